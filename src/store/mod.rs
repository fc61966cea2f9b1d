//! Checkpoints on disk.
//!
//! The first, plain form: a directory for each turn, with copies of everything. Content-addressed
//! packs (D8) will take its place behind the same interface.
//!
//! ```text
//! <root>/<namespace>/<id>/            0700
//!     lock                            flock of the one writer; its pid
//!     journal.jsonl                   a line for each turn
//!     armed                           the turn that the next start restores
//!     names/<NAME>                    the turn of a named checkpoint
//!     turns/<N>/manifest.json         what is in it
//!     turns/<N>/manifest.sha256       for `sha256sum -c`
//!     turns/<N>/image/                CRIU's images
//!     turns/<N>/bundle/               config.json and friends
//!     turns/<N>/upper/                the writable layer
//!     turns/<N>/upper.list            a digest for each of its entries
//!     turns/.tmp-<N>, .condemned-<N>  being made, being deleted; removed by the next writer
//! ```
//!
//! A checkpoint exists from the rename of `.tmp-<N>` to `<N>` on, after everything in it has been
//! fsynced; the fsync of `turns/` that follows is the commit.

mod arm;
mod digest;
mod files;
mod journal;
mod lineage;
mod manifest;
mod pending;
mod sandbox;
mod verify;

#[cfg(test)]
mod tests;

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

pub use digest::Digest;
pub use journal::{Action, BrokenLine, Effect, Journal, JournalLine, Sync, Trigger};
pub use manifest::{
    Contents, FORMAT, Facts, FileEntry, Host, Kind, Manifest, StdioPipe, TreeSummary,
};
pub use pending::Pending;
pub use sandbox::{Checkpoint, SandboxStore, SandboxWriter};
pub use verify::{Fault, What};

use crate::{
    sandbox::{SandboxId, TurnNo},
    tree::TreeError,
};

/// Where checkpoints are kept unless the configuration says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/crab";

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

/// All checkpoints of this host.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store, and makes it (0700) if it isn't there.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        if let Some(parent) = root.parent().filter(|p| !p.exists()) {
            fs::create_dir_all(parent).map_err(files::io("make", parent))?;
        }
        files::make_dir(root)?;
        let meta = fs::metadata(root).map_err(files::io("stat", root))?;
        let exposed = |what| StoreError::Exposed {
            path: root.to_owned(),
            what,
        };
        if meta.uid() != own_uid() {
            return Err(exposed(format!("belongs to uid {}", meta.uid())));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(exposed(format!("has mode {:04o}", meta.mode() & 0o7777)));
        }
        let root = root.canonicalize().map_err(files::io("resolve", root))?;
        Ok(Self { root })
    }

    /// The checkpoints of one sandbox, to read. Makes nothing; there may be none.
    pub fn sandbox(&self, id: &SandboxId) -> SandboxStore {
        SandboxStore::new(id.clone(), self.root.join(id.namespace()).join(id.id()))
    }

    /// The checkpoints of one sandbox, to write: of all processes, one at a time may.
    pub fn writer(&self, id: &SandboxId) -> Result<SandboxWriter, StoreError> {
        files::make_dir(&self.root.join(id.namespace()))?;
        SandboxWriter::lock(self.sandbox(id))
    }

    /// All sandboxes that have ever been written.
    pub fn sandboxes(&self) -> Result<Vec<SandboxId>, StoreError> {
        let mut all = Vec::new();
        for namespace in files::names(&self.root)? {
            for id in files::names(&self.root.join(&namespace))? {
                all.extend(SandboxId::new(&namespace, &id));
            }
        }
        all.sort();
        Ok(all)
    }

    /// The one sandbox, of one namespace or all, with this id; or else whose id begins so.
    pub fn find(&self, namespace: Option<&str>, prefix: &str) -> Result<SandboxId, StoreError> {
        let mut all = self.sandboxes()?;
        all.retain(|s| namespace.is_none_or(|n| s.namespace() == n));
        let (exact, begins): (Vec<_>, Vec<_>) = all
            .into_iter()
            .filter(|s| s.id().starts_with(prefix))
            .partition(|s| s.id() == prefix);
        let mut candidates = if exact.is_empty() { begins } else { exact };
        match (candidates.len(), candidates.pop()) {
            (1, Some(only)) => Ok(only),
            (_, Some(last)) => {
                candidates.push(last);
                Err(StoreError::Ambiguous {
                    prefix: prefix.to_owned(),
                    candidates,
                })
            }
            (_, None) => Err(StoreError::NoSandbox {
                prefix: prefix.to_owned(),
                root: self.root.clone(),
            }),
        }
    }
}

fn own_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// Makes a directory for root alone; one that is there already stays as it is.
fn dir_builder() -> fs::DirBuilder {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700);
    builder
}
