//! What a runtime that died half-way has left in a cgroup.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Component, Path},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{CgroupError, Mounts, collect_procs, gone};

/// How long killed processes may take to leave.
const LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// Kills whoever is in the cgroup that `path` (OCI's `cgroupsPath`) names and removes it, in every
/// hierarchy. Does nothing if there is none.
///
/// The path is a client's: only one that is absolute and ends with the container's own id is acted
/// upon, so that nobody else's cgroup is ever touched.
pub fn remove_remains(path: &Path, id: &str) -> Result<(), CgroupError> {
    remove_in(&Mounts::of_self()?, path, id)
}

fn remove_in(mounts: &Mounts, path: &Path, id: &str) -> Result<(), CgroupError> {
    let plain = path
        .components()
        .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !plain || path.file_name().is_none_or(|name| name != id) {
        return Ok(());
    }
    let dirs = mounts.dirs_at(path);
    let end = Instant::now() + LIMIT;
    loop {
        let mut pids = BTreeSet::new();
        for dir in &dirs {
            thaw(dir)?;
            collect_procs(dir, &mut pids)?;
        }
        for pid in &pids {
            // Gone meanwhile, or about to go.
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        if pids.is_empty() {
            break;
        }
        if Instant::now() > end {
            log::warn!("{}: {pids:?} do not end", path.display());
            break;
        }
        thread::sleep(PAUSE);
    }
    dirs.iter().try_for_each(|dir| remove(dir))
}

/// A frozen process of cgroup v1 does not die.
fn thaw(dir: &Path) -> Result<(), CgroupError> {
    let file = dir.join("freezer.state");
    match fs::OpenOptions::new().write(true).open(&file) {
        Ok(mut state) => state
            .write_all(b"THAWED")
            .map_err(|e| CgroupError::io("write THAWED to", &file, e)),
        // Another controller's, or cgroup v2's, where death needs no thaw.
        Err(e) if gone(&e) => Ok(()),
        Err(e) => Err(CgroupError::io("open", &file, e)),
    }
}

/// Removes a cgroup and those below it.
fn remove(dir: &Path) -> Result<(), CgroupError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if gone(&e) => return Ok(()),
        Err(e) => return Err(CgroupError::io("list", dir, e)),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove(&entry.path())?;
        }
    }
    let end = Instant::now() + LIMIT;
    loop {
        match fs::remove_dir(dir) {
            // The kernel lets go of a process a moment after it is listed no more.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                thread::sleep(PAUSE);
            }
            Err(e) if !gone(&e) => return Err(CgroupError::io("remove", dir, e)),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(point: &Path) -> Mounts {
        Mounts::parse(&format!(
            "31 23 0:28 / {} rw - cgroup cgroup rw,freezer",
            point.display()
        ))
    }

    #[test]
    fn only_a_path_that_ends_with_the_containers_id_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let mounts = mounts(root.path());
        let dir = |path: &str| root.path().join(path);
        for path in ["ns/c1/inner", "ns/other", "c1"] {
            fs::create_dir_all(dir(path)).unwrap();
        }
        for path in ["/", "/ns", "/ns/other", "ns/c1", "/ns/../ns/c1", "/none/c1"] {
            remove_in(&mounts, Path::new(path), "c1").unwrap();
        }
        assert!(dir("ns/c1/inner").exists() && dir("c1").exists());
        remove_in(&mounts, Path::new("/ns/c1"), "c1").unwrap();
        assert!(!dir("ns/c1").exists());
        assert!(dir("ns/other").exists() && dir("c1").exists());
    }

    #[test]
    fn who_is_left_in_it_is_killed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("ns/c1");
        fs::create_dir_all(&dir).unwrap();
        let mut left = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        // In a real cgroup the file goes with its directory, and the pid with its process.
        let procs = dir.join("cgroup.procs");
        fs::write(&procs, left.id().to_string()).unwrap();
        let reaped = thread::spawn(move || {
            let status = left.wait().unwrap();
            fs::remove_file(procs).unwrap();
            status
        });
        remove_in(&mounts(root.path()), Path::new("/ns/c1"), "c1").unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&reaped.join().unwrap()),
            Some(libc::SIGKILL)
        );
        assert!(!dir.exists());
    }
}
