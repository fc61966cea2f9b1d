//! The file systems in memory that a sandbox has mounted: a dump holds their contents, so a change
//! in one is not a change of the writable layer.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use crate::rootfs::{
    layer::{Fingerprint, Limits, holds_files},
    parse_mountinfo,
};

/// Up to what size one is compared; a larger one counts as changed whenever it was written.
const LIMITS: Limits = Limits {
    bytes: 32 << 20,
    entries: 10_000,
};

/// Bytes that a list of mounts seldom exceeds.
const USUAL_TEXT: usize = 16 << 10;

/// The mounts that a process sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Mounts {
    /// As the kernel lists them.
    pub(super) text: Vec<u8>,
    /// Where each file system in memory is mounted, by device.
    tmpfs: BTreeMap<u64, PathBuf>,
    /// All other devices: volumes, and the host's files that are bound in.
    others: BTreeMap<u64, PathBuf>,
}

impl Mounts {
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        Self::read(&format!("/proc/{pid}/mountinfo"))
    }

    /// The host's.
    pub(super) fn of_self() -> io::Result<Self> {
        Self::read("/proc/self/mountinfo")
    }

    fn read(path: &str) -> io::Result<Self> {
        // Not `fs::read`, which asks a file of /proc for 32 bytes first, then for 32 more, for 64, ...
        let mut text = Vec::with_capacity(USUAL_TEXT);
        fs::File::open(path)?.read_to_end(&mut text)?;
        let (mut tmpfs, mut others) = (BTreeMap::new(), BTreeMap::new());
        for entry in parse_mountinfo(&text) {
            let Some(dev) = entry.device.to_str().and_then(device) else {
                continue;
            };
            let all = match entry.fstype == "tmpfs" && entry.root == Path::new("/") {
                true => &mut tmpfs,
                false => &mut others,
            };
            all.entry(dev).or_insert(entry.mountpoint);
        }
        Ok(Self {
            text,
            tmpfs,
            others,
        })
    }

    /// Where a file system in memory is mounted; None: it is not one.
    pub(super) fn tmpfs(&self, dev: u64) -> Option<&Path> {
        self.tmpfs.get(&dev).map(PathBuf::as_path)
    }

    /// Where those are mounted that hold files, or cannot be looked at. While the sandbox `pid` stands
    /// still.
    pub(super) fn tmpfs_with_files(&self, pid: i32, stop: &dyn Fn() -> bool) -> Vec<&Path> {
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let holds = |(dev, place): &(&u64, &PathBuf)| {
            holds_files(&root, place, **dev, LIMITS.entries, stop).unwrap_or(true)
        };
        let places = self.tmpfs.iter().filter(holds);
        places.map(|(_, place)| place.as_path()).collect()
    }

    /// A place at this path, relative to the root, or below it, where something is mounted. The root is none.
    pub(super) fn at_or_below(&self, path: &Path) -> Option<PathBuf> {
        let places = parse_mountinfo(&self.text).filter_map(|mount| {
            let place = mount.mountpoint.strip_prefix("/").ok()?;
            (!place.as_os_str().is_empty()).then(|| place.to_owned())
        });
        places.into_iter().find(|place| place.starts_with(path))
    }

    /// Whether anything of a device is mounted.
    pub(super) fn has(&self, dev: u64) -> bool {
        self.tmpfs.contains_key(&dev) || self.others.contains_key(&dev)
    }

    /// Whether a device belongs to the host: what happens there is not the sandbox's state.
    pub(super) fn is_external(&self, dev: u64) -> bool {
        self.others.contains_key(&dev)
    }
}

/// `8:1` as a device number.
fn device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// What was in each of them at the last dump; None: it cannot be compared.
#[derive(Debug, Default)]
pub(super) struct MemoryFiles(BTreeMap<u64, Option<Fingerprint>>);

impl MemoryFiles {
    /// Reads all of them, while the sandbox stands still.
    pub(super) fn of(pid: i32, mounts: &Mounts, stop: &dyn Fn() -> bool) -> Self {
        let read = |(dev, _): (&u64, &PathBuf)| (*dev, fingerprint(pid, mounts, *dev, stop));
        Self(mounts.tmpfs.iter().map(read).collect())
    }

    /// Whether one holds what it held.
    pub(super) fn is_as_it_was(
        &self,
        pid: i32,
        mounts: &Mounts,
        dev: u64,
        stop: &dyn Fn() -> bool,
    ) -> bool {
        let then = self.0.get(&dev).copied().flatten();
        then.is_some() && then == fingerprint(pid, mounts, dev, stop)
    }
}

fn fingerprint(
    pid: i32,
    mounts: &Mounts,
    dev: u64,
    stop: &dyn Fn() -> bool,
) -> Option<Fingerprint> {
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let place = mounts.tmpfs.get(&dev)?;
    Fingerprint::of(&root, place, dev, LIMITS, stop)
        .inspect_err(|e| log::debug!("{}: {e}", place.display()))
        .ok()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_told_apart_by_device() {
        let mounts = Mounts::of(std::process::id() as i32).unwrap();
        let root = fs::metadata("/").unwrap();
        let dev = std::os::unix::fs::MetadataExt::dev(&root);
        assert!(mounts.is_external(dev) != mounts.tmpfs(dev).is_some());
        assert!(!mounts.is_external(libc::makedev(4095, 7)));
        assert_eq!(device("8:1"), Some(libc::makedev(8, 1)));
        assert_eq!(device("8"), None);
    }
}
