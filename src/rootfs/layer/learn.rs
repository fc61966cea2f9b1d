//! Digests of contents after the fact.

use std::collections::HashMap;

use super::index::Layer;
use crate::digest::Digest;

impl Layer {
    /// Takes the digests that the index lacks from the capture that it describes: of files' contents
    /// ([`crate::content`]), by device and inode. Returns how many it learnt.
    ///
    /// Never from the layer itself once the sandbox runs: a store through a mapping leaves no trace
    /// but the bytes, which would then be taken for those of the capture.
    pub fn learn(&mut self, contents: &HashMap<(u64, u64), Digest>) -> usize {
        let mut learnt = 0;
        let mut lacking = self.take_unread();
        lacking.retain(|id| {
            let ino = self.ino(*id);
            let content = contents.get(&(self.dev(), ino)).copied();
            let Some(content) = content.or_else(|| self.elsewhere(ino)) else {
                return true;
            };
            self.set_content(*id, content);
            learnt += 1;
            false
        });
        self.keep_unread(lacking);
        learnt
    }

    /// The digest of an inode that another of its names has brought.
    fn elsewhere(&self, ino: u64) -> Option<Digest> {
        let mut names = self.named(ino).iter();
        names.find_map(|id| self.content(*id))
    }

    /// How many files have no digest, and so can't be acquitted.
    pub fn without_digest(&self) -> usize {
        self.ids().filter(|id| self.is_unread(*id)).count()
    }
}
