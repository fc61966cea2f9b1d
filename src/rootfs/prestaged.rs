//! Copies of large files that are made before the freeze.
//!
//! A sandbox should stand still for as long as its small changes take, not for as long as a gigabyte
//! takes. So large files that have changed are read while it runs, *after* the kernel has begun a new
//! list of changed inodes. In the freeze a copy is taken if the inode is what it was when it was read,
//! and is not on the new list; any other is made anew then.

use std::{
    collections::HashMap,
    ffi::{CString, OsString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat};

use super::{
    LEFTOVER,
    contents::Contents,
    copy::new_file,
    layer::{Candidate, Comparison, reach},
};
use crate::tree::{
    self, Expect, FileId, Found, TreeError, failed, remove_tree, still_the_same, wide,
};

/// Smaller files are copied in the freeze: 4 MiB take a millisecond or two.
pub const LARGE: u64 = 4 << 20;

/// Copies of large files, in a directory of their own until a capture takes them.
#[derive(Debug, Default)]
pub struct Prestaged {
    place: Option<Place>,
    files: HashMap<FileId, Copy>,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    dir: OwnedFd,
}

#[derive(Debug)]
struct Copy {
    name: CString,
    bytes: u64,
    then: Then,
}

/// What an inode was when it was read.
#[derive(Debug, PartialEq, Eq)]
struct Then {
    size: i64,
    mtime: (i64, u64),
    ctime: (i64, u64),
}

impl Then {
    fn of(stat: &Stat) -> Self {
        Self {
            size: stat.st_size,
            mtime: (stat.st_mtime, wide(stat.st_mtime_nsec)),
            ctime: (stat.st_ctime, wide(stat.st_ctime_nsec)),
        }
    }
}

impl Prestaged {
    /// Copies the large files among what differs in the layer at `upper`, into a directory beside `dest`
    /// (where the capture will go). One that changes meanwhile is left to the capture.
    ///
    /// `is_written`: inodes that can change without a sign.
    pub fn copy(
        upper: &Path,
        dest: &Path,
        comparison: &Comparison,
        is_written: &dyn Fn(Candidate) -> bool,
        stop: &dyn Fn() -> bool,
    ) -> Result<Self, TreeError> {
        let mut prestaged = Self::default();
        let root = tree::open_root(upper)?;
        for one in comparison.staged() {
            if one.kind != FileType::RegularFile {
                continue;
            }
            let shown = upper.join(one.path);
            let Some((fd, stat)) = reach(&root, one.path, &shown)? else {
                continue;
            };
            let inode = Candidate {
                dev: wide(stat.st_dev),
                ino: wide(stat.st_ino),
            };
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if !is_file || stat.st_size.unsigned_abs() <= LARGE || is_written(inode) {
                continue;
            }
            let found = Found {
                parent: None,
                name: c"",
                fd: fd.as_fd(),
                stat: &stat,
                path: &shown,
                depth: 0,
            };
            match prestaged.add(dest, &found, stop) {
                Ok(()) => {}
                Err(TreeError::Changed { .. }) => log::debug!("{shown:?} is being written"),
                Err(e) => return Err(e),
            }
        }
        Ok(prestaged)
    }

    fn add(
        &mut self,
        dest: &Path,
        found: &Found<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), TreeError> {
        let id = FileId::from(found.stat);
        if self.files.contains_key(&id) {
            return Ok(());
        }
        let place = match self.place.take() {
            Some(place) => place,
            None => Place::beside(dest)?,
        };
        let place = self.place.insert(place);
        let name = CString::new(self.files.len().to_string()).unwrap_or_default();
        let copy = new_file(place.dir.as_fd(), &name).map_err(found.err("copy"))?;
        let done = Contents::new(stop)
            .copy(found, &copy)
            .and_then(|bytes| still_the_same(found, Expect::Unchanged).map(|()| bytes));
        let bytes = match done {
            Ok(bytes) => bytes,
            Err(e) => {
                rustix::fs::unlinkat(&place.dir, &name, AtFlags::empty())
                    .map_err(found.err("remove the copy of"))?;
                return Err(e);
            }
        };
        let then = Then::of(found.stat);
        self.files.insert(id, Copy { name, bytes, then });
        Ok(())
    }

    /// How many bytes were copied.
    pub fn bytes(&self) -> u64 {
        self.files.values().map(|copy| copy.bytes).sum()
    }

    /// Whether there are no copies.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Drops the copies of inodes that may have been written since.
    pub fn distrust(&mut self, is_written: impl Fn(Candidate) -> bool) {
        self.files.retain(|id, _| {
            let (dev, ino) = id.parts();
            !is_written(Candidate { dev, ino })
        });
    }

    /// Moves the copy of a file to where the capture wants it, if there is one and the file is what it
    /// was. Returns it, open to write, with the bytes that it holds.
    pub(super) fn give(
        &mut self,
        found: &Found<'_>,
        parent: BorrowedFd<'_>,
    ) -> Result<Option<(OwnedFd, u64)>, TreeError> {
        let (Some(place), Some(copy)) = (&self.place, self.files.remove(&FileId::from(found.stat)))
        else {
            return Ok(None);
        };
        if copy.then != Then::of(found.stat) {
            return Ok(None);
        }
        rustix::fs::renameat(&place.dir, &copy.name, parent, found.name)
            .map_err(found.err("move the copy of"))?;
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, found.name, flags, Mode::empty())
            .map_err(found.err("open the copy of"))?;
        Ok(Some((file, copy.bytes)))
    }
}

impl Drop for Prestaged {
    fn drop(&mut self) {
        if let Some(place) = &self.place
            && let Err(e) = remove_tree(&place.path)
        {
            // The next writer of the store removes the directory around it.
            log::warn!("{}: {e}", place.path.display());
        }
    }
}

impl Place {
    fn beside(dest: &Path) -> Result<Self, TreeError> {
        let mut name = OsString::from(LEFTOVER);
        name.push("large-");
        name.push(dest.file_name().unwrap_or_default());
        let path = dest.with_file_name(name);
        remove_tree(&path)?;
        rustix::fs::mkdirat(CWD, &path, Mode::RWXU).map_err(failed("make", &path))?;
        let dir = tree::open_root(&path)?;
        Ok(Self { path, dir })
    }
}
