//! Who takes the turns of one sandbox, one after the other: what it knows, and what it does at a boundary.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use time::OffsetDateTime;

use super::{
    budget::Budget,
    chain::Chain,
    doors::Doors,
    haste::Haste,
    inspection::Inspection,
    look::Look,
    machine::Event,
    subject::{Subject, scene},
    take::{Order, Taken, WithoutProcesses},
    turns::{Asked, Job, Proof, Settings, ShutGate},
    view::View,
};
use crate::{
    engine::{Plan, Reason},
    rootfs::Overlay,
    sandbox::TurnNo,
    store::{Checkpoint, JournalLine, SandboxWriter, StoreError, Sync as Durability, Trigger},
};

/// The thread that takes them.
pub(super) struct Worker {
    subject: Weak<dyn Subject>,
    pub(super) store: SandboxWriter,
    pub(super) doors: Arc<Doors>,
    pub(super) settings: Settings,
    /// Our part of the host's budget, from the first checkpoint on.
    pub(super) budget: Option<Budget>,
    /// The newest number given away.
    last_turn: Option<TurnNo>,
    /// The checkpoint that the sandbox goes on from.
    pub(super) head: Option<TurnNo>,
    /// Turns that ended before were undone by a rollback.
    pub(super) void_before: Option<Instant>,
    /// How often it was brought back since the last turn.
    pub(super) recoveries: usize,
    /// What the sandbox sees of its turns, if it does.
    pub(super) view: Option<View>,
    /// What is known since the last checkpoint.
    pub(super) inspection: Option<Inspection>,
    /// What the next dump can build upon.
    pub(super) chain: Option<Chain>,
    /// Why dumps do not build upon each other, as it was told last.
    pub(super) obstacle: Option<String>,
    /// What the last checkpoint has of the host's files.
    pub(super) artefacts: Option<BTreeMap<String, Vec<u8>>>,
}

impl Worker {
    pub(super) fn new(
        subject: Weak<dyn Subject>,
        store: SandboxWriter,
        doors: Arc<Doors>,
        settings: Settings,
    ) -> Self {
        Self {
            subject,
            store,
            doors,
            settings,
            budget: None,
            last_turn: None,
            head: None,
            void_before: None,
            recoveries: 0,
            view: None,
            inspection: None,
            chain: None,
            obstacle: None,
            artefacts: None,
        }
    }

    /// Until nothing more can come, or the sandbox is gone.
    pub(super) fn run(&mut self, jobs: &Receiver<Job>) {
        // Not at the first boundary: the agent waits there for the programs to be loaded.
        if let Some(subject) = self.subject.upgrade() {
            self.begin(&*subject);
        }
        while let Some(job) = self.next_job(jobs) {
            let Some(subject) = self.subject.upgrade() else {
                return;
            };
            self.work(&*subject, job);
        }
    }

    /// Waits for what is to be done next; None if nothing ever is.
    fn next_job(&self, jobs: &Receiver<Job>) -> Option<Job> {
        let Some(timer) = self.settings.timer else {
            return jobs.recv().ok();
        };
        match jobs.recv_timeout(timer) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Disconnected) => None,
            // Nobody waits for it, and the latch alone holds up whoever comes.
            Err(RecvTimeoutError::Timeout) => Some(Job::Boundary {
                trigger: Trigger::Timer,
                at: Instant::now(),
                gate: ShutGate::NONE,
                reply: None,
            }),
        }
    }

    fn work(&mut self, subject: &dyn Subject, job: Job) {
        let now = Instant::now();
        let (trigger, begin, mut gate, asked, reply) = match job {
            Job::Boundary { at, reply, .. } if self.void_before.is_some_and(|t| at < t) => {
                if let Some(reply) = reply {
                    let _ = reply.send(Err("the turn was undone by a rollback".into()));
                }
                return;
            }
            Job::Boundary {
                trigger,
                at,
                gate,
                reply,
            } => (trigger, at, gate, None, reply),
            Job::Checkpoint { asked, reply } => {
                let gate = ShutGate::NONE;
                (Trigger::Manual, now, gate, Some(asked), Some(reply))
            }
            Job::Rollback(order) => return self.roll_back(subject, order),
            Job::Recovery(order) => return self.recover(subject, order),
        };
        let taken = self.turn(subject, trigger, asked.as_ref(), begin, &mut gate);
        drop(gate);
        let taken = taken.and_then(|line| match asked.is_some_and(|asked| asked.prove) {
            true => self.prove(subject, line),
            false => Ok((line, Proof::NotAsked)),
        });
        match &taken {
            Ok(_) => self.got_on(),
            Err(e) => log::error!("{}: {e}", self.store.id()),
        }
        if let Some(reply) = reply {
            // Nobody waits any more: the journal has it.
            let _ = reply.send(taken);
        }
    }

    /// One turn, from its boundary, or from the moment when it was `asked` for, to its line in the journal.
    fn turn(
        &mut self,
        subject: &dyn Subject,
        trigger: Trigger,
        asked: Option<&Asked>,
        begin: Instant,
        gate: &mut ShutGate,
    ) -> Result<JournalLine, String> {
        let haste = (trigger != Trigger::Timer).then(Haste::begin);
        let parent = self.parent().map_err(text)?;
        // Nobody mounts another one meanwhile: that is a rollback's affair, and we do them.
        let overlay = subject.overlay();
        let turn = self.next_turn().map_err(text)?;
        self.doors.on(Event::Begin);
        let ended_at = OffsetDateTime::now_utc();
        let started_at = self.doors.take_turn_start().unwrap_or(ended_at);
        let mut line = JournalLine::new(turn, trigger, started_at, ended_at);
        let latest = parent.as_ref().map(Checkpoint::turn);
        let look = self.look(subject, &overlay, latest, &mut line);
        if asked.is_none() && look.effects.is_empty() {
            self.doors.on(Event::Unchanged);
            line.note = look.note;
            line.plan = Some(Plan::nothing().to_string());
            if line.trigger != Trigger::Timer {
                self.show_turn(subject, turn);
            }
            return self.nothing_new(gate, line);
        }
        drop(haste);
        // Asked for by hand, it is to be a whole one, and nobody is given less than they asked for.
        let reason = asked.map_or_else(|| look.reason(), |_| Reason::AskedFor);
        line.effects = look.effects;
        line.note = look.note;
        let order = Order {
            turn,
            parent,
            overlay,
            reason,
            large: look.large,
            without_processes: WithoutProcesses::of(asked),
        };
        let taken = self.take(subject, &order, gate, &mut line);
        self.doors.on(match &taken {
            Ok(Taken::Checkpoint(_)) => Event::Durable,
            Ok(Taken::Nothing) => Event::Unchanged,
            Err(_) => Event::Failed,
        });
        match &taken {
            Ok(Taken::Checkpoint(done)) => {
                let (checkpoint, _) = &**done;
                line.checkpoint = Some(checkpoint.digest);
                line.bytes_written = checkpoint.stored;
                line.durable_us = Some(micros(begin.elapsed()));
            }
            Ok(Taken::Nothing) => {}
            Err(e) => line.note = Some(format!("not protected: {e}")),
        }
        let is_nothing = matches!(taken, Ok(Taken::Nothing)) && line.effects.is_empty();
        if !is_nothing || line.trigger != Trigger::Timer {
            self.show_turn(subject, turn);
        }
        if is_nothing {
            line = self.nothing_new(gate, line)?;
        } else {
            // Before the gate opens: the journal never lacks a turn that the next one follows. It
            // need not be on the disk by itself, the checkpoint is.
            self.store.append(&line, Durability::Later).map_err(text)?;
            self.exposed(gate, &mut line)?;
        }
        let taken = taken.map_err(|e| format!("turn {turn} is not protected: {e}"))?;
        if let Some(inspection) = &mut self.inspection {
            let of = (subject, order.overlay()?, &*self.doors);
            scene(of, |scene| inspection.settle(scene))?;
        }
        let Taken::Checkpoint(done) = taken else {
            return Ok(line);
        };
        self.head = Some(turn);
        if let Some(name) = asked.and_then(|asked| asked.name.as_deref()) {
            self.store.name(name, turn).map_err(text)?;
        }
        drop(done);
        // The turn is protected, whatever comes of this.
        if let Err(e) = self.store.retain(&self.settings.retention) {
            log::warn!("{}: old checkpoints take space: {e}", self.store.id());
        }
        self.store.make_ready();
        Ok(line)
    }

    /// The end of a turn that is no work. Of those that only the timer has ended the journal would hold
    /// one for each time that it looks, for ever; so it has none, and their number is the next one's.
    fn nothing_new(
        &mut self,
        gate: &mut ShutGate,
        mut line: JournalLine,
    ) -> Result<JournalLine, String> {
        match line.trigger {
            Trigger::Timer => self.last_turn = Some(TurnNo(line.turn.0.saturating_sub(1))),
            _ => self.store.append(&line, Durability::Later).map_err(text)?,
        }
        // Nobody waits for a turn that is no work, but for the look itself.
        self.exposed(gate, &mut line)?;
        Ok(line)
    }

    /// Tries whether the turn's checkpoint can be restored, and says so in the journal.
    fn prove(
        &self,
        subject: &dyn Subject,
        mut line: JournalLine,
    ) -> Result<(JournalLine, Proof), String> {
        let checkpoint = self.store.get(line.turn).map_err(text)?;
        let proof = match checkpoint.has_processes() {
            true => subject.prove(&checkpoint),
            false => Err("there is nothing to prove: it holds no processes".into()),
        };
        let proof = proof.map_or_else(Proof::Failed, |()| Proof::Done);
        let said = match &proof {
            Proof::Failed(why) => format!("not proved: {why}"),
            Proof::Done | Proof::NotAsked => "proved by a trial restore".into(),
        };
        line.note = Some(match line.note.take() {
            Some(note) => format!("{note}; {said}"),
            None => said,
        });
        // A later line about a turn takes the place of the earlier one.
        self.store.append(&line, Durability::Later).map_err(text)?;
        Ok((line, proof))
    }

    /// Opens the gate, and adds to the journal how long somebody waited at it.
    fn exposed(&self, gate: &mut ShutGate, line: &mut JournalLine) -> Result<(), String> {
        let exposed = micros(gate.open());
        if exposed > line.exposed_us {
            // A later line about a turn takes the place of the earlier one.
            line.exposed_us = exposed;
            self.store.append(line, Durability::Later).map_err(text)?;
        }
        Ok(())
    }

    /// Begins to watch, unless that is done already. Tried again while it is impossible.
    fn begin(&mut self, subject: &dyn Subject) {
        if self.settings.skip_unchanged && self.inspection.as_ref().is_none_or(Inspection::is_blind)
        {
            let inspection = Inspection::begin(subject.watch(), self.settings.consistent_cut);
            let blind = inspection.blind();
            if blind != self.inspection.as_ref().and_then(Inspection::blind)
                && let Some(why) = blind
            {
                log::warn!("{}: every turn counts as changed: {why}", self.store.id());
            }
            self.inspection = Some(inspection);
        }
    }

    /// What has changed since the last checkpoint.
    fn look(
        &mut self,
        subject: &dyn Subject,
        overlay: &Result<Overlay, String>,
        latest: Option<TurnNo>,
        line: &mut JournalLine,
    ) -> Look {
        if !self.settings.skip_unchanged {
            return Look::everything("skip_unchanged is off");
        }
        let begin = Instant::now();
        self.begin(subject);
        let Some(inspection) = &mut self.inspection else {
            return Look::everything("nobody watches");
        };
        let look = overlay.as_ref().map_err(Clone::clone).and_then(|overlay| {
            let of = (subject, overlay, &*self.doors);
            scene(of, |scene| inspection.look(scene, latest))
        });
        let mut look = look.unwrap_or_else(Look::everything);
        match (subject.artefacts(), &self.artefacts) {
            (Ok(now), Some(then)) if now != *then => look.also_beside(differing(then, &now)),
            (Ok(_), _) => {}
            (Err(e), _) => return Look::everything(e),
        }
        line.look_us = micros(begin.elapsed());
        look
    }

    /// The checkpoint that the sandbox goes on from, if it is still there.
    pub(super) fn parent(&mut self) -> Result<Option<Checkpoint>, StoreError> {
        let kept = self.store.turns()?;
        if self.head.is_none_or(|head| !kept.contains(&head)) {
            self.head = self.store.head()?.map(|checkpoint| checkpoint.turn());
        }
        // A damaged one is an error, and is not passed over in silence.
        self.head.map(|head| self.store.current(head)).transpose()
    }

    /// The number after every one that was ever given away. The journal is read for the first one
    /// alone: it grows with every turn.
    pub(super) fn next_turn(&mut self) -> Result<TurnNo, StoreError> {
        let last = match self.last_turn {
            Some(last) => last,
            None => {
                let journal = self.store.journal()?.lines.iter().map(|l| l.turn).max();
                let kept = self.store.turns()?.into_iter().max();
                journal.max(kept).unwrap_or_default()
            }
        };
        self.last_turn = Some(last.next());
        Ok(last.next())
    }
}

/// The names under which two sets of files differ.
pub(super) fn differing<'a>(
    then: &'a BTreeMap<String, Vec<u8>>,
    now: &'a BTreeMap<String, Vec<u8>>,
) -> impl Iterator<Item = &'a str> {
    let names: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let differ = |name: &&String| then.get(*name) != now.get(*name);
    names.into_iter().filter(differ).map(String::as_str)
}

pub(super) fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
