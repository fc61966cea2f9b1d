//! States in which CRIU cannot dump a process: most of them pass.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The terminal's signals that stop a process, if it does nothing about them; SIGSTOP does whatever it does.
const TERMINAL_STOPS: u64 = bit(libc::SIGTSTP) | bit(libc::SIGTTIN) | bit(libc::SIGTTOU);

/// Why CRIU could not dump a process at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unrest {
    /// It will be over in a moment; what it does, in words.
    Passing(&'static str),
    /// It is stopped, until somebody continues it.
    Stopped,
}

impl Unrest {
    /// What keeps a process from being dumped: it waits uninterruptibly, and CRIU would give up after 10 s; it
    /// has ended in part ("Zombies with threads are not supported"); or, where CRIU `hangs_on_stopped`, it is
    /// stopped, or about to be.
    pub(super) fn of(pid: i32, hangs_on_stopped: bool) -> Option<Self> {
        if waits_for_vfork(pid) {
            return Some(Self::Passing("waits for its vforked child"));
        }
        let stat = Stat::of(pid)?;
        if stat.state == 'Z' && tasks(pid).count() > 1 {
            return Some(Self::Passing("has ended, but not all of its threads,"));
        }
        if !hangs_on_stopped {
            return None;
        }
        match is_stopped(pid) {
            true => Some(Self::Stopped),
            // Frozen before it could notice the signal.
            false => Signals::of(pid)
                .will_stop()
                .then_some(Self::Passing("is being stopped")),
        }
    }
}

/// Whether a signal has stopped this process. In a frozen cgroup its state is that of a frozen
/// one, and only the place where it waits tells.
pub(super) fn is_stopped(pid: i32) -> bool {
    let wchan = fs::read_to_string(proc(pid).join("wchan"));
    Stat::of(pid).is_some_and(|stat| stat.state == 'T')
        || wchan.is_ok_and(|place| place == "do_signal_stop")
}

/// Whether a process has been killed, be it that it has not noticed yet.
pub(super) fn is_dying(pid: i32) -> bool {
    const PF_EXITING: u64 = 4;
    let Some(stat) = Stat::of(pid) else {
        return true;
    };
    matches!(stat.state, 'Z' | 'X')
        || stat.flags & PF_EXITING != 0
        || Signals::of(pid).pending & bit(libc::SIGKILL) != 0
}

/// The directories of a process's threads. Those of a zombie are in /proc until they have ended.
fn tasks(pid: i32) -> impl Iterator<Item = PathBuf> {
    let tasks = fs::read_dir(proc(pid).join("task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| task.path())
}

/// Whether one of a process's threads waits for its vforked child: in `wait_for_vfork_done`, or,
/// where the compiler has inlined that (kernel 6.18), in `kernel_clone`, which waits for nothing
/// else.
fn waits_for_vfork(pid: i32) -> bool {
    tasks(pid).any(|task| {
        fs::read_to_string(task.join("wchan"))
            .is_ok_and(|place| place == "wait_for_vfork_done" || place == "kernel_clone")
    })
}

fn proc(pid: i32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

/// The bit of a signal in the masks of `/proc/PID/status`.
const fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// What `/proc/PID/status` says of signals: of the process and of its first thread.
#[derive(Debug, Default)]
struct Signals {
    pending: u64,
    /// Blocked, ignored or caught.
    handled: u64,
}

impl Signals {
    /// None at all of a process that is gone.
    fn of(pid: i32) -> Self {
        Self::parse(&fs::read_to_string(proc(pid).join("status")).unwrap_or_default())
    }

    fn parse(status: &str) -> Self {
        let mut found = Self::default();
        for line in status.lines() {
            let mut words = line.split_whitespace();
            let into = match words.next() {
                Some("SigPnd:" | "ShdPnd:") => &mut found.pending,
                Some("SigBlk:" | "SigIgn:" | "SigCgt:") => &mut found.handled,
                _ => continue,
            };
            let mask = words
                .next()
                .and_then(|mask| u64::from_str_radix(mask, 16).ok());
            *into |= mask.unwrap_or(0);
        }
        found
    }

    fn will_stop(&self) -> bool {
        self.pending & (bit(libc::SIGSTOP) | (TERMINAL_STOPS & !self.handled)) != 0
    }
}

/// What `/proc/PID/stat` says first.
pub(super) struct Stat {
    pub(super) state: char,
    pub(super) parent: i32,
    pub(super) flags: u64,
}

impl Stat {
    /// Reads it; the second field may contain anything.
    pub(super) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read(proc(pid).join("stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        let (_, rest) = stat.rsplit_once(')')?;
        let mut words = rest.split_whitespace();
        Some(Self {
            state: words.next()?.chars().next()?,
            parent: words.next()?.parse().ok()?,
            flags: words.nth(4)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use super::*;

    /// The main thread has ended, and another goes on until it is told to end.
    const HALF_GONE: &str = "import ctypes, sys, threading\n\
        def wait():\n    sys.stdin.read()\n\
        threading.Thread(target=wait).start()\n\
        ctypes.CDLL(None).pthread_exit(None)\n";

    fn python(script: &str) -> Child {
        let python = Command::new("python3")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn();
        python.unwrap()
    }

    fn until(what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < end, "{what}");
            thread::yield_now();
        }
    }

    #[test]
    fn a_process_of_which_only_the_first_thread_has_ended_is_not_dumped() {
        let mut python = python(HALF_GONE);
        let pid = python.id() as i32;
        until("it ends in part", || {
            matches!(Unrest::of(pid, true), Some(Unrest::Passing(_)))
        });
        drop(python.stdin.take());
        python.wait().unwrap();
        assert_eq!(Unrest::of(pid, true), None);
    }

    #[test]
    fn a_stopped_process_is_not_dumped_where_criu_hangs_on_it() {
        let mut python = python("import sys; sys.stdin.read()");
        let pid = python.id() as i32;
        assert_eq!(Unrest::of(pid, true), None);
        // SAFETY: takes two integers.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGSTOP) }, 0);
        until("it stops", || {
            Unrest::of(pid, true) == Some(Unrest::Stopped)
        });
        assert_eq!(Unrest::of(pid, false), None);
        python.kill().unwrap();
        python.wait().unwrap();
    }

    #[test]
    fn a_pending_signal_stops_unless_something_is_done_about_it() {
        let status = |pending: u64, blocked: u64, caught: u64| {
            Signals::parse(&format!(
                "Name:\tx\nSigPnd:\t{pending:016x}\nShdPnd:\t{:016x}\nSigBlk:\t{blocked:016x}\n\
                 SigIgn:\t{:016x}\nSigCgt:\t{caught:016x}\n",
                0, 0
            ))
        };
        let [stop, tstp, usr1] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGUSR1].map(bit);
        assert!(status(stop, stop, 0).will_stop());
        assert!(status(tstp | usr1, usr1, 0).will_stop());
        assert!(!status(tstp, tstp, 0).will_stop());
        assert!(!status(tstp, 0, tstp).will_stop());
        assert!(!status(usr1, 0, 0).will_stop());
    }
}
