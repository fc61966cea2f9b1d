//! Reaps every child of the shim, at once.
//!
//! The shim is a child subreaper: processes of containers become its children when the runtime
//! has started them and left. An unreaped exec keeps its pid namespace alive, so that kill and
//! dump hang; therefore one thread waits for SIGCHLD and nothing else.
//!
//! A process may be gone before its starter knows its pid. A [`Watch`], taken before the start,
//! keeps the exits that nobody has claimed.
//!
//! One child is left to be a zombie if asked ([`Reaper::keep`], [`Watch::claim_lingering`]): an init that was
//! rolled back or may come back after its death, whose pid the clients go on using. The kernel gives
//! that pid to nobody else meanwhile.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs, io,
    os::unix::process::CommandExt,
    path::PathBuf,
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
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};
use parking_lot::{Mutex, MutexGuard};
use signal_hook::{consts::SIGCHLD, iterator::Signals};
use time::OffsetDateTime;

use super::exits::Exits;
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
    /// Children that stay zombies.
    kept: HashSet<i32>,
    /// Those that will, once they have ended.
    lingering: HashSet<i32>,
}

/// The one who reaps. Cheap to share.
pub struct Reaper {
    state: Mutex<State>,
    exits: Exits,
}

impl Reaper {
    /// Starts the reaping thread. Call once per process, before any child is made.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self {
            state: Mutex::default(),
            exits: Exits::start()?,
        });
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

    /// One that reaps nothing.
    #[cfg(test)]
    pub fn idle() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            exits: Exits::start().unwrap(),
        })
    }

    /// Does what follows an exit, in another thread: nothing may wait in a handler, which would keep all other children
    /// from being reaped.
    pub fn follow(&self, work: impl FnOnce() + Send + 'static) {
        self.exits.follow(work);
    }

    fn reap(&self) {
        loop {
            // The lock spans wait and look-up: whoever registers a handler under it either comes
            // before the exit is collected or finds it in a watch.
            let state = self.state.lock();
            if !state.kept.is_empty() {
                drop(state);
                return self.reap_all_but_kept();
            }
            let collected = match state.lingering.is_empty() {
                true => collect(-1),
                false => collect_but(&state.lingering),
            };
            match collected {
                Collected::Ended(exit, ended) => deliver(state, exit, ended),
                Collected::Again => {}
                Collected::Nothing => return,
            }
        }
    }

    /// Asks for each child by itself: the kernel, asked for any, would hand out the kept ones, or
    /// see nothing else behind them.
    fn reap_all_but_kept(&self) {
        let children = match children() {
            Ok(children) => children,
            Err(e) => return log::error!("cannot list children, some stay unreaped: {e}"),
        };
        for pid in children {
            loop {
                let state = self.state.lock();
                if state.kept.contains(&pid) {
                    break;
                }
                let collected = match state.lingering.contains(&pid) {
                    true => peek(Id::Pid(Pid::from_raw(pid))),
                    false => collect(pid),
                };
                match collected {
                    Collected::Ended(exit, ended) => {
                        deliver(state, exit, ended);
                        break;
                    }
                    Collected::Again => {}
                    Collected::Nothing => break,
                }
            }
        }
    }

    /// Leaves a child unreaped, now or once it has ended, until [`Reaper::release`]. Whoever wanted
    /// its exit never hears of it. False, and nothing is done, if it is gone already, or nobody
    /// wanted it.
    pub fn keep(&self, pid: i32) -> bool {
        let mut state = self.state.lock();
        state.lingering.remove(&pid);
        // An exit is collected and delivered under the lock: while somebody waits for it, it has
        // not been collected.
        let mine = state.handlers.remove(&pid).is_some();
        if mine {
            state.kept.insert(pid);
        }
        mine
    }

    /// Whether a child is a zombie that stays one.
    pub fn keeps(&self, pid: i32) -> bool {
        self.state.lock().kept.contains(&pid)
    }

    /// Reaps as ever, but tells nobody. False as in [`Reaper::keep`].
    pub fn disclaim(&self, pid: i32) -> bool {
        self.state.lock().handlers.remove(&pid).is_some()
    }

    /// The end of [`Reaper::keep`] and [`Watch::claim_lingering`].
    pub fn release(&self, pid: i32) {
        let mut state = self.state.lock();
        state.lingering.remove(&pid);
        if state.kept.remove(&pid)
            && let Collected::Ended(exit, ended) = collect(pid)
        {
            deliver(state, exit, ended);
        }
    }

    /// Pretends that a process has ended: unit tests have no children.
    #[cfg(test)]
    pub fn inject(&self, exit: Exit) {
        let state = self.state.lock();
        if !state.kept.contains(&exit.pid) {
            deliver(state, exit, Ended::Exited(exit.status as i32));
        }
    }

    /// The children that are kept.
    #[cfg(test)]
    pub fn kept(&self) -> Vec<i32> {
        self.state.lock().kept.iter().copied().collect()
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

/// What one question for an ended child came to.
enum Collected {
    Ended(Exit, Ended),
    /// Something else happened to it: ask again.
    Again,
    Nothing,
}

/// Collects the exit of one child, or of any (-1). Never waits.
fn collect(pid: i32) -> Collected {
    collected(waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)))
}

/// The exit of a child that stays a zombie. Never waits.
fn peek(whose: Id<'_>) -> Collected {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    collected(waitid(whose, flags))
}

/// Collects the exit of any child; one of `lingering` stays a zombie.
fn collect_but(lingering: &HashSet<i32>) -> Collected {
    match peek(Id::All) {
        Collected::Ended(exit, _) if !lingering.contains(&exit.pid) => collect(exit.pid),
        peeked => peeked,
    }
}

fn collected(status: nix::Result<WaitStatus>) -> Collected {
    let (pid, ended) = match status {
        Ok(WaitStatus::Exited(pid, code)) => (pid, Ended::Exited(code)),
        Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Ended::Signaled(signal as i32)),
        Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Collected::Nothing,
        Ok(_) | Err(Errno::EINTR) => return Collected::Again,
        Err(e) => {
            log::error!("cannot wait for children: {e}");
            return Collected::Nothing;
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
    Collected::Ended(exit, ended)
}

/// How often the threads are listed again because one of them has come or gone.
const LISTINGS: u32 = 100;

/// All children of this process. Exact, since nobody else reaps: the kernel's lists are not when
/// children go while they are read.
fn children() -> io::Result<HashSet<i32>> {
    let mut all = HashSet::new();
    let mut before = threads()?;
    for _ in 0..LISTINGS {
        for thread in &before {
            match fs::read_to_string(thread.join("children")) {
                Ok(pids) => all.extend(pids.split_whitespace().flat_map(str::parse::<i32>)),
                Err(e) if gone(&e) => {}
                Err(e) => return Err(e),
            }
        }
        // The children of a thread that has ended meanwhile are another one's.
        let after = threads()?;
        if after == before {
            return Ok(all);
        }
        before = after;
    }
    Ok(all)
}

fn threads() -> io::Result<BTreeSet<PathBuf>> {
    let threads = fs::read_dir("/proc/self/task")?;
    threads.map(|thread| Ok(thread?.path())).collect()
}

fn gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

/// Whether this kernel lists children, without which no child can be kept.
pub fn lists_children() -> bool {
    fs::metadata("/proc/thread-self/children").is_ok()
}

/// Gives an exit to whoever wants it, without the lock. A child that lingers is a zombie from now on.
fn deliver(mut state: MutexGuard<'_, State>, exit: Exit, ended: Ended) {
    if state.lingering.remove(&exit.pid) {
        state.kept.insert(exit.pid);
    }
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
        self.claim_as(pid, false, handler);
    }

    /// The same; unless it is gone already, it stays a zombie once it has ended, until
    /// [`Reaper::release`]. Its exit is told all the same.
    pub fn claim_lingering(self, pid: i32, handler: impl FnOnce(Exit) + Send + 'static) {
        self.claim_as(pid, true, handler);
    }

    fn claim_as(self, pid: i32, lingers: bool, handler: impl FnOnce(Exit) + Send + 'static) {
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
                if lingers {
                    state.lingering.insert(pid);
                }
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
