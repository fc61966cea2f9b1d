//! Walking trees that a hostile sandbox has made.
//!
//! Every step is one `openat2` of one name below an open directory, and may neither follow a
//! symbolic link nor cross a mount. An inode is looked at (`O_PATH`, `fstat`) before it is opened,
//! so that no fifo blocks and no device is touched. The walk keeps its own stack: deep trees cost
//! memory in proportion to their depth, and a bounded number of descriptors.
//!
//! This module knows nothing of overlays or checkpoints; the store walks its trees with it too.

mod durably;
mod reach;
mod remove;
mod stack;
#[cfg(test)]
mod tests;
mod walk;

use std::{
    ffi::{CStr, CString, OsStr},
    fmt,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

pub(crate) use durably::Durably;
pub(crate) use reach::{found_at, reach};
pub use remove::remove_tree;
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat},
    io::Errno,
};
pub(crate) use stack::DirStack;
pub(crate) use walk::{Expect, Visitor, still_the_same, walk};

/// How often the kernel is asked again for a path that a race has disturbed.
const OPEN_TRIES: u32 = 1000;
/// How much of a path is shown in an error.
const SHOWN_PATH: usize = 512;
/// The kernel's bound for one value and for one list (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A step of a walk that failed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A system call failed.
    #[error("cannot {step} {path}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Where, escaped and shortened.
        path: ShownPath,
        /// The kernel's answer.
        source: Errno,
    },
    /// Something wrote into the tree during the walk.
    #[error("{path} changed while it was read ({what})")]
    Changed {
        /// Where, escaped and shortened.
        path: ShownPath,
        /// Which attribute gave it away.
        what: &'static str,
    },
    /// The tree is larger than what is accepted from a sandbox.
    #[error("{path}: the tree exceeds the limit of {limit} {what}")]
    Limit {
        /// Where, escaped and shortened.
        path: ShownPath,
        /// The bound.
        limit: usize,
        /// What is bounded.
        what: &'static str,
    },
    /// The caller asked for an end.
    #[error("stopped on request at {path}")]
    Stopped {
        /// Where, escaped and shortened.
        path: ShownPath,
    },
}

/// A path as errors show it: quoted, control characters escaped, its middle left out if long.
#[derive(Clone, PartialEq, Eq)]
pub struct ShownPath(String);

impl ShownPath {
    pub(crate) fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        if bytes.len() <= SHOWN_PATH {
            return Self(format!("{path:?}"));
        }
        let (head, tail) = (
            &bytes[..SHOWN_PATH / 2],
            &bytes[bytes.len() - SHOWN_PATH / 2..],
        );
        Self(format!(
            "{:?}…{:?}",
            OsStr::from_bytes(head),
            OsStr::from_bytes(tail)
        ))
    }
}

impl fmt::Display for ShownPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ShownPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes a [`TreeError::Io`] out of a kernel error, and costs nothing where there is none.
pub(crate) fn failed(step: &'static str, path: &Path) -> impl FnOnce(Errno) -> TreeError {
    move |source| TreeError::Io {
        step,
        path: ShownPath::new(path),
        source,
    }
}

/// Fields of `struct stat` have other widths on other architectures.
pub(crate) fn wide(field: impl Into<u64>) -> u64 {
    field.into()
}

/// Which inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    dev: u64,
    ino: u64,
}

impl FileId {
    /// Device and number.
    pub(crate) fn parts(self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}

impl From<&Stat> for FileId {
    fn from(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }
}

/// One inode that a walk has come to.
pub(crate) struct Found<'a> {
    /// The directory that holds it; none for the root.
    pub(crate) parent: Option<BorrowedFd<'a>>,
    /// Its name there; empty for the root.
    pub(crate) name: &'a CStr,
    /// Readable for a directory, `O_PATH` for everything else.
    pub(crate) fd: BorrowedFd<'a>,
    /// Its attributes when the walk first came to it.
    pub(crate) stat: &'a Stat,
    /// Its path, for messages.
    pub(crate) path: &'a Path,
    /// 0 for the root.
    pub(crate) depth: usize,
}

impl Found<'_> {
    pub(crate) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub(crate) fn err(&self, step: &'static str) -> impl FnOnce(Errno) -> TreeError {
        failed(step, self.path)
    }

    /// Opens a regular file for reading: the inode that was looked at, whatever its name says now.
    pub(crate) fn open_file(&self) -> Result<OwnedFd, TreeError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let path = proc_path(self.fd);
        rustix::fs::openat(CWD, &path, flags | OFlags::NOATIME, Mode::empty())
            .or_else(|e| match e {
                Errno::PERM => rustix::fs::openat(CWD, &path, flags, Mode::empty()),
                e => Err(e),
            })
            .map_err(self.err("open"))
    }

    pub(crate) fn xattrs(&self) -> Result<Vec<(CString, Vec<u8>)>, TreeError> {
        xattrs(self.fd).map_err(self.err("read the extended attributes of"))
    }

    pub(crate) fn changed(&self, what: &'static str) -> TreeError {
        TreeError::Changed {
            path: ShownPath::new(self.path),
            what,
        }
    }
}

/// Opens a tree's root. The path itself is the host's and may lead through links.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd, TreeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .and_then(|fd| open_dir(&fd))
        .map_err(failed("open", path))
}

/// Opens one name below a directory without acting on what it names.
pub(crate) fn look_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    open_within(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )
}

/// `openat2`, again if the kernel says so: any mount or rename on the host may disturb its check
/// that a path stays within (openat2(2), EAGAIN).
pub(crate) fn open_within(
    dir: BorrowedFd<'_>,
    path: impl rustix::path::Arg + Copy,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < OPEN_TRIES => tries += 1,
            opened => return opened,
        }
    }
}

/// Opens for reading the directory that an `O_PATH` descriptor stands for.
pub(crate) fn open_dir(path_fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    let open = |flags| rustix::fs::openat(path_fd, c".", flags, Mode::empty());
    open(DIRECTORY | OFlags::NOATIME).or_else(|e| match e {
        Errno::PERM => open(DIRECTORY),
        e => Err(e),
    })
}

/// A path that leads to an open inode itself, `O_PATH` or not, symbolic link or not.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// All extended attributes of an inode, by name.
pub(crate) fn xattrs(fd: BorrowedFd<'_>) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    // Through /proc, since the kernel refuses `f*xattr` on O_PATH descriptors.
    let path = proc_path(fd);
    let list = match grow(|buf| rustix::fs::listxattr(&path, buf)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    let mut all = list
        .split_inclusive(|b| *b == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .map(|name| {
            let value = grow(|buf| rustix::fs::getxattr(&path, name, buf))?;
            Ok((name.to_owned(), value))
        })
        .collect::<Result<Vec<_>, Errno>>()?;
    all.sort_unstable();
    Ok(all)
}

fn grow(read: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut small = [0; 512];
    match read(&mut small) {
        Ok(n) => Ok(small[..n].to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; XATTR_MAX];
            let n = read(&mut large)?;
            large.truncate(n);
            Ok(large)
        }
        Err(e) => Err(e),
    }
}

/// The next stretch of data at or after `at`, none if only a hole is left.
pub(crate) fn next_data(file: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        // A filesystem that doesn't know where its holes are.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(e) => return Err(e),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
    Ok(Some((start, end.max(start + 1))))
}
