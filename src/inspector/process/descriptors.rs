//! The descriptor table: what each descriptor refers to, where it stands, and how much waits in
//! its queue.
//!
//! Queues are read from a copy of the very descriptor (`pidfd_getfd`): opening a FIFO anew would
//! wake who waits for a reader, and a socket cannot be opened at all. Ordinary files are neither
//! copied nor opened: closing a copy makes a FUSE server of the sandbox, frozen perhaps, answer.

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

use super::{
    proc_fs::{Digest, Dir, ProcessError, digest, duplicate, pidfd},
    queues::{self, Queue},
};

/// Descriptors of all processes together.
pub(super) const MAX_DESCRIPTORS: usize = 32 << 10;
/// How much of a target is kept for a message.
const SHOWN_TARGET: usize = 96;

/// What kind of object a descriptor refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file, directory or harmless device: a read takes nothing away from others.
    File,
    /// A pipe without a name.
    Pipe,
    /// A pipe with a name in a file system.
    Fifo,
    Socket,
    Terminal,
    /// inotify, fanotify: tells of files that are newer than P.
    Watch,
    /// eventfd, epoll, timerfd, signalfd, pidfd: only the set itself reaches them.
    Event,
    /// Anything else.
    Odd,
}

/// One descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) fd: i32,
    pub(super) kind: Kind,
    /// Shortened, for messages.
    pub(super) target: String,
    /// It is a regular file without a name (or one whose name says so: looked at more closely).
    pub(super) deleted: bool,
    /// It can be read from.
    pub(super) readable: bool,
    /// Target and fdinfo, without what clocks change.
    info: Digest,
    /// Bytes and states in the kernel's queues; [`Queue::exact`] says whether nothing
    /// can hide behind them.
    pub(super) queue: Queue,
}

/// A process's descriptors, sorted by number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Table {
    pub(super) all: Vec<Descriptor>,
}

impl Table {
    /// The first descriptor that differs.
    pub(super) fn difference<'a>(&'a self, now: &'a Self) -> Option<&'a Descriptor> {
        let (mut before, mut after) = (self.all.iter(), now.all.iter());
        loop {
            match (before.next(), after.next()) {
                (None, None) => return None,
                (Some(a), Some(b)) if a == b => {}
                // The lower number is the one that came or went.
                (Some(a), Some(b)) => return Some(if b.fd < a.fd { b } else { a }),
                (Some(one), None) | (None, Some(one)) => return Some(one),
            }
        }
    }

    pub(super) fn of_kind(&self, kind: Kind) -> Option<&Descriptor> {
        self.all.iter().find(|descriptor| descriptor.kind == kind)
    }
}

/// Reads the table. `left` is how many descriptors may still be looked at, in all processes.
pub(super) fn read(dir: &Dir, left: &mut usize) -> Result<Table, ProcessError> {
    let numbers = dir
        .numbers("fd", "descriptors", *left)
        .map_err(|error| match error {
            ProcessError::Limit { what, .. } => ProcessError::Limit {
                what,
                limit: MAX_DESCRIPTORS,
            },
            error => error,
        })?;
    *left -= numbers.len();
    let mut table = Table::default();
    if numbers.is_empty() {
        return Ok(table);
    }
    let handle = pidfd(dir.pid)?;
    let mut mounts = None;
    for fd in numbers {
        match read_one(dir, &handle, fd, &mut mounts) {
            Ok(descriptor) => table.all.push(descriptor),
            // Closed since it was listed, by a process that runs: as if it had been listed later.
            // redis opens its /proc/self/stat ten times a second.
            Err(ProcessError::Gone(_)) if dir.lives() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(table)
}

/// [`ProcessError::Gone`]: the process, or the descriptor.
fn read_one(
    dir: &Dir,
    handle: &OwnedFd,
    fd: i32,
    mounts: &mut Option<String>,
) -> Result<Descriptor, ProcessError> {
    let target = dir.link(&format!("fd/{fd}"))?;
    let text = dir.record(&format!("fdinfo/{fd}"))?;
    let mut info = format!("{target}\n{}", without_clocks(&text));
    let kind = match kind_by_name(&target) {
        Some(kind) => kind,
        None => {
            let (kind, times) = kind_by_inode(dir, fd, &target, || is_queue(dir, &text, mounts))?;
            info += &times;
            kind
        }
    };
    let queue = match kind {
        Kind::File | Kind::Event | Kind::Odd => Queue::default(),
        Kind::Socket => queues::socket(&duplicate(dir.pid, handle, fd)?)
            .map_err(|errno| dir.failed("socket", errno.into()))?,
        Kind::Pipe | Kind::Fifo => queues::pipe(&duplicate(dir.pid, handle, fd)?),
        Kind::Watch => queues::held(&duplicate(dir.pid, handle, fd)?),
        Kind::Terminal => queues::terminal(&duplicate(dir.pid, handle, fd)?),
    };
    Ok(Descriptor {
        fd,
        kind,
        readable: is_readable(&text),
        deleted: kind == Kind::File && target.ends_with(" (deleted)"),
        target: shortened(target),
        info: digest(info.as_bytes()),
        queue,
    })
}

/// By the octal `flags:` of fdinfo.
fn is_readable(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
    flags.is_none_or(|flags| flags & libc::O_ACCMODE != libc::O_WRONLY)
}

/// An armed timerfd's remaining time and its expirations are the clock's doing.
fn without_clocks(fdinfo: &str) -> String {
    let by_clock = |line: &&str| line.starts_with("it_value:") || line.starts_with("ticks:");
    let lines = fdinfo.lines().filter(|line| !by_clock(line));
    lines.fold(String::new(), |text, line| text + line + "\n")
}

fn shortened(mut target: String) -> String {
    let length = target.len().min(SHOWN_TARGET);
    let end = (0..=length).rev().find(|&end| target.is_char_boundary(end));
    target.truncate(end.unwrap_or(0));
    target
}

/// By what /proc shows; names of files begin with a slash, so none can be mistaken for these.
fn kind_by_name(target: &str) -> Option<Kind> {
    if target.starts_with("pipe:[") {
        return Some(Kind::Pipe);
    }
    if target.starts_with("socket:[") {
        return Some(Kind::Socket);
    }
    let name = target.strip_prefix("anon_inode:")?;
    Some(match name.trim_matches(['[', ']']) {
        "inotify" | "fanotify" => Kind::Watch,
        "eventfd" | "eventpoll" | "timerfd" | "signalfd" | "pidfd" => Kind::Event,
        _ => Kind::Odd,
    })
}

/// By the inode. Asks for what the kernel has at hand: a FUSE server is not bothered. For what is
/// no plain file of a file system, times and size are part of the text to compare.
fn kind_by_inode(
    dir: &Dir,
    fd: i32,
    target: &str,
    is_queue: impl FnOnce() -> Result<bool, ProcessError>,
) -> Result<(Kind, String), ProcessError> {
    let file = format!("fd/{fd}");
    let flags = AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::TYPE;
    let stat = statx(dir.as_fd(), &file, flags, wanted).map_err(|errno| dir.error(&file, errno))?;
    let kind = match FileType::from_raw_mode(u32::from(stat.stx_mode)) {
        FileType::Fifo => Kind::Fifo,
        FileType::CharacterDevice => device(stat.stx_rdev_major, stat.stx_rdev_minor),
        // /dev/mqueue's and memfds lie in mounts of the kernel's own; their names tell them apart
        // well enough: who calls a file so is looked at more closely, not less.
        FileType::RegularFile if target.starts_with("/memfd:") || !target.starts_with('/') => {
            Kind::Odd
        }
        FileType::RegularFile if stat.stx_dev_major == 0 && is_queue()? => Kind::Odd,
        FileType::RegularFile | FileType::Directory | FileType::Symlink => Kind::File,
        _ => Kind::Odd,
    };
    if kind != Kind::Odd {
        return Ok((kind, String::new()));
    }
    let (mtime, ctime) = (stat.stx_mtime, stat.stx_ctime);
    let times = format!(
        "{} {}.{} {}.{}",
        stat.stx_size, mtime.tv_sec, mtime.tv_nsec, ctime.tv_sec, ctime.tv_nsec
    );
    Ok((kind, times))
}

/// Whether a regular file is a POSIX message queue or lies in another mount that the process does
/// not see: told by the mount that fdinfo names. `mounts` keeps mountinfo for the next question.
fn is_queue(dir: &Dir, info: &str, mounts: &mut Option<String>) -> Result<bool, ProcessError> {
    let Some(id) = info.lines().find_map(|line| line.strip_prefix("mnt_id:")) else {
        return Ok(true);
    };
    if mounts.is_none() {
        *mounts = Some(dir.text("mountinfo")?);
    }
    let mount = mounts
        .iter()
        .flat_map(|text| text.lines())
        .find(|line| line.split(' ').next() == Some(id.trim()));
    let kind = mount
        .and_then(|line| line.split_once(" - "))
        .and_then(|(_, tail)| tail.split(' ').next());
    Ok(matches!(kind, None | Some("mqueue")))
}

fn device(device_major: u32, device_minor: u32) -> Kind {
    match (device_major, device_minor) {
        // null, zero, full, random, urandom
        (1, 3 | 5 | 7 | 8 | 9) => Kind::File,
        // Virtual consoles, /dev/tty, console, ptmx, pts.
        (4 | 5 | 128..=143, _) => Kind::Terminal,
        _ => Kind::Odd,
    }
}
