//! The facts that the rules need, from `/proc` of frozen processes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, StatxFlags, statx},
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use super::{
    sockets::{self, Socket},
    watches::{self, Watched},
};
use crate::tree::open_within;

/// So many descriptors and mappings of files are looked at in all: a sandbox chooses their number.
const MAX_LOOKED_AT: usize = 100_000;
/// Of so many watched files the path is looked for.
const MAX_WATCHES: usize = 10_000;
/// More of a file of /proc than this is not read.
const MAX_TEXT: u64 = 32 << 20;
/// Bytes of a name that are shown.
const SHOWN: usize = 200;

/// Why the facts are not known.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file of /proc could not be read.
    #[error("cannot read {path:?}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is more than crab looks at.
    #[error("its processes have more than {MAX_LOOKED_AT} open and mapped files")]
    TooMany,
}

/// The processes of a sandbox that stands still.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// All of them, init first.
    pub processes: Vec<Process>,
    /// What its network has as local IPv4 addresses: address and length of the prefix.
    pub addresses: Vec<(Ipv4Addr, u8)>,
    /// The names of POSIX message queues.
    pub queues: Vec<String>,
}

/// One of its processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Its pid on the host.
    pub host_pid: i32,
    /// Its pid in the sandbox.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// Whether it is the sandbox's init, whose terminal the shim holds.
    pub is_init: bool,
    /// The file that it executes.
    pub program: Option<Kind>,
    /// Host pid of whoever traces it; 0 for nobody.
    pub tracer: i32,
    /// Whether it is in a user namespace that it has made itself.
    pub own_users: bool,
    /// What it has open.
    pub descriptors: Vec<Descriptor>,
    /// What it has mapped, or stands in, and what the rules want to know.
    pub others: Vec<Kind>,
}

/// One open file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// What it is.
    pub kind: Kind,
}

/// What something open, mapped or executed is, as far as the rules care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Nothing that matters here.
    Plain,
    /// A file whose name is gone, and how many names it still has elsewhere. In an overlay a file
    /// of a lower layer still has those it has there.
    Deleted {
        /// The name it had.
        path: String,
        /// How many it has.
        links: u32,
    },
    /// A file on which it holds POSIX locks and which it has mapped.
    LockedAndMapped(String),
    /// A file in memory that has no name at all.
    Memory(String),
    /// One end of a pseudoterminal.
    Terminal {
        /// Whether it is the master.
        is_master: bool,
        /// Its number.
        index: u32,
    },
    /// A socket.
    Socket(Socket),
    /// A POSIX message queue.
    Queue(String),
    /// inotify, and what of an overlay it watches.
    Watches(Vec<Watched>),
    /// What the kernel has no file for: `io_uring`, `eventfd`, …
    Anonymous(String),
    /// A file of a mount that the sandbox does not see.
    Outside(String),
}

/// The mounts that the processes see.
#[derive(Default)]
struct Mounts {
    namespaces: BTreeSet<PathBuf>,
    ids: BTreeSet<u64>,
    queues: BTreeMap<(u32, u32), String>,
}

impl Snapshot {
    /// Reads all of it. `procs`: host pids of the frozen processes.
    ///
    /// # Errors
    /// When /proc cannot be read, or there is more than crab looks at.
    pub fn read(procs: &BTreeSet<i32>, init: i32) -> Result<Self, SnapshotError> {
        let mut mounts = Mounts::default();
        for pid in procs {
            mounts.add(*pid)?;
        }
        let users = namespace(init, "user");
        let mut left = MAX_LOOKED_AT;
        let mut found = Self::default();
        for pid in procs {
            let mut process = match read_process(*pid, &mounts, &mut left) {
                // Killed meanwhile; whoever counts them afterwards will see that.
                Err(SnapshotError::Io { source, .. }) if is_absent(&source) => continue,
                process => process?,
            };
            process.is_init = *pid == init;
            process.own_users = namespace(*pid, "user") != users;
            found.processes.push(process);
        }
        found.processes.sort_by_key(|process| process.pid);
        found.addresses = sockets::local_addresses(&optional_text(init, "net/fib_trie")?);
        found.queues = mounts.queues_of(init);
        Ok(found)
    }

    /// The watched files of the overlay with these layers, the writable one first, each once; the
    /// deepest first, since CRIU searches below each in turn. Those that cannot be found are left
    /// out: CRIU will say so. The layers are asked for only if there is one.
    pub fn watched_paths(&self, layers: impl FnOnce() -> Vec<PathBuf>) -> Vec<PathBuf> {
        let all = self.processes.iter().flat_map(|p| &p.descriptors);
        let watched = all.filter_map(|descriptor| match &descriptor.kind {
            Kind::Watches(watched) => Some(watched),
            _ => None,
        });
        let watched: Vec<_> = watched.flatten().take(MAX_WATCHES).collect();
        if watched.is_empty() {
            return Vec::new();
        }
        let layers = layers();
        let paths: BTreeSet<PathBuf> = watched
            .into_iter()
            .filter_map(|watched| watched.path(&layers))
            .collect();
        let mut paths: Vec<PathBuf> = paths.into_iter().collect();
        paths.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
        paths
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = &Socket> {
        let all = self.processes.iter().flat_map(|p| &p.descriptors);
        all.filter_map(|descriptor| match &descriptor.kind {
            Kind::Socket(socket) => Some(socket),
            _ => None,
        })
    }
}

fn proc(pid: i32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> SnapshotError + '_ {
    move |source| SnapshotError::Io {
        path: path.to_owned(),
        source,
    }
}

fn text(pid: i32, file: &str) -> Result<String, SnapshotError> {
    let path = proc(pid, file);
    let mut bytes = Vec::new();
    fs::File::open(&path)
        .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, MAX_TEXT), &mut bytes))
        .map_err(at(&path))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Empty where this kernel, or this process, has no such file.
fn optional_text(pid: i32, file: &str) -> Result<String, SnapshotError> {
    match text(pid, file) {
        Err(SnapshotError::Io { source, .. }) if is_absent(&source) => Ok(String::new()),
        text => text,
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ESRCH | libc::EINVAL)
    )
}

fn namespace(pid: i32, kind: &str) -> Option<PathBuf> {
    fs::read_link(proc(pid, &format!("ns/{kind}"))).ok()
}

impl Mounts {
    fn add(&mut self, pid: i32) -> Result<(), SnapshotError> {
        // A zombie has none.
        let Some(namespace) = namespace(pid, "mnt") else {
            return Ok(());
        };
        if !self.namespaces.insert(namespace) {
            return Ok(());
        }
        for line in optional_text(pid, "mountinfo")?.lines() {
            let mut words = line.split(' ');
            let id = words.next().and_then(|word| word.parse::<u64>().ok());
            let device = words.nth(1).and_then(device);
            let point = words.nth(1).unwrap_or_default();
            self.ids.extend(id);
            let kind = line.split_once(" - ").map(|(_, right)| right);
            if let Some(device) = device
                && kind.is_some_and(|kind| kind.starts_with("mqueue "))
            {
                self.queues.insert(device, point.to_owned());
            }
        }
        Ok(())
    }

    /// The names in the file systems of message queues.
    fn queues_of(&self, init: i32) -> Vec<String> {
        let mut names = Vec::new();
        for point in self.queues.values() {
            // One that init does not see has no names here; CRIU will say so.
            if let Ok(dir) = open_in_root(init, point) {
                names.extend(names_in(dir));
            }
        }
        names
    }
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A directory as the process `pid` sees it; no link of the sandbox leads out of its root.
fn open_in_root(pid: i32, path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, proc(pid, "root"), flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    open_within(root.as_fd(), path, flags, resolve)
}

fn names_in(dir: OwnedFd) -> Vec<String> {
    let mut buffer = Vec::with_capacity(8 << 10);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut names = Vec::new();
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name().to_string_lossy();
        if name != "." && name != ".." && names.len() < MAX_LOOKED_AT {
            names.push(name.into_owned());
        }
    }
    names
}

fn read_process(pid: i32, mounts: &Mounts, left: &mut usize) -> Result<Process, SnapshotError> {
    let status = text(pid, "status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).unwrap_or_default()
    };
    let last_number = |name| {
        let number = field(name).split_whitespace().last();
        number.and_then(|n| n.parse().ok()).unwrap_or_default()
    };
    let mut process = Process {
        host_pid: pid,
        pid: last_number("NSpid:"),
        name: field("Name:").to_owned(),
        tracer: last_number("TracerPid:"),
        ..Process::default()
    };
    if field("State:").starts_with('Z') {
        return Ok(process);
    }
    process.program = Some(look_at(pid, "exe", mounts)?);
    process.others.push(look_at(pid, "cwd", mounts)?);
    process.others.push(look_at(pid, "root", mounts)?);
    let maps = text(pid, "maps")?;
    process.others.extend(mapped(pid, &maps, mounts, left)?);
    process.descriptors = descriptors(pid, &maps, mounts, left)?;
    Ok(process)
}

fn descriptors(
    pid: i32,
    maps: &str,
    mounts: &Mounts,
    left: &mut usize,
) -> Result<Vec<Descriptor>, SnapshotError> {
    let dir = proc(pid, "fd");
    let mapped: BTreeSet<&str> = maps.lines().filter_map(mapped_path).collect();
    let mut found = Vec::new();
    let mut handle = None;
    for entry in fs::read_dir(&dir).map_err(at(&dir))? {
        let name = entry.map_err(at(&dir))?.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        *left = left.checked_sub(1).ok_or(SnapshotError::TooMany)?;
        let file = format!("fd/{fd}");
        let mut kind = look_at(pid, &file, mounts)?;
        match &mut kind {
            Kind::Plain => {
                let target = fs::read_link(proc(pid, &file)).unwrap_or_default();
                if let Some(path) = target.to_str().filter(|path| mapped.contains(path))
                    && has_posix_locks(&text(pid, &format!("fdinfo/{fd}"))?)
                {
                    kind = Kind::LockedAndMapped(shortened(path));
                }
            }
            Kind::Socket(socket) => *socket = sockets::look_at(&duplicate(pid, fd, &mut handle)?),
            Kind::Terminal {
                is_master: true,
                index,
            } => *index = master_index(&text(pid, &format!("fdinfo/{fd}"))?),
            Kind::Watches(watched) => {
                *watched = watches::parse(&text(pid, &format!("fdinfo/{fd}"))?);
            }
            _ => {}
        }
        found.push(Descriptor { fd, kind });
    }
    Ok(found)
}

/// Our own copy of a process's descriptor. `handle` keeps its pidfd for the next one.
fn duplicate(pid: i32, fd: i32, handle: &mut Option<OwnedFd>) -> Result<OwnedFd, SnapshotError> {
    let path = proc(pid, &format!("fd/{fd}"));
    let opened = match handle.take() {
        Some(opened) => Ok(opened),
        None => Pid::from_raw(pid)
            .ok_or(Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty())),
    };
    let opened = opened.map_err(|e| at(&path)(e.into()))?;
    let copy = pidfd_getfd(&opened, fd, PidfdGetfdFlags::empty());
    *handle = Some(opened);
    copy.map_err(|e| at(&path)(e.into()))
}

/// The number of a pseudoterminal, in the `fdinfo` of its master.
fn master_index(fdinfo: &str) -> u32 {
    let line = fdinfo.lines().find_map(|l| l.strip_prefix("tty-index:"));
    // None has this number: its slaves are taken for somebody else's, the safe side.
    line.and_then(|text| text.trim().parse().ok())
        .unwrap_or(u32::MAX)
}

/// The file in a line of `maps`: the sixth word and what follows.
fn mapped_path(line: &str) -> Option<&str> {
    let start = line.find('/')?;
    Some(&line[start..])
}

/// By `fdinfo`: `lock: 1: POSIX  ADVISORY  WRITE 27 00:30:1452 120 120`.
pub(super) fn has_posix_locks(fdinfo: &str) -> bool {
    let mut locks = fdinfo.lines().filter_map(|l| l.strip_prefix("lock:"));
    locks.any(|lock| lock.split_whitespace().nth(1) == Some("POSIX"))
}

/// Files that are mapped and have lost their names.
fn mapped(
    pid: i32,
    maps: &str,
    mounts: &Mounts,
    left: &mut usize,
) -> Result<Vec<Kind>, SnapshotError> {
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.ends_with(" (deleted)")) {
        *left = left.checked_sub(1).ok_or(SnapshotError::TooMany)?;
        let Some(range) = line.split(' ').next() else {
            continue;
        };
        let kind = look_at(pid, &format!("map_files/{range}"), mounts)?;
        // Shared memory without a name is kept with its contents.
        if matches!(kind, Kind::Deleted { .. }) && !found.contains(&kind) {
            found.push(kind);
        }
    }
    Ok(found)
}

/// What a link of /proc leads to. Asks for what the kernel has at hand: a frozen FUSE server would
/// never answer.
fn look_at(pid: i32, file: &str, mounts: &Mounts) -> Result<Kind, SnapshotError> {
    let path = proc(pid, file);
    let target = match fs::read_link(&path) {
        Ok(target) => target.to_string_lossy().into_owned(),
        // Mapped, executed or open a moment ago: a thread that is not frozen yet has closed it.
        Err(e) if is_absent(&e) => return Ok(Kind::Plain),
        Err(e) => return Err(at(&path)(e)),
    };
    if let Some(name) = target.strip_prefix("anon_inode:") {
        return Ok(match name.trim_matches(['[', ']']) {
            "inotify" => Kind::Watches(Vec::new()),
            name => Kind::Anonymous(name.to_owned()),
        });
    }
    if target.starts_with("socket:[") {
        return Ok(Kind::Socket(Socket::default()));
    }
    if !target.starts_with('/') {
        return Ok(Kind::Plain);
    }
    let wanted = StatxFlags::TYPE | StatxFlags::NLINK | StatxFlags::MNT_ID;
    let stat = match statx(CWD, &path, AtFlags::STATX_DONT_SYNC, wanted) {
        Ok(stat) => stat,
        Err(e) if is_absent(&e.into()) => return Ok(Kind::Plain),
        Err(e) => return Err(at(&path)(e.into())),
    };
    let name = shortened(&target);
    if FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::CharacterDevice
        && let Some(terminal) = terminal(stat.stx_rdev_major, stat.stx_rdev_minor)
    {
        return Ok(terminal);
    }
    let inside = mounts.ids.contains(&stat.stx_mnt_id);
    let device = (stat.stx_dev_major, stat.stx_dev_minor);
    Ok(match target.strip_suffix(" (deleted)") {
        _ if mounts.queues.contains_key(&device) => Kind::Queue(name),
        Some(old) if !inside && is_memory(old) => Kind::Memory(shortened(old)),
        Some(old) if inside => Kind::Deleted {
            path: shortened(old),
            links: stat.stx_nlink,
        },
        _ if inside => Kind::Plain,
        _ => Kind::Outside(name),
    })
}

/// Memory of the kernel's own mounts that CRIU keeps, by the name that it has in /proc.
fn is_memory(path: &str) -> bool {
    let names = ["/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage", "/[aio]"];
    names.iter().any(|name| path.starts_with(name))
}

/// By the numbers of pseudoterminals (admin-guide/devices.txt).
fn terminal(major: u32, minor: u32) -> Option<Kind> {
    match (major, minor) {
        (5, 2) => Some(Kind::Terminal {
            is_master: true,
            index: u32::MAX,
        }),
        (136..=143, minor) => Some(Kind::Terminal {
            is_master: false,
            index: (major - 136) * 256 + minor,
        }),
        _ => None,
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(SHOWN).collect()
}
