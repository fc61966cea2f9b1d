//! The inspector's programs are loaded while the runtime makes the sandbox: that takes longer than many an
//! agent's first command, whose checkpoint would wait for them.

use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use crate::inspector::Joined;

type Answer = Result<Joined, String>;

/// The inspector, which is being joined for a sandbox that is being made.
#[derive(Default)]
pub struct EarlyJoin(Mutex<Option<JoinHandle<Answer>>>);

impl EarlyJoin {
    /// Begins to join. If there can be no thread now, nobody has been early.
    pub fn begin(join: impl FnOnce() -> Answer + Send + 'static) -> Self {
        let thread = thread::Builder::new().name("join".into());
        Self(Mutex::new(thread.spawn(join).ok()))
    }

    /// What was joined, once it is, or why it could not be. None if nobody was early, or somebody has it.
    pub fn get(&self) -> Option<Answer> {
        let joining = self.0.lock().take()?;
        let died = |_| Err("the thread that loads the inspector has panicked".to_owned());
        Some(joining.join().unwrap_or_else(died))
    }
}

impl Drop for EarlyJoin {
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

    fn slow(done: &Arc<AtomicBool>) -> EarlyJoin {
        let done = Arc::clone(done);
        EarlyJoin::begin(move || {
            thread::sleep(Duration::from_millis(50));
            done.store(true, Ordering::SeqCst);
            Err("no inspector".into())
        })
    }

    #[test]
    fn what_was_begun_is_had_once_and_why_it_failed_is_told() {
        let early = slow(&Arc::default());
        let why = |answer: Option<Answer>| answer.map(|answer| answer.err());
        assert_eq!(why(early.get()), Some(Some("no inspector".into())));
        assert_eq!(why(early.get()), None);
        assert_eq!(why(EarlyJoin::default().get()), None);
        let dead = EarlyJoin::begin(|| panic!("as a test wants it"));
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
