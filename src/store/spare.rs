//! The next pack's file, made before it is needed where that is dear.
//!
//! ext4 without a journal passes over each inode that was free for less than a minute, so where many files were
//! removed lately a new one takes long (measured: 0.8 ms of a checkpoint's 9). Elsewhere it takes microseconds,
//! and a file that comes long before its pack costs a commit of the file system's journal by itself.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{SandboxStore, files};

/// Longer than this, and the next one is made while nobody waits.
const DEAR: Duration = Duration::from_micros(300);

/// At most one file, empty and with no place among the packs. It goes with its sandbox's lock; what is left of
/// one that was killed is removed with all that was not completed.
#[derive(Debug)]
pub(super) struct Spare {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    file: Option<File>,
    /// How long it took to make the last one.
    took: Duration,
}

impl Spare {
    pub(super) fn new(store: &SandboxStore) -> Self {
        Self {
            path: store.packs_dir().join(format!("{}pack", files::TEMPORARY)),
            state: Mutex::default(),
        }
    }

    /// Its name, and that of each pack until it is complete: only one is written at a time.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// So long it took to make a file that was not made before.
    pub(super) fn took(&self, time: Duration) {
        self.state.lock().took = time;
    }

    /// Unless there is one, or it would take no time worth it. To be called while no pack is being written.
    pub(super) fn make(&self) {
        let mut state = self.state.lock();
        if state.file.is_some() || state.took < DEAR {
            return;
        }
        let begin = Instant::now();
        let made = files::remove(&self.path).and_then(|_| files::write_new(&self.path, b""));
        state.took = begin.elapsed();
        match made {
            Ok(made) => state.file = Some(made),
            // The next checkpoint tries it itself, and says what is wrong.
            Err(e) => log::debug!("no file for the next checkpoint: {e}"),
        }
    }

    /// It is the caller's from now on. None if there is none, or somebody has removed it.
    pub(super) fn take(&self) -> Option<File> {
        let file = self.state.lock().file.take()?;
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
