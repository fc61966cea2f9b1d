//! What of a layer that is there already can stay when another is put into its place.
//!
//! A layer that is put back differs in few files from the one that it replaces. Those that are equal, to
//! the last byte, get a second name in the new layer, and are neither written nor removed: 20,000 small
//! files take a second where writing and removing them takes minutes.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType},
    io::Errno,
};

use super::entry::{Node, TreeEntry};
use crate::{
    content::content_of,
    store::ingest::attributes,
    tree::{self, DirStack, Expect, FileId, Found, TreeError, failed, still_the_same},
};

/// The layer that is there, on the way down beside the one that is written. Nobody may write to it.
pub(super) struct Present {
    dirs: DirStack,
    /// How many of the deepest levels are not there.
    absent: usize,
    buffer: Vec<u8>,
}

impl Present {
    /// None if there is none.
    pub(super) fn open(root: &Path) -> Result<Option<Self>, TreeError> {
        let dir = match tree::open_root(root) {
            Ok(dir) => dir,
            Err(TreeError::Io {
                source: Errno::NOENT,
                ..
            }) => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut present = Self {
            dirs: DirStack::default(),
            absent: 0,
            buffer: Vec::new(),
        };
        present.push(dir, root)?;
        Ok(Some(present))
    }

    fn push(&mut self, dir: OwnedFd, shown: &Path) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(&dir).map_err(failed("stat", shown))?;
        self.dirs.push(dir, FileId::from(&stat));
        Ok(())
    }

    /// Goes down into a directory, be it there or not.
    pub(super) fn enter(&mut self, name: &CStr, shown: &Path) -> Result<(), TreeError> {
        if self.absent > 0 {
            self.absent += 1;
            return Ok(());
        }
        let top = self.dirs.top().map_err(failed("reach", shown))?;
        let dir = tree::look_at(top, name).and_then(|dir| tree::open_dir(&dir));
        match dir {
            Ok(dir) => self.push(dir, shown),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                self.absent = 1;
                Ok(())
            }
            Err(e) => Err(failed("open", shown)(e)),
        }
    }

    /// Goes up again.
    pub(super) fn leave(&mut self, shown: &Path) -> Result<(), TreeError> {
        match self.absent {
            0 => self.dirs.pop().map(drop).map_err(failed("leave", shown)),
            _ => {
                self.absent -= 1;
                Ok(())
            }
        }
    }

    /// Gives the file that has this name here a second one in `parent`, if it is a regular file with this
    /// one name and equal in everything that is kept of it. False if it is not.
    pub(super) fn link(
        &mut self,
        entry: &TreeEntry,
        parent: BorrowedFd<'_>,
        name: &CString,
        shown: &Path,
    ) -> Result<bool, TreeError> {
        let (Node::File(content), None) = (&entry.node, &entry.link) else {
            return Ok(false);
        };
        if self.absent > 0 {
            return Ok(false);
        }
        let top = self.dirs.top().map_err(failed("reach", shown))?;
        let Ok(fd) = tree::look_at(top, name) else {
            return Ok(false);
        };
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", shown))?;
        let found = Found {
            name: name.as_c_str(),
            ..tree::found_at(&fd, &stat, shown)
        };
        let may_be = found.kind() == FileType::RegularFile
            && stat.st_nlink == 1
            && stat.st_size.unsigned_abs() == content.size;
        if !may_be || !self.is_equal(entry, &found)? {
            return Ok(false);
        }
        // The inode that was read, whatever its name stands for now. One that must not have a second
        // name (`chattr +i`) is written anew.
        Ok(rustix::fs::linkat(fd.as_fd(), c"", parent, name, AtFlags::EMPTY_PATH).is_ok())
    }

    fn is_equal(&mut self, entry: &TreeEntry, found: &Found<'_>) -> Result<bool, TreeError> {
        let Ok(mut there) = attributes(found, entry.node.clone()) else {
            return Ok(false);
        };
        there.link = None;
        if there != *entry {
            return Ok(false);
        }
        let content = content_of(found, &mut self.buffer, &|| false)?;
        still_the_same(found, Expect::Unchanged)?;
        Ok(matches!(entry.node, Node::File(wanted) if wanted == content))
    }
}
