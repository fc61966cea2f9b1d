//! What is to be done when a process has ended, beside the thread that reaps: that one must not wait for anything.

use std::{io, sync::Arc, thread, time::Duration};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

/// How often a thread is asked for again.
const AGAIN: Duration = Duration::from_millis(100);

type Work = Box<dyn FnOnce() + Send>;

/// Something to be done once. Whoever cannot make a thread for it still has it.
#[derive(Clone)]
struct Once(Arc<Mutex<Option<Work>>>);

impl Once {
    fn run(&self) {
        let work = self.0.lock().take();
        if let Some(work) = work {
            work();
        }
    }
}

/// Makes a thread for it.
type Spawn = fn(Once) -> io::Result<()>;

/// Does each thing in a thread of its own: one may wait for another.
pub struct Exits {
    waiting: Sender<Once>,
    spawn: Spawn,
}

impl Exits {
    /// Starts the thread that asks for others where there were none.
    pub fn start() -> io::Result<Self> {
        Self::with(|work| {
            thread::Builder::new()
                .name("exit".into())
                .spawn(move || work.run())
                .map(drop)
        })
    }

    fn with(spawn: Spawn) -> io::Result<Self> {
        let (waiting, works) = unbounded();
        thread::Builder::new()
            .name("exits".into())
            .spawn(move || insist(&works, spawn))?;
        Ok(Self { waiting, spawn })
    }

    /// Does it, soon. A sandbox may have taken all threads that the host has; the exit of one of its processes must
    /// not be lost by that, or nobody could ever be rid of it.
    pub fn follow(&self, work: impl FnOnce() + Send + 'static) {
        let work = Once(Arc::new(Mutex::new(Some(Box::new(work)))));
        if let Err(e) = (self.spawn)(work.clone()) {
            log::warn!("no thread for an exit, which is told later: {e}");
            // The other end lives as long as this.
            let _ = self.waiting.send(work);
        }
    }
}

fn insist(works: &Receiver<Once>, spawn: Spawn) {
    for work in works {
        while spawn(work.clone()).is_err() {
            thread::sleep(AGAIN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn what_finds_no_thread_is_done_once_and_in_its_order() {
        static HAS_ROOM: AtomicBool = AtomicBool::new(false);
        let exits = Exits::with(|work| {
            if !HAS_ROOM.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
            thread::spawn(move || work.run()).join().unwrap();
            Ok(())
        })
        .unwrap();
        let (done, seen) = unbounded();
        for number in 0..3 {
            let done = done.clone();
            exits.follow(move || done.send(number).unwrap());
        }
        thread::sleep(2 * AGAIN);
        assert!(seen.is_empty());
        HAS_ROOM.store(true, Ordering::SeqCst);
        let soon = Duration::from_secs(20);
        let order: Vec<_> = (0..3).map(|_| seen.recv_timeout(soon).unwrap()).collect();
        assert_eq!(order, [0, 1, 2]);
        assert!(seen.try_recv().is_err());
    }

    #[test]
    fn one_may_wait_for_another() {
        let exits = Exits::start().unwrap();
        let (first, second) = (unbounded(), unbounded());
        let sender = first.0.clone();
        exits.follow(move || second.0.send(first.1.recv().unwrap()).unwrap());
        exits.follow(move || sender.send(7).unwrap());
        assert_eq!(second.1.recv_timeout(Duration::from_secs(20)).unwrap(), 7);
    }
}
