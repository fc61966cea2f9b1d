//! Whether no task of a sandbox has run for a while, so that nothing needed to be frozen (D7).
//!
//! Checked as a seqlock is: once before the work and once after it. The kernel counts a task's turns on a
//! CPU as it is given one, so a task that has run in between, or runs now, has another count.

use super::{
    proc_fs::{Dir, ProcessError},
    snapshot::MAX_TASKS,
    tasks::{self, Progress, Stat},
};

/// How far all threads of a sandbox had come at a moment when none of them ran.
#[derive(Debug, PartialEq, Eq)]
pub struct Stillness {
    /// In ascending order of process and thread.
    threads: Vec<(i32, i32, Progress)>,
}

impl Stillness {
    /// Of threads (process, thread, how far it has come) none of which runs.
    pub(super) fn new(threads: impl Iterator<Item = (i32, i32, Progress)>) -> Self {
        let mut threads: Vec<_> = threads.collect();
        threads.sort_unstable_by_key(|(pid, tid, _)| (*pid, *tid));
        Self { threads }
    }

    /// Of the processes `pids` (host pids, all of them); None if a thread runs or is about to.
    ///
    /// # Errors
    /// If /proc cannot be read, a process ends meanwhile, or there are more threads than are looked at.
    pub fn of(pids: &[i32]) -> Result<Option<Self>, ProcessError> {
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        let mut threads = Vec::new();
        for pid in pids {
            let dir = Dir::open(pid)?;
            let left = MAX_TASKS - threads.len();
            for tid in dir.numbers("task", "threads", left)? {
                // Before the state: see `tasks::read`.
                let progress = tasks::progress(&dir, tid)?;
                let file = format!("task/{tid}/stat");
                let stat = Stat::parse(&dir.record(&file)?);
                let state = stat.ok_or_else(|| dir.unexpected(&file))?.state;
                if state == b'R' {
                    return Ok(None);
                }
                threads.push((pid, tid, progress));
            }
        }
        Ok(Some(Self { threads }))
    }

    /// Whether none of them has run since, and no other process has come: `pids` are those of now. To
    /// be asked after the work; an error counts as no.
    pub fn has_lasted(&self, pids: &[i32]) -> bool {
        Self::of(pids).is_ok_and(|now| now.as_ref() == Some(self))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        thread,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::test_child::TestChild;

    fn until(mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < deadline, "it does not come to pass");
            thread::yield_now();
        }
    }

    fn signal(child: &TestChild, signal: i32) {
        // SAFETY: takes two integers.
        assert_eq!(unsafe { libc::kill(child.pid(), signal) }, 0);
    }

    fn still(pids: &[i32]) -> Stillness {
        let mut found = None;
        until(|| {
            found = Stillness::of(pids).unwrap();
            found.is_some()
        });
        found.unwrap()
    }

    #[test]
    fn who_sleeps_all_the_time_was_still() {
        let sleeper = TestChild::asleep();
        assert!(still(&[sleeper.pid()]).has_lasted(&[sleeper.pid()]));
    }

    #[test]
    fn who_has_run_and_sleeps_again_was_not_still() {
        let sleeper = TestChild::asleep();
        let before = still(&[sleeper.pid()]);
        // It wakes, and goes on sleeping.
        signal(&sleeper, libc::SIGSTOP);
        signal(&sleeper, libc::SIGCONT);
        until(|| still(&[sleeper.pid()]) != before);
        assert!(!before.has_lasted(&[sleeper.pid()]));
    }

    #[test]
    fn who_runs_is_not_still() {
        let busy = TestChild::busy();
        until(|| Stillness::of(&[busy.pid()]).is_ok_and(|found| found.is_none()));
    }

    #[test]
    fn who_came_or_went_was_not_still() {
        let (a, b) = (TestChild::asleep(), TestChild::asleep());
        let before = still(&[a.pid()]);
        assert!(!before.has_lasted(&[a.pid(), b.pid()]));
        let before = still(&[a.pid(), b.pid()]);
        drop(b);
        assert!(!before.has_lasted(&[a.pid()]));
    }
}
