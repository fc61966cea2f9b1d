//! A CRIU that is started before the sandbox stands still.
//!
//! It waits at the [line](StartLine) until it does. Whoever drops it lets it fail: it has touched nothing.

use std::{
    io,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread::{Builder, Scope, ScopedJoinHandle},
};

use crate::runtime::{
    self, RuntimeError,
    criu_conf::CriuConf,
    start_line::{StartLine, Waiting},
};

/// This host's CRIU does not run the scripts of a configuration file when runc calls it (as older ones
/// don't), so it would not wait.
static NEVER_WAITS: AtomicBool = AtomicBool::new(false);

/// How a dump is started early.
pub(super) struct Early {
    line: StartLine,
    /// What CRIU is told to look for watched files in.
    pub(super) watched: Vec<PathBuf>,
}

/// What became of starting it.
pub(super) enum Started<'scope> {
    /// It waits.
    Waits(Runner<'scope>),
    /// It does not wait, and must be run when the sandbox stands still.
    NotEarly,
    /// It has failed.
    Failed(RuntimeError),
}

/// A CRIU that waits.
pub(super) struct Runner<'scope> {
    waiting: Waiting,
    thread: ScopedJoinHandle<'scope, Result<(), RuntimeError>>,
}

impl Early {
    /// None if this dump cannot be started early: one that kills would kill what has not been frozen,
    /// should CRIU not wait.
    pub(super) fn of(
        args: &runtime::Checkpoint,
        watched: Vec<PathBuf>,
    ) -> io::Result<Option<Self>> {
        let Some(home) = &args.home else {
            return Ok(None);
        };
        if !args.leave_running || NEVER_WAITS.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let line = StartLine::draw(home)?;
        CriuConf::add_script(home, line.script())?;
        CriuConf::add_watched(home, &watched)?;
        Ok(Some(Self { line, watched }))
    }

    /// Starts it by `run`, and returns when it waits.
    pub(super) fn start<'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        run: impl FnOnce() -> Result<(), RuntimeError> + Send + 'scope,
    ) -> io::Result<Started<'scope>> {
        self.line.arm()?;
        // The runtime dies with the thread that starts it, which waits for it.
        let thread = Builder::new()
            .name("criu".into())
            .spawn_scoped(scope, run)?;
        if let Some(waiting) = self.line.wait(|| thread.is_finished())? {
            return Ok(Started::Waits(Runner { waiting, thread }));
        }
        Ok(match ended(thread) {
            Err(e) => Started::Failed(e),
            Ok(()) => {
                log::info!("CRIU does not wait: it is started when the sandbox stands still");
                NEVER_WAITS.store(true, Ordering::Relaxed);
                Started::NotEarly
            }
        })
    }
}

impl Runner<'_> {
    /// Lets it dump, and returns when it has.
    pub(super) fn go(self) -> Result<(), RuntimeError> {
        // If it no longer waits, it has an error of its own to tell.
        let gone = self.waiting.go();
        ended(self.thread).inspect(|()| {
            if let Err(e) = gone {
                log::warn!("CRIU has dumped without being told to: {e}");
            }
        })
    }

    /// Lets it fail.
    pub(super) fn give_up(self) {
        drop(self.waiting);
        if ended(self.thread).is_ok() {
            log::warn!("CRIU has dumped without being told to");
        }
    }
}

fn ended(thread: ScopedJoinHandle<'_, Result<(), RuntimeError>>) -> Result<(), RuntimeError> {
    thread
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
