//! Checkpoints on disk: content-addressed (D8), a pack for each.
//!
//! ```text
//! <root>/<namespace>/<id>/   0700
//!     lock                   flock of the one writer; its pid
//!     journal.jsonl          a line for each turn
//!     armed                  the turn that the next start restores
//!     alive                  it was started, and has not ended as it should
//!     names/<NAME>           the turn of a named checkpoint
//!     packs/<N>.pack         the checkpoint of turn N, and what no other pack had then
//!     packs/<N>.kept         what others still need of checkpoints that are gone
//!     tmp/                   being filled, or laid out for a restore; tidied by the next writer
//! ```
//!
//! A directory is an object that names its entries by digest, a file one that names its chunks. An
//! object that some pack of the sandbox has is not written again, so a turn writes what changed and
//! the path to the root. Every manifest is complete in itself: it names the roots of everything, and
//! the packs' indexes find them. `docs/store-format.md` describes every field.
//!
//! A checkpoint exists from the rename of its pack on, if the pack is whole (`seal`); the fdatasync of the
//! pack and the fsync of `packs/` that follow are the commit.
//!
//! Downwards: [`SandboxWriter`] → [`Pending`] → `capture` → `layer` → `directory`, `ingest` → `pack`; and back:
//! [`Checkpoint`] → `lay_out`, `tree_view`, `stored_file` → `objects` → `pack`.

mod arm;
mod capture;
mod chain;
mod checkpoint;
mod codec;
mod content;
mod directory;
mod entry;
mod error;
mod failpoint;
mod files;
mod gc;
mod gone;
mod ingest;
mod journal;
mod keep;
mod lay_out;
mod layer;
mod lineage;
mod links;
mod manifest;
mod objects;
mod pack;
mod pending;
mod reuse;
mod sandbox;
mod seal;
mod shelf;
mod spare;
mod staging;
mod stored_file;
mod tree_view;
mod verify;

#[cfg(test)]
mod tests;

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub use capture::{Ahead, Captured, Part};
pub use checkpoint::Checkpoint;
pub use entry::{Content, DirRef, Node, TreeEntry};
pub use error::StoreError;
pub use gc::{Freed, Retention};
pub use journal::{Action, BrokenLine, Effect, Journal, JournalLine, Missing, Sync, Trigger};
pub use lay_out::Laid;
pub use layer::LayerChanges;
pub use manifest::{
    Contents, Facts, FileEntry, Host, Kind, Manifest, Origin, Reference, StdioPipe, TreeSummary,
};
pub use pack::FORMAT;
pub use pending::{Files, Images, Pending};
pub use sandbox::{SandboxStore, SandboxWriter};
pub use staging::Staging;
pub use stored_file::StoredFile;
pub use tree_view::{Difference, Tree};
pub use verify::Fault;

pub use crate::digest::Digest;
use crate::sandbox::SandboxId;

/// Where checkpoints are kept unless the configuration says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/crab";

/// How often whoever waits for the right to write asks for it.
const LOCK_POLL: Duration = Duration::from_millis(10);

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
        let namespace = self.root.join(id.namespace());
        let is_new = files::make_dir_unsynced(&namespace)?;
        let writer = SandboxWriter::lock(self.sandbox(id))?;
        // The lowest comes first: for a file system with a journal that is one commit, and not one for each.
        if is_new {
            files::sync_parent(&namespace)?;
        }
        Ok(writer)
    }

    /// The same, but waits so long for whoever else writes: `crab gc`, or a shim that is about to end.
    pub fn writer_within(
        &self,
        id: &SandboxId,
        limit: Duration,
    ) -> Result<SandboxWriter, StoreError> {
        let end = Instant::now() + limit;
        loop {
            match self.writer(id) {
                Err(StoreError::Locked { .. }) if Instant::now() < end => {
                    std::thread::sleep(LOCK_POLL);
                }
                done => return done,
            }
        }
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
