//! What a writer knows of its packs between two checkpoints.
//!
//! Packs are never changed in place, so what was read of one stays true: without this a turn that changes
//! one file would open every pack that is kept, and read and check its trailer and index. Each is used only
//! as long as its file is the very one that was opened ([`Pack::is_fresh`]); nothing is held open.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use super::{
    Checkpoint, SandboxStore, StoreError,
    pack::{Pack, Stamp},
};
use crate::sandbox::TurnNo;

/// So much memory all packs on the shelf may take.
const ROOM: usize = 1 << 20;
/// A manifest that is larger, as JSON, is read anew each time.
const SMALL_MANIFEST: usize = 128 << 10;

/// What is known of a sandbox's packs.
#[derive(Debug, Default)]
pub(super) struct Shelf {
    packs: Mutex<HashMap<PathBuf, Pack>>,
    /// The checkpoint that was asked for or written last, and the file that it is in.
    last: Mutex<Option<(Stamp, Checkpoint)>>,
}

impl Shelf {
    /// All packs that are on it, by path.
    pub(super) fn take(&self) -> HashMap<PathBuf, Pack> {
        std::mem::take(&mut self.packs.lock())
    }

    /// Puts packs on it as long as there is room, the newest first.
    pub(super) fn put(&self, packs: impl Iterator<Item = Pack>) {
        let mut left = ROOM;
        let mut shelved = HashMap::new();
        for mut pack in packs {
            let Some(rest) = pack.shelve().and_then(|takes| left.checked_sub(takes)) else {
                continue;
            };
            left = rest;
            shelved.insert(pack.path().to_owned(), pack);
        }
        *self.packs.lock() = shelved;
    }

    /// [`SandboxStore::get`], which is not done again for the checkpoint of the last time.
    pub(super) fn get(&self, store: &SandboxStore, turn: TurnNo) -> Result<Checkpoint, StoreError> {
        let path = store.pack_path(turn);
        if let Some((stamp, checkpoint)) = &*self.last.lock()
            && checkpoint.turn() == turn
            && Stamp::at(&path) == Some(*stamp)
        {
            return Ok(checkpoint.clone());
        }
        let (checkpoint, stamp, size) = store.read(turn)?;
        self.keep(&checkpoint, Some(stamp), size);
        Ok(checkpoint)
    }

    /// The checkpoint is the last one; its manifest has this size.
    fn keep(&self, checkpoint: &Checkpoint, stamp: Option<Stamp>, size: usize) {
        let small = stamp.filter(|_| size <= SMALL_MANIFEST);
        *self.last.lock() = small.map(|stamp| (stamp, checkpoint.clone()));
    }

    /// A checkpoint was written, and is at `path`.
    pub(super) fn written(&self, checkpoint: &Checkpoint, path: &Path, json: &[u8]) {
        self.keep(checkpoint, Stamp::at(path), json.len());
    }
}
