//! Going back to a checkpoint, as one of a sandbox's turns: the checks before it, and the journal.
//!
//! The thread that takes the turns does it, so no turn is taken meanwhile.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam_channel::{Sender, bounded};
use serde::{Serialize, Serializer, ser::SerializeMap};
use time::OffsetDateTime;

use super::{
    freeze::Held,
    machine::Event,
    rollback_files::{OnlyFiles, Went},
    subject::Subject,
    turns::{Job, Turns},
    worker::Worker,
};
use crate::{
    sandbox::TurnNo,
    store::{
        Checkpoint, Digest, Effect, JournalLine, Laid, StoreError, Sync as Durability, Trigger,
    },
};

/// So many characters of why processes were replaced are in the journal.
const MAX_REASON: usize = 300;

/// What one part of a rollback is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// The checkpoint is read, checked against its digests and laid out.
    Verify,
    /// The journal tells of it.
    Journal,
    /// From the wait for execs that are being started until all stands still.
    Freeze,
    /// Until all processes are gone.
    Kill,
    /// Until the files are in their place.
    Files,
    /// Until the processes go on.
    Restore,
}

/// How long each step took.
#[derive(Debug, Clone)]
pub struct Steps {
    last: Instant,
    steps: Vec<(Step, Duration)>,
}

impl Steps {
    /// The first step begins.
    pub fn begin() -> Self {
        Self {
            last: Instant::now(),
            steps: Vec::new(),
        }
    }

    /// A step is done, the next one begins.
    pub fn done(&mut self, step: Step) {
        let now = Instant::now();
        self.steps.push((step, now - self.last));
        self.last = now;
    }

    /// How long all of them took together.
    pub(super) fn total(&self) -> Duration {
        self.steps.iter().map(|(_, took)| *took).sum()
    }

    /// How long all of these took together.
    fn of(&self, which: &[Step]) -> Duration {
        let steps = self.steps.iter();
        steps
            .filter(|(step, _)| which.contains(step))
            .map(|(_, took)| *took)
            .sum()
    }
}

/// As an object of microseconds.
impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.steps.len()))?;
        for (step, took) in &self.steps {
            map.serialize_entry(step, &micros(*took))?;
        }
        map.end()
    }
}

/// A rollback that was done.
#[derive(Debug, Clone, Serialize)]
pub struct RolledBack {
    /// Its own number: what the sandbox is now.
    pub turn: TurnNo,
    /// The last turn before it.
    pub from: TurnNo,
    /// The turn that it has gone back to.
    pub to: TurnNo,
    /// The checkpoint of that.
    pub checkpoint: Digest,
    /// How long each step took, in microseconds.
    pub steps_us: Steps,
    /// All of it, in microseconds.
    pub total_us: u64,
}

/// A rollback that was not done.
#[derive(Debug, Clone)]
pub enum Failure {
    /// The sandbox is as it was.
    Untouched(String),
    /// Its processes are gone.
    Ended(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::Untouched(why) | Self::Ended(why)) = self;
        f.write_str(why)
    }
}

impl Failure {
    fn untouched(e: impl std::fmt::Display) -> Self {
        Self::Untouched(e.to_string())
    }

    fn into_text(self) -> String {
        match self {
            Self::Untouched(text) | Self::Ended(text) => text,
        }
    }
}

/// What the sandbox's processes and files are replaced with.
pub struct Replacement<'a> {
    /// A checkpoint that was laid out, and so is whole; or why there is none, though the sandbox cannot stay
    /// what it is.
    pub laid: Result<Arc<Laid>, String>,
    /// For what a restore needs for a while.
    pub scratch: &'a Path,
    /// The sandbox stands still, and its files are half-way: none of its processes may run again.
    pub half_way: Option<Held>,
}

/// Whoever takes the sandbox itself back.
pub type GoBack = Box<dyn FnOnce(Replacement<'_>) -> Result<Steps, Failure> + Send>;

/// How a sandbox may be taken back.
enum Way {
    Files(Box<OnlyFiles>),
    /// And why not by files alone.
    All(Box<Laid>, String),
}

/// A rollback that waits for the turns before it.
pub(super) struct Order {
    to: TurnNo,
    go_back: GoBack,
    reply: Sender<Result<RolledBack, Failure>>,
}

impl Turns {
    /// Goes back to the checkpoint of `to`, after the turns that have ended.
    pub fn roll_back(&self, to: TurnNo, go_back: GoBack) -> Result<RolledBack, Failure> {
        let (reply, answer) = bounded(1);
        let gone = || Failure::Untouched("the sandbox is going away".into());
        let order = Order { to, go_back, reply };
        if !self.send(Job::Rollback(order)) {
            return Err(gone());
        }
        answer.recv().map_err(|_| gone())?
    }
}

impl Worker {
    pub(super) fn roll_back(&mut self, subject: &dyn Subject, order: Order) {
        let Order { to, go_back, reply } = order;
        self.doors.on(Event::GoBack);
        let done = self.go_back(subject, to, go_back);
        self.doors.on(Event::WentBack);
        if let Err(Failure::Untouched(e) | Failure::Ended(e)) = &done {
            log::error!("{}: roll back to turn {to}: {e}", self.store.id());
        }
        // Nobody waits any more: the journal has it.
        let _ = reply.send(done);
    }

    fn go_back(
        &mut self,
        subject: &dyn Subject,
        to: TurnNo,
        go_back: GoBack,
    ) -> Result<RolledBack, Failure> {
        let begin = Instant::now();
        let started_at = OffsetDateTime::now_utc();
        let mut steps = Steps::begin();
        let checkpoint = self.restorable(to)?;
        let way = self.way(subject, &checkpoint)?;
        let turn = self.next_turn().map_err(Failure::untouched)?;
        let from = TurnNo(turn.0.saturating_sub(1));
        steps.done(Step::Verify);
        let mut line = JournalLine::new(turn, Trigger::Rollback, started_at, started_at);
        line.effects = vec![Effect::Files, Effect::Processes, Effect::Memory];
        line.checkpoint = Some(checkpoint.digest);
        line.note = Some(format!("rolled back from turn {from} to turn {to}"));
        // Before anything is touched: a sandbox must not go on from where the journal does not know
        // of. Whoever dies in the middle has been told to go there, too.
        let told = self.store.append(&line, Durability::Now);
        told.map_err(Failure::untouched)?;
        steps.done(Step::Journal);
        let shown = self.show_way_back(subject, turn, to);
        let (gone, instead) = self.go(subject, &checkpoint, way, go_back);
        // Of one that was refused a turn that ended meanwhile is one like any other.
        if !matches!(gone, Err(Failure::Untouched(_))) {
            self.undo_what_ended();
        }
        match &gone {
            Ok(shims) => {
                steps.steps.extend(shims.steps.iter().copied());
                steps.last = shims.last;
                line.freeze_us = micros(steps.of(&[Step::Kill, Step::Files, Step::Restore]));
                line.durable_us = Some(micros(begin.elapsed()));
                match instead {
                    None => {
                        self.head = Some(to);
                        self.store.goes_on_from(to);
                        line.effects = vec![Effect::Files];
                    }
                    Some(why) => {
                        self.goes_on_from(subject, to, format!("it was rolled back to turn {to}"));
                        let note = line.note.get_or_insert_default();
                        let why: String = why.chars().take(MAX_REASON).collect();
                        *note += &format!(", and its processes, too: {why}");
                    }
                }
            }
            Err(Failure::Ended(e)) => {
                line.checkpoint = None;
                line.note = Some(format!(
                    "rollback to turn {to} failed, and the sandbox was ended: {e}"
                ));
            }
            Err(Failure::Untouched(e)) => {
                self.show_again(subject, shown);
                line.checkpoint = None;
                line.effects.clear();
                line.note = Some(format!("rollback to turn {to} refused: {e}"));
            }
        }
        line.ended_at = OffsetDateTime::now_utc();
        let sync = match gone {
            // Only how long it took is new.
            Ok(_) => Durability::Later,
            Err(_) => Durability::Now,
        };
        if let Err(e) = self.store.append(&line, sync) {
            log::error!(
                "{}: what became of turn {turn} is not in the journal: {e}",
                self.store.id()
            );
        }
        gone?;
        Ok(RolledBack {
            turn,
            from,
            to,
            checkpoint: checkpoint.digest,
            steps_us: steps,
            total_us: micros(begin.elapsed()),
        })
    }

    /// Files alone, if that may do; else all of the checkpoint must be there before anything is touched.
    fn way(&mut self, subject: &dyn Subject, checkpoint: &Checkpoint) -> Result<Way, Failure> {
        match self.only_files(subject, checkpoint) {
            Ok(files) => Ok(Way::Files(Box::new(files))),
            Err(why) => Ok(Way::All(Box::new(self.whole(checkpoint)?), why)),
        }
    }

    /// Takes the sandbox back. Also tells why not by files alone, if it was not.
    fn go(
        &mut self,
        subject: &dyn Subject,
        checkpoint: &Checkpoint,
        way: Way,
        go_back: GoBack,
    ) -> (Result<Steps, Failure>, Option<String>) {
        let scratch = self.store.scratch_dir();
        let replace = |laid: Result<Laid, String>, half_way| {
            go_back(Replacement {
                laid: laid.map(Arc::new),
                scratch: &scratch,
                half_way,
            })
        };
        let files = match way {
            Way::All(laid, why) => return (replace(Ok(*laid), None), Some(why)),
            Way::Files(files) => files,
        };
        match self.back_by_files(subject, *files) {
            Went::Back(steps) => (Ok(steps), None),
            Went::Not(why) => {
                let laid = self.whole(checkpoint);
                (laid.and_then(|laid| replace(Ok(laid), None)), Some(why))
            }
            Went::HalfWay(why, held, _latched) => {
                log::warn!("{}: files alone: {why}", self.store.id());
                let laid = self.whole(checkpoint);
                let laid = laid.map_err(|e| format!("{why}; {}", e.into_text()));
                (replace(laid, Some(held)), Some(why))
            }
        }
    }

    /// Turns that ended while nobody knew of the way back are none any more.
    pub(super) fn undo_what_ended(&mut self) {
        self.void_before = Some(Instant::now());
    }

    /// What was known of the sandbox is no longer so.
    pub(super) fn goes_on_from(&mut self, subject: &dyn Subject, to: TurnNo, why: String) {
        self.head = Some(to);
        self.store.goes_on_from(to);
        self.artefacts = None;
        self.chain = None;
        if let Some(inspection) = &mut self.inspection {
            inspection.follow(subject.to_watch(), why);
        }
    }

    /// A checkpoint that has processes.
    pub(super) fn restorable(&self, turn: TurnNo) -> Result<Checkpoint, Failure> {
        let checkpoint = self.store.get(turn).map_err(Failure::untouched)?;
        match checkpoint.has_processes() {
            true => Ok(checkpoint),
            false => Err(Failure::Untouched(format!(
                "the checkpoint of turn {turn} is {notes}; no rollback brings back what is not there. \
                 To boot on its files, stop the sandbox, and then: crab restore {id}@{turn} --start",
                notes = checkpoint.manifest.facts.notes.join("; "),
                id = self.store.id().id(),
            ))),
        }
    }

    /// All of it, laid out: so it was checked to its last byte.
    pub(super) fn whole(&self, checkpoint: &Checkpoint) -> Result<Laid, Failure> {
        let turn = checkpoint.turn();
        let broken = |e: StoreError| {
            Failure::Untouched(format!("the checkpoint of turn {turn} is broken ({e})"))
        };
        if let Some(path) = checkpoint.changed_reference().map_err(broken)? {
            return Err(Failure::Untouched(format!(
                "the processes of turn {turn} were dumped earlier, upon another {path:?} than it has"
            )));
        }
        let laid = checkpoint.lay_out(&self.store.scratch_dir());
        laid.map_err(broken)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
