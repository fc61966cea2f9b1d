//! Who has which slot of the maps.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
};

use super::abi::SLOTS;
use crate::slot_lock::{self, SlotLock};

/// The file of slots.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    path: PathBuf,
}

impl Slots {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Claims a free one; None if there is none.
    pub(super) fn claim(&self) -> io::Result<Option<SlotLock>> {
        Ok(SlotLock::claim(self.open()?, 0..SLOTS)?.ok())
    }

    /// Whether nobody has this slot.
    pub(super) fn is_free(&self, number: u32) -> io::Result<bool> {
        slot_lock::are_free(&self.open()?, number, 1)
    }

    /// Whether nobody has any slot.
    pub(super) fn all_free(&self) -> io::Result<bool> {
        slot_lock::are_free(&self.open()?, 0, SLOTS)
    }

    /// Removes the file, which nobody may be about to open: under the lock, when all are free.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn open(&self) -> io::Result<File> {
        File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&self.path)
    }
}
