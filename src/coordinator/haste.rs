//! Going first while somebody may wait.
//!
//! A turn ends while containerd, its client and the shim's own threads are busy with the exec's end. Whoever
//! looks then is taken off the processor again and again, and waits for it nearly as long as it works;
//! the next command waits for it at the gate. So the look goes first. What takes long (dump, capture,
//! compression) does not: nobody waits for most of it, and it must not be in the way of those who work.

use rustix::process::{getpriority_process, setpriority_process};

/// The nice value of who looks: nine times the weight of others, and still one of the ordinary threads.
const NICE: i32 = -10;

/// This thread goes before others, as long as this lives. What it starts meanwhile goes on so.
#[must_use]
pub(super) struct Haste {
    /// The nice value to come back to; None if there is nothing to take back.
    before: Option<i32>,
}

impl Haste {
    /// Where it is forbidden nothing changes: all is done as well, a little later.
    pub(super) fn begin() -> Self {
        // Of a thread, not of the process, whatever their names say (setpriority(2), "C library/kernel
        // differences").
        let before = getpriority_process(None).ok().filter(|nice| *nice > NICE);
        let before = before.filter(|_| setpriority_process(None, NICE).is_ok());
        Self { before }
    }
}

impl Drop for Haste {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(e) = setpriority_process(None, before)
        {
            log::warn!("a thread keeps its nice value of {NICE}: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::thread::gettid;
    use std::thread;

    fn nice() -> i32 {
        getpriority_process(None).unwrap()
    }

    /// In a thread of its own, which ends with it.
    fn aside<T: Send>(what: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(what).join().unwrap())
    }

    #[test]
    fn this_thread_alone_goes_first_and_only_so_long() {
        let (other, before) = (gettid(), nice());
        aside(|| {
            let haste = Haste::begin();
            let (ours, theirs) = (nice(), getpriority_process(Some(other)).unwrap());
            drop(haste);
            assert_eq!((ours, theirs, nice()), (NICE, before, before));
        });
    }

    #[test]
    fn who_goes_before_us_already_is_left_there() {
        aside(|| {
            setpriority_process(None, NICE - 3).unwrap();
            let haste = Haste::begin();
            assert_eq!(nice(), NICE - 3);
            drop(haste);
            assert_eq!(nice(), NICE - 3);
        });
    }

    #[test]
    fn haste_within_haste_ends_with_the_outer_one() {
        aside(|| {
            let before = nice();
            let outer = Haste::begin();
            drop(Haste::begin());
            assert_eq!(nice(), NICE);
            drop(outer);
            assert_eq!(nice(), before);
        });
    }
}
