//! Turns of one sandbox: at each boundary a checkpoint, then the gate (D3, D11).
//!
//! A boundary is the end of the last exec, the word of somebody who knows (`crab turn`), or, if
//! configured, that none has come for long.
//!
//! A turn that changed nothing is skipped; how the others are taken is in [`take`](super::take). One
//! thread per protected sandbox takes the cuts, so that neither the client's calls nor the reports of exits
//! wait for one.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;
use time::OffsetDateTime;

use super::{
    budget::{Budget, HostBudget},
    cut,
    doors::Doors,
    inspection::{Inspection, Scene},
    look::Look,
    machine::Event,
    recovery, rollback,
    take::{Order, Taken, WithoutProcesses},
    view::View,
};
use crate::{
    config::Gate,
    engine::{Plan, Reason},
    inspector::{self, Watch},
    rootfs::Overlay,
    sandbox::TurnNo,
    store::{
        Checkpoint, JournalLine, Retention, SandboxWriter, StoreError, Sync as Durability, Trigger,
    },
};

/// What a turn needs of its sandbox.
pub trait Subject: Send + Sync {
    /// What takes part in a cut.
    fn parts(&self) -> Result<cut::Sandbox<'_>, String>;
    /// Why its processes can never be dumped; none if they can.
    fn never_dumped(&self) -> Option<String>;
    /// Where its root file system is mounted.
    fn root(&self) -> PathBuf;
    /// Its writable layer.
    fn overlay(&self) -> Result<Overlay, String>;
    /// What of its state lies in small files of the host, by the name under which a checkpoint keeps it:
    /// its specification, its limits, `/etc/hosts` and the like.
    fn artefacts(&self) -> Result<BTreeMap<String, Vec<u8>>, String>;
    /// A directory for CRIU's work and options.
    fn scratch(&self) -> PathBuf;
    /// Whether its init has a terminal.
    fn has_terminal(&self) -> bool;
    /// Begins to watch what changes in it.
    fn watch(&self) -> Result<Watch, String>;
    /// What there is to watch.
    fn to_watch(&self) -> Result<inspector::Subject, String>;
    /// When input last came to each of its processes that have some. While two answers are equal,
    /// none has come.
    fn input_marks(&self) -> Vec<Option<Instant>>;
    /// What the host's owner runs in each cut.
    fn frozen_hook(&self) -> Result<(), String>;
    /// Whether there is such a program: it finds the sandbox frozen.
    fn has_frozen_hook(&self) -> bool;
    /// What the host's owner runs when it is what it was at a checkpoint, before anything of it runs.
    fn restored_hook(&self) -> Result<(), String>;
    /// Shows it what there is to know of its turns.
    fn show(&self, view: &View) -> Result<(), String>;
    /// Restores a checkpoint of it beside it, and throws that away (D9b).
    fn prove(&self, checkpoint: &Checkpoint) -> Result<(), String>;
}

/// What is known of whether a checkpoint can be restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// Nobody has asked.
    NotAsked,
    /// It has been restored.
    Done,
    /// It could not be, or not be tried.
    Failed(String),
}

/// What somebody asks for who wants a checkpoint now.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// A name to keep it under.
    pub name: Option<String>,
    /// Also try whether it can be restored.
    pub prove: bool,
    /// If the processes cannot be kept, the files alone will do.
    pub or_files: bool,
}

/// How the turns of one sandbox are taken.
pub struct Settings {
    /// When the next exec may start.
    pub gate: Gate,
    /// Which checkpoints are kept.
    pub retention: Retention,
    /// How long a dump may take.
    pub dump_limit: Duration,
    /// Whether a turn that changed nothing is skipped.
    pub skip_unchanged: bool,
    /// Whether processes that merely ran count as unchanged (D6c).
    pub consistent_cut: bool,
    /// How long it may go on without a boundary.
    pub timer: Option<Duration>,
    /// Whether the sandbox sees its turns.
    pub view: bool,
    /// The turn whose checkpoint it was started from.
    pub started_from: Option<TurnNo>,
    /// What the host may spend on checkpoints.
    pub budget: HostBudget,
}

type Reply = Sender<Result<(JournalLine, Proof), String>>;

pub(super) enum Job {
    /// A turn has ended. `reply`: somebody waits until it is durable.
    Boundary {
        trigger: Trigger,
        at: Instant,
        gate: ShutGate,
        reply: Option<Reply>,
    },
    /// A checkpoint, whether anything has changed or not.
    Checkpoint {
        asked: Asked,
        reply: Reply,
    },
    Rollback(rollback::Order),
    Recovery(recovery::Order),
}

/// A gate that the end of a turn has shut. Opens when dropped, at the latest: also when the job
/// that holds it is never done.
pub(super) struct ShutGate(Option<Arc<Doors>>);

impl ShutGate {
    /// No gate: nobody waits for this turn.
    const NONE: Self = Self(None);

    /// Opens it; returns the exposed delay, once.
    pub(super) fn open(&mut self) -> Duration {
        self.0.take().map_or(Duration::ZERO, |doors| doors.open())
    }
}

impl Drop for ShutGate {
    fn drop(&mut self) {
        self.open();
    }
}

/// The turns of one sandbox.
pub struct Turns {
    jobs: Mutex<Option<Sender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    gate: Gate,
    doors: Arc<Doors>,
}

impl Turns {
    /// Starts the thread that takes the cuts.
    pub fn start(
        subject: Weak<dyn Subject>,
        store: SandboxWriter,
        doors: Arc<Doors>,
        settings: Settings,
    ) -> std::io::Result<Arc<Self>> {
        let (sender, jobs) = unbounded();
        let gate = settings.gate;
        let mut worker = Worker {
            subject,
            store,
            doors: Arc::clone(&doors),
            settings,
            budget: None,
            last_turn: None,
            head: None,
            void_before: None,
            recoveries: 0,
            view: None,
            inspection: None,
            artefacts: None,
        };
        let thread = thread::Builder::new()
            .name("turns".into())
            .spawn(move || worker.run(&jobs))?;
        Ok(Arc::new(Self {
            jobs: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            gate,
            doors,
        }))
    }

    pub(super) fn send(&self, job: Job) -> bool {
        match &*self.jobs.lock() {
            Some(jobs) => jobs.send(job).is_ok(),
            None => false,
        }
    }

    /// A turn has ended; the doors' gate is shut.
    pub fn boundary(&self) {
        self.send_boundary(Trigger::Exec, None);
    }

    fn send_boundary(&self, trigger: Trigger, reply: Option<Reply>) -> bool {
        let mut gate = ShutGate(Some(Arc::clone(&self.doors)));
        if self.gate == Gate::Off {
            gate.open();
        }
        self.send(Job::Boundary {
            trigger,
            at: Instant::now(),
            gate,
            reply,
        })
    }

    /// Ends the turn under way, as the end of its last exec would, and waits until it is durable. Like
    /// any turn it is skipped if nothing has changed.
    pub fn boundary_now(&self) -> Result<JournalLine, String> {
        let (reply, answer) = bounded(1);
        if !self.doors.end_turn_now() || !self.send_boundary(Trigger::Manual, Some(reply)) {
            return Err(going_away());
        }
        let done = answer.recv().map_err(|_| going_away())?;
        done.map(|(line, _)| line)
    }

    /// Takes a checkpoint now and waits until it is durable and, if that is asked for, tried.
    pub fn checkpoint(&self, asked: Asked) -> Result<(JournalLine, Proof), String> {
        let (reply, answer) = bounded(1);
        if !self.send(Job::Checkpoint { asked, reply }) {
            return Err(going_away());
        }
        answer.recv().map_err(|_| going_away())?
    }

    /// Takes no more cuts; returns when the last one is done.
    pub fn stop(&self) {
        self.jobs.lock().take();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            log::error!("the thread that takes the turns has panicked");
        }
    }
}

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
    /// What the last checkpoint has of the host's files.
    pub(super) artefacts: Option<BTreeMap<String, Vec<u8>>>,
}

impl Worker {
    fn run(&mut self, jobs: &Receiver<Job>) {
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
        let Some(inspection) = &self.inspection else {
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
        self.head.map(|head| self.store.get(head)).transpose()
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

/// Calls `then` with the sandbox as it is to be looked at.
pub(super) fn scene<T>(
    (subject, overlay, doors): (&dyn Subject, &Overlay, &Doors),
    then: impl FnOnce(&Scene<'_>) -> T,
) -> Result<T, String> {
    let parts = subject.parts()?;
    Ok(then(&Scene {
        init: parts.scene.init_pid(),
        upper: &overlay.upperdir,
        cgroup: parts.freeze.cgroup(),
        marks: subject.input_marks(),
        stop: &|| doors.is_dying(),
    }))
}

fn going_away() -> String {
    "the sandbox is going away".to_owned()
}

pub(super) fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
