//! stdio in CRIU images: which pipe of the dumped sandbox gets which new pipe (D12).
//!
//! runc writes the targets of init's descriptors 0–2 to `descriptors.json` and gives CRIU an
//! `inherit-fd` for every entry that contains `pipe:`, the entry's index being the number under
//! which the new descriptor is open in `runc restore`. It does so for any index, so pipes of
//! execs can be taken up in the same way, by a `descriptors.json` with more entries than three.
//! Such a file belongs to one restore: it lives in a directory of its own beside hard links to
//! the images.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// runc's file.
const DESCRIPTORS: &str = "descriptors.json";
/// crab's file beside it. CRIU ignores what it doesn't know.
const STREAMS: &str = "crab-streams.json";
/// CRIU's image of what else there is.
const INVENTORY: &str = "inventory.img";
/// CRIU's image of the clocks' offsets.
const TIME_NAMESPACE: &str = "timens-0.img";
/// Neither file is ever large; a hostile one is not read to its end.
const MAX_FILE: u64 = 16 << 20;
/// Numbers below this belong to the runtime.
const FIRST_FD: i32 = 40;

/// One pipe between the sandbox and the shim, at the time of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The exec it belonged to; empty for init.
    pub exec_id: String,
    /// 0, 1 or 2.
    pub fd: u8,
    /// As in `pipe:[inode]`.
    pub inode: u64,
    /// The client's end, as in the task API.
    pub target: String,
    /// What the process had not read of its stdin yet, in base 16.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub pending: String,
}

/// The streams of a dump, as saved.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Streams {
    version: u32,
    /// The boot during which the dump was made.
    #[serde(default)]
    boot_id: String,
    /// Whether a TCP connection leads out of the sandbox; none if nobody has looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    outside_tcp: Option<bool>,
    streams: Vec<Stream>,
}

/// Why stdio cannot be taken up again.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}", path.display())]
pub struct DescriptorsError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn at<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DescriptorsError + 'a {
    move |source| DescriptorsError {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Saves the streams beside the images, and whether a TCP connection leads out of the sandbox.
pub fn save(image: &Path, streams: &[Stream], outside_tcp: bool) -> Result<(), DescriptorsError> {
    let path = image.join(STREAMS);
    let file = Streams {
        version: 1,
        boot_id: boot_id(),
        outside_tcp: Some(outside_tcp),
        streams: streams.to_vec(),
    };
    serde_json::to_vec(&file)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(&path, bytes))
        .map_err(at("cannot write", &path))
}

fn boot_id() -> String {
    // Without it no dump counts as one of this boot, which is the safe side.
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Whether crab made these images since the machine was booted.
pub fn of_this_boot(image: &Path) -> bool {
    let boot = boot_id();
    load_file(image).is_ok_and(|file| !boot.is_empty() && file.boot_id == boot)
}

/// Whether no TCP connection of the dump leads out of the sandbox. Then none has a peer that has
/// moved on, and all of them can be taken up: CRIU closes either all or none.
pub fn has_no_outside_tcp(image: &Path) -> bool {
    load_file(image).is_ok_and(|file| file.outside_tcp == Some(false))
}

/// The streams of a dump; none if another shim has made it.
pub fn load(image: &Path) -> Result<Vec<Stream>, DescriptorsError> {
    load_file(image).map(|file| file.streams)
}

fn load_file(image: &Path) -> Result<Streams, DescriptorsError> {
    let path = image.join(STREAMS);
    let bytes = match read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Streams::default()),
        read => read.map_err(at("cannot read", &path))?,
    };
    let file: Streams = serde_json::from_slice(&bytes)
        .map_err(io::Error::from)
        .map_err(at("cannot understand", &path))?;
    if file.version != 1 {
        let why = format!("version {} is newer than this crab", file.version);
        return Err(at("cannot use", &path)(io::Error::other(why)));
    }
    Ok(file)
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let size = fs::metadata(path)?.len();
    if size > MAX_FILE {
        return Err(io::Error::other(format!("{size} bytes are too many")));
    }
    fs::read(path)
}

/// A directory from which one restore may read. Removed when dropped.
pub struct RestoreImage {
    dir: tempfile::TempDir,
    fds: Vec<OwnedFd>,
}

impl RestoreImage {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Descriptors that the runtime must inherit under the numbers that they have; once.
    pub fn take_fds(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.fds)
    }
}

/// Makes a directory from which one restore may read: every image, and a `descriptors.json` that
/// names `extra` pipes by inode.
///
/// The directory is made in the first of `places` that can be written, under a hidden name. The
/// images in it are hard links, or copies where that is another file system. Symbolic links would
/// not do: CRIU opens images from inside the restored mount namespace, where they lead nowhere.
///
/// `same_boot` leaves out the time namespace. CRIU would make one for the restored tasks, which
/// later execs are not in; what an exec leaves running could then be dumped, and never restored
/// ("Can't restore sub-task in NS"). The monotonic clock goes on while the sandbox is dead, then.
/// After another boot it would run backwards, so there the namespace stays.
pub fn prepare_restore(
    image: &Path,
    places: &[&Path],
    extra: Vec<(u64, OwnedFd)>,
    same_boot: bool,
) -> Result<RestoreImage, DescriptorsError> {
    let inventory = image.join(INVENTORY);
    if !inventory.exists() {
        let why = io::Error::other("it has no such file");
        return Err(at("not a checkpoint of CRIU: cannot read", &inventory)(why));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".tmp-restore-");
    let mut made = Err(at("no place to prepare", image)(io::Error::other(
        "none named",
    )));
    for place in places {
        made = builder
            .tempdir_in(place)
            .map_err(at("cannot make a directory in", place));
        if made.is_ok() {
            break;
        }
    }
    let dir = made?;
    let entries = fs::read_dir(image).map_err(at("cannot list the images in", image))?;
    for entry in entries {
        let entry = entry.map_err(at("cannot list the images in", image))?;
        let kind = entry
            .file_type()
            .map_err(at("cannot list the images in", image))?;
        let name = entry.file_name();
        if name == DESCRIPTORS || kind.is_dir() || (same_boot && name == TIME_NAMESPACE) {
            continue;
        }
        let (from, to) = (entry.path(), dir.path().join(entry.file_name()));
        if kind.is_symlink() {
            // The `parent` of an incremental dump, relative to where it is now.
            let target = fs::canonicalize(&from).map_err(at("cannot follow", &from))?;
            symlink(target, &to).map_err(at("cannot link", &from))?;
        } else if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).map_err(at("cannot copy", &from))?;
        }
    }
    let path = image.join(DESCRIPTORS);
    let bytes = read(&path).map_err(at("not a checkpoint: cannot read", &path))?;
    let mut names: Vec<String> = serde_json::from_slice(&bytes)
        .map_err(io::Error::from)
        .map_err(at("not a checkpoint: cannot understand", &path))?;
    names.truncate(3);
    let mut fds = Vec::new();
    for (inode, fd) in extra {
        let fd = numbered_from(&fd, FIRST_FD).map_err(at("cannot pass a pipe to", image))?;
        let index = fd.as_raw_fd() as usize;
        if names.len() <= index {
            names.resize(index + 1, String::new());
        }
        names[index] = format!("pipe:[{inode}]");
        fds.push(fd);
    }
    let path = dir.path().join(DESCRIPTORS);
    serde_json::to_vec(&names)
        .map_err(io::Error::from)
        .and_then(|bytes| fs::write(&path, bytes))
        .map_err(at("cannot write", &path))?;
    Ok(RestoreImage { dir, fds })
}

/// A copy of a descriptor whose number is at least `min`.
fn numbered_from(fd: &OwnedFd, min: i32) -> io::Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, min).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_named_at_the_index_of_its_descriptor() {
        let image = tempfile::tempdir().unwrap();
        fs::write(image.path().join(DESCRIPTORS), r#"["a","pipe:[7]","c"]"#).unwrap();
        fs::write(image.path().join("pages-1.img"), "x").unwrap();
        fs::write(image.path().join(TIME_NAMESPACE), "x").unwrap();
        fs::write(image.path().join(INVENTORY), "x").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (_, end) = io::pipe().unwrap();
        let mut made =
            prepare_restore(image.path(), &[dir.path()], vec![(99, end.into())], true).unwrap();
        let (dir, fds) = (made.path().to_owned(), made.take_fds());
        let names: Vec<String> =
            serde_json::from_slice(&fs::read(dir.join(DESCRIPTORS)).unwrap()).unwrap();
        assert_eq!(names[1], "pipe:[7]");
        assert_eq!(names[fds[0].as_raw_fd() as usize], "pipe:[99]");
        assert!(fds[0].as_raw_fd() >= FIRST_FD);
        assert_eq!(fs::read(dir.join("pages-1.img")).unwrap(), b"x");
        assert!(!dir.join(TIME_NAMESPACE).exists());
        // The image itself is as it was.
        assert_eq!(
            fs::read(image.path().join(DESCRIPTORS)).unwrap(),
            br#"["a","pipe:[7]","c"]"#
        );
        drop(made);
        assert!(!dir.exists());
    }

    #[test]
    fn a_directory_that_is_no_checkpoint_is_refused_by_name() {
        let image = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = prepare_restore(image.path(), &[dir.path()], Vec::new(), false)
            .err()
            .unwrap();
        assert!(error.to_string().contains("not a checkpoint"), "{error}");
    }

    #[test]
    fn streams_of_a_newer_version_are_refused() {
        let image = tempfile::tempdir().unwrap();
        assert_eq!(load(image.path()).unwrap(), Vec::new());
        fs::write(image.path().join(STREAMS), r#"{"version":2,"streams":[]}"#).unwrap();
        assert!(
            load(image.path())
                .unwrap_err()
                .to_string()
                .contains("newer")
        );
    }
}
