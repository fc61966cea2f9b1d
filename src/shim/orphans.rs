//! What killed shims have left and nobody was asked to clean up.
//!
//! containerd runs `delete` for a shim that is gone, in its bundle. Not when the shim died before
//! containerd had connected to it, and not when a Create that the death has made fail removes the
//! bundle first. So each shim writes down below `/run/crab` what there is of it, and others clear
//! it away: at their own end, and when containerd has them clean up.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
};

use super::{create::Remains, delete, host::Host, run_dir::RunDir};
use crate::{
    control::{self, LINK, SHIMS},
    sandbox::SandboxId,
};

/// How the link to a shim's task socket ends; its name is the shim's pid.
const TASK: &str = "task";

/// Writes down where this shim serves the task API, before it does.
pub fn record(run: &Path, task_socket: &Path) -> io::Result<()> {
    let link = own_link(run);
    remove(&link)?;
    symlink(task_socket, link)
}

/// This shim ends as it should.
pub fn forget(run: &Path) {
    if let Err(e) = remove(&own_link(run)) {
        log::warn!("cannot remove the record of this shim: {e}");
    }
}

fn own_link(run: &Path) -> PathBuf {
    run.join(SHIMS)
        .join(format!("{}.{TASK}", std::process::id()))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Clears away what dead shims have left, as far as nobody else will.
pub fn sweep(host: &dyn Host, run: &Path) {
    let shims = run.join(SHIMS);
    task_sockets(&shims);
    for sandbox in sandboxes(run) {
        let run_dir = RunDir::below(run, &sandbox);
        if let Some(remains) = orphan(&run_dir) {
            log::info!("{sandbox}: its shim and its bundle are gone: removing the rest");
            delete::clear(host, &sandbox, Some(&remains));
        }
    }
    // Last: the sockets' names tell which shims are dead.
    control::sweep(&shims);
}

fn task_sockets(shims: &Path) {
    for link in entries(shims) {
        let pid = link
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(TASK)?.strip_suffix('.'));
        let Some(pid) = pid.filter(|pid| !control::is_alive(pid)) else {
            continue;
        };
        // One that is about to end still listens: another time.
        let gone = !Path::new("/proc").join(pid).exists();
        let settled = fs::read_link(&link).is_ok_and(|socket| remove_dead_socket(&socket) || gone);
        if settled && let Err(e) = remove(&link) {
            log::warn!("cannot remove {}: {e}", link.display());
        }
    }
}

/// Removes a socket that nobody listens at; false if somebody does: the next shim of a killed
/// one's name takes its socket over.
pub fn remove_dead_socket(path: &Path) -> bool {
    match UnixStream::connect(path) {
        Ok(_) => false,
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => {
            if let Err(e) = remove(path) {
                log::warn!("cannot remove {}: {e}", path.display());
            }
            true
        }
        Err(e) => e.kind() == ErrorKind::NotFound,
    }
}

/// What is left of a sandbox whose shim is dead and whose bundle containerd has removed. While
/// there is a bundle, containerd will ask for the clean-up, and wants to hear of the end.
fn orphan(run_dir: &RunDir) -> Option<Remains> {
    let socket = fs::read_link(run_dir.path().join(LINK)).ok()?;
    if control::is_alive(socket.file_stem()?.to_str()?) {
        return None;
    }
    let remains = Remains::load(run_dir)?;
    (!remains.bundle.exists()).then_some(remains)
}

fn sandboxes(run: &Path) -> Vec<SandboxId> {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let mut all = Vec::new();
    for namespace in entries(&RunDir::all(run)) {
        for sandbox in entries(&namespace) {
            if let (Some(namespace), Some(id)) = (name(&namespace), name(&sandbox)) {
                all.extend(SandboxId::new(&namespace, &id));
            }
        }
    }
    all
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, process::Command};

    use super::*;

    fn dead_pid() -> u32 {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn a_dead_shims_task_socket_goes_unless_somebody_listens_there() {
        let dir = tempfile::tempdir().unwrap();
        let link = |pid: u32, socket: &str| {
            let path = dir.path().join(socket);
            let link = dir.path().join(format!("{pid}.{TASK}"));
            symlink(&path, &link).unwrap();
            (path, link)
        };
        // A closed listener leaves its file.
        let (refused, refused_link) = link(dead_pid(), "refused");
        drop(UnixListener::bind(&refused).unwrap());
        let (taken_over, taken_link) = link(dead_pid(), "taken over");
        let _successor = UnixListener::bind(&taken_over).unwrap();
        let (missing, missing_link) = link(dead_pid(), "missing");
        let (own, own_link) = link(std::process::id(), "own");
        drop(UnixListener::bind(&own).unwrap());

        task_sockets(dir.path());
        assert!(!refused.exists() && !refused_link.is_symlink());
        assert!(taken_over.exists() && !taken_link.is_symlink());
        assert!(!missing.exists() && !missing_link.is_symlink());
        assert!(own.exists() && own_link.is_symlink(), "a living shim's");
    }
}
