//! One consistent cut: latch, freeze, dump, look whether it held, capture, thaw (D7).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    doors::Doors,
    freeze::{Freeze, FreezeError, Held},
};
use crate::{
    cgroup::CgroupError,
    runtime::{
        self, OciRuntime, RuntimeError, criu_conf,
        descriptors::{self, DescriptorsError, Stream},
    },
};

/// How long a cut waits for execs that are half-way through the door.
pub(super) const LATCH_LIMIT: Duration = Duration::from_secs(30);
/// A vforked child needs a few hundred microseconds to its exec.
const VFORK_PAUSE: Duration = Duration::from_millis(3);
const VFORK_TRIES: u32 = 100;
/// What a cut must know of the sandbox's processes.
pub trait Scene: Send + Sync {
    /// Host pid of init.
    fn init_pid(&self) -> i32;
    /// Moves the frozen processes' output into the shim: it was written before the cut.
    fn drain(&self);
    /// The pipes between the processes and the shim.
    fn streams(&self) -> Result<Vec<Stream>, String>;
}

/// The parts of a sandbox that take part in a cut.
pub struct Sandbox<'a> {
    /// The container's id for the runtime.
    pub id: &'a str,
    /// Who dumps.
    pub runtime: &'a dyn OciRuntime,
    /// Who freezes.
    pub freeze: &'a Arc<Freeze>,
    /// Who keeps execs out.
    pub doors: &'a Arc<Doors>,
    /// Its processes.
    pub scene: &'a dyn Scene,
}

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// CRIU would drop these processes without a word (D9b).
    #[error(
        "the sandbox has {} that CRIU cannot dump, because they are no descendants of its init: \
         wait for them or end them first",
        list_execs(.execs, .pids)
    )]
    LiveExecs {
        /// Execs that run.
        execs: Vec<String>,
        /// Host pids of all processes that would be lost.
        pids: Vec<i32>,
    },
    /// CRIU would hang in the kernel: a task that is stopped never answers in a v1 freezer.
    #[error(
        "the sandbox has stopped processes (host pid {}), on which CRIU hangs with cgroup v1: \
         continue or end them",
        list(.0)
    )]
    Stopped(Vec<i32>),
    /// A process stays between vfork and exec.
    #[error("a process waits for its vforked child all the time, and CRIU cannot dump it so")]
    Vfork,
    /// Another cut has taken longer than one may take.
    #[error("another checkpoint of the sandbox does not end")]
    Busy,
    /// An exec was being started for too long.
    #[error("an exec has been starting for {LATCH_LIMIT:?}")]
    Latch,
    /// The sandbox could not be frozen.
    #[error("cannot freeze the sandbox: {0}")]
    Freeze(#[from] FreezeError),
    /// Its processes could not be listed.
    #[error("cannot list the sandbox's processes: {0}")]
    Procs(#[from] CgroupError),
    /// CRIU failed.
    #[error("{source}; CRIU's log says:\n{log}")]
    Dump {
        /// The runtime's answer.
        source: RuntimeError,
        /// The end of CRIU's log.
        log: String,
    },
    /// The sandbox did not stand still.
    #[error("the sandbox did not stand still during the dump ({0}): discarded")]
    Disturbed(String),
    /// stdio could not be saved.
    #[error(transparent)]
    Streams(#[from] DescriptorsError),
    /// The part done by the caller.
    #[error("{0}")]
    Capture(String),
}

fn list(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    pids.join(", ")
}

fn list_execs(execs: &[String], pids: &[i32]) -> String {
    let pids = list(pids);
    match execs {
        [] => format!("processes (host pid {pids})"),
        execs => format!("live execs ({}; host pid {pids})", execs.join(", ")),
    }
}

/// What a cut found and took.
#[derive(Debug)]
pub struct Done<T> {
    /// From the freeze to the thaw.
    pub frozen: Duration,
    /// How many processes are in the dump.
    pub processes: usize,
    /// The pipes that are in the dump.
    pub streams: Vec<Stream>,
    /// What the caller took while all stood still.
    pub captured: T,
}

impl Sandbox<'_> {
    /// Dumps all processes into `args.image_path` and calls `capture` while they stand still.
    ///
    /// The sandbox is thawed and its doors are open again when this returns, unless the client
    /// has paused it. After an error nothing in the image directory is worth keeping.
    pub fn cut<T>(
        &self,
        args: &runtime::Checkpoint,
        capture: impl FnOnce() -> Result<T, String>,
    ) -> Result<Done<T>, CutError> {
        let _alone = self
            .doors
            .cut_alone(args.limit + LATCH_LIMIT)
            .ok_or(CutError::Busy)?;
        let _latched = self.doors.latch(LATCH_LIMIT).ok_or(CutError::Latch)?;
        let begin = Instant::now();
        if self.freeze.cgroup().hangs_on_stopped() {
            let mut stopped = self.freeze.cgroup().procs()?;
            stopped.retain(|pid| is_stopped(*pid));
            if !stopped.is_empty() {
                return Err(CutError::Stopped(stopped));
            }
        }
        let held = self.hold_outside_vfork()?;
        let before: BTreeSet<i32> = self.freeze.cgroup().procs()?.into_iter().collect();
        let strangers = strangers(&before, self.scene.init_pid());
        if !strangers.is_empty() {
            return Err(CutError::LiveExecs {
                execs: self.doors.inside(),
                pids: strangers,
            });
        }
        self.scene.drain();
        let streams = self.scene.streams().map_err(CutError::Capture)?;
        self.dump(args)?;
        if args.leave_running {
            self.check_stillness(&before)?;
        }
        descriptors::save(&args.image_path, &streams)?;
        let captured = capture().map_err(CutError::Capture)?;
        // With --exit it is meant to die.
        if args.leave_running && self.freeze.is_dying() {
            return Err(FreezeError::Dying.into());
        }
        drop(held);
        Ok(Done {
            frozen: begin.elapsed(),
            processes: before.len(),
            streams,
            captured,
        })
    }

    /// Freezes at a moment when no process is between vfork and exec.
    ///
    /// Its parent waits for it where CRIU cannot seize it, and CRIU would give up after 10 s. The
    /// child is let run on for a moment.
    fn hold_outside_vfork(&self) -> Result<Held, CutError> {
        for _ in 0..VFORK_TRIES {
            let held = self.freeze.hold()?;
            let procs = self.freeze.cgroup().procs()?;
            if !procs.iter().any(|pid| waits_for_vfork(*pid)) {
                return Ok(held);
            }
            drop(held);
            thread::sleep(VFORK_PAUSE);
        }
        Err(CutError::Vfork)
    }

    fn dump(&self, args: &runtime::Checkpoint) -> Result<(), CutError> {
        // CRIU and an init that dies under its hands wait for each other. With --exit it is CRIU
        // that kills.
        let init = self.scene.init_pid();
        let stop = || args.leave_running && (self.freeze.is_dying() || is_dying(init));
        self.runtime
            .checkpoint(self.id, args, &stop)
            .map_err(|source| CutError::Dump {
                source,
                log: criu_conf::log_tail(&args.work_path.join("dump.log")),
            })
    }

    /// CRIU thaws a v1 cgroup while it works. What then came or went is not in the images.
    fn check_stillness(&self, before: &BTreeSet<i32>) -> Result<(), CutError> {
        let after: BTreeSet<i32> = self.freeze.cgroup().procs()?.into_iter().collect();
        if &after != before {
            let changed: Vec<&i32> = after.symmetric_difference(before).collect();
            return Err(CutError::Disturbed(format!(
                "processes came or went: {changed:?}"
            )));
        }
        if !self.freeze.cgroup().is_frozen()? {
            return Err(CutError::Disturbed("it was thawed".into()));
        }
        Ok(())
    }
}

/// Processes that are neither init nor its descendants: those whose parent is outside.
fn strangers(procs: &BTreeSet<i32>, init: i32) -> Vec<i32> {
    procs
        .iter()
        .copied()
        .filter(|pid| *pid != init && !stat(*pid).is_some_and(|s| procs.contains(&s.parent)))
        .collect()
}

/// Whether a process has been killed, be it that it has not noticed yet.
fn is_dying(pid: i32) -> bool {
    const PF_EXITING: u64 = 4;
    const SIGKILL: u64 = 1 << (9 - 1);
    let Some(stat) = stat(pid) else {
        return true;
    };
    let status = fs::read_to_string(proc(pid).join("status")).unwrap_or_default();
    let pending = status
        .lines()
        .filter(|line| line.starts_with("SigPnd:") || line.starts_with("ShdPnd:"))
        .filter_map(|line| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok());
    matches!(stat.state, 'Z' | 'X')
        || stat.flags & PF_EXITING != 0
        || pending.into_iter().any(|mask| mask & SIGKILL != 0)
}

/// Whether one of a process's threads waits for its vforked child: in `wait_for_vfork_done`, or,
/// where the compiler has inlined that (kernel 6.18), in `kernel_clone`, which waits for nothing
/// else.
fn waits_for_vfork(pid: i32) -> bool {
    let tasks = fs::read_dir(proc(pid).join("task"));
    tasks.into_iter().flatten().flatten().any(|task| {
        fs::read_to_string(task.path().join("wchan"))
            .is_ok_and(|place| place == "wait_for_vfork_done" || place == "kernel_clone")
    })
}

fn proc(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// Whether a signal has stopped this process. In a frozen cgroup its state is that of a frozen
/// one, and only the place where it waits tells.
fn is_stopped(pid: i32) -> bool {
    let wchan = fs::read_to_string(proc(pid).join("wchan"));
    stat(pid).is_some_and(|stat| stat.state == 'T')
        || wchan.is_ok_and(|place| place == "do_signal_stop")
}

/// What `/proc/PID/stat` says first.
struct Stat {
    state: char,
    parent: i32,
    flags: u64,
}

/// Reads `/proc/PID/stat`, whose second field may contain anything.
fn stat(pid: i32) -> Option<Stat> {
    let stat = fs::read(proc(pid).join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, rest) = stat.rsplit_once(')')?;
    let mut words = rest.split_whitespace();
    Some(Stat {
        state: words.next()?.chars().next()?,
        parent: words.next()?.parse().ok()?,
        flags: words.nth(4)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_parent_is_outside_is_a_stranger() {
        let me = std::process::id() as i32;
        let init = stat(me).unwrap().parent;
        // With the parent inside I am one of them.
        assert!(strangers(&BTreeSet::from([init, me]), init).is_empty());
        assert_eq!(strangers(&BTreeSet::from([me]), init), [me]);
        assert!(strangers(&BTreeSet::from([me]), me).is_empty());
    }

    #[test]
    fn the_refusal_names_execs_and_pids() {
        let error = CutError::LiveExecs {
            execs: vec!["e1".into()],
            pids: vec![7, 8],
        };
        assert!(error.to_string().contains("live execs (e1; host pid 7, 8)"));
    }
}
