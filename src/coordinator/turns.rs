//! Turns of one sandbox: at each boundary a checkpoint, then the gate (D3, D11).
//!
//! A turn that changed nothing is skipped; every other one is `full`. One thread per protected sandbox
//! takes the cuts, so that neither the client's calls nor the reports of exits wait for one.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;
use time::OffsetDateTime;

use super::{
    cut,
    doors::Doors,
    inspection::{Inspection, Look, Scene, Taken},
};
use crate::{
    config::Gate,
    inspector::Watch,
    rootfs::{self, Overlay},
    runtime::{self, criu_conf::CriuConf, descriptors::Stream},
    sandbox::TurnNo,
    store::{
        Action, Checkpoint, Facts, Host, JournalLine, Kind, Pending, SandboxWriter, StdioPipe,
        StoreError, Sync as Durability, Trigger,
    },
};

/// What a turn needs of its sandbox.
pub trait Subject: Send + Sync {
    /// What takes part in a cut.
    fn parts(&self) -> Result<cut::Sandbox<'_>, String>;
    /// Its writable layer.
    fn overlay(&self) -> Result<Overlay, String>;
    /// The directory with its `config.json`.
    fn bundle(&self) -> PathBuf;
    /// A directory for CRIU's work and options.
    fn scratch(&self) -> PathBuf;
    /// Whether its init has a terminal.
    fn has_terminal(&self) -> bool;
    /// Begins to watch what changes in it.
    fn watch(&self) -> Result<Watch, String>;
    /// When input last came to each of its processes that have some. While two answers are equal,
    /// none has come.
    fn input_marks(&self) -> Vec<Option<Instant>>;
    /// What the host's owner runs in each cut.
    fn frozen_hook(&self) -> Result<(), String>;
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

/// How the turns of one sandbox are taken.
pub struct Settings {
    /// When the next exec may start.
    pub gate: Gate,
    /// How many turns are kept.
    pub keep: u32,
    /// How long a dump may take.
    pub dump_limit: Duration,
    /// Whether a turn that changed nothing is skipped.
    pub skip_unchanged: bool,
    /// Whether processes that merely ran count as unchanged (D6c).
    pub consistent_cut: bool,
}

type Reply = Sender<Result<(JournalLine, Proof), String>>;

enum Job {
    Boundary {
        at: Instant,
        gate: ShutGate,
    },
    Manual {
        name: Option<String>,
        prove: bool,
        reply: Reply,
    },
}

/// A gate that the end of a turn has shut. Opens when dropped, at the latest: also when the job
/// that holds it is never done.
struct ShutGate(Option<Arc<Doors>>);

impl ShutGate {
    /// No gate: nobody waits for this turn.
    const NONE: Self = Self(None);

    /// Opens it; returns the exposed delay, once.
    fn open(&mut self) -> Duration {
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
            last_turn: None,
            inspection: None,
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

    fn send(&self, job: Job) -> bool {
        match &*self.jobs.lock() {
            Some(jobs) => jobs.send(job).is_ok(),
            None => false,
        }
    }

    /// A turn has ended; the doors' gate is shut.
    pub fn boundary(&self) {
        let mut gate = ShutGate(Some(Arc::clone(&self.doors)));
        if self.gate == Gate::Off {
            gate.open();
        }
        let at = Instant::now();
        self.send(Job::Boundary { at, gate });
    }

    /// Takes a checkpoint now and waits until it is durable and, if that is asked for, tried.
    pub fn checkpoint(
        &self,
        name: Option<String>,
        prove: bool,
    ) -> Result<(JournalLine, Proof), String> {
        let (reply, answer) = bounded(1);
        let gone = || "the sandbox is going away".to_owned();
        if !self.send(Job::Manual { name, prove, reply }) {
            return Err(gone());
        }
        answer.recv().map_err(|_| gone())?
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

struct Worker {
    subject: Weak<dyn Subject>,
    store: SandboxWriter,
    doors: Arc<Doors>,
    settings: Settings,
    /// The newest number given away.
    last_turn: Option<TurnNo>,
    /// What is known since the last checkpoint.
    inspection: Option<Inspection>,
}

impl Worker {
    fn run(&mut self, jobs: &Receiver<Job>) {
        // Not at the first boundary: the agent waits there for the programs to be loaded.
        if let Some(subject) = self.subject.upgrade() {
            self.begin(&*subject);
        }
        for job in jobs {
            let (trigger, begin, mut gate, name, prove, reply) = match job {
                Job::Boundary { at, gate } => (Trigger::Exec, at, gate, None, false, None),
                Job::Manual { name, prove, reply } => {
                    let (now, reply) = (Instant::now(), Some(reply));
                    (Trigger::Manual, now, ShutGate::NONE, name, prove, reply)
                }
            };
            let Some(subject) = self.subject.upgrade() else {
                return;
            };
            let taken = self.turn(&*subject, trigger, begin, name.as_deref(), &mut gate);
            drop(gate);
            let taken = taken.and_then(|line| match prove {
                true => self.prove(&*subject, line),
                false => Ok((line, Proof::NotAsked)),
            });
            if let Err(e) = &taken {
                log::error!("{}: {e}", self.store.id());
            }
            if let Some(reply) = reply {
                // Nobody waits any more: the journal has it.
                let _ = reply.send(taken);
            }
        }
    }

    /// One turn, from its boundary to its line in the journal.
    fn turn(
        &mut self,
        subject: &dyn Subject,
        trigger: Trigger,
        begin: Instant,
        name: Option<&str>,
        gate: &mut ShutGate,
    ) -> Result<JournalLine, String> {
        let parent = self.store.latest().map_err(text)?.map(|c| c.turn());
        let turn = self.next_turn().map_err(text)?;
        let ended_at = OffsetDateTime::now_utc();
        let mut line = JournalLine {
            turn,
            trigger,
            effects: Vec::new(),
            action: Action::Skip,
            pre_dumps: 0,
            checkpoint: None,
            changed_files: 0,
            bytes_captured: 0,
            bytes_written: 0,
            look_us: 0,
            freeze_us: 0,
            durable_us: None,
            exposed_us: 0,
            started_at: self.doors.take_turn_start().unwrap_or(ended_at),
            ended_at,
            note: None,
        };
        let look = self.look(subject, parent, &mut line);
        if line.trigger == Trigger::Exec && look.effects.is_empty() {
            line.note = look.note;
            self.store.append(&line, Durability::Later).map_err(text)?;
            // Nobody waits for a turn that is no work, but for the look itself.
            self.exposed(gate, &mut line)?;
            return Ok(line);
        }
        line.effects = look.effects;
        line.note = look.note;
        let taken = self.take(subject, turn, parent, gate, &mut line);
        if let Ok(checkpoint) = &taken {
            line.action = Action::Full;
            line.checkpoint = Some(checkpoint.digest);
            line.bytes_written = checkpoint.manifest.contents.bytes;
            line.durable_us = Some(micros(begin.elapsed()));
        }
        if let Err(e) = &taken {
            line.note = Some(format!("not protected: {e}"));
        }
        // Before the gate opens: the journal never lacks a turn that the next one follows. It need
        // not be on the disk by itself, the checkpoint is.
        self.store.append(&line, Durability::Later).map_err(text)?;
        self.exposed(gate, &mut line)?;
        let checkpoint = taken.map_err(|e| format!("turn {turn} is not protected: {e}"))?;
        if let Some(name) = name {
            self.store.name(name, turn).map_err(text)?;
        }
        let keep = usize::try_from(self.settings.keep).unwrap_or(usize::MAX);
        self.store.prune(keep).map_err(text)?;
        if let Some(inspection) = &mut self.inspection {
            let upper = checkpoint.upper_dir();
            scene(subject, &self.doors, |scene| {
                inspection.learn(scene, &upper)
            })?;
        }
        Ok(line)
    }

    /// Tries whether the turn's checkpoint can be restored, and says so in the journal.
    fn prove(
        &self,
        subject: &dyn Subject,
        mut line: JournalLine,
    ) -> Result<(JournalLine, Proof), String> {
        let checkpoint = self.store.get(line.turn).map_err(text)?;
        let proof = match subject.prove(&checkpoint) {
            Ok(()) => Proof::Done,
            Err(why) => Proof::Failed(why),
        };
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
        let look = scene(subject, &self.doors, |scene| inspection.look(scene, latest))
            .unwrap_or_else(Look::everything);
        line.look_us = micros(begin.elapsed());
        look
    }

    /// The number after every one that was ever given away. The journal is read for the first one
    /// alone: it grows with every turn.
    fn next_turn(&mut self) -> Result<TurnNo, StoreError> {
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

    /// Takes the cut and makes it durable.
    fn take(
        &mut self,
        subject: &dyn Subject,
        turn: TurnNo,
        parent: Option<TurnNo>,
        gate: &mut ShutGate,
        line: &mut JournalLine,
    ) -> Result<Checkpoint, String> {
        let overlay = subject.overlay()?;
        let pending = self.store.begin(turn).map_err(text)?;
        let scratch = subject.scratch();
        // Not the client's: both may be about to dump.
        let work = scratch.join("criu-turn-work");
        fs::create_dir_all(&work).map_err(|e| format!("{work:?}: {e}"))?;
        let home = CriuConf::for_dump(false)
            .write(&scratch.join("criu-turn"))
            .map_err(|e| format!("{scratch:?}: {e}"))?;
        let args = runtime::Checkpoint {
            image_path: pending.image_dir().to_owned(),
            work_path: work.clone(),
            leave_running: true,
            // Kept in the image; whether they are closed is decided at the restore.
            tcp_established: true,
            file_locks: true,
            shell_job: subject.has_terminal(),
            home: Some(home),
            limit: self.settings.dump_limit,
            ..Default::default()
        };
        let doors = Arc::clone(&self.doors);
        let dying = || doors.is_dying();
        let mut inspection = self.inspection.as_mut();
        if let Some(inspection) = &mut inspection {
            inspection.prepare();
        }
        let mut seen = None;
        let done = subject.parts()?.cut(&args, || {
            // Before the copy is made: whoever is outside of the sandbox is not frozen, and what
            // he changes meanwhile must not be known without being in the copy.
            if let Some(inspection) = &mut inspection {
                seen = scene(subject, &doors, |scene| {
                    inspection.frozen(scene, pending.image_dir())
                })?;
            }
            let stats =
                rootfs::capture(&overlay.upperdir, pending.upper_dir(), &dying).map_err(text)?;
            subject.frozen_hook()?;
            Ok(stats)
        });
        let done = done.map_err(text)?;
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        let differ = seen.as_ref().and_then(|seen: &Taken| seen.changed_files);
        line.changed_files = differ.unwrap_or_else(|| done.captured.entries());
        let checkpoint = commit(subject, pending, parent, &done)?;
        if let Some(inspection) = inspection {
            inspection.durable(turn, seen, &checkpoint.image_dir());
        }
        line.bytes_captured = checkpoint.manifest.contents.bytes;
        // The checkpoint exists from here on: nothing may make its turn count as unprotected.
        if let Err(e) = fs::remove_dir_all(&work) {
            log::warn!("{}: cannot remove {work:?}: {e}", self.store.id());
        }
        Ok(checkpoint)
    }
}

/// Calls `then` with the sandbox as it is to be looked at.
fn scene<T>(
    subject: &dyn Subject,
    doors: &Doors,
    then: impl FnOnce(&Scene<'_>) -> T,
) -> Result<T, String> {
    let overlay = subject.overlay()?;
    let parts = subject.parts()?;
    Ok(then(&Scene {
        init: parts.scene.init_pid(),
        upper: &overlay.upperdir,
        cgroup: parts.freeze.cgroup(),
        marks: subject.input_marks(),
        stop: &|| doors.is_dying(),
    }))
}

/// Adds what is known about the cut and makes all of it durable.
fn commit<T>(
    subject: &dyn Subject,
    pending: Pending,
    parent: Option<TurnNo>,
    done: &cut::Done<T>,
) -> Result<Checkpoint, String> {
    let config = subject.bundle().join("config.json");
    let kept = pending.bundle_dir().join("config.json");
    fs::copy(&config, &kept).map_err(|e| format!("cannot keep {config:?}: {e}"))?;
    let facts = Facts {
        parent,
        created_at: OffsetDateTime::now_utc(),
        kind: Kind::Full,
        processes: done.processes as u64,
        host: Host::detect(),
        pipes: done.streams.iter().map(pipe).collect(),
        runtime: serde_json::json!({ "terminal": subject.has_terminal() }),
        notes: Vec::new(),
    };
    pending.commit(facts).map_err(text)
}

fn pipe(stream: &Stream) -> StdioPipe {
    StdioPipe {
        exec_id: Some(stream.exec_id.clone()).filter(|id| !id.is_empty()),
        fd: stream.fd.into(),
        inode: stream.inode,
        target: stream.target.clone(),
        pending: Vec::new(),
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
