//! Reaps every child of the shim, at once.
//!
//! The shim is a child subreaper: processes of containers become its children when the runtime
//! has started them and left. An unreaped exec keeps its pid namespace alive, so that kill and
//! dump hang; therefore one thread waits for SIGCHLD and nothing else.
//!
//! A process may be gone before its starter knows its pid. A [`Watch`], taken before the start,
//! keeps the exits that nobody has claimed.

use std::{
    collections::HashMap,
    io,
    os::unix::process::CommandExt,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use parking_lot::{Mutex, MutexGuard};
use signal_hook::{consts::SIGCHLD, iterator::Signals};
use time::OffsetDateTime;

use crate::runtime::{Ended, Spawner};

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The host pid it had.
    pub pid: i32,
    /// Its exit status, or 128 plus the signal that killed it.
    pub status: u32,
    /// When it was reaped.
    pub at: OffsetDateTime,
}

type Handler = Box<dyn FnOnce(Exit, Ended) + Send>;

#[derive(Default)]
struct State {
    handlers: HashMap<i32, Handler>,
    /// Exits that had no handler, for each living watch.
    watches: HashMap<u64, HashMap<i32, Exit>>,
    next_watch: u64,
}

/// The one who reaps. Cheap to share.
#[derive(Default)]
pub struct Reaper {
    state: Mutex<State>,
}

impl Reaper {
    /// Starts the reaping thread. Call once per process, before any child is made.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut signals = Signals::new([SIGCHLD])?;
        let this = Arc::clone(&reaper);
        thread::Builder::new()
            .name("reaper".into())
            .spawn(move || {
                for _ in signals.forever() {
                    this.reap();
                }
            })?;
        Ok(reaper)
    }

    fn reap(&self) {
        loop {
            // The lock spans wait and look-up: whoever registers a handler under it either comes
            // before the exit is collected or finds it in a watch.
            let state = self.state.lock();
            let (pid, ended) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Ended::Exited(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Ended::Signaled(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(e) => {
                    log::error!("cannot wait for children: {e}");
                    return;
                }
            };
            let exit = Exit {
                pid: pid.as_raw(),
                status: match ended {
                    Ended::Exited(code) => code as u32,
                    Ended::Signaled(signal) => 128 + signal as u32,
                },
                at: OffsetDateTime::now_utc(),
            };
            deliver(state, exit, ended);
        }
    }

    /// Pretends that a process has ended: unit tests have no children.
    #[cfg(test)]
    pub fn inject(&self, exit: Exit) {
        deliver(self.state.lock(), exit, Ended::Exited(exit.status as i32));
    }

    /// Keeps unclaimed exits from now on.
    pub fn watch(self: &Arc<Self>) -> Watch {
        let mut state = self.state.lock();
        let key = state.next_watch;
        state.next_watch += 1;
        state.watches.insert(key, HashMap::new());
        Watch {
            reaper: Arc::clone(self),
            key,
        }
    }

    /// Starts a child and delivers its exit to the returned channel.
    fn spawn(&self, command: &mut Command) -> io::Result<(i32, Receiver<Ended>)> {
        let (sender, receiver) = bounded(1);
        // With the lock held the reaper cannot collect the child before it has a handler.
        let mut state = self.state.lock();
        let child = command.spawn()?;
        let pid = child.id() as i32;
        state.handlers.insert(pid, deliver_to(sender));
        Ok((pid, receiver))
    }

    /// Starts a child that nobody waits for; returns its pid.
    pub fn spawn_detached(&self, mut command: Command) -> io::Result<u32> {
        let (pid, _) = self.spawn(&mut command)?;
        Ok(pid as u32)
    }
}

/// Gives an exit to whoever wants it, without the lock.
fn deliver(mut state: MutexGuard<'_, State>, exit: Exit, ended: Ended) {
    match state.handlers.remove(&exit.pid) {
        Some(handler) => {
            drop(state);
            handler(exit, ended);
        }
        None => {
            for exits in state.watches.values_mut() {
                exits.insert(exit.pid, exit);
            }
        }
    }
}

fn deliver_to(sender: Sender<Ended>) -> Handler {
    Box::new(move |_, ended| {
        // Nobody waits any more: the exit needs no other reader.
        let _ = sender.send(ended);
    })
}

/// How often somebody who may stop a command is asked.
const ASK: Duration = Duration::from_millis(20);

impl Spawner for Reaper {
    fn run(&self, mut command: Command, limit: Duration) -> io::Result<Ended> {
        let (pid, ends) = self.spawn(&mut command)?;
        ends.recv_timeout(limit).map_err(|_| {
            // The child is unreaped as long as its handler waits, so the pid is still its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            late(limit)
        })
    }

    fn run_unless(
        &self,
        mut command: Command,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Ended> {
        command.process_group(0);
        let (pid, ends) = self.spawn(&mut command)?;
        let end = Instant::now() + limit;
        loop {
            if let Ok(ended) = ends.recv_timeout(ASK) {
                return Ok(ended);
            }
            let stopped = stop();
            if stopped || Instant::now() >= end {
                // Unreaped as above; its children share the group.
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                return Err(match stopped {
                    true => io::Error::other("stopped: the sandbox is to die"),
                    false => late(limit),
                });
            }
        }
    }
}

fn late(limit: Duration) -> io::Error {
    let text = format!("no end after {limit:?}; killed it");
    io::Error::new(io::ErrorKind::TimedOut, text)
}

/// See [`Reaper::watch`].
pub struct Watch {
    reaper: Arc<Reaper>,
    key: u64,
}

impl Watch {
    /// Calls `handler` once with the exit of `pid`: now if it is gone already, else when it goes.
    pub fn claim(self, pid: i32, handler: impl FnOnce(Exit) + Send + 'static) {
        let mut state = self.reaper.state.lock();
        let gone = state
            .watches
            .get_mut(&self.key)
            .and_then(|exits| exits.remove(&pid));
        match gone {
            Some(exit) => {
                drop(state);
                handler(exit);
            }
            None => {
                state
                    .handlers
                    .insert(pid, Box::new(move |exit, _| handler(exit)));
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.reaper.state.lock().watches.remove(&self.key);
    }
}
