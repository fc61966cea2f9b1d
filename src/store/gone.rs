//! Sandboxes that are gone, with all that is kept of them.

use std::fs;

use super::{Freed, Store, StoreError, failpoint::failpoint, files};
use crate::{sandbox::SandboxId, tree::remove_tree};

/// How the directory of a sandbox begins that is being deleted.
const GONE: &str = ".gone-";

impl Store {
    /// How large all packs are.
    pub fn size(&self) -> Result<u64, StoreError> {
        let mut sum = 0u64;
        for id in self.sandboxes()? {
            sum = sum.saturating_add(self.sandbox(&id).size()?);
        }
        Ok(sum)
    }

    /// Removes everything about a sandbox, and what an interrupted removal has left. When this
    /// returns, not even a power failure brings it back. An error if somebody writes its checkpoints.
    pub fn remove(&self, id: &SandboxId) -> Result<Freed, StoreError> {
        let writer = self.writer(id)?;
        let freed = Freed {
            turns: writer.turns()?,
            bytes: writer.size()?,
        };
        let gone = writer.dir().with_file_name(format!("{GONE}{}", id.id()));
        remove_tree(&gone)?;
        failpoint("rename a sandbox");
        fs::rename(writer.dir(), &gone).map_err(files::io("rename", writer.dir()))?;
        failpoint("sync its namespace");
        gone.parent().map_or(Ok(()), files::sync_dir)?;
        failpoint("delete a sandbox");
        remove_tree(&gone)?;
        Ok(freed)
    }

    /// Removes what interrupted removals have left.
    pub fn tidy(&self) -> Result<(), StoreError> {
        for namespace in files::names(&self.root)? {
            let dir = self.root.join(namespace);
            for name in files::all_names(&dir)? {
                if name.starts_with(GONE) {
                    remove_tree(&dir.join(name))?;
                }
            }
        }
        Ok(())
    }
}
