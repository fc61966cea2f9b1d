//! Digests of contents after the fact.

use std::{os::fd::AsFd, path::Path};

use super::{
    compare::found,
    content::Reader,
    facts::{Digest, Facts, Kind, Verdict, View},
    index::{Id, Layer},
    listing,
};
use crate::tree::{self, TreeError};

impl Layer {
    /// Reads the digests that the index lacks out of a copy of the layer: the capture that the
    /// index describes, which nobody writes to any more. Returns how many it learnt.
    ///
    /// Never out of the layer itself once the sandbox runs: a store through a mapping leaves no
    /// trace but the bytes, which would then be taken for those of the capture.
    ///
    /// A file that the copy has not, or has with other attributes, is left without a digest. After
    /// an error, what was learnt before it stays.
    pub fn learn(&mut self, copy: &Path, stop: &dyn Fn() -> bool) -> Result<usize, TreeError> {
        let root = tree::open_root(copy)?;
        let mut reader = Reader::new(stop);
        let mut learnt = 0;
        let lacking: Vec<Id> = self.lacking().collect();
        for id in lacking {
            let ino = self.ino(id);
            if let Some(digest) = self.elsewhere(ino) {
                self.set_content(id, digest);
                learnt += 1;
                continue;
            }
            let path = self.path(id);
            let shown = copy.join(&path);
            let Some((fd, stat)) = listing::reach(&root, &path, &shown)? else {
                continue;
            };
            let found = found(fd.as_fd(), &stat, &shown);
            reader.check_stop(&found)?;
            let facts = Facts::of(&found, View::Overlay)?;
            if facts.verdict(&self.facts(id)) != Verdict::ReadIt {
                continue;
            }
            let digest = reader.digest(&found)?;
            self.set_content(id, digest);
            learnt += 1;
        }
        Ok(learnt)
    }

    /// The digest of an inode that another of its names has brought.
    fn elsewhere(&self, ino: u64) -> Option<Digest> {
        let mut names = self.named(ino).iter();
        names.find_map(|id| self.content(*id))
    }

    /// How many files have no digest, and so can't be acquitted.
    pub fn without_digest(&self) -> usize {
        self.lacking().count()
    }

    fn lacking(&self) -> impl Iterator<Item = Id> + '_ {
        self.ids()
            .filter(|id| self.kind(*id) == Kind::File && self.content(*id).is_none())
    }
}
