//! The way down a tree, of which few levels are open.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{fs::Mode, io::Errno};

use super::{DIRECTORY, FileId};

/// How many levels of a deep tree are kept open; the others are reopened through `..`.
const OPEN_LEVELS: usize = 64;

/// The way from a tree's root down to one directory, of which the deepest levels are open.
#[derive(Default)]
pub(crate) struct DirStack {
    slots: Vec<(Option<OwnedFd>, FileId)>,
}

impl DirStack {
    pub(crate) fn push(&mut self, dir: OwnedFd, id: FileId) {
        self.slots.push((Some(dir), id));
        if let Some(beyond) = self.slots.len().checked_sub(OPEN_LEVELS + 1) {
            self.slots[beyond].0 = None;
        }
    }

    /// The deepest directory.
    pub(crate) fn top(&self) -> Result<BorrowedFd<'_>, Errno> {
        let top = self.slots.last().and_then(|(fd, _)| fd.as_ref());
        top.map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// Leaves the deepest directory and returns it. Its parent is opened again if need be, and has
    /// to be the directory that the walk came through: `ESTALE` if somebody moved it meanwhile.
    pub(crate) fn pop(&mut self) -> Result<OwnedFd, Errno> {
        let (dir, _) = self.slots.pop().ok_or(Errno::BADF)?;
        let dir = dir.ok_or(Errno::BADF)?;
        if let Some((closed @ None, id)) = self.slots.last_mut() {
            let up = rustix::fs::openat(&dir, c"..", DIRECTORY, Mode::empty())?;
            if FileId::from(&rustix::fs::fstat(&up)?) != *id {
                return Err(Errno::STALE);
            }
            *closed = Some(up);
        }
        Ok(dir)
    }
}
