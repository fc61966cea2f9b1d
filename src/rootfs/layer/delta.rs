//! What a comparison has found, as the index takes it.

use super::{facts::Facts, index::Id};

/// What turns the index into that of the layer compared.
#[derive(Debug)]
pub(super) struct Delta {
    pub(super) generation: u64,
    /// With all that is below them.
    pub(super) removed: Vec<Id>,
    pub(super) updated: Vec<(Id, Facts)>,
    /// Parents before their children.
    pub(super) inserted: Vec<Insert>,
}

/// A new name.
#[derive(Debug)]
pub(super) struct Insert {
    pub(super) parent: Place,
    pub(super) name: Box<[u8]>,
    pub(super) facts: Facts,
}

/// A directory, in the index or about to be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Known(Id),
    /// Position among the new names.
    New(usize),
}
