//! Putting a saved writable layer back: as a new upper directory, never by editing the old one.
//!
//! The new layer is built beside the old one, fsynced, and exchanged with it in one rename, so
//! that an interruption leaves the old or the new one, whole, at the overlay's path. What is left
//! beside it then (`.crab-new-…`, `.crab-old-…`) the next put-back removes. Files that are equal in both
//! may be names of one inode meanwhile; those of the old layer go before anybody can see that.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsString,
    fs,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, RenameFlags, Uid, XattrFlags},
    io::Errno,
};

use super::{
    LEFTOVER, MountError, NoOverlay, Overlay,
    mount::{mount_all, unmount_one},
    mountinfo::{MountEntry, parse_mountinfo},
};
use crate::tree::{self, Durably, Expect, Found, TreeError, Visitor, failed, remove_tree};

/// How many processes an error names.
const SHOWN_PROCESSES: usize = 8;

/// A layer that was not put back.
#[derive(Debug, thiserror::Error)]
pub enum PutBackError {
    /// Building the new layer failed, and nothing was touched.
    #[error("cannot write the new layer: {0}")]
    Build(String),
    /// Exchanging the layers failed.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The layer is in use, and nothing was touched.
    #[error("{upper:?} is still mounted at {mountpoint:?}{who}")]
    Mounted {
        /// The writable layer.
        upper: PathBuf,
        /// Where.
        mountpoint: PathBuf,
        /// In whose mount namespace, in words.
        who: String,
    },
    /// The overlay could not be unmounted, and nothing was touched.
    #[error("{source}{who}")]
    Busy {
        /// What the kernel said.
        source: MountError,
        /// Who uses it, in words.
        who: String,
    },
    /// What is mounted there is not the overlay that was meant.
    #[error("{mountpoint:?} has {found:?} as its writable layer, not {wanted:?}")]
    OtherOverlay {
        /// Where.
        mountpoint: PathBuf,
        /// What is mounted.
        found: PathBuf,
        /// What was expected.
        wanted: PathBuf,
    },
    /// There is no such overlay.
    #[error(transparent)]
    NoOverlay(#[from] NoOverlay),
    /// The new layer is in place, but its overlay could not be mounted.
    #[error("the layer is put back, but cannot be mounted: {0}")]
    NotMounted(MountError),
    /// Putting back failed, and so did mounting the old layer again.
    #[error("{cause}; and the old layer could not be mounted again: {mount}")]
    NothingMounted {
        /// The first error.
        cause: Box<PutBackError>,
        /// The second.
        mount: MountError,
    },
}

/// A layer that was put back. The one that it replaced still has to be deleted.
#[derive(Debug)]
#[must_use = "the replaced layer takes space until `remove_old`"]
pub struct Replaced {
    old: Vec<PathBuf>,
}

/// Writes the new layer into a directory that is to be made (the first). The second is the layer that it
/// replaces, to which nobody writes: the new one may have hard links to its files.
pub type Build<'b> = &'b mut dyn FnMut(&Path, &Path) -> Result<(), String>;

impl Replaced {
    /// Deletes the replaced layer. The next put-back would do it, too.
    pub fn remove_old(self) -> Result<(), TreeError> {
        self.old.iter().try_for_each(|path| remove_tree(path))
    }
}

/// Replaces the writable layer of an overlay that is mounted nowhere with what `build` makes, and
/// its work directory with an empty one.
pub fn put_back(build: Build<'_>, overlay: &Overlay) -> Result<Replaced, PutBackError> {
    refuse_if_mounted(&overlay.upperdir)?;
    let upper = Layer::new(&overlay.upperdir)?;
    let work = Layer::new(&overlay.workdir)?;
    upper.recover()?;
    work.recover()?;
    upper.build(build)?;
    work.build_empty()?;
    // The upper directory first: with a volatile overlay, the old work directory says that the
    // layer can't be trusted, and may only go when that layer has gone.
    upper.swap()?;
    work.swap()?;
    remove_shared(&upper.old)?;
    Ok(Replaced {
        old: vec![upper.old, work.old],
    })
}

/// The same for an overlay that somebody else (dockerd) keeps mounted at `overlay.mountpoint`:
/// unmounts it there, puts back, mounts it again in the same place with the same options.
pub fn remount_with(build: Build<'_>, overlay: &Overlay) -> Result<Replaced, PutBackError> {
    let mountpoint = overlay.mountpoint.clone().unwrap_or_default();
    let now = Overlay::from_mountinfo(&mountpoint)?;
    if now.upperdir != overlay.upperdir {
        return Err(PutBackError::OtherOverlay {
            mountpoint,
            found: now.upperdir,
            wanted: overlay.upperdir.clone(),
        });
    }
    let users = Users::of(&mountpoint);
    if !users.pinning.is_empty() {
        return Err(PutBackError::Mounted {
            upper: overlay.upperdir.clone(),
            mountpoint,
            who: users.in_words(),
        });
    }
    unmount_one(&mountpoint).map_err(|source| PutBackError::Busy {
        source,
        who: users.in_words(),
    })?;
    let spec = [overlay.mount_spec()];
    match put_back(build, overlay) {
        Ok(replaced) => {
            mount_all(&spec, &mountpoint).map_err(PutBackError::NotMounted)?;
            Ok(replaced)
        }
        Err(cause) => match mount_all(&spec, &mountpoint) {
            Ok(()) => Err(cause),
            Err(mount) => Err(PutBackError::NothingMounted {
                cause: Box::new(cause),
                mount,
            }),
        },
    }
}

/// One directory of an overlay, and the names that its successor goes through.
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) new: PathBuf,
    pub(super) old: PathBuf,
    links: PathBuf,
    parent: PathBuf,
}

impl Layer {
    pub(super) fn new(path: &Path) -> Result<Self, TreeError> {
        let invalid = || failed("put back", path)(Errno::INVAL);
        let name = path.file_name().ok_or_else(invalid)?;
        let parent = path.parent().ok_or_else(invalid)?;
        let beside = |kind: &str| {
            let mut full = OsString::from(LEFTOVER);
            full.push(kind);
            full.push(name);
            parent.join(full)
        };
        Ok(Self {
            path: path.to_owned(),
            new: beside("new-"),
            old: beside("old-"),
            links: beside("links-.crab-new-"),
            parent: parent.to_owned(),
        })
    }

    /// Clears away what an interrupted put-back has left.
    pub(super) fn recover(&self) -> Result<(), TreeError> {
        if !exists(&self.path)? && exists(&self.old)? {
            // Between the two renames of a filesystem without an exchange.
            rename(&self.old, &self.path, RenameFlags::NOREPLACE)?;
        }
        for leftover in [&self.new, &self.links, &self.old] {
            remove_tree(leftover)?;
        }
        Ok(())
    }

    pub(super) fn build(&self, build: Build<'_>) -> Result<(), PutBackError> {
        let durably = Durably::at(&self.parent)?;
        build(&self.new, &self.path).map_err(PutBackError::Build)?;
        Ok(durably.sync(&self.new)?)
    }

    fn build_empty(&self) -> Result<(), TreeError> {
        rustix::fs::mkdirat(CWD, &self.new, Mode::RWXU).map_err(failed("make", &self.new))?;
        if exists(&self.path)? {
            copy_attributes(&self.path, &self.new)?;
        }
        Durably::at(&self.parent)?.sync(&self.new)
    }

    /// Puts the new directory in the place of the old one.
    pub(super) fn swap(&self) -> Result<(), TreeError> {
        if !exists(&self.path)? {
            rename(&self.new, &self.path, RenameFlags::NOREPLACE)?;
        } else if self.exchange()? {
            rename(&self.new, &self.old, RenameFlags::NOREPLACE)?;
        } else {
            rename(&self.path, &self.old, RenameFlags::NOREPLACE)?;
            rename(&self.new, &self.path, RenameFlags::NOREPLACE)?;
        }
        let parent = tree::open_root(&self.parent)?;
        rustix::fs::fsync(&parent).map_err(failed("fsync", &self.parent))
    }

    /// False if the filesystem cannot.
    pub(super) fn exchange(&self) -> Result<bool, TreeError> {
        match rename(&self.new, &self.path, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(TreeError::Io {
                source: Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP,
                ..
            }) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Removes from the old layer what has further names: those in the new one among them. It has to be the
/// only one there before the sandbox sees how many it has.
fn remove_shared(old: &Path) -> Result<(), TreeError> {
    if !exists(old)? {
        return Ok(());
    }
    let root = tree::open_root(old)?;
    match tree::walk(root, old, Expect::Changes, &|| false, &mut Shared) {
        // Too large to be looked through, and not to be removed.
        Err(TreeError::Limit { .. }) => remove_tree(old),
        walked => walked,
    }
}

struct Shared;

impl Visitor for Shared {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        match found.parent {
            Some(parent) if found.stat.st_nlink > 1 && found.kind() == FileType::RegularFile => {
                rustix::fs::unlinkat(parent, found.name, AtFlags::empty())
                    .map_err(found.err("remove"))
            }
            _ => Ok(()),
        }
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

/// Gives a directory's owner, mode and extended attributes to another. Owner first, since a change of
/// owner takes set-id bits away; the mode before an ACL, whose mask a later chmod would change.
fn copy_attributes(from: &Path, to: &Path) -> Result<(), TreeError> {
    let (source, copy) = (tree::open_root(from)?, tree::open_root(to)?);
    let stat = rustix::fs::fstat(&source).map_err(failed("stat", from))?;
    let owner = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(&copy, Some(owner.0), Some(owner.1))
        .map_err(failed("set the owner of", to))?;
    rustix::fs::fchmod(&copy, Mode::from_raw_mode(stat.st_mode & 0o7777))
        .map_err(failed("set the mode of", to))?;
    let xattrs = tree::xattrs(source.as_fd()).map_err(failed("read the attributes of", from))?;
    for (name, value) in xattrs {
        rustix::fs::fsetxattr(&copy, &name, &value, XattrFlags::empty())
            .map_err(failed("set an extended attribute of", to))?;
    }
    Ok(())
}

fn rename(from: &Path, to: &Path, how: RenameFlags) -> Result<(), TreeError> {
    let plain = |e| match e {
        // An old filesystem without flags: the target is ours, and absent.
        Errno::INVAL if how == RenameFlags::NOREPLACE => rustix::fs::renameat(CWD, from, CWD, to),
        e => Err(e),
    };
    rustix::fs::renameat_with(CWD, from, CWD, to, how)
        .or_else(plain)
        .map_err(failed("rename", from))
}

fn exists(path: &Path) -> Result<bool, TreeError> {
    match rustix::fs::lstat(path) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(failed("stat", path)(e)),
    }
}

fn refuse_if_mounted(upper: &Path) -> Result<(), PutBackError> {
    let real = upper.canonicalize().unwrap_or_else(|_| upper.to_owned());
    let uses_it =
        |dir: &Path| dir == upper || dir == real || dir.canonicalize().is_ok_and(|dir| dir == real);
    for (mount, pid) in mounts_of_all_namespaces() {
        if Overlay::from_mount_entry(&mount).is_ok_and(|o| uses_it(&o.upperdir)) {
            return Err(PutBackError::Mounted {
                upper: upper.to_owned(),
                mountpoint: mount.mountpoint,
                who: pid.map_or_else(String::new, |pid| {
                    format!(" in the mount namespace of {}", describe(pid))
                }),
            });
        }
    }
    Ok(())
}

/// The overlays of every mount namespace that some process is in; each with a process that is in
/// it, none for our own.
fn mounts_of_all_namespaces() -> impl Iterator<Item = (MountEntry, Option<u32>)> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    // The thread's, which need not be the process's.
    let own = Path::new("/proc/thread-self");
    let mut seen: HashSet<PathBuf> = namespace(own).into_iter().collect();
    let others = pids().filter(move |pid| {
        namespace(&process_dir(*pid)).is_some_and(|namespace| seen.insert(namespace))
    });
    let lists = std::iter::once((own.to_owned(), None))
        .chain(others.map(|pid| (process_dir(pid), Some(pid))));
    lists.flat_map(|(process, pid)| {
        // A process that has ended meanwhile has no mounts.
        let text = fs::read(process.join("mountinfo")).unwrap_or_default();
        let overlays = parse_mountinfo(&text).filter(|m| m.fstype == "overlay");
        overlays.map(move |m| (m, pid)).collect::<Vec<_>>()
    })
}

fn pids() -> impl Iterator<Item = u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|e| e.file_name().to_str()?.parse().ok())
}

fn process_dir(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

fn describe(pid: u32) -> String {
    let name = fs::read_to_string(process_dir(pid).join("comm")).unwrap_or_default();
    format!("process {pid} ({:?})", name.trim_end())
}

/// Who keeps the overlay at a mount point alive.
struct Users {
    /// Members of mount namespaces that keep it even when it is unmounted here.
    pinning: Vec<u32>,
    /// The overlay's device number, as processes' files show it.
    device: Option<u64>,
}

impl Users {
    fn of(mountpoint: &Path) -> Self {
        let ours = |m: &MountEntry| m.mountpoint == mountpoint;
        let mounts: Vec<_> = mounts_of_all_namespaces().collect();
        let here = mounts.iter().rfind(|(m, pid)| pid.is_none() && ours(m));
        let pinning = match here {
            Some((here, _)) => mounts
                .iter()
                .filter(|(m, _)| m.device == here.device && !m.follows(here))
                .filter_map(|(_, pid)| *pid)
                .collect(),
            None => Vec::new(),
        };
        let device = fs::metadata(mountpoint).ok().map(|root| root.dev());
        Self { pinning, device }
    }

    fn in_words(&self) -> String {
        let pinning = self.pinning.iter().map(|pid| (*pid, "its mount namespace"));
        let inside = self.device.map(processes_on).unwrap_or_default();
        let all: Vec<_> = pinning.chain(inside).collect();
        let shown: Vec<_> = all.iter().take(SHOWN_PROCESSES).collect();
        let shown: Vec<_> = shown
            .iter()
            .map(|(pid, what)| format!("{} with {what}", describe(*pid)))
            .collect();
        match (shown.is_empty(), all.len().saturating_sub(SHOWN_PROCESSES)) {
            (true, _) => "; no process was found that uses it: look for a mount below it".into(),
            (_, 0) => format!("; used by {}", shown.join(", ")),
            (_, more) => format!("; used by {} and {more} more", shown.join(", ")),
        }
    }
}

fn processes_on(device: u64) -> BTreeMap<u32, &'static str> {
    let on_it = |path: PathBuf| fs::metadata(path).is_ok_and(|m| m.dev() == device);
    let how = |pid| {
        let process = process_dir(pid);
        let mut files = fs::read_dir(process.join("fd")).into_iter().flatten();
        if on_it(process.join("cwd")) {
            Some("its working directory")
        } else if on_it(process.join("root")) {
            Some("its root")
        } else if files.any(|fd| fd.is_ok_and(|fd| on_it(fd.path()))) {
            Some("an open file")
        } else {
            None
        }
    };
    pids().filter_map(|pid| Some((pid, how(pid)?))).collect()
}
