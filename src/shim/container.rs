//! One container: what is known of it, and the requests that concern all of it.
//!
//! No lock is held across a call to the runtime (D17). A request that must be alone (`Start`,
//! `Pause`, `Checkpoint`, …) marks the container busy and others of its kind wait; State, Pids,
//! Wait, Kill and Connect look at the facts and never wait.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
    thread::JoinHandle,
};

use containerd_shim::protos::{
    api::{ProcessInfo, Status},
    events::task::{TaskExit, TaskPaused, TaskResumed},
    protobuf::{MessageField, well_known_types::any::Any},
    shim::oci::ProcessDetails,
};
use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};

use super::{
    artefacts,
    early_join::EarlyJoin,
    error::{Context, Kind, Result, ShimError},
    events::{EventSink, TaskEvent},
    going_back::GoingBack,
    host::{ControlGroup, Host},
    io::ProcessIo,
    process::{Process, Step},
    proto,
    reaper::Exit,
    restore::Source,
    run_dir::RunDir,
    spec::Spec,
    state::{Phase, Request},
};
use crate::{
    cgroup::OomWatch,
    config::Config,
    coordinator::{
        doors::Doors,
        freeze::{Freeze, FreezeError},
        turns::Turns,
    },
    rootfs::MountSpec,
    runtime::OciRuntime,
    sandbox::SandboxId,
};

/// What exists from the moment when init has a pid.
pub struct Place {
    /// Its cgroup.
    pub cgroup: Arc<dyn ControlGroup>,
    /// Who has frozen it.
    pub freeze: Arc<Freeze>,
    /// Ends with the container.
    pub oom: Option<OomWatch>,
}

/// A process that lives on although its exec is over, seen from its pipes.
pub struct Leftover {
    /// The exec it came from.
    pub exec_id: String,
    /// Where its stdout and stderr went.
    pub targets: [String; 2],
    /// The pipes.
    pub io: Arc<ProcessIo>,
}

pub(super) struct Inner {
    pub phase: Phase,
    pub busy: bool,
    pausing: bool,
    /// init's creation or start is still to be told, and its end, however soon, after that.
    pub starting: bool,
    /// A signal for an init that is being restored.
    pub kill_at_start: Option<i32>,
    pub execs: BTreeMap<String, Arc<Process>>,
    /// Execs between their start and the report of their end.
    pub running_execs: usize,
    /// init has ended: no exec starts any more.
    pub init_gone: bool,
    /// How init has ended; told to the client when the last exec has been.
    pub init_exit: Option<Exit>,
    /// A rollback or a recovery is under way.
    pub going_back: Option<GoingBack>,
    /// A recovery or a rollback has brought it back, and it has ended before that was over.
    pub fell_again: Option<Exit>,
    /// A client has asked for its end.
    pub asked_to_end: bool,
    /// What a client has last signalled init.
    pub last_signal: Option<i32>,
    /// The init that the client was told of, if a rollback has ended it: unreaped, so that the
    /// kernel gives its pid to nobody else.
    pub told_zombie: Option<i32>,
}

/// See the module.
pub struct Container {
    /// Its name.
    pub sandbox: SandboxId,
    /// The directory with `config.json`.
    pub bundle: PathBuf,
    /// Its settings.
    pub config: Config,
    /// What `config.json` says.
    pub spec: Spec,
    /// Its files of this boot.
    pub run_dir: RunDir,
    /// What Start restores from, instead of booting.
    pub source: Option<Source>,
    /// Where its root file system is, if the shim has mounted it.
    pub mounted: Option<PathBuf>,
    /// What the shim has mounted there.
    pub mounts: Vec<MountSpec>,
    /// init.
    pub init: Arc<Process>,
    /// Who runs it.
    pub runtime: Arc<dyn OciRuntime>,
    /// Docker's health check.
    pub(super) health_check: Option<Vec<String>>,
    /// The machine below.
    pub host: Arc<dyn Host>,
    /// Where events go.
    pub events: Arc<dyn EventSink>,
    /// Who may enter, and when.
    pub doors: Arc<Doors>,
    pub(super) place: RwLock<Option<Arc<Place>>>,
    pub(super) turns: OnceLock<Arc<Turns>>,
    pub(super) early_join: EarlyJoin,
    pub(super) leftovers: Mutex<Vec<Leftover>>,
    /// Removes files that a rollback has replaced.
    pub(super) tidying: Mutex<Option<JoinHandle<()>>>,
    /// What Update has changed of its limits.
    pub(super) limits: Mutex<Option<serde_json::Value>>,
    pub(super) inner: Mutex<Inner>,
    pub(super) changed: Condvar,
}

/// The right to be alone, until dropped.
pub struct Alone<'a>(&'a Container);

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.inner.lock().busy = false;
        self.0.changed.notify_all();
    }
}

impl Inner {
    pub(super) fn new(phase: Phase) -> Self {
        Self {
            phase,
            busy: false,
            pausing: false,
            starting: true,
            kill_at_start: None,
            execs: BTreeMap::new(),
            running_execs: 0,
            init_gone: false,
            init_exit: None,
            going_back: None,
            fell_again: None,
            asked_to_end: false,
            last_signal: None,
            told_zombie: None,
        }
    }
}

impl Container {
    /// Waits until no other such request is under way, and checks that the phase allows this one.
    pub(super) fn alone(&self, request: Request) -> Result<Alone<'_>> {
        let mut inner = self.inner.lock();
        while inner.busy {
            self.changed.wait(&mut inner);
        }
        inner.phase.allows(request)?;
        inner.busy = true;
        Ok(Alone(self))
    }

    /// Moves on to another phase and tells it, in one step for every client, unless the container
    /// has stopped meanwhile.
    pub(super) fn enter_phase(&self, phase: Phase, event: TaskEvent) {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Stopped || phase == Phase::Deleted {
            inner.phase = phase;
            self.events.send(event);
        }
    }

    /// Its phase.
    pub fn phase(&self) -> Phase {
        self.inner.lock().phase
    }

    /// init (empty `exec_id`) or an exec.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let inner = self.inner.lock();
        let found = inner.execs.get(exec_id).cloned();
        found.ok_or_else(|| ShimError::not_found(format!("exec {exec_id} in {}", self.sandbox)))
    }

    /// The state of one process, as the client sees it: crab's own freezes do not show (D7b).
    pub fn status(&self, process: &Process) -> Status {
        let inner = self.inner.lock();
        if inner.pausing {
            return Status::PAUSING;
        }
        if inner.phase == Phase::Paused {
            return Status::PAUSED;
        }
        if process.exec_id.is_empty() {
            return match inner.phase {
                Phase::Created | Phase::CreatedCheckpoint => Status::CREATED,
                Phase::Running => Status::RUNNING,
                Phase::Paused => Status::PAUSED,
                Phase::Stopped | Phase::Deleted => Status::STOPPED,
            };
        }
        match process.step() {
            Step::Created | Step::Starting => Status::CREATED,
            Step::Running => Status::RUNNING,
            Step::Stopped => Status::STOPPED,
        }
    }

    /// The cgroup and its freezer.
    ///
    /// # Errors
    /// `FailedPrecondition` before init has a pid.
    pub fn place(&self) -> Result<Arc<Place>> {
        self.place.read().clone().ok_or_else(|| {
            ShimError::new(
                Kind::FailedPrecondition,
                format!("{}: the container has not been started", self.sandbox),
            )
        })
    }

    /// Freezes it for the client.
    pub fn pause(&self) -> Result<()> {
        let _alone = self.alone(Request::Pause)?;
        let place = self.place()?;
        self.inner.lock().pausing = true;
        let paused = place.freeze.pause();
        self.inner.lock().pausing = false;
        paused.context(format_args!("{}: pause", self.sandbox))?;
        let event = TaskEvent::Paused(TaskPaused {
            container_id: self.sandbox.id().to_owned(),
            ..Default::default()
        });
        self.enter_phase(Phase::Paused, event);
        Ok(())
    }

    /// Thaws it for the client.
    pub fn resume(&self) -> Result<()> {
        let _alone = self.alone(Request::Resume)?;
        let resumed = self.place()?.freeze.resume();
        resumed.context(format_args!("{}: resume", self.sandbox))?;
        let event = TaskEvent::Resumed(TaskResumed {
            container_id: self.sandbox.id().to_owned(),
            ..Default::default()
        });
        self.enter_phase(Phase::Running, event);
        Ok(())
    }

    /// Changes its limits; `resources` is OCI `LinuxResources` as JSON.
    pub fn update(&self, resources: &Any) -> Result<()> {
        let _alone = self.alone(Request::Update)?;
        let update: serde_json::Value = serde_json::from_slice(&resources.value).map_err(|e| {
            let text = format!("{}: update: resources are no JSON: {e}", self.sandbox);
            ShimError::new(Kind::InvalidArgument, text)
        })?;
        self.runtime
            .update(self.sandbox.id(), &resources.value)
            .context(format_args!("{}: update", self.sandbox))?;
        artefacts::merge(&mut self.limits.lock(), update);
        Ok(())
    }

    /// Host pids of all processes, with the exec that each belongs to.
    pub fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let Ok(place) = self.place() else {
            return Ok(Vec::new());
        };
        let mut pids = match place.cgroup.procs() {
            Err(e) if e.is_gone() => Vec::new(),
            pids => pids.context(format_args!("{}: list processes", self.sandbox))?,
        };
        let (execs, going_back) = {
            let inner = self.inner.lock();
            (inner.execs.clone(), inner.going_back.is_some())
        };
        if pids.is_empty() && going_back {
            // Between the old processes and the new ones; a running container always has some.
            pids.push(self.init.pid());
        }
        let info = |pid: i32| ProcessInfo {
            pid: pid as u32,
            info: execs
                .values()
                .find(|e| e.pid() == pid && e.step() == Step::Running)
                .and_then(|e| {
                    let details = ProcessDetails {
                        exec_id: e.exec_id.clone(),
                        ..Default::default()
                    };
                    proto::pack("containerd.runc.v1.ProcessDetails", &details).ok()
                })
                .map_or_else(MessageField::none, MessageField::some),
            ..Default::default()
        };
        Ok(pids.into_iter().map(info).collect())
    }

    /// What its cgroup has used.
    pub fn stats(&self) -> Result<Any> {
        let stats = self.place()?.cgroup.stats();
        stats.context(format_args!("{}: stats", self.sandbox))
    }

    /// An exec has ended.
    pub(super) fn exec_exited(&self, process: &Process, exit: Exit) {
        // The gate is shut before the client hears of the end, and so before it can go on.
        let turn_ended = self.doors.leave(&process.exec_id);
        if let Some(io) = process.io() {
            io.leader_exited();
            io.deliver();
        }
        {
            // One step for every client: whoever sees it stopped acts after its end was told.
            let _inner = self.inner.lock();
            process.ended(exit);
            self.report_exit(&process.exec_id, exit);
        }
        if turn_ended {
            self.turn_ended();
        }
        self.exec_is_over();
    }

    /// A turn is over: checkpoint it, or open the gate again.
    pub(super) fn turn_ended(&self) {
        match self.turns.get() {
            Some(turns) => turns.boundary(),
            None => {
                self.doors.open();
            }
        }
    }

    /// One exec less. The end of init is told last.
    pub(super) fn exec_is_over(&self) {
        let mut inner = self.inner.lock();
        inner.running_execs -= 1;
        self.changed.notify_all();
        self.tell_init_exit(inner);
    }

    /// init's creation or start has been told (or will never be).
    pub(super) fn init_told(&self) {
        let mut inner = self.inner.lock();
        inner.starting = false;
        self.tell_init_exit(inner);
    }

    /// init has ended, and nothing takes its place.
    pub(super) fn init_ended(&self, exit: Exit) {
        self.note_end(exit);
        // Before the doors open: whoever waits there must not go on.
        self.inner.lock().init_gone = true;
        self.doors.give_up();
        self.release();
        if self.spec.shares_pids()
            && exit.pid != 0
            && let Err(e) = self.runtime.kill_all(self.sandbox.id(), libc::SIGKILL)
        {
            log::warn!("{}: cannot end what init has left: {e}", self.sandbox);
        }
        if let Some(io) = self.init.io() {
            io.leader_exited();
            io.deliver();
        }
        let mut inner = self.inner.lock();
        inner.init_exit = Some(exit);
        self.tell_init_exit(inner);
    }

    /// Tells init's end once, when all that comes before it has been told.
    pub(super) fn tell_init_exit(&self, mut inner: MutexGuard<'_, Inner>) {
        let over = matches!(inner.phase, Phase::Stopped | Phase::Deleted);
        let due = !over && !inner.starting && inner.running_execs == 0;
        let Some(exit) = inner.init_exit.filter(|_| due) else {
            return;
        };
        if let Some(io) = self.init.io() {
            io.leader_exited();
        }
        if let Some(pid) = inner.told_zombie.take() {
            self.host.reaper().release(pid);
        }
        // One step for every client: whoever sees it stopped acts after its end was told.
        inner.phase = Phase::Stopped;
        self.init.ended(exit);
        self.report_exit("", exit);
        drop(inner);
        // Lets go of the store, so that a restore can be armed before the task is deleted.
        self.stop_turns();
    }

    fn report_exit(&self, exec_id: &str, exit: Exit) {
        let id = self.sandbox.id();
        self.events.send(TaskEvent::Exit(TaskExit {
            container_id: id.to_owned(),
            id: if exec_id.is_empty() { id } else { exec_id }.to_owned(),
            pid: exit.pid as u32,
            exit_status: exit.status,
            exited_at: MessageField::some(proto::timestamp(exit.at)),
            ..Default::default()
        }));
    }
}

impl From<FreezeError> for ShimError {
    fn from(e: FreezeError) -> Self {
        Self::new(Kind::Failed, e.to_string())
    }
}
