//! What is known of a sandbox: of its newest checkpoint, of a cut that is not durable yet, and of what a cut
//! has still to read.

use std::collections::HashSet;

use super::{
    look::Look,
    memory_files::{MemoryFiles, Mounts},
    processes::Processes,
    references::References,
};
use crate::{
    inspector::Inode,
    rootfs::layer::{Comparison, Layer},
    sandbox::TurnNo,
    store::Ahead,
};

/// The state of the newest checkpoint.
pub(super) struct Known {
    pub(super) turn: TurnNo,
    /// The checkpoint to whose files the sandbox was taken back since, while its processes went on.
    pub(super) back_to: Option<TurnNo>,
    pub(super) layer: Layer,
    /// None: it has no processes.
    pub(super) dump: Option<Dump>,
}

impl Known {
    /// The checkpoint that the sandbox goes on from.
    pub(super) fn head(&self) -> TurnNo {
        self.back_to.unwrap_or(self.turn)
    }

    /// The layer is held against another checkpoint than the one that the sandbox goes on from: that nothing
    /// differs from it does not mean that nothing has changed.
    pub(super) fn is_elsewhere(&self) -> bool {
        self.back_to.is_some()
    }
}

/// The state of the dump that the newest checkpoint has its image from.
pub(super) struct Dump {
    pub(super) turn: TurnNo,
    pub(super) memory_files: MemoryFiles,
    pub(super) mounts: Mounts,
    pub(super) processes: Option<Processes>,
    pub(super) references: Result<References, String>,
    /// It has been seen what ran on after its thaw.
    pub(super) settled: bool,
}

/// What was found in the freeze of a full checkpoint.
pub(super) struct Taken {
    pub(super) layer: Result<Outline, String>,
    pub(super) memory_files: MemoryFiles,
    pub(super) mounts: Mounts,
    pub(super) processes: Result<Processes, String>,
    pub(super) references: Result<References, String>,
    /// Somebody who does not dump has cleared marks of written pages since the dump before.
    pub(super) marks_cleared: bool,
}

impl Taken {
    /// How the writable layer differs from the checkpoint before, if that is known.
    pub(super) fn changes(&self) -> Option<&Comparison> {
        self.layer.as_ref().ok()?.changes()
    }

    /// What the processes stand upon; None if it could not be told.
    pub(super) fn references(&self) -> Option<&References> {
        self.references.as_ref().ok()
    }
}

/// What was found while nothing ran, for a checkpoint of files alone.
pub(super) struct Still {
    pub(super) comparison: Comparison,
    /// How this was found.
    pub(super) look: Look,
}

/// What is read before the freeze.
pub(super) struct ToRead {
    pub(super) which: Ahead,
    /// Inodes that can change without a sign.
    pub(super) unseen: HashSet<Inode>,
}

/// What may have been written since it was read.
pub(super) enum Written {
    /// Nobody can tell.
    Anything,
    These(HashSet<Inode>),
}

impl Written {
    pub(super) fn has(&self, dev: u64, ino: u64) -> bool {
        match self {
            Self::Anything => true,
            Self::These(inodes) => inodes.contains(&Inode { dev, ino }),
        }
    }
}

/// The index of a writable layer.
pub(super) enum Outline {
    New(Layer),
    Delta(Comparison),
}

impl Outline {
    /// How the layer differs from the checkpoint before, if that is known.
    pub(super) fn changes(&self) -> Option<&Comparison> {
        match self {
            Self::Delta(comparison) => Some(comparison),
            Self::New(_) => None,
        }
    }
}
