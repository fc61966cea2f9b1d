//! Which names are links of one inode.
//!
//! A name's links changed if, of the names that are still there, others share its inode than did
//! before. A link that was added or removed has its own entry.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
};

use rustix::fs::FileType;

use super::{
    changes::{Change, Now, What, shown_path},
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
                let facts = layer.facts(id);
                self.changes.push(Change {
                    path: shown_path(&layer.path(id)),
                    what: What::Links,
                    now: Some(Now {
                        mode: u32::from(facts.mode),
                        size: facts.size,
                        hides: false,
                    }),
                });
            }
        }
    }

    /// See [`Comparison::linked`](super::Comparison). In byte order.
    pub(super) fn linked(&self) -> Vec<(PathBuf, FileType)> {
        let layer = self.layer;
        let now = |id: Id| self.moved.get(&id).copied().unwrap_or(layer.ino(id));
        // Inodes that a name with an entry has, or had.
        let left = self
            .lost
            .iter()
            .chain(&self.changed)
            .map(|id| layer.ino(*id));
        let come = self.changed.iter().map(|id| now(*id));
        let new = self.delta.inserted.iter().map(|new| new.facts.ino);
        let inodes: HashSet<u64> = left.chain(come).chain(new).collect();
        let stayed = inodes.iter().flat_map(|ino| layer.named(*ino)).copied();
        let moved = self.moved.keys().copied();
        let others: HashSet<Id> = stayed
            .chain(moved)
            .filter(|id| layer.kind(*id).links_count() && inodes.contains(&now(*id)))
            .filter(|id| !self.lost.contains(id) && !self.changed.contains(id))
            .collect();
        let kind = |id: Id| FileType::from_raw_mode(u32::from(layer.facts(id).mode));
        let mut all: Vec<_> = others
            .into_iter()
            .map(|id| (layer.path(id), kind(id)))
            .collect();
        all.sort_unstable_by(|a, b| a.0.as_os_str().cmp(b.0.as_os_str()));
        all
    }
}
