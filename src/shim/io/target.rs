//! The client's end of a stream: from the task API's string to an open descriptor.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStringExt,
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{IoError, Stream, sink::Sink};

/// How long a client is given to open its end of a FIFO. containerd's does it in the background while it asks for
/// the process, and gives it up if the process has ended by then, with all that it wrote. Go's shim waits for it
/// without end; a client that never reads is none of crab's business.
const READER_LIMIT: Duration = Duration::from_secs(1);

/// A parsed target.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Nowhere,
    Fifo(PathBuf),
    File(PathBuf),
    Binary(LoggerUri),
}

/// `binary:///path?key=value&…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoggerUri {
    pub(super) path: PathBuf,
    pub(super) args: Vec<OsString>,
    /// `binary-v2`: only a byte says "ready"; the end of the ready pipe alone says "died".
    pub(super) strict_ready: bool,
}

impl Target {
    pub(super) fn parse(stream: Stream, uri: &str) -> Result<Self, IoError> {
        let refuse = |reason| IoError::Target {
            stream,
            uri: uri.to_owned(),
            reason,
        };
        if uri.is_empty() {
            return Ok(Self::Nowhere);
        }
        let Some((scheme, rest)) = uri.split_once("://") else {
            return match uri.starts_with('/') {
                true => Ok(Self::Fifo(PathBuf::from(uri))),
                false => Err(refuse(
                    "not an absolute path, nor fifo://, file:// or binary://",
                )),
            };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        if !path.starts_with('/') {
            return Err(refuse("the path must be absolute, as in file:///var/log/x"));
        }
        match scheme {
            "fifo" => Ok(Self::Fifo(PathBuf::from(rest))),
            _ if stream == Stream::Stdin => Err(refuse("stdin can only come from a FIFO")),
            "file" => Ok(Self::File(decode(path, false).into())),
            "binary" | "binary-v2" => Ok(Self::Binary(LoggerUri {
                path: decode(path, false).into(),
                args: query_args(query),
                strict_ready: scheme == "binary-v2",
            })),
            _ => Err(refuse("unknown scheme: use fifo, file or binary")),
        }
    }
}

/// The logger's arguments as Go's shim makes them: each key, then its first value, which is an
/// empty argument when there is none. (Go's order is random; this is the URI's.)
fn query_args(query: &str) -> Vec<OsString> {
    let mut seen = Vec::new();
    let mut args = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = decode(key, true);
        if !seen.contains(&key) {
            args.extend([key.clone(), decode(value, true)]);
            seen.push(key);
        }
    }
    args
}

fn decode(text: &str, plus_is_space: bool) -> OsString {
    let hex = |byte: Option<&u8>| byte.and_then(|&b| char::from(b).to_digit(16));
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match (byte, hex(bytes.get(at)), hex(bytes.get(at + 1))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 2;
            }
            (b'+', _, _) if plus_is_space => out.push(b' '),
            _ => out.push(byte),
        }
    }
    OsString::from_vec(out)
}

/// Opens the client's end of an output stream. `/dev/null` is nowhere.
pub(super) fn open_output(stream: Stream, target: &Target) -> Result<Option<Sink>, IoError> {
    match target {
        Target::Nowhere | Target::Binary(_) => Ok(None),
        Target::File(path) => append_to(path)
            .map(|file| Some(Sink::file(file, label(stream, path))))
            .map_err(named(stream, path)),
        Target::Fifo(path) => open_fifo_or_file(stream, path).map_err(named(stream, path)),
    }
}

fn named(stream: Stream, path: &Path) -> impl FnOnce(io::Error) -> IoError {
    let path = path.to_owned();
    move |source| IoError::Open {
        stream,
        path,
        source,
    }
}

fn label(stream: Stream, path: &Path) -> String {
    format!("{stream} {}", path.display())
}

fn append_to(path: &Path) -> io::Result<OwnedFd> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)?;
    Ok(file.into())
}

/// A plain path is a FIFO by rule; Go's shim appends to it when it turns out to be a file.
fn open_fifo_or_file(stream: Stream, path: &Path) -> io::Result<Option<Sink>> {
    let handle = look(path)?;
    let kind = handle.metadata()?;
    if kind.file_type().is_fifo() {
        // A reader of our own would hide that there is none of the client's: it comes after the writer. The writer
        // stays, since a client whose FIFO has no writer left takes that for the end.
        let writer = once_read(&handle)?;
        let keepalive = reopen(&handle, libc::O_RDONLY | libc::O_NONBLOCK)?;
        let writer =
            writer.map_or_else(|| reopen(&handle, libc::O_WRONLY | libc::O_NONBLOCK), Ok)?;
        return Ok(Some(Sink::fifo(keepalive, writer, label(stream, path))));
    }
    if kind.file_type().is_file() {
        let file = reopen(&handle, libc::O_WRONLY | libc::O_APPEND)?;
        return Ok(Some(Sink::file(file, label(stream, path))));
    }
    if is_dev_null(&kind) {
        return Ok(None);
    }
    Err(io::Error::other("neither a FIFO nor a regular file"))
}

/// Opens a FIFO to write to once somebody has opened it to read; None: nobody has for [`READER_LIMIT`].
fn once_read(fifo: &File) -> io::Result<Option<OwnedFd>> {
    let deadline = Instant::now() + READER_LIMIT;
    let mut pause = Duration::from_micros(200);
    loop {
        match reopen(fifo, libc::O_WRONLY | libc::O_NONBLOCK) {
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => {}
            opened => return opened.map(Some),
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// The client's end of stdin.
pub(super) struct Input {
    pub(super) reader: OwnedFd,
    /// A writer of our own: clients may leave and come back until CloseIO drops it.
    pub(super) keepalive: OwnedFd,
}

/// Opens the client's end of stdin; None: there is no input.
pub(super) fn open_input(uri: &str) -> Result<Option<Input>, IoError> {
    let stream = Stream::Stdin;
    let Target::Fifo(path) = Target::parse(stream, uri)? else {
        return Ok(None);
    };
    let open = || {
        let handle = look(&path)?;
        let kind = handle.metadata()?;
        if is_dev_null(&kind) {
            return Ok(None);
        }
        if !kind.file_type().is_fifo() {
            return Err(io::Error::other("not a FIFO"));
        }
        let reader = reopen(&handle, libc::O_RDONLY | libc::O_NONBLOCK)?;
        let keepalive = reopen(&handle, libc::O_WRONLY | libc::O_NONBLOCK)?;
        Ok(Some(Input { reader, keepalive }))
    };
    open().map_err(named(stream, &path))
}

/// A handle that can be examined before anything is opened for real.
fn look(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
}

fn reopen(handle: &File, flags: i32) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let flags = nix::fcntl::OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    Ok(nix::fcntl::open(
        path.as_str(),
        flags,
        nix::sys::stat::Mode::empty(),
    )?)
}

fn is_dev_null(kind: &std::fs::Metadata) -> bool {
    kind.file_type().is_char_device() && kind.rdev() == nix::sys::stat::makedev(1, 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logger(path: &str, args: &[&str], strict_ready: bool) -> Target {
        Target::Binary(LoggerUri {
            path: path.into(),
            args: args.iter().map(OsString::from).collect(),
            strict_ready,
        })
    }

    #[test]
    fn targets_are_understood_as_go_understands_them() {
        for (uri, expected) in [
            ("", Target::Nowhere),
            ("/run/a b", Target::Fifo("/run/a b".into())),
            ("fifo:///run/x", Target::Fifo("/run/x".into())),
            (
                "file:///var/log/a%20b?x=y",
                Target::File("/var/log/a b".into()),
            ),
            ("binary:///bin/l", logger("/bin/l", &[], false)),
            (
                "binary:///bin/l?_A=%2Fvar%2Flib&k2&_A=again&c=d+e",
                logger("/bin/l", &["_A", "/var/lib", "k2", "", "c", "d e"], false),
            ),
            ("binary-v2:///bin/l", logger("/bin/l", &[], true)),
        ] {
            let parsed = Target::parse(Stream::Stdout, uri).unwrap();
            assert_eq!(parsed, expected, "{uri}");
        }
    }

    #[test]
    fn a_wrong_target_is_named_with_its_stream() {
        for (stream, uri) in [
            (Stream::Stdout, "relative"),
            (Stream::Stdout, "file://relative"),
            (Stream::Stderr, "tcp:///x"),
            (Stream::Stdin, "file:///x"),
        ] {
            let error = Target::parse(stream, uri).unwrap_err().to_string();
            assert!(
                error.contains(uri) && error.contains(&stream.to_string()),
                "{error}"
            );
        }
        let error = open_input("/no/such/fifo").err().unwrap().to_string();
        assert!(
            error.contains("stdin") && error.contains("/no/such/fifo"),
            "{error}"
        );
    }
}
