//! A cut without a dump: files are read while no process runs, with a freeze only if one would (D7).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    cut::{CutError, LATCH_LIMIT},
    doors::Doors,
    freeze::{Freeze, FreezeError},
};
use crate::inspector::process::Stillness;

/// How often it is tried to do without a freeze. Whoever polls ten times a second meets a capture of ten
/// milliseconds one time in ten.
const IDLE_TRIES: u32 = 2;

/// What was taken while nothing ran.
#[derive(Debug)]
pub struct Still<T> {
    /// From the freeze to the thaw; zero if none was needed.
    pub frozen: Duration,
    /// What the caller took.
    pub captured: T,
}

/// Calls `capture` while no process runs: without a freeze if none runs of its own accord, unless
/// `must_freeze`. It is called again if one did run meanwhile; only the last call counts. It is told how far
/// the threads had come before it, if they were not frozen.
///
/// `limit`: how long another cut is waited for.
pub fn stand_still<T>(
    freeze: &Arc<Freeze>,
    doors: &Arc<Doors>,
    limit: Duration,
    must_freeze: bool,
    mut capture: impl FnMut(Option<&Stillness>) -> Result<T, String>,
) -> Result<Still<T>, CutError> {
    let _alone = doors.cut_alone(limit + LATCH_LIMIT).ok_or(CutError::Busy)?;
    let _latched = doors.latch(LATCH_LIMIT).ok_or(CutError::Latch)?;
    for _ in 0..if must_freeze { 0 } else { IDLE_TRIES } {
        if freeze.is_dying() {
            return Err(FreezeError::Dying.into());
        }
        // Whatever cannot be read of a process means that it may run.
        let Ok(Some(still)) = Stillness::of(&freeze.cgroup().procs()?) else {
            continue;
        };
        let entered = doors.entered();
        let captured = capture(Some(&still));
        // One that came after waiting too long at the latch, and went, leaves no process behind.
        if doors.entered() == entered && still.has_lasted(&freeze.cgroup().procs()?) {
            return Ok(Still {
                frozen: Duration::ZERO,
                captured: captured.map_err(CutError::Capture)?,
            });
        }
    }
    let begin = Instant::now();
    let held = freeze.hold()?;
    let captured = capture(None).map_err(CutError::Capture)?;
    if freeze.is_dying() {
        return Err(FreezeError::Dying.into());
    }
    drop(held);
    Ok(Still {
        frozen: begin.elapsed(),
        captured,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{coordinator::freeze::fake::FakeCgroup, test_child::TestChild};

    const SOON: Duration = Duration::from_secs(20);

    /// A sandbox with one real process.
    struct Bed {
        child: TestChild,
        cgroup: Arc<FakeCgroup>,
        freeze: Arc<Freeze>,
        doors: Arc<Doors>,
    }

    impl Bed {
        fn of(child: TestChild) -> Self {
            let cgroup = Arc::new(FakeCgroup::default());
            cgroup.procs.lock().push(child.pid());
            Self {
                child,
                freeze: Freeze::new(Arc::clone(&cgroup) as _),
                cgroup,
                doors: Doors::new(),
            }
        }

        fn state(&self) -> Option<Stillness> {
            Stillness::of(&self.cgroup.procs.lock()).unwrap()
        }

        fn until(&self, is_so: impl Fn() -> bool) {
            let deadline = Instant::now() + SOON;
            while !is_so() {
                assert!(Instant::now() < deadline, "it does not come to pass");
                std::thread::yield_now();
            }
        }

        /// Stops it for a moment, so that it has run, and waits until it sleeps again.
        fn wake(&self) {
            let before = self.state();
            for signal in [libc::SIGSTOP, libc::SIGCONT] {
                // SAFETY: takes two integers.
                assert_eq!(unsafe { libc::kill(self.child.pid(), signal) }, 0);
            }
            self.until(|| self.state().is_some() && self.state() != before);
        }

        /// How often `capture` was called frozen and not frozen, and what came of it.
        fn take(
            &self,
            must_freeze: bool,
            mut capture: impl FnMut() -> Result<(), String>,
        ) -> (Vec<bool>, Result<Still<()>, CutError>) {
            let mut calls = Vec::new();
            let taken = stand_still(&self.freeze, &self.doors, SOON, must_freeze, |still| {
                calls.push(*self.cgroup.frozen.lock());
                assert_eq!(still.is_none(), calls.last() == Some(&true));
                capture()
            });
            assert!(!*self.cgroup.frozen.lock(), "thawed");
            assert!(self.doors.latch(SOON).is_some());
            (calls, taken)
        }
    }

    fn sleeper() -> Bed {
        Bed::of(TestChild::asleep())
    }

    #[test]
    fn where_nothing_runs_nothing_is_frozen() {
        let (calls, taken) = sleeper().take(false, || Ok(()));
        assert_eq!(calls, [false]);
        assert_eq!(taken.unwrap().frozen, Duration::ZERO);
    }

    #[test]
    fn whoever_wants_it_frozen_finds_it_so() {
        let (calls, taken) = sleeper().take(true, || Ok(()));
        assert_eq!(calls, [true]);
        assert!(taken.unwrap().frozen > Duration::ZERO);
    }

    #[test]
    fn what_was_taken_while_somebody_ran_does_not_count() {
        let bed = sleeper();
        let mut times = 0;
        let (calls, taken) = bed.take(false, || {
            times += 1;
            if times == 1 {
                bed.wake();
                return Err("half of it".into());
            }
            Ok(())
        });
        assert_eq!(calls, [false, false]);
        taken.unwrap();
        // Again and again: then it is made to stand still.
        let (calls, taken) = bed.take(false, || {
            bed.wake();
            Ok(())
        });
        assert_eq!(calls, [false, false, true]);
        taken.unwrap();
    }

    #[test]
    fn what_was_taken_while_an_exec_came_in_does_not_count() {
        let bed = sleeper();
        let mut times = 0;
        let (calls, taken) = bed.take(false, || {
            times += 1;
            if times == 1 {
                bed.doors.enter_at_once();
            }
            Ok(())
        });
        assert_eq!(calls, [false, false]);
        taken.unwrap();
    }

    #[test]
    fn whoever_runs_all_the_time_is_frozen() {
        let bed = Bed::of(TestChild::busy());
        bed.until(|| bed.state().is_none());
        let (calls, _) = bed.take(false, || Ok(()));
        assert_eq!(calls.last(), Some(&true));
    }

    #[test]
    fn a_process_that_cannot_be_looked_at_is_frozen() {
        let bed = sleeper();
        // Beyond every kernel's pid_max.
        bed.cgroup.procs.lock().push(1_000_000_001);
        let (calls, _) = bed.take(false, || Ok(()));
        assert_eq!(calls, [true]);
    }

    #[test]
    fn an_error_is_told_and_the_dying_are_left_alone() {
        let bed = sleeper();
        let (calls, taken) = bed.take(false, || Err("no room".into()));
        assert_eq!(calls, [false]);
        assert!(taken.unwrap_err().to_string().contains("no room"));
        bed.freeze.release_for_death();
        let (calls, taken) = bed.take(false, || Ok(()));
        assert_eq!((calls.len(), taken.is_err()), (0, true));
    }
}
