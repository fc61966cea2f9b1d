//! The next pack's file, made before it is needed.
//!
//! To make a file is dear where many were removed lately: ext4 without a journal passes over each inode that was
//! free for less than a minute (measured: 0.8 ms of a checkpoint's 9).

use std::{fs::File, os::unix::fs::MetadataExt, path::PathBuf};

use parking_lot::Mutex;

use super::{SandboxStore, files};

/// At most one file, empty and with no place among the packs. It goes with its sandbox's lock; what is left of
/// one that was killed is removed with all that was not completed.
#[derive(Debug)]
pub(super) struct Spare {
    path: PathBuf,
    file: Mutex<Option<File>>,
}

/// Its name, and that of each pack until it is complete: only one is written at a time.
pub(super) fn path(store: &SandboxStore) -> PathBuf {
    store.packs_dir().join(format!("{}pack", files::TEMPORARY))
}

impl Spare {
    pub(super) fn new(store: &SandboxStore) -> Self {
        Self {
            path: path(store),
            file: Mutex::default(),
        }
    }

    /// Unless there is one. To be called while no pack is being written.
    pub(super) fn make(&self) {
        let mut file = self.file.lock();
        if file.is_some() {
            return;
        }
        let made = files::remove(&self.path).and_then(|_| files::write_new(&self.path, b""));
        match made {
            Ok(made) => *file = Some(made),
            // The next checkpoint tries it itself, and says what is wrong.
            Err(e) => log::debug!("no file for the next checkpoint: {e}"),
        }
    }

    /// It is the caller's from now on. None if there is none, or somebody has removed it.
    pub(super) fn take(&self) -> Option<File> {
        let file = self.file.lock().take()?;
        let is_there = file.metadata().is_ok_and(|its| its.nlink() == 1);
        is_there.then_some(file)
    }

    pub(super) fn remove(&self) {
        if self.take().is_some()
            && let Err(e) = files::remove(&self.path)
        {
            log::warn!("{e}");
        }
    }
}
