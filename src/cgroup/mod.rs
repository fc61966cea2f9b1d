//! The cgroup of one sandbox: where it is, who is in it, freezing it, measuring it, its OOM kills.
//!
//! A [`Cgroup`] is resolved once from a live process and then kept: everything else works from
//! the directories, so it goes on working when the sandbox's init has died.
//!
//! Three layouts are met (`man 7 cgroups`): *v1* (a hierarchy per controller), *hybrid* (v1
//! controllers and an empty cgroup2 hierarchy beside them), and *v2* (cgroup2 only).

mod freezer;
mod oom;
mod path;
mod remains;
mod remove;
mod stats;
mod stats_v1;
mod stats_v2;
mod survey;

pub use freezer::FreezerState;
pub use oom::OomWatch;
pub use path::Mounts;
pub use remains::named;
pub use remove::{kill, remove};
pub use survey::Survey;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file of the cgroup could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write FROZEN to`, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A process's cgroup lies outside every cgroup mount that this process can see.
    #[error("no cgroup mount shows the cgroup of process {pid} (/proc/{pid}/cgroup: {lines})")]
    NotVisible {
        /// The process.
        pid: i32,
        /// What its file said, on one line.
        lines: String,
    },
    /// The tasks did not freeze in time; the cgroup was thawed again.
    #[error("{} is still {state} after {waited:?}; thawed again", path.display())]
    NotFrozen {
        /// The file that tells the state.
        path: PathBuf,
        /// The last state seen.
        state: FreezerState,
        /// How long was waited.
        waited: Duration,
    },
    /// The file's text is not what the kernel documents.
    #[error("unexpected text in {}: {text:?}", path.display())]
    Unexpected {
        /// The file.
        path: PathBuf,
        /// What it said, shortened.
        text: String,
    },
    /// There is no such controller for this cgroup (the root cgroup has no freezer, either).
    #[error("no {controller} for the cgroup {}", path.display())]
    NoController {
        /// `freezer` or `memory`.
        controller: &'static str,
        /// A directory of the cgroup.
        path: PathBuf,
    },
}

impl CgroupError {
    /// Whether the cause is that the cgroup has been removed.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Io { source, .. } if gone(source))
    }

    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// ENOENT before the file is open, ENODEV after it.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// Which cgroup hierarchies a sandbox lives in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// v1 controllers only.
    V1,
    /// v1 controllers, and a cgroup2 directory that carries no controllers.
    Hybrid,
    /// cgroup2 only.
    V2,
}

/// The directories of one cgroup, one per hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    /// v1: controller (or `name=systemd`) to directory.
    v1: BTreeMap<String, PathBuf>,
    /// cgroup2.
    unified: Option<Unified>,
}

/// The cgroup2 directory and its id, read while it surely existed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unified {
    dir: PathBuf,
    id: Option<u64>,
}

impl Cgroup {
    /// Resolves the cgroup of a live process, as seen through this process's own mounts.
    ///
    /// Call it while `pid` is alive: a zombie is shown in the root cgroup. A hierarchy in which
    /// the process sits in the root (it was never moved there) is left out, so that nothing here
    /// ever freezes, lists or counts the whole host.
    pub fn of_pid(pid: i32) -> Result<Self, CgroupError> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read(&path).map_err(|e| CgroupError::io("read", &path, e))?;
        Self::resolve(pid, &String::from_utf8_lossy(&text), &Mounts::of_self()?)
    }

    /// [`Cgroup::of_pid`] on the given text of `/proc/PID/cgroup` and the given mounts.
    pub fn resolve(pid: i32, proc_cgroup: &str, mounts: &Mounts) -> Result<Self, CgroupError> {
        let mut v1 = BTreeMap::new();
        let mut unified = None;
        for membership in path::memberships(proc_cgroup) {
            let Some(dir) = mounts.dir_of(&membership) else {
                continue;
            };
            if membership.controllers.is_empty() {
                let id = fs::metadata(&dir).ok().map(|m| m.ino());
                unified = Some(Unified { dir, id });
            } else {
                for controller in membership.controllers {
                    v1.insert(controller.to_owned(), dir.clone());
                }
            }
        }
        if v1.is_empty() && unified.is_none() {
            return Err(CgroupError::NotVisible {
                pid,
                lines: proc_cgroup.trim_end().replace('\n', " "),
            });
        }
        Ok(Self { v1, unified })
    }

    /// Which hierarchies it is in.
    pub fn layout(&self) -> Layout {
        match (self.v1.is_empty(), &self.unified) {
            (false, None) => Layout::V1,
            (false, Some(_)) => Layout::Hybrid,
            (true, _) => Layout::V2,
        }
    }

    /// The cgroup2 id that BPF programs see: the directory's inode number.
    ///
    /// `None` where the sandbox has no cgroup2 directory of its own. Remembered, so it can still
    /// be asked for when the directory is gone.
    pub fn id(&self) -> Option<u64> {
        self.unified.as_ref().and_then(|u| u.id)
    }

    /// Whether any of its directories is still there.
    pub fn exists(&self) -> bool {
        self.dirs().any(Path::exists)
    }

    /// All processes in the cgroup and its descendants, in ascending order: host pids, each once.
    ///
    /// A cgroup that is gone has none. Costs a directory walk: on a busy cgroup the list may be
    /// old when it arrives, unless the cgroup is frozen.
    pub fn procs(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = BTreeSet::new();
        if let Some(dir) = self.membership_dir() {
            collect_procs(dir, &mut pids)?;
        }
        Ok(pids.into_iter().collect())
    }

    /// The directory that runc and CRIU freeze with (v1 freezer, or cgroup2).
    pub fn freezer_dir(&self) -> Option<&Path> {
        self.v1_dir("freezer").or_else(|| self.unified_dir())
    }

    /// The cgroup2 directory.
    pub fn unified_dir(&self) -> Option<&Path> {
        self.unified.as_ref().map(|u| u.dir.as_path())
    }

    /// The directory of one v1 controller.
    pub fn v1_dir(&self, controller: &str) -> Option<&Path> {
        self.v1.get(controller).map(PathBuf::as_path)
    }

    /// Removes its directories, which must have no processes any more. What is gone already is no
    /// error.
    pub fn remove(&self) -> Result<(), CgroupError> {
        for dir in self.dirs() {
            match fs::remove_dir(dir) {
                Err(e) if !gone(&e) => return Err(CgroupError::io("remove", dir, e)),
                _ => {}
            }
        }
        Ok(())
    }

    fn dirs(&self) -> impl Iterator<Item = &Path> {
        self.unified_dir()
            .into_iter()
            .chain(self.v1.values().map(PathBuf::as_path))
    }

    /// Where membership is read: what is frozen is what must be listed, so the freezer first.
    fn membership_dir(&self) -> Option<&Path> {
        self.freezer_dir()
            .into_iter()
            .chain(self.dirs())
            .find(|dir| dir.exists())
    }

    /// Any directory, to name the cgroup in an error.
    fn label(&self) -> PathBuf {
        self.dirs().next().map(Path::to_owned).unwrap_or_default()
    }
}

/// Adds the pids of `dir` and everything below it. Directories that vanish meanwhile are empty.
fn collect_procs(dir: &Path, pids: &mut BTreeSet<i32>) -> Result<(), CgroupError> {
    let file = dir.join("cgroup.procs");
    match fs::read_to_string(&file) {
        // 0 stands for a process of a pid namespace that we cannot see.
        Ok(text) => {
            let listed = text.lines().filter_map(|line| line.parse::<i32>().ok());
            pids.extend(listed.filter(|pid| *pid > 0));
        }
        // A threaded cgroup lists its processes in its domain, which is above it.
        Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(CgroupError::io("read", &file, e)),
    }
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(CgroupError::io("list", dir, e)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_procs(&entry.path(), pids)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
