//! The API that the `crab` command speaks to a running shim (D14): a ttrpc service on a socket
//! below `/run/crab` that root alone can open.

pub mod client;

/// The generated messages and stubs.
#[allow(
    missing_docs,
    unused,
    nonstandard_style,
    unused_qualifications,
    clippy::all,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "generated"
)]
pub mod api {
    mod control {
        include!(concat!(env!("OUT_DIR"), "/control.rs"));
    }
    mod control_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/control_ttrpc.rs"));
    }
    pub use self::{control::*, control_ttrpc::*};
}

use std::{
    fs::{self, DirBuilder},
    io,
    os::{
        fd::IntoRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt, symlink},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use ttrpc::Server;

/// The socket's name in a sandbox's run directory: a link to its shim's socket.
pub const LINK: &str = "control.sock";

/// Removes the sockets of shims that were killed: each is named after its pid.
pub fn sweep(dir: &Path) {
    for socket in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = socket.file_name();
        let pid = name.to_str().and_then(|n| n.strip_suffix(".sock"));
        if pid.is_some_and(|pid| !is_alive(pid))
            && let Err(e) = fs::remove_file(socket.path())
        {
            log::warn!("cannot remove the socket of a dead shim: {e}");
        }
    }
}

/// Whether a process lives, and is not about to end. Who has just been killed still is in /proc, and
/// so is who has not been waited for; the kernel marks both, before it closes any of their files.
pub fn is_alive(pid: &str) -> bool {
    /// include/linux/sched.h.
    const PF_EXITING: u32 = 4;
    let Ok(stat) = fs::read_to_string(Path::new("/proc").join(pid).join("stat")) else {
        return false;
    };
    // The name, which may hold anything, ends with the last parenthesis; before the flags come
    // state, parent, group, session, terminal and its foreground group (proc(5)).
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest);
    let flags = rest.and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_none_or(|flags| flags & PF_EXITING == 0)
}

/// The directory of the sockets below `/run/crab`.
pub const SHIMS: &str = "shims";

/// A shim's control socket. Removed when dropped.
pub struct ControlSocket {
    path: PathBuf,
    server: Option<Server>,
}

impl ControlSocket {
    /// Serves on a socket of this process below `dir`.
    pub fn serve(dir: &Path, service: Arc<dyn api::Control + Send + Sync>) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let path = dir.join(format!("{}.sock", std::process::id()));
        match fs::remove_file(&path) {
            // Of an earlier process with this pid.
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let mut server = Server::new()
            .add_listener(listener.into_raw_fd())
            .map_err(io::Error::other)?
            .register_service(api::create_control(service));
        server.start().map_err(io::Error::other)?;
        Ok(Self {
            path,
            server: Some(server),
        })
    }

    /// Links a sandbox's run directory to the socket.
    pub fn link(path: &Path, run_dir: &Path) -> io::Result<()> {
        let link = run_dir.join(LINK);
        match fs::remove_file(&link) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        symlink(path, link)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            // Stopping would wait for calls under way; the process ends anyway.
            std::mem::forget(server);
        }
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn sockets_of_the_dead_go_also_before_somebody_has_waited_for_them() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |pid: u32| {
            let path = dir.path().join(format!("{pid}.sock"));
            UnixListener::bind(&path).unwrap();
            path
        };
        let mut living = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let mut dead = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        dead.kill().unwrap();
        let zombie =
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        let pid = rustix::process::Pid::from_child(&dead);
        rustix::process::waitid(rustix::process::WaitId::Pid(pid), zombie).unwrap();
        let gone = Command::new("true").spawn().map(|mut child| {
            child.wait().unwrap();
            child.id()
        });

        let (alive, zombie, gone) = (
            socket(living.id()),
            socket(dead.id()),
            socket(gone.unwrap()),
        );
        fs::write(dir.path().join("other"), "").unwrap();
        sweep(dir.path());
        assert!(alive.exists() && dir.path().join("other").exists());
        assert!(!zombie.exists() && !gone.exists());

        living.kill().unwrap();
        living.wait().unwrap();
        dead.wait().unwrap();
    }
}
