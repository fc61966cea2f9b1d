//! A line on the terminal while something takes longer than a moment: what, how far, and for how long.

use std::{
    io::{self, IsTerminal},
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::term::{clear_progress, show_progress};

/// What is done sooner needs no line.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it is drawn.
const PERIOD: Duration = Duration::from_millis(200);

/// Shows what goes on, until dropped. Nothing at all if stderr is no terminal.
pub(super) struct Progress {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    text: String,
    is_done: bool,
}

impl Progress {
    /// Something begins.
    pub(super) fn begin(text: impl Into<String>) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                text: text.into(),
                is_done: false,
            }),
            changed: Condvar::new(),
        });
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let thread = (io::stderr().is_terminal() && !dumb).then(|| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.draw())
        });
        Self { shared, thread }
    }

    /// What goes on now.
    pub(super) fn say(&self, text: impl Into<String>) {
        self.shared.state.lock().text = text.into();
    }
}

impl Shared {
    fn draw(&self) {
        let begin = Instant::now();
        let mut next = begin + PATIENCE;
        let mut state = self.state.lock();
        while !state.is_done {
            if self.changed.wait_until(&mut state, next).timed_out() {
                show_progress(&format!("{} … {} s", state.text, begin.elapsed().as_secs()));
                next = Instant::now() + PERIOD;
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.shared.state.lock().is_done = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has nothing that could fail.
            let _ = thread.join();
            clear_progress();
        }
    }
}
