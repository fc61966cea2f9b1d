//! Reaching one inode of a tree by its path.

use std::{
    ffi::CString,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{OFlags, ResolveFlags, Stat},
    io::Errno,
};

use super::{Found, TreeError, failed, open_within};

/// The kernel takes paths of up to 4,095 bytes.
const PATH: usize = 4000;

/// Looks at what is at a path below `root`, through no link and no mount. None if nothing is.
pub(crate) fn reach(
    root: &OwnedFd,
    relative: &Path,
    shown: &Path,
) -> Result<Option<(OwnedFd, Stat)>, TreeError> {
    let fd = match open_below(root, relative.as_os_str().as_bytes()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        fd => fd.map_err(failed("open", shown))?,
    };
    let stat = rustix::fs::fstat(&fd).map_err(failed("stat", shown))?;
    Ok(Some((fd, stat)))
}

fn open_below(root: &OwnedFd, mut path: &[u8]) -> Result<OwnedFd, Errno> {
    let open = |dir: BorrowedFd<'_>, path: &[u8]| {
        let path = CString::new(path).map_err(|_| Errno::INVAL)?;
        open_within(
            dir,
            path.as_c_str(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            ResolveFlags::BENEATH
                | ResolveFlags::NO_SYMLINKS
                | ResolveFlags::NO_MAGICLINKS
                | ResolveFlags::NO_XDEV,
        )
    };
    if path.is_empty() {
        path = b".";
    }
    let mut at: Option<OwnedFd> = None;
    while path.len() > PATH {
        let cut = path[..PATH].iter().rposition(|b| *b == b'/');
        let cut = cut.ok_or(Errno::NAMETOOLONG)?;
        at = Some(open(at.as_ref().unwrap_or(root).as_fd(), &path[..cut])?);
        path = &path[cut + 1..];
    }
    open(at.as_ref().unwrap_or(root).as_fd(), path)
}

/// What was reached, for whoever reads it.
pub(crate) fn found_at<'f>(fd: &'f OwnedFd, stat: &'f Stat, path: &'f Path) -> Found<'f> {
    Found {
        parent: None,
        name: c"",
        fd: fd.as_fd(),
        stat,
        path,
        depth: 0,
    }
}
