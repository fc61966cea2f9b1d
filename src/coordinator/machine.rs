//! Where the coordinator is with one sandbox: its states, what moves it, and from where to where.
//!
//! Two regions that move side by side: whether the sandbox *lives*, which its clients and the kernel
//! decide, and what crab *does* with it, which the thread that takes its turns decides. The table of all
//! transitions is in `docs/coordinator.md`; a test compares the two.

use std::fmt;

/// Whether the sandbox lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Life {
    /// It runs, or its client has paused it.
    #[default]
    Alive,
    /// Its processes are dead, and others may take their place.
    Fallen,
    /// It is to die, or is dead: no more cuts, and whoever waits at the doors meets its end.
    Doomed,
}

/// What crab does with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Work {
    /// Nothing, or what concerns its checkpoints alone.
    #[default]
    Resting,
    /// A turn has ended, or somebody wants a checkpoint: it is looked at.
    Looking,
    /// It has changed, and waits for the host's budget.
    Waiting,
    /// The cut: latched, and for a part of it frozen.
    Cutting,
    /// It runs again, and what was captured is made durable.
    Draining,
    /// A rollback makes ready: the checkpoint is read, the journal written.
    GoingBack,
    /// Its processes and files are replaced: what ends meanwhile ends no turn.
    Replacing,
    /// It has died, and a checkpoint is made ready and restored.
    Recovering,
}

/// What moves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A turn has ended, or a checkpoint was asked for, and its thread has come to it.
    Begin,
    /// Nothing has changed, or nothing that can be kept.
    Unchanged,
    /// A checkpoint is to be taken: the budget is asked. After a cut that showed that files alone will
    /// not do, once more.
    Ask,
    /// The budget has granted it.
    Granted,
    /// The cut is over.
    Captured,
    /// The checkpoint is durable.
    Durable,
    /// There is no checkpoint of this turn.
    Failed,
    /// A rollback begins.
    GoBack,
    /// It is latched, and its turn undone.
    Replace,
    /// Others have taken the place of its processes, or nothing was touched.
    Replaced,
    /// The rollback is over, however.
    WentBack,
    /// A recovery begins.
    Recover,
    /// It is over, however.
    Recovered,
    /// init has died, and may come back.
    Fall,
    /// It has come back.
    Rise,
    /// It is to die, or does not come back.
    GiveUp,
    /// It could not be killed.
    TakeHeart,
}

/// A transition that there is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} while the sandbox is {life:?} and crab is {work:?}")]
pub struct Illegal {
    life: Life,
    work: Work,
    event: Event,
}

/// Both regions of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Machine {
    /// Whether it lives.
    pub life: Life,
    /// What crab does with it.
    pub work: Work,
}

impl Machine {
    /// Where an event leads.
    pub fn after(self, event: Event) -> Result<Self, Illegal> {
        let Self { life, work } = self;
        match (life.after(event), work.after(event)) {
            (Some(life), None) => Ok(Self { life, work }),
            (None, Some(work)) => Ok(Self { life, work }),
            _ => Err(Illegal { life, work, event }),
        }
    }
}

impl Life {
    fn after(self, event: Event) -> Option<Self> {
        use Life::{Alive, Doomed, Fallen};
        Some(match (self, event) {
            (Alive, Event::Fall) => Fallen,
            (Fallen, Event::Rise) => Alive,
            // A client wants it dead while it comes back.
            (Doomed, Event::Fall | Event::Rise) => Doomed,
            (_, Event::GiveUp) => Doomed,
            // Of two who tried, the second one.
            (Doomed | Alive, Event::TakeHeart) => Alive,
            _ => return None,
        })
    }
}

impl Work {
    fn after(self, event: Event) -> Option<Self> {
        use Event::{
            Ask, Begin, Captured, Durable, Failed, GoBack, Granted, Recover, Recovered, Replace,
            Replaced, Unchanged, WentBack,
        };
        use Work::{
            Cutting, Draining, GoingBack, Looking, Recovering, Replacing, Resting, Waiting,
        };
        Some(match (self, event) {
            (Resting, Begin) => Looking,
            (Looking | Draining, Unchanged) => Resting,
            (Looking | Cutting, Ask) => Waiting,
            (Waiting, Granted) => Cutting,
            (Cutting, Captured) => Draining,
            (Draining, Durable) => Resting,
            (Looking | Waiting | Cutting | Draining, Failed) => Resting,
            (Resting, GoBack) => GoingBack,
            (GoingBack, Replace) => Replacing,
            (Replacing, Replaced) => GoingBack,
            (GoingBack, WentBack) => Resting,
            (Resting, Recover) => Recovering,
            (Recovering, Recovered) => Resting,
            _ => return None,
        })
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resting => "",
            Self::Looking => "looking",
            Self::Waiting => "waiting for the budget",
            Self::Cutting => "in the cut",
            Self::Draining => "writing",
            Self::GoingBack | Self::Replacing => "rolling back",
            Self::Recovering => "recovering",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIVES: [Life; 3] = [Life::Alive, Life::Fallen, Life::Doomed];
    const WORKS: [Work; 8] = [
        Work::Resting,
        Work::Looking,
        Work::Waiting,
        Work::Cutting,
        Work::Draining,
        Work::GoingBack,
        Work::Replacing,
        Work::Recovering,
    ];
    const EVENTS: [Event; 17] = [
        Event::Begin,
        Event::Unchanged,
        Event::Ask,
        Event::Granted,
        Event::Captured,
        Event::Durable,
        Event::Failed,
        Event::GoBack,
        Event::Replace,
        Event::Replaced,
        Event::WentBack,
        Event::Recover,
        Event::Recovered,
        Event::Fall,
        Event::Rise,
        Event::GiveUp,
        Event::TakeHeart,
    ];

    /// The rows of a table: each state with each event that it knows.
    fn rows<S: Copy + fmt::Debug>(states: &[S], after: impl Fn(S, Event) -> Option<S>) -> String {
        let mut rows = String::new();
        for state in states {
            for event in EVENTS {
                if let Some(next) = after(*state, event) {
                    rows += &format!("| {state:?} | {event:?} | {next:?} |\n");
                }
            }
        }
        rows
    }

    #[test]
    fn the_document_has_every_transition_and_no_other() {
        let document = include_str!("../../docs/coordinator.md");
        for table in [rows(&WORKS, Work::after), rows(&LIVES, Life::after)] {
            let header = "| in | on | to |\n| --- | --- | --- |\n";
            let wanted = format!("{header}{table}\n");
            assert!(
                document.contains(&wanted),
                "docs/coordinator.md lacks:\n{wanted}"
            );
        }
    }

    #[test]
    fn an_event_moves_one_region_and_leaves_the_other() {
        for event in EVENTS {
            let of_life = LIVES.iter().any(|life| life.after(event).is_some());
            let of_work = WORKS.iter().any(|work| work.after(event).is_some());
            assert!(of_life != of_work, "{event:?}");
        }
        let machine = Machine {
            life: Life::Doomed,
            work: Work::Cutting,
        };
        let after = machine.after(Event::Captured).unwrap();
        assert_eq!((after.life, after.work), (Life::Doomed, Work::Draining));
    }

    #[test]
    fn whatever_it_does_it_comes_to_rest_and_whoever_lives_can_die() {
        for work in WORKS {
            let mut reached = vec![work];
            for _ in WORKS {
                let more = reached
                    .iter()
                    .flat_map(|work| EVENTS.map(|e| work.after(e)));
                let more: Vec<Work> = more.flatten().collect();
                reached.extend(more);
                reached.dedup();
            }
            assert!(reached.contains(&Work::Resting), "{work:?}");
        }
        for life in LIVES {
            assert_eq!(life.after(Event::GiveUp), Some(Life::Doomed));
        }
    }

    #[test]
    fn what_is_no_transition_says_what_was_wrong() {
        let illegal = Machine::default().after(Event::Durable).unwrap_err();
        assert_eq!(
            illegal.to_string(),
            "Durable while the sandbox is Alive and crab is Resting"
        );
    }
}
