//! Which names are links of one inode.
//!
//! A name's links changed if, of the names that are still there, others share its inode than did
//! before. A link that was added or removed has its own entry.

use std::collections::{HashMap, HashSet};

use super::{
    changes::{Change, What, shown_path},
    compare::Look,
    index::Id,
};

impl Look<'_> {
    /// Only inodes that some name came to or left can have other links.
    pub(super) fn links(&mut self) {
        let layer = self.layer;
        let touched = self.moved.iter();
        let inodes: HashSet<u64> = touched
            .flat_map(|(id, now)| [layer.ino(*id), *now])
            .collect();
        let names: Vec<(Id, u64, u64)> = inodes
            .into_iter()
            .flat_map(|ino| layer.named(ino))
            .filter(|id| layer.kind(**id).links_count() && !self.lost.contains(id))
            .map(|id| {
                let then = layer.ino(*id);
                (*id, then, self.moved.get(id).copied().unwrap_or(then))
            })
            .collect();
        // Equal sets have equal sizes, and their intersection has that size, too.
        let (mut before, mut after, mut both) = (HashMap::new(), HashMap::new(), HashMap::new());
        for (_, then, now) in &names {
            *before.entry(*then).or_insert(0) += 1;
            *after.entry(*now).or_insert(0) += 1;
            *both.entry((*then, *now)).or_insert(0) += 1;
        }
        for (id, then, now) in names {
            let (before, after, both): (&u32, &u32, &u32) =
                (&before[&then], &after[&now], &both[&(then, now)]);
            if (before != both || after != both) && self.changed.insert(id) {
                let path = shown_path(&layer.path(id));
                let what = What::Links;
                self.changes.push(Change { path, what });
            }
        }
    }
}
