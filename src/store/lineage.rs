//! Which checkpoint a sandbox goes on from: not always its newest one, since it may have been rolled
//! back.

use super::{Checkpoint, JournalLine, SandboxStore, StoreError};
use crate::sandbox::TurnNo;

impl JournalLine {
    /// The turn that this rollback, or recovery, went back to; none for any other line, and for one
    /// that was not done. `journal` is the one that this line is from.
    pub fn went_back_to(&self, journal: &[Self]) -> Option<TurnNo> {
        let digest = self.checkpoint.filter(|_| self.trigger.is_way_back())?;
        let made = |line: &&Self| {
            line.checkpoint == Some(digest) && !line.trigger.is_way_back() && line.turn < self.turn
        };
        journal.iter().rev().find(made).map(|line| line.turn)
    }
}

impl SandboxStore {
    /// The checkpoint that the sandbox goes on from: the newest one, or the one that it was rolled
    /// back to after that. Those in between stay, as another way that it once went.
    pub fn head(&self) -> Result<Option<Checkpoint>, StoreError> {
        let kept = self.turns()?;
        let Some(&newest) = kept.last() else {
            return Ok(None);
        };
        let lines = self.journal()?.lines;
        let rollback = lines.iter().rev().find(|line| {
            line.trigger.is_way_back() && line.checkpoint.is_some() && line.turn > newest
        });
        let Some(rollback) = rollback else {
            return self.get(newest).map(Some);
        };
        if let Some(turn) = rollback.went_back_to(&lines)
            && kept.contains(&turn)
        {
            return self.get(turn).map(Some);
        }
        // The line of the checkpoint itself is lost.
        for turn in kept.iter().rev() {
            let checkpoint = self.get(*turn)?;
            if Some(checkpoint.digest) == rollback.checkpoint {
                return Ok(Some(checkpoint));
            }
        }
        self.get(newest).map(Some)
    }

    /// The checkpoint with processes that the sandbox goes on from, or, if that has none, the nearest one
    /// before it that has some.
    pub fn head_with_processes(&self) -> Result<Option<Checkpoint>, StoreError> {
        let kept = self.turns()?;
        let mut next = self.head()?;
        while let Some(checkpoint) = next {
            if checkpoint.has_processes() {
                return Ok(Some(checkpoint));
            }
            let turn = checkpoint.turn();
            let parent = checkpoint.manifest.facts.parent;
            let parent = parent.filter(|parent| *parent < turn && kept.contains(parent));
            next = parent.map(|parent| self.get(parent)).transpose()?;
        }
        self.newest_with_processes()
    }

    /// The newest checkpoint that has processes. One that cannot be read is passed over: what it holds
    /// nobody can have.
    pub fn newest_with_processes(&self) -> Result<Option<Checkpoint>, StoreError> {
        let kept = self.turns()?.into_iter().rev();
        let mut readable = kept.filter_map(|turn| self.get(turn).ok());
        Ok(readable.find(Checkpoint::has_processes))
    }
}
