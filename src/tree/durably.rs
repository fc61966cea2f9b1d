//! Writing a tree to the disk.

use std::{cell::Cell, os::fd::OwnedFd, path::Path};

use rustix::fs::FileType;

use super::{Expect, Found, TreeError, Visitor, failed, open_root, walk};

/// Up to so many inodes are fsynced one by one, more by one `syncfs`.
///
/// Medians on ext4, 2 busy cores, one by one / with the writing of all started first / `syncfs`:
/// 5 files of 4 KB 8 / 10 / 14 ms, 25 of 10 KB 26 / 13 / 10 ms, 100 of 4 KB 196 / 95 / 41 ms, 1,000
/// of 4 KB 1,874 / 1,148 / 31 ms; for 200 MB in 4 files there is no difference. The price: `syncfs`
/// waits for what others have written to the same filesystem, too.
const FEW: u64 = 8;

/// Makes what is written after its creation durable.
#[derive(Debug)]
pub(crate) struct Durably {
    /// Open before the writing starts: the kernel reports an error of earlier background writing
    /// once to each descriptor that was open then.
    filesystem: OwnedFd,
}

impl Durably {
    /// `place` is a directory on the filesystem that will be written to.
    pub(crate) fn at(place: &Path) -> Result<Self, TreeError> {
        let filesystem = open_root(place)?;
        Ok(Self { filesystem })
    }

    /// Writes a tree to the disk: data, inodes, directories.
    pub(crate) fn sync(&self, path: &Path) -> Result<(), TreeError> {
        let seen = Cell::new(0);
        let root = open_root(path)?;
        let counted = walk(
            root,
            path,
            Expect::Changes,
            &|| seen.get() > FEW,
            &mut Counter(&seen),
        );
        if let Err(TreeError::Stopped { .. }) = counted {
            return rustix::fs::syncfs(&self.filesystem).map_err(failed("sync", path));
        }
        counted?;
        let root = open_root(path)?;
        walk(root, path, Expect::Changes, &|| false, &mut Syncer)
    }
}

struct Counter<'a>(&'a Cell<u64>);

impl Visitor for Counter<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }

    fn other(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

pub(super) struct Syncer;

impl Visitor for Syncer {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        if found.kind() == FileType::RegularFile {
            let file = found.open_file()?;
            rustix::fs::fsync(&file).map_err(found.err("fsync"))?;
        }
        Ok(())
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        rustix::fs::fsync(dir.fd).map_err(dir.err("fsync"))
    }
}
