//! The inspector's programs are loaded while the runtime makes the sandbox: that takes longer than many an
//! agent's first command, whose checkpoint would wait for them.

use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use crate::inspector::Seat;

type Taken = Result<Seat, String>;

/// A seat that is being taken for a sandbox that is being made.
#[derive(Default)]
pub struct EarlySeat(Mutex<Option<JoinHandle<Taken>>>);

impl EarlySeat {
    /// Begins to take one. If there can be no thread now, nobody has been early.
    pub fn begin(take: impl FnOnce() -> Taken + Send + 'static) -> Self {
        let thread = thread::Builder::new().name("seat".into());
        Self(Mutex::new(thread.spawn(take).ok()))
    }

    /// The seat, once it is taken, or why there is none. None if nobody was early, or somebody has it.
    pub fn get(&self) -> Option<Taken> {
        let taking = self.0.lock().take()?;
        let died = |_| Err("the thread that loads the inspector has panicked".to_owned());
        Some(taking.join().unwrap_or_else(died))
    }
}

impl Drop for EarlySeat {
    /// Not later: the programs would outlive the last shim.
    fn drop(&mut self) {
        drop(self.get());
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
        time::Duration,
    };

    use super::*;

    fn slow(done: &Arc<AtomicBool>) -> EarlySeat {
        let done = Arc::clone(done);
        EarlySeat::begin(move || {
            thread::sleep(Duration::from_millis(50));
            done.store(true, Ordering::SeqCst);
            Err("no inspector".into())
        })
    }

    #[test]
    fn what_was_begun_is_had_once_and_why_it_failed_is_told() {
        let seat = slow(&Arc::default());
        let why = |taken: Option<Taken>| taken.map(|taken| taken.err());
        assert_eq!(why(seat.get()), Some(Some("no inspector".into())));
        assert_eq!(why(seat.get()), None);
        assert_eq!(why(EarlySeat::default().get()), None);
        let dead = EarlySeat::begin(|| panic!("as a test wants it"));
        assert!(
            why(dead.get())
                .flatten()
                .is_some_and(|why| why.contains("panicked"))
        );
    }

    #[test]
    fn nothing_is_under_way_any_more_once_it_is_dropped() {
        let done = Arc::default();
        drop(slow(&done));
        assert!(done.load(Ordering::SeqCst));
    }
}
