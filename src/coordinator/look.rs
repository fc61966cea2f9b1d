//! What a look at a sandbox found.

use super::processes::Rested;
use crate::{engine::Reason, store::Effect};

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Empty: the sandbox is what the last checkpoint holds.
    pub(super) effects: Vec<Effect>,
    /// Files alone have changed, and none that a process stands upon: no dump is needed.
    pub(super) only_files: bool,
    /// A large file may have changed.
    pub(super) large: bool,
    /// What a person should know of how this was found.
    pub(super) note: Option<String>,
    /// The processes were found unchanged, and none ran meanwhile.
    pub(super) rested: Option<Box<Rested>>,
}

impl Look {
    /// What there is a checkpoint for, if there is to be one.
    pub(super) fn reason(&self) -> Reason {
        match &self.effects[..] {
            _ if self.only_files => Reason::OnlyFiles,
            [Effect::Files] => Reason::UsedFiles,
            _ => Reason::Processes,
        }
    }

    /// Adds an effect, once.
    pub(super) fn add(&mut self, effect: Effect) {
        if !self.effects.contains(&effect) {
            self.effects.push(effect);
        }
    }

    /// Adds to the note.
    pub(super) fn tell(&mut self, what: impl Into<String>) {
        let before = self
            .note
            .take()
            .map_or_else(String::new, |note| note + "; ");
        self.note = Some(before + &what.into());
    }

    /// Files of the host that belong to the sandbox's state have changed: no reason for a dump.
    pub(super) fn also_beside<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        self.only_files |= self.effects.is_empty();
        self.add(Effect::Files);
        let names: Vec<_> = names.collect();
        self.tell(format!("{} changed", names.join(", ")));
    }

    /// Nothing is known, so everything counts as changed.
    pub(super) fn everything(why: impl Into<String>) -> Self {
        Self {
            effects: vec![Effect::Files, Effect::Processes, Effect::Memory],
            only_files: false,
            large: true,
            note: Some(format!("all counts as changed: {}", why.into())),
            rested: None,
        }
    }
}
