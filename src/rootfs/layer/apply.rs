//! Making the index that of a new capture.

use std::collections::HashSet;

use super::{
    changes::Comparison,
    delta::{Delta, Place},
    index::{Id, Layer},
};

/// Why a comparison could not be applied. The index is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// Another one was applied in between.
    #[error("the comparison was made with another state of the index")]
    Stale,
}

impl Layer {
    /// Makes the index that of the layer which was compared. To be called once the capture made in
    /// the same freeze as the comparison is durable; it looks at no file.
    ///
    /// New and changed files have no digest afterwards unless the comparison read them:
    /// [`Layer::learn`].
    pub fn apply(&mut self, comparison: Comparison) -> Result<(), ApplyError> {
        let delta = comparison.delta;
        if delta.generation != self.generation {
            return Err(ApplyError::Stale);
        }
        self.generation += 1;
        let dead: HashSet<Id> = delta
            .removed
            .iter()
            .flat_map(|id| self.below(*id))
            .collect();
        let moved: Vec<Id> = delta
            .updated
            .iter()
            .filter(|(id, now)| !dead.contains(id) && self.ino(*id) != now.ino)
            .map(|(id, _)| *id)
            .collect();
        let gone = self.positions(dead.iter().chain(&moved).copied());
        self.cut(&delta, &dead);
        for (id, facts) in delta.updated.iter().filter(|(id, _)| !dead.contains(id)) {
            self.set(*id, facts);
        }
        let mut new = self.grow(&delta, &dead);
        new.extend(moved);
        self.index(&gone, new);
        self.tidy();
        Ok(())
    }

    fn cut(&mut self, delta: &Delta, dead: &HashSet<Id>) {
        let parents: HashSet<Id> = delta
            .removed
            .iter()
            .filter_map(|id| self.parent(*id))
            .filter(|id| !dead.contains(id))
            .collect();
        let parents: Vec<Id> = parents.into_iter().collect();
        self.unlink(&parents, &|id| dead.contains(&id));
        for id in dead {
            self.release(*id);
        }
    }

    fn grow(&mut self, delta: &Delta, dead: &HashSet<Id>) -> Vec<Id> {
        self.make_room(delta.inserted.iter().map(|new| new.name.len()).sum());
        let mut placed: Vec<Option<Id>> = Vec::with_capacity(delta.inserted.len());
        for new in &delta.inserted {
            let parent = match new.parent {
                Place::Known(id) => (!dead.contains(&id)).then_some(id),
                Place::New(at) => placed.get(at).copied().flatten(),
            };
            placed.push(parent.map(|parent| self.insert(parent, &new.name, &new.facts)));
        }
        placed.into_iter().flatten().collect()
    }
}
