//! Turns of one sandbox: at each boundary a checkpoint, then the gate (D3, D11).
//!
//! A boundary is the end of the last exec, the word of somebody who knows (`crab turn`), or, if
//! configured, that none has come for long.
//!
//! A turn that changed nothing is skipped; how the others are taken is in [`take`](super::take). One
//! thread per protected sandbox takes the cuts, so that neither the client's calls nor the reports of exits
//! wait for one.

use std::{
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{Sender, bounded, unbounded};
use parking_lot::Mutex;

use super::{
    budget::HostBudget, doors::Doors, recovery, rollback, subject::Subject, worker::Worker,
};
use crate::{
    config::{Gate, Incremental},
    sandbox::TurnNo,
    store::{JournalLine, Retention, SandboxWriter, Trigger},
};

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
    /// Whether dumps build upon each other, where the kernel marks what is written to.
    pub incremental: Incremental,
    /// How many pre-dumps come before a dump, where they are possible; None: as many as pay.
    pub pre_dumps: Option<u32>,
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
    pub(super) const NONE: Self = Self(None);

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
        let mut worker = Worker::new(subject, store, Arc::clone(&doors), settings);
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

fn going_away() -> String {
    "the sandbox is going away".to_owned()
}
