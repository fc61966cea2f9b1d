//! Hearing of a sandbox's OOM kills.
//!
//! cgroup2 announces a change of `memory.events` as an urgent event on the open file (the kernel's
//! `cgroup-v2.rst`), v1 writes to an eventfd that is registered in `cgroup.event_control`
//! (`cgroup-v1/memory.rst`, 10). One thread waits for all of them in one epoll.

use std::{
    collections::HashMap,
    fmt, fs,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    eventfd::{EfdFlags, EventFd},
};
use parking_lot::Mutex;

use super::{Cgroup, CgroupError, stats::Keyed};

/// Calls back when the kernel's OOM killer strikes in one cgroup; ends when it is dropped.
///
/// All watches of a process share one thread, which exists only while there is a watch. A watch
/// whose cgroup is removed falls silent.
pub struct OomWatch {
    key: u64,
}

impl OomWatch {
    /// Starts watching.
    ///
    /// `callback` runs on the shared thread, once per observed OOM (several kills in quick
    /// succession may be one), and must not block for long. It may still be running for a moment
    /// when the watch has been dropped. It may drop the watch itself.
    ///
    /// On cgroup2 it is called when a task of the cgroup (or below) was killed; on v1, as with
    /// containerd's own shim, when the cgroup or one above it hit its limit.
    pub fn new(
        cgroup: &Cgroup,
        callback: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, CgroupError> {
        let source = Source::of(cgroup)?;
        let watch = Watch {
            source,
            callback: Box::new(callback),
        };
        REGISTRY
            .lock()
            .add(watch)
            .map(|key| Self { key })
            .map_err(|e| CgroupError::io("watch", &cgroup.label(), e))
    }
}

impl fmt::Debug for OomWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OomWatch").field(&self.key).finish()
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        // Bound, so that the callback and what it holds go after the lock.
        let _watch = REGISTRY.lock().remove(self.key);
    }
}

struct Watch {
    source: Source,
    callback: Box<dyn Fn() + Send + Sync>,
}

/// What becomes ready, and how to tell whether that was an OOM.
enum Source {
    V1 { event: EventFd, control: PathBuf },
    V2 { events: File, kills: AtomicU64 },
}

/// What a look at a source that became ready told.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Oom,
    Other,
    CgroupGone,
}

impl Source {
    fn of(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        if let Some(dir) = cgroup.v1_dir("memory") {
            Self::v1(dir)
        } else if let Some(dir) = cgroup.unified_dir() {
            Self::v2(dir)
        } else {
            Err(CgroupError::NoController {
                controller: "memory controller",
                path: cgroup.label(),
            })
        }
    }

    fn v1(dir: &Path) -> Result<Self, CgroupError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|e| CgroupError::io("watch", dir, e.into()))?;
        let control = dir.join("memory.oom_control");
        let file = File::open(&control).map_err(|e| CgroupError::io("open", &control, e))?;
        let register = dir.join("cgroup.event_control");
        let line = format!("{} {}", event.as_fd().as_raw_fd(), file.as_raw_fd());
        fs::OpenOptions::new()
            .write(true)
            .open(&register)
            .and_then(|mut f| io::Write::write_all(&mut f, line.as_bytes()))
            .map_err(|e| CgroupError::io("register an eventfd in", &register, e))?;
        Ok(Self::V1 { event, control })
    }

    fn v2(dir: &Path) -> Result<Self, CgroupError> {
        let path = dir.join("memory.events");
        let events = File::open(&path).map_err(|e| CgroupError::io("open", &path, e))?;
        let kills = kills(&events).map_err(|e| CgroupError::io("read", &path, e))?;
        Ok(Self::V2 {
            events,
            kills: AtomicU64::new(kills),
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::V1 { event, .. } => event.as_fd(),
            Self::V2 { events, .. } => events.as_fd(),
        }
    }

    /// Looks what happened, and makes the source wait for the next event.
    fn look(&self) -> Seen {
        match self {
            Self::V1 { event, control } => {
                let told = event.read().is_ok();
                // The removal of the cgroup is told through the same eventfd.
                if !control.exists() {
                    Seen::CgroupGone
                } else if told {
                    Seen::Oom
                } else {
                    Seen::Other
                }
            }
            Self::V2 { events, kills: old } => match kills(events) {
                Ok(new) if new > old.swap(new, Ordering::Relaxed) => Seen::Oom,
                Ok(_) => Seen::Other,
                Err(_) => Seen::CgroupGone,
            },
        }
    }
}

/// `oom_kill` of an open memory.events. Reading also tells the kernel that we know this state.
fn kills(events: &File) -> io::Result<u64> {
    let mut buffer = [0; 512];
    let n = events.read_at(&mut buffer, 0)?;
    Ok(Keyed::parse(&String::from_utf8_lossy(&buffer[..n])).get("oom_kill"))
}

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    poller: None,
    watches: None,
    next_key: WAKE + 1,
    running: false,
});

/// The key of the poller's own eventfd.
const WAKE: u64 = 0;

struct Registry {
    poller: Option<Arc<Poller>>,
    /// `None` before the first: a HashMap cannot be made in a static.
    watches: Option<HashMap<u64, Arc<Watch>>>,
    next_key: u64,
    running: bool,
}

struct Poller {
    epoll: Epoll,
    wake: EventFd,
}

impl Registry {
    fn add(&mut self, watch: Watch) -> io::Result<u64> {
        let poller = match &self.poller {
            Some(poller) => Arc::clone(poller),
            None => Arc::clone(self.poller.insert(Arc::new(Poller::new()?))),
        };
        let key = self.next_key;
        self.next_key += 1;
        let interest = match watch.source {
            Source::V1 { .. } => EpollFlags::EPOLLIN,
            Source::V2 { .. } => EpollFlags::EPOLLPRI,
        };
        poller
            .epoll
            .add(watch.source.fd(), EpollEvent::new(interest, key))?;
        if !self.running {
            let started = thread::Builder::new()
                .name("crab-oom".to_owned())
                .spawn(move || serve(&poller));
            if let Err(e) = started {
                self.forget(&watch);
                return Err(e);
            }
            self.running = true;
        }
        self.watches
            .get_or_insert_default()
            .insert(key, Arc::new(watch));
        Ok(key)
    }

    fn remove(&mut self, key: u64) -> Option<Arc<Watch>> {
        let watches = self.watches.as_mut()?;
        let watch = watches.remove(&key)?;
        let last = watches.is_empty();
        self.forget(&watch);
        if last && let Some(poller) = &self.poller {
            // Fails only when the counter is full, and then the thread wakes anyhow.
            let _ = poller.wake.write(1);
        }
        Some(watch)
    }

    /// Takes a watch out of the epoll. That it is already out is no error.
    fn forget(&self, watch: &Watch) {
        if let Some(poller) = &self.poller {
            let _ = poller.epoll.delete(watch.source.fd());
        }
    }

    fn get(&self, key: u64) -> Option<Arc<Watch>> {
        self.watches.as_ref()?.get(&key).cloned()
    }

    /// Whether the thread may end; it must, if it is told so.
    fn may_end(&mut self) -> bool {
        let idle = self.watches.as_ref().is_none_or(HashMap::is_empty);
        self.running = !idle;
        idle
    }
}

impl Poller {
    fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))?;
        Ok(Self { epoll, wake })
    }
}

/// The shared thread: until no watch is left.
fn serve(poller: &Poller) {
    loop {
        let mut events = [EpollEvent::empty(); 16];
        let n = poller
            .epoll
            .wait(&mut events, EpollTimeout::NONE)
            .unwrap_or(0); // EINTR
        for event in &events[..n] {
            if event.data() == WAKE {
                let _ = poller.wake.read();
                continue;
            }
            // Neither look nor call back under the lock: the callback may drop the watch.
            let Some(watch) = REGISTRY.lock().get(event.data()) else {
                continue;
            };
            match watch.source.look() {
                Seen::Oom => (watch.callback)(),
                Seen::Other => {}
                Seen::CgroupGone => REGISTRY.lock().forget(&watch),
            }
        }
        if REGISTRY.lock().may_end() {
            return;
        }
    }
}
