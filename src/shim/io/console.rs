//! Terminals: the socket over which runc hands the pty's master, and its window size.

use std::{
    fs::{DirBuilder, Permissions},
    io::{self, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;

/// `sun_path` holds 108 bytes; runc wants some slack.
const MAX_PATH: usize = 100;
/// The socket's name in its directory.
const NAME: &str = "s";

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowSize {
    pub(super) width: u16,
    pub(super) height: u16,
}

impl WindowSize {
    pub(super) fn apply(self, master: BorrowedFd<'_>) -> io::Result<()> {
        let size = libc::winsize {
            ws_row: self.height,
            ws_col: self.width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which lives for the call.
        unsafe { set_window_size(master.as_raw_fd(), &raw const size) }?;
        Ok(())
    }
}

/// The listening end of runc's `--console-socket`; removed when dropped.
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Holds open what a short path leads through.
    _opened: Option<OwnedFd>,
    _directory: TempDir,
}

impl ConsoleSocket {
    /// Makes a socket in a new directory (mode 0700) below `base`, which is made if need be. Where its path
    /// would be too long for a socket, as with long names of container and namespace, the one told leads
    /// through this process's descriptors.
    pub fn new_in(base: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(base)?;
        let directory = tempfile::Builder::new()
            .prefix("pty")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(base)?;
        let mut path = directory.path().join(NAME);
        let mut opened = None;
        if path.as_os_str().len() >= MAX_PATH {
            let (here, none) = (
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            );
            let fd = rustix::fs::open(directory.path(), here, none)?;
            path = format!("/proc/{}/fd/{}/{NAME}", process::id(), fd.as_raw_fd()).into();
            opened = Some(fd);
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            _opened: opened,
            _directory: directory,
        })
    }

    /// For `runc --console-socket`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for runc to send the master of the process's pty.
    pub fn receive(&self, timeout: Duration) -> io::Result<OwnedFd> {
        let deadline = Instant::now() + timeout;
        wait_readable(self.listener.as_fd(), deadline)?;
        let (stream, _) = self.listener.accept()?;
        wait_readable(stream.as_fd(), deadline)?;
        let master = receive_fd(&stream)?;
        if nix::unistd::isatty(&master) != Ok(true) {
            return Err(io::Error::other("runc sent something that is no terminal"));
        }
        Ok(master)
    }
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so as not to spin through the last millisecond.
        let left =
            PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
        match poll(&mut polled, left) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "runc sent no terminal over the console socket",
                ));
            }
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    // runc also sends the master's name, of which we need nothing.
    let mut name = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
    )?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this message.
            received.extend(fds.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let mut received = received.into_iter();
    match (received.next(), received.next()) {
        (Some(master), None) => Ok(master),
        _ => Err(io::Error::other(
            "expected one descriptor over the console socket",
        )),
    }
}
