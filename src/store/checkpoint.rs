//! A checkpoint that is in the store.

use std::path::{Path, PathBuf};

use super::{Digest, Kind, Manifest, StoreError, objects::Objects};
use crate::sandbox::TurnNo;

/// A checkpoint that is in the store.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What it says about itself.
    pub manifest: Manifest,
    /// Of the manifest, and through it of everything.
    pub digest: Digest,
    /// The size of its pack: what it added to the store.
    pub stored: u64,
    packs: PathBuf,
}

impl Checkpoint {
    pub(super) fn new(packs: PathBuf, manifest: Manifest, digest: Digest, stored: u64) -> Self {
        Self {
            manifest,
            digest,
            stored,
            packs,
        }
    }

    /// Which turn's.
    pub fn turn(&self) -> TurnNo {
        self.manifest.turn
    }

    /// Whether it brings back processes, and not files alone.
    pub fn has_processes(&self) -> bool {
        self.manifest.facts.kind == Kind::Full
    }

    pub(super) fn is_elsewhere(&self, packs: &Path) -> bool {
        self.packs != packs
    }

    pub(super) fn objects(&self) -> Result<Objects, StoreError> {
        Objects::open(&self.packs)
    }

    pub(super) fn strict_objects(&self) -> Result<Objects, StoreError> {
        Objects::open_strictly(&self.packs)
    }
}
