//! One process that containerd knows by name: init, or an exec.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::{
    error::{Kind, Result, ShimError},
    host::Target,
    io::{ProcessIo, StdioConfig},
    reaper::Exit,
};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Known, not started.
    Created,
    /// Its only start is under way.
    Starting,
    /// It has a pid.
    Running,
    /// It has ended, or could not be started.
    Stopped,
}

struct State {
    step: Step,
    pid: i32,
    /// Another one than `pid` after a rollback.
    live_pid: i32,
    target: Option<Box<dyn Target>>,
    exit: Option<Exit>,
    io: Option<Arc<ProcessIo>>,
    /// Dropped when the process has ended, which wakes all waiters.
    done: Option<Sender<()>>,
}

/// See the module.
pub struct Process {
    /// Empty for init.
    pub exec_id: String,
    /// What the client asked for.
    pub stdio: StdioConfig,
    /// For an exec: the OCI `process` object, JSON.
    pub spec: Vec<u8>,
    state: Mutex<State>,
    done: Receiver<()>,
}

impl Process {
    /// A process that has not been started.
    pub fn new(exec_id: &str, stdio: StdioConfig, spec: Vec<u8>) -> Arc<Self> {
        let (sender, done) = bounded(0);
        Arc::new(Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            state: Mutex::new(State {
                step: Step::Created,
                pid: 0,
                live_pid: 0,
                target: None,
                exit: None,
                io: None,
                done: Some(sender),
            }),
            done,
        })
    }

    /// Its step.
    pub fn step(&self) -> Step {
        self.state.lock().step
    }

    /// The host pid that the client was told; 0 before it has one. Kept after its end.
    pub fn pid(&self) -> i32 {
        self.state.lock().pid
    }

    /// The host pid that it has now: another one after a rollback.
    pub fn live_pid(&self) -> i32 {
        self.state.lock().live_pid
    }

    /// How it ended.
    pub fn exit(&self) -> Option<Exit> {
        self.state.lock().exit
    }

    /// Its stdio, from just before its start until its deletion.
    pub fn io(&self) -> Option<Arc<ProcessIo>> {
        self.state.lock().io.clone()
    }

    /// Keeps its stdio.
    pub fn set_io(&self, io: Arc<ProcessIo>) {
        self.state.lock().io = Some(io);
    }

    /// Lets go of its stdio.
    pub fn take_io(&self) -> Option<Arc<ProcessIo>> {
        self.state.lock().io.take()
    }

    /// Claims its only start.
    ///
    /// # Errors
    /// `FailedPrecondition` when another start has been made, or is under way.
    pub fn begin(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.step != Step::Created {
            let text = format!("exec {} was started already", self.exec_id);
            return Err(ShimError::new(Kind::FailedPrecondition, text));
        }
        state.step = Step::Starting;
        Ok(())
    }

    /// Nothing was tried after [`Process::begin`]: it may be started later.
    pub fn not_begun(&self) {
        let mut state = self.state.lock();
        if state.step == Step::Starting {
            state.step = Step::Created;
        }
    }

    /// It got a pid, or after a rollback another one, of which the client is not told. `target` is
    /// missing if it was gone already.
    pub fn has_pid(&self, pid: i32, target: Option<Box<dyn Target>>) {
        let mut state = self.state.lock();
        if state.pid == 0 {
            state.pid = pid;
        }
        state.live_pid = pid;
        state.target = target;
        if matches!(state.step, Step::Created | Step::Starting) {
            state.step = Step::Running;
        }
    }

    /// It ended. Later calls change nothing.
    pub fn ended(&self, exit: Exit) {
        let mut state = self.state.lock();
        if state.exit.is_none() {
            state.step = Step::Stopped;
            state.exit = Some(exit);
            state.target = None;
            state.done = None;
        }
    }

    /// Waits for its end, or until the client has gone.
    pub fn wait<T>(&self, gone: &Receiver<T>) -> Result<Exit> {
        crossbeam_channel::select! {
            recv(self.done) -> _ => {}
            recv(gone) -> _ => {}
        }
        self.exit()
            .ok_or_else(|| ShimError::new(Kind::Failed, "the client went away while waiting"))
    }

    /// Signals it.
    ///
    /// # Errors
    /// `NotFound` when it has ended, as containerd's clients expect.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let state = self.state.lock();
        match (&state.target, state.step) {
            (Some(target), _) => target.signal(signal).map_err(|e| {
                let kind = match e.raw_os_error() {
                    Some(libc::ESRCH) => Kind::NotFound,
                    Some(libc::EINVAL) => Kind::InvalidArgument,
                    _ => Kind::Failed,
                };
                let text = format!("cannot send signal {signal} to pid {}: {e}", state.pid);
                ShimError::new(kind, text)
            }),
            (None, Step::Created | Step::Starting) => Err(ShimError::new(
                Kind::FailedPrecondition,
                "process not started",
            )),
            (None, _) => Err(ShimError::not_found("process already finished")),
        }
    }
}
