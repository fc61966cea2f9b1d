//! Which paths of its root file system the processes of a sandbox stand upon (D7a).
//!
//! An image names its files by path, and a restore opens them again: what a process had open, mapped,
//! executed, bound or entered must be what it was when the image was made, while all other files may be
//! newer.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::PathBuf,
};

use rustix::fs::{AtFlags, StatxFlags, statx};

use super::{
    descriptors::MAX_DESCRIPTORS,
    proc_fs::{Dir, ProcessError, duplicate, pidfd},
    queues,
    snapshot::MAX_TASKS,
    tasks::Stat,
};

/// Paths of one sandbox.
const MAX_REFERENCES: usize = 32 << 10;
/// Bytes of all of them together: each checkpoint names them.
const MAX_BYTES: usize = 4 << 20;
/// The kernel's ioctl that opens what a unix socket is bound to (`include/uapi/linux/un.h`).
const SIOCUNIXFILE: libc::c_ulong = 0x8900 + 0xe0;
const DELETED: &[u8] = b" (deleted)";

/// The paths that the processes `pids` refer to, relative to the sandbox's root, each with type and
/// permission bits if it is a directory that one of them has entered or opened. While they stand still.
///
/// # Errors
/// If not all of them can be told: then every file counts as one.
pub fn references(pids: &[i32]) -> Result<BTreeMap<PathBuf, Option<u32>>, ProcessError> {
    let mut all = References::default();
    let mut namespace = None;
    for pid in pids {
        let dir = Dir::open(*pid)?;
        if is_dead(&dir)? {
            continue;
        }
        let own = dir.link("ns/mnt")?;
        let first = namespace.get_or_insert_with(|| own.clone());
        if *first != own {
            return Err(unknown(&dir, "ns/mnt", "it has mounts of its own"));
        }
        all.process(&dir)?;
    }
    Ok(all.paths)
}

/// Whether it is a zombie, which has neither memory nor files.
fn is_dead(dir: &Dir) -> Result<bool, ProcessError> {
    let stat = Stat::parse(&dir.text("stat")?).ok_or_else(|| dir.unexpected("stat"))?;
    if stat.state != b'Z' {
        return Ok(false);
    }
    match dir.numbers("task", "threads", MAX_TASKS)?.len() {
        0 | 1 => Ok(true),
        _ => Err(unknown(dir, "fd", "its first thread has ended")),
    }
}

fn unknown(dir: &Dir, file: &str, why: &str) -> ProcessError {
    dir.failed(file, io::Error::other(why))
}

#[derive(Default)]
struct References {
    paths: BTreeMap<PathBuf, Option<u32>>,
    bytes: usize,
    /// The root file system's device as the kernel prints it, once it is known.
    device: Option<String>,
}

impl References {
    fn process(&mut self, dir: &Dir) -> Result<(), ProcessError> {
        if self.device.is_none() {
            let text = dir.read("mountinfo")?;
            let device = only_root(&text).map_err(|why| unknown(dir, "mountinfo", why))?;
            self.device = Some(device);
        }
        for file in ["exe", "cwd", "root"] {
            let mode = directory_mode(dir, file);
            self.add(dir.link_bytes(file)?, mode)?;
        }
        for name in mapped(&dir.read("maps")?) {
            // A newline in a name is shown as `\\012`, and so is that text.
            if let Some(other) = with_newlines(name) {
                self.add(other, None)?;
            }
            self.add(name.to_vec(), None)?;
        }
        let mut handle = None;
        for fd in dir.numbers("fd", "descriptors", MAX_DESCRIPTORS)? {
            self.descriptor(dir, fd, &mut handle)?;
        }
        Ok(())
    }

    fn descriptor(
        &mut self,
        dir: &Dir,
        fd: i32,
        handle: &mut Option<OwnedFd>,
    ) -> Result<(), ProcessError> {
        let file = format!("fd/{fd}");
        let target = dir.link_bytes(&file)?;
        if target.starts_with(b"/") {
            let mode = directory_mode(dir, &file);
            return self.add(target, mode);
        }
        if target.starts_with(b"socket:[") {
            let handle = match handle {
                Some(handle) => handle,
                None => handle.insert(pidfd(dir.pid)?),
            };
            let socket = duplicate(dir.pid, handle, fd)?;
            if let Some(path) = bound_path(&socket).map_err(|e| dir.failed(&file, e))? {
                self.add(path, None)?;
            }
        }
        if target.starts_with(b"anon_inode:") && is_watch(&target) {
            let info = dir.text(&format!("fdinfo/{fd}"))?;
            if self.watches_layer(&info) {
                return Err(unknown(
                    dir,
                    &file,
                    "it watches files, whose paths nobody tells",
                ));
            }
        }
        Ok(())
    }

    /// Whether an inotify or fanotify instance watches something of the root file system.
    fn watches_layer(&self, fdinfo: &str) -> bool {
        let device = format!("sdev:{}", self.device.as_deref().unwrap_or_default());
        let watched = |line: &str| line.split(' ').any(|word| word == device);
        fdinfo
            .lines()
            .any(|line| line.starts_with("fanotify ") || watched(line))
    }

    fn add(&mut self, path: Vec<u8>, mode: Option<u32>) -> Result<(), ProcessError> {
        // A deleted one belongs to the processes. Its path may be taken for a moment by a restore, and
        // a name may end so.
        if let Some(without) = path.strip_suffix(DELETED) {
            let without = without.to_vec();
            self.insert(without, None)?;
        }
        self.insert(path, mode)
    }

    fn insert(&mut self, path: Vec<u8>, mode: Option<u32>) -> Result<(), ProcessError> {
        let Some(relative) = path.strip_prefix(b"/") else {
            return Ok(());
        };
        let length = relative.len();
        let path = PathBuf::from(OsString::from_vec(relative.to_vec()));
        if let Some(known) = self.paths.get_mut(&path) {
            *known = known.or(mode);
            return Ok(());
        }
        self.bytes += length;
        self.paths.insert(path, mode);
        let limit = |what, limit| Err(ProcessError::Limit { what, limit });
        match () {
            () if self.paths.len() > MAX_REFERENCES => limit("files in use", MAX_REFERENCES),
            () if self.bytes > MAX_BYTES => limit("bytes of paths in use", MAX_BYTES),
            () => Ok(()),
        }
    }
}

/// The device of the file system at `/`, in the kernel's own numbers and in hexadecimal, if nothing of
/// it is mounted at another place: then the path that a process sees is the path in the layer.
fn only_root(mountinfo: &[u8]) -> Result<String, &'static str> {
    let mounts: Vec<[&[u8]; 3]> = mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let mut words = line.split(|byte| *byte == b' ').skip(2);
            Some([words.next()?, words.next()?, words.next()?])
        })
        .collect();
    let root = mounts.iter().rev().find(|[_, _, place]| *place == b"/");
    let [device, ..] = root.ok_or("nothing is mounted at /")?;
    let elsewhere = |[other, root, place]: &[&[u8]; 3]| other == device && root != place;
    if mounts.iter().any(elsewhere) {
        return Err("a part of the root file system is mounted at another place");
    }
    let number = |text: &str| {
        let (major, minor) = text.split_once(':')?;
        let (major, minor): (u64, u64) = (major.parse().ok()?, minor.parse().ok()?);
        Some(format!("{:x}", major << 20 | minor))
    };
    let text = str::from_utf8(device).ok().and_then(number);
    text.ok_or("a device that is no number")
}

/// Type and permission bits behind a link of /proc if it leads to a directory. A server in the sandbox
/// is not asked.
fn directory_mode(dir: &Dir, file: &str) -> Option<u32> {
    let asked = StatxFlags::TYPE | StatxFlags::MODE;
    let stat = statx(dir.as_fd(), file, AtFlags::STATX_DONT_SYNC, asked).ok()?;
    let mode = u32::from(stat.stx_mode);
    (mode & libc::S_IFMT == libc::S_IFDIR).then_some(mode)
}

/// Names of mapped files in the text of /proc/PID/maps, each once in a row.
fn mapped(maps: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut last: &[u8] = b"";
    let name = |line: &[u8]| -> Option<usize> {
        // Five fields, then the name behind any number of spaces.
        let mut at = 0;
        for _ in 0..5 {
            at += line.get(at..)?.iter().position(|byte| *byte == b' ')? + 1;
        }
        Some(at + line.get(at..)?.iter().position(|byte| *byte != b' ')?)
    };
    maps.split(|byte| *byte == b'\n').filter_map(move |line| {
        let found = line.get(name(line)?..)?;
        let is_new = found != last;
        last = found;
        (is_new && found.starts_with(b"/")).then_some(found)
    })
}

fn with_newlines(name: &[u8]) -> Option<Vec<u8>> {
    const SHOWN: &[u8] = b"\\012";
    let mut plain = Vec::new();
    let mut rest = name;
    while let Some(at) = rest.windows(SHOWN.len()).position(|part| part == SHOWN) {
        plain.extend_from_slice(&rest[..at]);
        plain.push(b'\n');
        rest = &rest[at + SHOWN.len()..];
    }
    plain.extend_from_slice(rest);
    (plain != name).then_some(plain)
}

fn is_watch(target: &[u8]) -> bool {
    let name = target.strip_prefix(b"anon_inode:").unwrap_or(target);
    [&b"inotify"[..], b"[fanotify]", b"[inotify]", b"fanotify"].contains(&name)
}

/// The path that a unix socket is bound to, as it is now. None of any other socket.
fn bound_path(socket: &OwnedFd) -> io::Result<Option<Vec<u8>>> {
    // Others understand the same number in other ways.
    if !queues::is_unix(socket) {
        return Ok(None);
    }
    // SAFETY: the request takes no argument; what it returns is a descriptor of ours, or an error.
    let file = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE) };
    if file < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            // Not bound to a file.
            Some(libc::ENOENT) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: the kernel has just made it for us alone.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(Some(path.into_bytes()))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::{ffi::OsStrExt, net::UnixListener},
        path::Path,
        process::Command,
    };

    use super::*;
    use crate::test_child::TestChild;

    struct Holder(TestChild);

    impl Holder {
        /// A process in `dir` that holds these as its first three descriptors.
        fn of(dir: &Path, fds: [OwnedFd; 3]) -> Self {
            let [stdin, stdout, stderr] = fds;
            let mut command = Command::new("sleep");
            command.arg("1000").current_dir(dir);
            command.stdin(stdin).stdout(stdout).stderr(stderr);
            Self(TestChild::asleep_as(command))
        }

        fn told(&self) -> BTreeMap<PathBuf, Option<u32>> {
            let mut all = References {
                device: Some("0".into()),
                ..Default::default()
            };
            let dir = Dir::open(self.0.pid()).unwrap();
            all.process(&dir).unwrap();
            all.paths
        }
    }

    fn relative(path: &Path) -> PathBuf {
        path.strip_prefix("/").unwrap().to_owned()
    }

    #[test]
    fn whatever_a_process_holds_by_path_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let open = File::create(at("open")).unwrap();
        fs::create_dir(at("sub")).unwrap();
        let sub = File::open(at("sub")).unwrap();
        let bound = UnixListener::bind(at("bound")).unwrap();
        let first = Holder::of(&at("sub"), [open.into(), sub.into(), bound.into()]);
        fs::rename(at("bound"), at("moved")).unwrap();
        let gone = File::create(at("gone")).unwrap();
        fs::remove_file(at("gone")).unwrap();
        let odd = at("odd \n\\012 (deleted)");
        let odd_file = File::create(&odd).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let second = Holder::of(dir.path(), [gone.into(), odd_file.into(), tcp.into()]);

        let found = first.told();
        let program = fs::read_link(format!("/proc/{}/exe", first.0.pid())).unwrap();
        for path in [at("open"), at("sub"), at("moved"), program] {
            assert!(found.contains_key(&relative(&path)), "{path:?}");
        }
        assert!(found.contains_key(Path::new("")), "the root");
        let mode = found[&relative(&at("sub"))].unwrap();
        assert_eq!(mode & libc::S_IFMT, libc::S_IFDIR);
        assert_eq!(found[&relative(&at("open"))], None);
        // Libraries, or the loader.
        assert!(
            found
                .keys()
                .any(|path| path.to_string_lossy().contains(".so"))
        );

        let found = second.told();
        for path in [at("gone"), odd, dir.path().to_owned()] {
            assert!(found.contains_key(&relative(&path)), "{path:?}");
        }
    }

    #[test]
    fn names_in_a_list_of_mappings_are_told_whatever_they_contain() {
        let maps = b"7f00-8f00 r--p 00000000 08:01 5                  /lib/a b\n\
            8f00-9f00 r-xp 00000000 08:01 5                  /lib/a b\n\
            9f00-af00 rw-p 00000000 00:00 0 \n\
            af00-bf00 rw-p 00000000 00:00 0                  [heap]\n\
            bf00-cf00 r--p 00000000 08:01 6                  /a\\012b\xff (deleted)\n";
        let names: Vec<&[u8]> = mapped(maps).collect();
        assert_eq!(names, [&b"/lib/a b"[..], b"/a\\012b\xff (deleted)"]);
        assert_eq!(with_newlines(names[1]).unwrap(), b"/a\nb\xff (deleted)");
        assert_eq!(with_newlines(names[0]), None);
        let mut all = References::default();
        for name in names {
            all.add(name.to_vec(), None).unwrap();
        }
        let paths: Vec<&[u8]> = all.paths.keys().map(|p| p.as_os_str().as_bytes()).collect();
        assert_eq!(
            paths,
            [&b"a\\012b\xff"[..], b"a\\012b\xff (deleted)", b"lib/a b"]
        );
    }

    #[test]
    fn a_layer_that_shows_at_two_places_is_not_told_apart() {
        let line = |device: &str, root: &str, place: &str| {
            format!("1 2 {device} {root} {place} rw - overlay overlay rw\n")
        };
        let root = line("0:300", "/", "/");
        let tmpfs = line("0:5", "/", "/dev");
        let both = format!("{root}{tmpfs}");
        assert_eq!(only_root(both.as_bytes()), Ok(format!("{:x}", 300)));
        // Read-only over itself.
        let same = line("0:300", "/etc", "/etc");
        assert!(only_root(format!("{both}{same}").as_bytes()).is_ok());
        let other = line("0:300", "/etc", "/mnt");
        assert!(only_root(format!("{both}{other}").as_bytes()).is_err());
        assert!(only_root(tmpfs.as_bytes()).is_err());
        assert!(only_root(b"").is_err());
    }

    #[test]
    fn more_than_is_kept_is_an_error_and_twice_the_same_is_once() {
        let mut all = References::default();
        for _ in 0..2 {
            for number in 0..MAX_REFERENCES {
                all.add(format!("/{number}").into_bytes(), None).unwrap();
            }
        }
        let error = all.add(b"/one more".to_vec(), None).unwrap_err();
        assert!(error.to_string().contains("files in use"), "{error}");
        let mut all = References::default();
        let long = |number: usize| [format!("/{number}").into_bytes(), vec![b'x'; 4000]].concat();
        let error = (0..MAX_REFERENCES).find_map(|n| all.add(long(n), None).err());
        assert!(error.unwrap().to_string().contains("bytes of paths"));
    }

    #[test]
    fn watches_of_the_layer_are_told_from_others() {
        let all = References {
            device: Some("12c".into()),
            ..Default::default()
        };
        let watch =
            |sdev: &str| format!("pos: 0\ninotify wd:1 ino:9e7e sdev:{sdev} mask:100 f:0\n");
        assert!(all.watches_layer(&watch("12c")));
        assert!(!all.watches_layer(&watch("12")));
        assert!(all.watches_layer("fanotify flags:10 event-flags:0\n"));
        assert!(is_watch(b"anon_inode:inotify") && !is_watch(b"anon_inode:[eventpoll]"));
    }
}
