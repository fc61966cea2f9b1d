//! The one thread that moves all bytes of all processes of a shim.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        eventfd::{EfdFlags, EventFd},
        signal::SigSet,
    },
};
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{
    buffer::BOUND,
    core::{Core, FileJob},
    flow::{FlowId, Unwritten},
    pipes::{self, Moved},
    sink::SinkId,
};

/// The thread calls nothing deep; only touched pages count.
const STACK: usize = 128 * 1024;
const WAKER: u64 = u64::MAX;

/// Moves the bytes of every [`super::ProcessIo`] made with it, in a thread that starts with the
/// first one and sleeps while nothing moves.
pub struct Pump {
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    core: Mutex<Core>,
    /// Signalled after every change that somebody in `finish` may be waiting for.
    changed: Condvar,
    epoll: Epoll,
    waker: EventFd,
    /// Turns of the loop, to prove that it sleeps.
    #[cfg(test)]
    turns: std::sync::atomic::AtomicU64,
}

impl Pump {
    /// Makes a pump; its thread starts with the first stream.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER))?;
        let shared = Shared {
            core: Mutex::default(),
            changed: Condvar::new(),
            epoll,
            waker,
            #[cfg(test)]
            turns: Default::default(),
        };
        Ok(Arc::new(Self {
            shared: Arc::new(shared),
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Core> {
        self.shared.core.lock()
    }

    #[cfg(test)]
    pub(super) fn turns(&self) -> u64 {
        self.shared.turns.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Has the thread look at what was enqueued.
    pub(super) fn wake(&self) {
        // Fails only when the counter is full: then it is awake.
        let _ = self.shared.waker.write(1);
    }

    /// Waits for a change, at most until `until`.
    pub(super) fn wait(&self, core: &mut MutexGuard<'_, Core>, until: Instant) {
        core.waiters += 1;
        self.shared.changed.wait_until(core, until);
        core.waiters -= 1;
    }

    /// Starts to move a flow, and the thread if it does not run yet.
    pub(super) fn activate(&self, core: &mut Core, id: FlowId) -> io::Result<()> {
        let edge = EpollFlags::EPOLLET;
        let Some(flow) = core.flows.get_mut(&id) else {
            return Ok(());
        };
        if let Some(source) = &flow.source
            && !flow.registered
        {
            let event = EpollEvent::new(EpollFlags::EPOLLIN | edge, id.0 << 1);
            self.shared.epoll.add(source, event)?;
            flow.registered = true;
        }
        flow.active = true;
        flow.last_read = Instant::now();
        let sink_id = flow.sink;
        if let Some(sink_id) = sink_id
            && let Some(sink) = core.sinks.get_mut(&sink_id)
            && !sink.registered
            && !sink.is_file()
        {
            let event = EpollEvent::new(EpollFlags::EPOLLOUT | edge, sink_id.0 << 1 | 1);
            self.shared.epoll.add(sink.fd.as_fd(), event)?;
            sink.registered = true;
        }
        core.enqueue(id);
        if !core.running {
            let shared = self.shared.clone();
            thread::Builder::new()
                .name("crab-io".to_owned())
                .stack_size(STACK)
                .spawn(move || shared.run())?;
            core.running = true;
        }
        Ok(())
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.lock().stopping = true;
        self.wake();
    }
}

impl Shared {
    fn run(&self) {
        // Signals are for the shim's own threads.
        let _ = SigSet::all().thread_block();
        let mut events = [EpollEvent::empty(); 64];
        let mut scratch = vec![0; BOUND];
        let mut timeout = Some(Duration::ZERO);
        loop {
            let timeout_arg = timeout.map_or(EpollTimeout::NONE, |timeout| {
                EpollTimeout::try_from(timeout + Duration::from_micros(999))
                    .unwrap_or(EpollTimeout::MAX)
            });
            let count = match self.epoll.wait(&mut events, timeout_arg) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => {
                    log::error!("stdio stops: epoll: {errno}");
                    return;
                }
            };
            #[cfg(test)]
            self.turns
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let mut core = self.core.lock();
            for event in &events[..count] {
                self.dispatch(&mut core, *event);
            }
            for _ in 0..core.ready_count() {
                let Some(flow) = core.next_ready() else { break };
                if let Some(job) = core.service(flow, &mut scratch) {
                    let (flow, sink) = (job.flow, job.sink);
                    let result = MutexGuard::unlocked(&mut core, || write_file(job, &scratch));
                    core.file_written(flow, sink, result);
                }
                // Callers of the API get their turn between two flows.
                MutexGuard::bump(&mut core);
            }
            timeout = core.tick(Instant::now());
            if core.ready_count() > 0 {
                timeout = Some(Duration::ZERO);
            }
            if core.waiters > 0 {
                self.changed.notify_all();
            }
            if core.stopping {
                return;
            }
        }
    }

    fn dispatch(&self, core: &mut Core, event: EpollEvent) {
        let token = event.data();
        let gone = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        if token == WAKER {
            let _ = self.waker.read();
        } else if token & 1 == 0 {
            core.source_event(FlowId(token >> 1));
        } else {
            core.sink_event(SinkId(token >> 1), event.events().intersects(gone));
        }
    }
}

/// Appends to a file; the caller holds no lock.
fn write_file(job: FileJob, scratch: &[u8]) -> io::Result<()> {
    let mut bytes = match &job.bytes {
        Unwritten::Scratch(n) => scratch.get(..*n).unwrap_or_default(),
        Unwritten::Buffered(bytes) => bytes,
    };
    let file: &OwnedFd = &job.file;
    while !bytes.is_empty() {
        match pipes::write(file.as_fd(), bytes)? {
            Moved::Bytes(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Moved::Blocked | Moved::End => return Err(io::ErrorKind::WriteZero.into()),
        }
    }
    Ok(())
}
