//! Killing and removing a cgroup that no runtime answers for any more.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Cgroup, CgroupError, collect_procs, gone};

/// How long killed processes may take to leave.
const LIMIT: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(2);
/// What lies below a cgroup of ours, at most so deep: the kernel allows more only on request.
const DEPTH: usize = 64;

impl Cgroup {
    /// Its directory in every hierarchy.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<_> = self.dirs().map(Path::to_owned).collect();
        dirs.sort_unstable();
        dirs.dedup();
        dirs
    }
}

/// Kills what is left in a cgroup, also if it is frozen or cannot finish freezing, and waits for
/// nothing. Directories that are gone are no error; one that is no cgroup, or is the root of its
/// hierarchy, is refused.
pub fn kill(directories: &[PathBuf]) -> Result<(), CgroupError> {
    refuse_others(directories)?;
    directories.iter().try_for_each(|dir| kill_in(dir))
}

/// Kills what is left in a cgroup, and removes its directories, under the same conditions.
pub fn remove(directories: &[PathBuf]) -> Result<(), CgroupError> {
    refuse_others(directories)?;
    let end = Instant::now() + LIMIT;
    for dir in directories {
        loop {
            kill_in(dir)?;
            match remove_tree(dir, DEPTH) {
                Ok(()) => break,
                Err(e) if Instant::now() > end => return Err(CgroupError::io("remove", dir, e)),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }
    Ok(())
}

fn refuse_others(directories: &[PathBuf]) -> Result<(), CgroupError> {
    for dir in directories.iter().filter(|dir| dir.exists()) {
        let parent = dir.parent().unwrap_or(dir);
        if !dir.join("cgroup.procs").exists() || !parent.join("cgroup.procs").exists() {
            let why = io::Error::other("it is no cgroup below another one");
            return Err(CgroupError::io("remove", dir, why));
        }
    }
    Ok(())
}

/// Kills everything inside. Each look kills what the last one could not see yet.
fn kill_in(dir: &Path) -> Result<(), CgroupError> {
    let mut pids = Default::default();
    collect_procs(dir, &mut pids)?;
    for pid in pids {
        // One that has ended meanwhile is what is wanted.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    // A v1 freezer keeps even SIGKILL waiting. Where there is none, or it is gone, nothing waits.
    for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
        let file = fs::OpenOptions::new().write(true).open(dir.join(file));
        let _ = file.and_then(|mut f| io::Write::write_all(&mut f, value.as_bytes()));
    }
    Ok(())
}

fn remove_tree(dir: &Path, depth: usize) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if gone(&e) => return Ok(()),
        entries => entries?,
    };
    for entry in entries.flatten() {
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path(), depth - 1)?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if gone(&e) => Ok(()),
        done => done,
    }
}
