//! What the store could not do.

use std::{io, path::PathBuf};

use crate::{
    sandbox::{SandboxId, TurnNo},
    tree::TreeError,
};

/// What the store could not do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {step} {path:?}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Reading or deleting a tree failed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Another process writes this sandbox's checkpoints.
    #[error("the checkpoints of {sandbox} are being written by another process{}", by(.pid))]
    Locked {
        /// Whose.
        sandbox: SandboxId,
        /// Who, if it said so.
        pid: Option<u32>,
    },
    /// The store could be read or written by others than root.
    #[error(
        "the store {path:?} {what}: it holds the memory of sandboxes, and must be root's alone (chown root, chmod 0700)"
    )]
    Exposed {
        /// The store's root.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// There is no such checkpoint.
    #[error("{sandbox} has no checkpoint of turn {turn}")]
    NoTurn {
        /// Whose.
        sandbox: SandboxId,
        /// Which.
        turn: TurnNo,
    },
    /// The turn has a checkpoint already.
    #[error("{sandbox} has a checkpoint of turn {turn} already")]
    Exists {
        /// Whose.
        sandbox: SandboxId,
        /// Which.
        turn: TurnNo,
    },
    /// There is no such named checkpoint.
    #[error("{sandbox} has no checkpoint named {name:?}")]
    NoName {
        /// Whose.
        sandbox: SandboxId,
        /// Which.
        name: String,
    },
    /// A name that is no identifier.
    #[error(transparent)]
    BadName(#[from] crate::sandbox::BadName),
    /// A file of the store does not hold what it should.
    #[error("{path:?} is damaged: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// Written by a newer crab.
    #[error(
        "{path:?} has format {found}; this version of crab reads up to {known}: use the newer one"
    )]
    Newer {
        /// Which.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// Ours.
        known: u32,
    },
    /// What is to be kept cannot be.
    #[error("cannot keep {path:?} in a checkpoint: {reason}")]
    Unfit {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// No sandbox with that name.
    #[error("no sandbox matches {prefix:?} in {root:?}")]
    NoSandbox {
        /// What was asked for.
        prefix: String,
        /// Where.
        root: PathBuf,
    },
    /// Several sandboxes with that name.
    #[error("{prefix:?} is ambiguous: {}", candidates.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// What it may mean.
        candidates: Vec<SandboxId>,
    },
}

fn by(pid: &Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}
