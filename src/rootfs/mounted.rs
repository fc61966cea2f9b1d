//! The overlay at a place, for whoever asks again and again.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{NoOverlay, Overlay, overlay::open_mountinfo};

/// Finds what [`Overlay::from_mountinfo`] finds, and reads the list of mounts only when one has changed: a host
/// with many sandboxes has many, and their options are long.
#[derive(Debug, Default)]
pub struct Mounted(Mutex<Option<Seen>>);

#[derive(Debug)]
struct Seen {
    rootfs: PathBuf,
    /// Device and inode of what is mounted there: it may lead through links.
    root: (u64, u64),
    /// The list, open since before it was read: the kernel tells of later mounts by it.
    list: File,
    overlay: Overlay,
}

impl Mounted {
    /// The overlay at `rootfs`. All callers must be in one mount namespace.
    pub fn overlay(&self, rootfs: &Path) -> Result<Overlay, NoOverlay> {
        let mut seen = self.0.lock();
        if let Some(seen) = &*seen
            && seen.holds(rootfs)
        {
            return Ok(seen.overlay.clone());
        }
        *seen = None;
        let list = open_mountinfo()?;
        let overlay = Overlay::find(&list, rootfs)?;
        if let Some(root) = root(rootfs) {
            *seen = Some(Seen {
                rootfs: rootfs.to_owned(),
                root,
                list,
                overlay: overlay.clone(),
            });
        }
        Ok(overlay)
    }

    #[cfg(test)]
    pub(super) fn is_current(&self, rootfs: &Path) -> bool {
        self.0
            .lock()
            .as_ref()
            .is_some_and(|seen| seen.holds(rootfs))
    }
}

impl Seen {
    fn holds(&self, rootfs: &Path) -> bool {
        // Anything but "nothing has changed" asks for another look.
        let mut list = [PollFd::new(&self.list, PollFlags::PRI | PollFlags::ERR)];
        self.rootfs == rootfs
            && Some(self.root) == root(rootfs)
            && poll(&mut list, Some(&Timespec::default())) == Ok(0)
    }
}

fn root(rootfs: &Path) -> Option<(u64, u64)> {
    let root = fs::metadata(rootfs).ok()?;
    Some((root.dev(), root.ino()))
}
