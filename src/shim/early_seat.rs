//! The inspector's programs are loaded while the runtime makes the sandbox: that takes longer than many an
//! agent's first command, whose checkpoint would wait for them.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
};

use parking_lot::Mutex;

use super::host::Host;
use crate::inspector::Seat;

type Taken = Result<Seat, String>;

/// A seat that is being taken for a sandbox that is being made.
#[derive(Default)]
pub struct EarlySeat(Mutex<Option<JoinHandle<Taken>>>);

impl EarlySeat {
    /// Begins to take one. If there can be no thread now, nobody has been early.
    pub fn begin(host: &Arc<dyn Host>) -> Self {
        let host = Arc::clone(host);
        let thread = thread::Builder::new().name("seat".into());
        let taking = thread.spawn(move || host.seat());
        Self(Mutex::new(taking.ok()))
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
