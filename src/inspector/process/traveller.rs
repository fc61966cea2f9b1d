//! A thread that goes to a sandbox's namespaces, and comes home again.
//!
//! Some things the kernel shows of the reader's own namespaces alone. One thread of the shim goes there for
//! all of them. No other may: what it started would belong to the sandbox's namespaces, and CRIU would take
//! those for the host's.

use std::{
    io,
    os::fd::OwnedFd,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use nix::sched::{CloneFlags, setns};
use parking_lot::Mutex;

use super::proc_fs::{ProcessError, pidfd};

/// The thread's name.
pub(super) const NAME: &str = "crab-traveller";

/// Where to go, and what to do there: it is told whether that could be reached, and sends the answer.
struct Errand {
    process: OwnedFd,
    namespaces: CloneFlags,
    act: Box<dyn FnOnce(io::Result<()>) -> Reply + Send>,
}

/// Hands the answer over, once the thread is home again.
type Reply = Box<dyn FnOnce() + Send>;

/// An errand that is being run.
pub(super) struct Visit<T> {
    pid: i32,
    what: &'static str,
    answer: Receiver<io::Result<T>>,
}

/// The thread, if it was needed before. It ends if it cannot return from a sandbox; then the next one
/// begins.
static TRAVELLER: Mutex<Option<Sender<Errand>>> = Mutex::new(None);

/// Has `act` done in some namespaces of a process; `what` that is, in an error.
///
/// # Errors
/// If there is no such process, or no thread could be started.
pub(super) fn visit<T: Send + 'static>(
    pid: i32,
    namespaces: CloneFlags,
    what: &'static str,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<Visit<T>, ProcessError> {
    let (sender, answer) = channel();
    let mut errand = Errand {
        process: pidfd(pid)?,
        namespaces,
        act: Box::new(move |there| {
            let found = there.and_then(|()| act());
            // Whoever asked may have given up.
            Box::new(move || drop(sender.send(found)))
        }),
    };
    let visit = Visit { pid, what, answer };
    let mut traveller = TRAVELLER.lock();
    if let Some(thread) = &*traveller {
        match thread.send(errand) {
            Ok(()) => return Ok(visit),
            Err(unsent) => errand = unsent.0,
        }
    }
    let thread = begin().map_err(|source| visit.failed(source))?;
    let lost = |_| visit.failed(io::Error::other("the thread died"));
    thread.send(errand).map_err(lost)?;
    *traveller = Some(thread);
    Ok(visit)
}

impl<T> Visit<T> {
    /// Waits for it.
    pub(super) fn answer(self) -> Result<T, ProcessError> {
        let died = |_| Err(io::Error::other("the thread died"));
        let answer = self.answer.recv().unwrap_or_else(died);
        answer.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> ProcessError {
        ProcessError::Io {
            pid: self.pid,
            file: self.what.to_owned(),
            source,
        }
    }
}

fn begin() -> io::Result<Sender<Errand>> {
    // Where the thread comes from, as this process's first one is there.
    let home = pidfd(nix::unistd::getpid().as_raw()).map_err(io::Error::other)?;
    let (sender, errands) = channel();
    thread::Builder::new()
        .name(NAME.to_owned())
        .spawn(move || travel(&home, &errands))?;
    Ok(sender)
}

fn travel(home: &OwnedFd, errands: &Receiver<Errand>) {
    for errand in errands {
        let there = setns(&errand.process, errand.namespaces);
        let reply = (errand.act)(there.map_err(io::Error::from));
        let back = setns(home, errand.namespaces);
        reply();
        if let Err(e) = back {
            return log::error!("cannot return from a sandbox's namespaces: {e}");
        }
    }
}
