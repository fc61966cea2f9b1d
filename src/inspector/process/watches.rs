//! Who writes into the pipes and terminals of the set.
//!
//! No probe sees that: a pipe without a name changes no timestamp (kernel 6.15), and `splice`,
//! `tee` and `vmsplice` change none of any pipe. An inotify watch on the inode sees all of them
//! (tried: docs/inspector-processes.md), also when it is opened anew through /proc/PID/fd.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
};

use parking_lot::Mutex;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};

/// Watches of one baseline.
const MAX_WATCHES: usize = 4096;

/// Watches on objects of the set, since they were placed.
#[derive(Debug)]
pub(super) struct Watches {
    instance: Option<OwnedFd>,
    /// (pid, descriptor) to watch.
    placed: BTreeMap<(i32, i32), i32>,
    moved: Mutex<Moved>,
}

#[derive(Debug, Default)]
struct Moved {
    watches: BTreeSet<i32>,
    /// Events were lost.
    all: bool,
}

impl Watches {
    /// No watches if the host has no more of them (`fs.inotify.max_user_instances`): then
    /// everything counts as moved.
    pub(super) fn new() -> Self {
        let instance = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        if let Err(errno) = &instance {
            log::warn!("processes that read will not be acquitted: no inotify instance: {errno}");
        }
        Self {
            instance: instance.ok(),
            placed: BTreeMap::new(),
            moved: Mutex::default(),
        }
    }

    /// Watches the object behind a descriptor from now on. The process stands still.
    pub(super) fn place(&mut self, pid: i32, fd: i32) {
        let Some(instance) = &self.instance else {
            return;
        };
        if self.placed.len() == MAX_WATCHES {
            return;
        }
        let path = format!("/proc/{pid}/fd/{fd}");
        // Two descriptors of one object get the same watch.
        if let Ok(watch) = inotify::add_watch(instance, path, WatchFlags::MODIFY) {
            self.placed.insert((pid, fd), watch);
        }
    }

    /// Whether somebody may have written into the object since.
    pub(super) fn moved(&self, pid: i32, fd: i32) -> bool {
        let (Some(instance), Some(watch)) = (&self.instance, self.placed.get(&(pid, fd))) else {
            return true;
        };
        let mut moved = self.moved.lock();
        moved.drain(instance);
        moved.all || moved.watches.contains(watch)
    }
}

impl Watches {
    /// How many of them somebody has written to since; None if that is not known. One that is written to
    /// again does not count again.
    pub(super) fn count(&self) -> Option<usize> {
        let mut moved = self.moved.lock();
        moved.drain(self.instance.as_ref()?);
        (!moved.all).then_some(moved.watches.len())
    }
}

impl Moved {
    fn drain(&mut self, instance: &OwnedFd) {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(instance, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => self.all = true,
                // IGNORED, too: the object is gone, and with it the watch.
                Ok(event) => drop(self.watches.insert(event.wd())),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.all = true;
                    return;
                }
            }
        }
    }
}
