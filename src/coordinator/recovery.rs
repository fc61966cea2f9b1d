//! A sandbox that has died goes on from its last checkpoint with processes: which one, how often it is
//! tried, and the journal.
//!
//! The thread that takes the turns does it, after the turns that had ended before.

use std::{path::Path, sync::Arc, time::Duration};

use crossbeam_channel::{Sender, bounded};
use time::OffsetDateTime;

use super::{
    machine::Event,
    rollback::{Failure, Steps},
    subject::Subject,
    turns::{Job, Turns},
    worker::{Worker, micros, text},
};
use crate::{
    sandbox::TurnNo,
    store::{Effect, JournalLine, Laid, Sync as Durability, Trigger},
};

/// How long each try in a row waits before it begins. A turn ends the row.
const BACK_OFF: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// A sandbox that did not come back.
#[derive(Debug, Clone)]
pub enum Lost {
    /// It is not tried, or not any more.
    GivenUp(String),
    /// This try has failed.
    Failed(String),
}

/// Whoever brings the processes back: from a checkpoint that was laid out, and so is whole, with a
/// directory for what a restore needs for a while.
pub type BringBack = Box<dyn FnOnce(TurnNo, Arc<Laid>, &Path) -> Result<Steps, Failure> + Send>;

/// A recovery that waits for the turns before it.
pub(super) struct Order {
    death: String,
    bring_back: BringBack,
    reply: Sender<Result<TurnNo, Lost>>,
}

impl Turns {
    /// Goes on from the last checkpoint with processes; returns the recovery's own number. `death`: how
    /// the sandbox died, for the journal.
    pub fn recover(&self, death: String, bring_back: BringBack) -> Result<TurnNo, Lost> {
        let (reply, answer) = bounded(1);
        let gone = || Lost::GivenUp("the sandbox is going away".into());
        let order = Order {
            death,
            bring_back,
            reply,
        };
        if !self.send(Job::Recovery(order)) {
            return Err(gone());
        }
        answer.recv().map_err(|_| gone())?
    }
}

impl Worker {
    pub(super) fn recover(&mut self, subject: &dyn Subject, order: Order) {
        let Order {
            death,
            bring_back,
            reply,
        } = order;
        self.doors.on(Event::Recover);
        let done = self.go_on(subject, &death, bring_back);
        self.doors.on(Event::Recovered);
        match &done {
            Ok(turn) => log::warn!("{}: {death}: it goes on as turn {turn}", self.store.id()),
            Err(Lost::GivenUp(e) | Lost::Failed(e)) => {
                log::error!("{}: {death}: it does not come back: {e}", self.store.id());
            }
        }
        // Nobody waits any more: the journal has it.
        let _ = reply.send(done);
    }

    /// A turn was taken: whatever it dies of next, it has got on.
    pub(super) fn got_on(&mut self) {
        self.recoveries = 0;
    }

    fn go_on(
        &mut self,
        subject: &dyn Subject,
        death: &str,
        bring_back: BringBack,
    ) -> Result<TurnNo, Lost> {
        let given_up = |e: String| Lost::GivenUp(e);
        let Some(wait) = BACK_OFF.get(self.recoveries) else {
            return Err(Lost::GivenUp(format!(
                "it has been brought back {} times without a turn in between",
                BACK_OFF.len()
            )));
        };
        let last = self.store.head_with_processes();
        let Some(last) = last.map_err(text).map_err(given_up)? else {
            return Err(given_up("it has no checkpoint with processes".into()));
        };
        let to = last.turn();
        if self.doors.wait_doomed(*wait) {
            return Err(given_up("it is being killed".into()));
        }
        self.recoveries += 1;
        let untouched = |e: Failure| given_up(e.to_string());
        let checkpoint = self.restorable(to).map_err(untouched)?;
        let laid = self.whole(&checkpoint).map_err(untouched)?;
        let turn = self.next_turn().map_err(text).map_err(given_up)?;
        let now = OffsetDateTime::now_utc();
        let mut line = JournalLine::new(turn, Trigger::Recovery, now, now);
        line.effects = vec![Effect::Files, Effect::Processes, Effect::Memory];
        line.checkpoint = Some(checkpoint.digest);
        let before = TurnNo(turn.0.saturating_sub(1));
        line.note = Some(format!(
            "{death}: went back from turn {before} to turn {to}"
        ));
        // Before anything is touched, as for a rollback.
        let told = self.store.append(&line, Durability::Now);
        told.map_err(text).map_err(given_up)?;
        let shown = self.show_way_back(subject, turn, to);
        let back = bring_back(to, Arc::new(laid), &self.store.scratch_dir());
        self.undo_what_ended();
        match &back {
            Ok(steps) => {
                line.durable_us = Some(micros(steps.total()));
                self.goes_on_from(
                    subject,
                    to,
                    format!("it went on from turn {to} after its death"),
                );
            }
            Err(e) => {
                self.show_again(subject, shown);
                line.checkpoint = None;
                line.note = Some(format!("{death}: recovery from turn {to} failed: {e}"));
            }
        }
        line.ended_at = OffsetDateTime::now_utc();
        if let Err(e) = self.store.append(&line, Durability::Later) {
            log::error!(
                "{}: what became of turn {turn} is not in the journal: {e}",
                self.store.id()
            );
        }
        match back {
            Ok(_) => Ok(turn),
            Err(Failure::Untouched(e)) => Err(Lost::GivenUp(e)),
            Err(Failure::Ended(e)) => Err(Lost::Failed(e)),
        }
    }
}
