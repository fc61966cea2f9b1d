//! Where a test kills the process that writes: before each write, fsync and rename.

/// Passes one such point. In a test's child process that was told to, dies there.
#[cfg(not(test))]
pub(super) fn failpoint(_step: &str) {}

#[cfg(test)]
pub(super) use testing::failpoint;

#[cfg(test)]
pub(super) mod testing {
    use std::{
        cell::Cell,
        sync::atomic::{AtomicI64, Ordering},
    };

    /// How many more points are passed; the next one is the last. Negative: all.
    static LEFT: AtomicI64 = AtomicI64::new(-1);

    thread_local! {
        /// How many points this thread has passed, for the test that counts them.
        pub static PASSED: Cell<u64> = const { Cell::new(0) };
    }

    /// The process dies at its point number `at`, counted from 0.
    pub fn die_at(at: i64) {
        LEFT.store(at, Ordering::SeqCst);
    }

    pub fn failpoint(_step: &str) {
        PASSED.with(|passed| passed.set(passed.get() + 1));
        if LEFT.load(Ordering::SeqCst) >= 0 && LEFT.fetch_sub(1, Ordering::SeqCst) == 0 {
            // SAFETY: plain system calls on ourselves.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
