//! Which files have changed: of the candidates that the kernel names, those that differ.

use super::{
    inspection::Scene,
    look::Look,
    memory_files::{MemoryFiles, Mounts},
};
use crate::{
    inspector::{Dirty, Inode, process},
    rootfs::layer::{Candidate, Comparison, Layer, Scope},
    store::Effect,
};

/// What was found.
pub(super) struct Files {
    /// Of the writable layer; None if something writes to it.
    pub(super) comparison: Option<Comparison>,
    /// An inode without a name was changed: it belongs to the processes that have it open.
    pub(super) orphans: bool,
    /// Something that only a dump holds was changed, or nobody knows what.
    pub(super) elsewhere: bool,
}

/// The inodes to look at. Whoever is outside of the sandbox may have copied directories up without a
/// sign, so then names that nothing explains are searched for.
pub(super) fn candidates(dirty: &Dirty) -> (Vec<Candidate>, Scope) {
    let outside = dirty.inodes.values().any(|how| how.is_outside());
    let candidate = |inode: &Inode| Candidate {
        dev: inode.dev,
        ino: inode.ino,
    };
    let scope = match outside {
        true => Scope::Search,
        false => Scope::Candidates,
    };
    (dirty.inodes.keys().map(candidate).collect(), scope)
}

/// What differs in the writable layer and in memory.
pub(super) fn files(
    layer: &Layer,
    memory_files: &MemoryFiles,
    mounts: &Mounts,
    dirty: &Dirty,
    scene: &Scene<'_>,
    look: &mut Look,
) -> Files {
    let (candidates, scope) = candidates(dirty);
    let comparison = match layer.compare(scene.upper, &candidates, scope, scene.stop) {
        Ok(comparison) => comparison,
        // Something writes while we read.
        Err(e) => {
            look.add(Effect::Files);
            look.tell(format!("the files change: {e}"));
            return Files {
                comparison: None,
                orphans: true,
                elsewhere: true,
            };
        }
    };
    if !comparison.is_empty() {
        look.add(Effect::Files);
    }
    let mut orphans = false;
    let mut devices: Vec<u64> = Vec::new();
    for candidate in &comparison.outside {
        match candidate.dev == layer.dev() {
            true => orphans = true,
            false => devices.push(candidate.dev),
        }
    }
    devices.dedup();
    let mut elsewhere = false;
    for dev in devices {
        let why = match mounts.tmpfs(dev) {
            Some(_) if memory_files.is_as_it_was(scene.init, mounts, dev, scene.stop) => continue,
            Some(place) => format!("{} changed", place.display()),
            // Volumes are the host's; of memory the processes' own marks tell.
            None if mounts.is_external(dev) || Some(dev) == process::shared_memory() => continue,
            // The runtime, which has joined the sandbox's cgroup and not yet its mounts.
            None if Mounts::of_self().is_ok_and(|host| host.has(dev)) => continue,
            None => {
                let (major, minor) = (libc::major(dev), libc::minor(dev));
                format!("something changed on device {major}:{minor}, which init has not mounted")
            }
        };
        look.add(Effect::Files);
        look.tell(why);
        elsewhere = true;
    }
    Files {
        comparison: Some(comparison),
        orphans,
        elsewhere,
    }
}
