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
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
            && let Err(e) = fs::remove_file(socket.path())
        {
            log::warn!("cannot remove the socket of a dead shim: {e}");
        }
    }
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
