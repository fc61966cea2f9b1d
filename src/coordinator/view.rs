//! What an agent may know of its own turns (option `view`): how many have ended, and whether the sandbox
//! was taken back.
//!
//! It is told before anything of the sandbox can look: before a turn's gate opens, and before the processes
//! of a rollback run.

use serde::Serialize;

use super::{subject::Subject, worker::Worker};
use crate::{sandbox::TurnNo, store::JournalLine};

/// What there is to know.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct View {
    /// The last turn that has ended; 0 before the first.
    pub turn: TurnNo,
    /// Null if the sandbox was never taken back.
    pub went_back: Option<WentBack>,
}

/// That a sandbox was taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WentBack {
    /// How often: rollbacks and recoveries, and one for a start from a checkpoint.
    pub times: u64,
    /// The turn that had ended last when it was, the last time.
    pub from: TurnNo,
    /// The turn whose state it went on from then.
    pub to: TurnNo,
}

impl View {
    /// What a journal tells. `started_from`: the turn whose checkpoint the sandbox was started from.
    pub fn of(journal: &[JournalLine], started_from: Option<TurnNo>) -> Self {
        let mut view = Self::default();
        for line in journal {
            if let Some(to) = line.went_back_to(journal) {
                view.go_back(to);
            }
            view.turn = view.turn.max(line.turn);
        }
        if let Some(to) = started_from {
            view.go_back(to);
        }
        view
    }

    /// It is taken back now.
    fn go_back(&mut self, to: TurnNo) {
        let times = self.went_back.as_ref().map_or(0, |before| before.times);
        self.went_back = Some(WentBack {
            times: times.saturating_add(1),
            from: self.turn,
            to,
        });
    }
}

impl Worker {
    /// A turn has ended.
    pub(super) fn show_turn(&mut self, subject: &dyn Subject, turn: TurnNo) {
        if let Some(view) = self.view() {
            view.turn = turn;
            self.show(subject);
        }
    }

    /// The sandbox is about to be taken back to `to`, which is turn `turn`. Returns what to show should
    /// nothing come of it.
    pub(super) fn show_way_back(
        &mut self,
        subject: &dyn Subject,
        turn: TurnNo,
        to: TurnNo,
    ) -> Option<View> {
        let before = self.view()?.clone();
        let view = self.view()?;
        view.go_back(to);
        view.turn = turn;
        self.show(subject);
        Some(before)
    }

    /// Nothing has come of it.
    pub(super) fn show_again(&mut self, subject: &dyn Subject, before: Option<View>) {
        if before.is_some() {
            self.view = before;
            self.show(subject);
        }
    }

    /// None if nobody wants one.
    fn view(&mut self) -> Option<&mut View> {
        if self.settings.view && self.view.is_none() {
            let journal = self.store.journal();
            let lines = journal.map(|journal| journal.lines).unwrap_or_else(|e| {
                log::warn!("{}: the view: {e}", self.store.id());
                Vec::new()
            });
            self.view = Some(View::of(&lines, self.settings.started_from));
        }
        self.view.as_mut()
    }

    fn show(&self, subject: &dyn Subject) {
        let shown = self.view.as_ref().map(|view| subject.show(view));
        if let Some(Err(e)) = shown {
            log::error!(
                "{}: what it sees of its turns is out of date: {e}",
                self.store.id()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::{digest::Digest, store::Trigger};

    #[test]
    fn a_journal_tells_how_often_and_where_to() {
        let line = |turn: u64, trigger: Trigger, digest: Option<u8>| {
            let now = OffsetDateTime::UNIX_EPOCH;
            let mut line = JournalLine::new(TurnNo(turn), trigger, now, now);
            line.checkpoint = digest.map(|byte| Digest::of(&[byte]));
            line
        };
        assert_eq!(View::of(&[], None), View::default());
        let journal = [
            line(1, Trigger::Exec, Some(1)),
            line(2, Trigger::Exec, Some(2)),
            line(3, Trigger::Rollback, Some(1)),
            line(4, Trigger::Rollback, None),
            line(5, Trigger::Exec, None),
            line(6, Trigger::Recovery, Some(2)),
        ];
        let went = |times, from, to| {
            Some(WentBack {
                times,
                from: TurnNo(from),
                to: TurnNo(to),
            })
        };
        let view = View::of(&journal[..4], None);
        assert_eq!((view.turn, view.went_back), (TurnNo(4), went(1, 2, 1)));
        let view = View::of(&journal, Some(TurnNo(1)));
        assert_eq!((view.turn, view.went_back), (TurnNo(6), went(3, 6, 1)));
    }
}
