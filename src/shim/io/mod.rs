//! The stdio of container processes: what lies between a process and containerd's client.
//!
//! A process only ever gets plain anonymous pipes (or the slave of a pty, from runc): a host
//! FIFO, file or `/dev/null` would make it undumpable for CRIU. One thread per shim, the
//! [`Pump`], moves the bytes between those pipes and the client's FIFOs, files and loggers.
//!
//! The life of one [`ProcessIo`]:
//!
//! ```no_run
//! # use std::time::Duration;
//! # use crab::shim::io::{IoContext, ProcessIo, Pump, StdioConfig};
//! # fn spawn_with(_: Option<[std::os::fd::OwnedFd; 3]>) {}
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let pump = Pump::new()?;
//! let config = StdioConfig { stdout: "/run/x/stdout".into(), ..Default::default() };
//! let spawner = |mut command: std::process::Command| command.spawn().map(|child| child.id());
//! let io = ProcessIo::open(&pump, &config, &IoContext {
//!     namespace: "default",
//!     container_id: "c1",
//!     uid: 0,
//!     gid: 0,
//!     spawner: &spawner,
//!     orphan: None,
//! })?;
//! spawn_with(io.take_child_fds()); // runc create / exec; our copies are closed here
//! io.start()?; // bytes flow (terminal: attach_console instead)
//! // … the process exits:
//! io.leader_exited();
//! io.deliver(); // then the client is told
//! // … Delete:
//! io.finish(Duration::from_secs(2));
//! while io.is_live() { // a background process still holds a pipe: keep `io` for checkpoints
//! #   break;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Streams of background processes outlive [`ProcessIo::finish`] and even the `ProcessIo`: they
//! would die of SIGPIPE otherwise (D12).

use std::{fmt, io, path::PathBuf, process::Command};

mod binary;
mod buffer;
mod console;
mod core;
mod flow;
mod open;
mod pipes;
mod process;
mod pump;
mod sink;
mod snapshot;
mod target;
#[cfg(test)]
mod tests;

pub use self::{
    console::ConsoleSocket, open::NewPipes, process::ProcessIo, pump::Pump, sink::SinkHandle,
};

/// Where the client wants a process's stdio, as the task API says it.
///
/// Each string is `""` (nowhere; for stdin: end of file at once), a path or `fifo:///path` (a
/// FIFO that the client made), `file:///path` (appended to, made with its directories) or
/// `binary:///path?args` (containerd's logger protocol). As with containerd's Go shim, an empty
/// `stderr` follows a `file` or `binary` stdout.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioConfig {
    /// A pty instead of pipes; `stderr` then has no meaning.
    pub terminal: bool,
    /// Where input comes from: nowhere or a FIFO.
    pub stdin: String,
    /// Where output goes.
    pub stdout: String,
    /// Where error output goes.
    pub stderr: String,
}

/// Starts a command and says its pid; nobody but the spawner's reaper waits for it.
pub type Spawner<'a> = &'a dyn Fn(Command) -> io::Result<u32>;

/// What a process's stdio must know of its container.
pub struct IoContext<'a> {
    /// containerd's namespace, for loggers.
    pub namespace: &'a str,
    /// The container's id (containerd gives an exec's id for an exec), for loggers.
    pub container_id: &'a str,
    /// Owner of the process's pipe ends (`io_uid` of runc's options).
    pub uid: u32,
    /// Group of the process's pipe ends (`io_gid`).
    pub gid: u32,
    /// Starts loggers.
    pub spawner: Spawner<'a>,
    /// Where the output of background processes goes once their own target is gone: for an exec,
    /// init's [`ProcessIo::orphan_sink`]. None: nowhere.
    pub orphan: Option<SinkHandle>,
}

/// One of the three standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stream {
    /// Descriptor 0.
    Stdin,
    /// Descriptor 1, also a terminal's output.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl Stream {
    /// The descriptor's number in the process.
    pub fn fd(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// A live pipe between the shim and a process, as CRIU will name it: `pipe:[INODE]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StdioPipe {
    /// The role that the pipe has: 0, 1 or 2.
    pub fd: u8,
    /// The pipe's inode in pipefs.
    pub inode: u64,
}

/// Why a process's stdio could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The client's end could not be opened.
    #[error("{stream}: cannot open {path:?}: {source}")]
    Open {
        /// Which stream.
        stream: Stream,
        /// What the client named.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The client named something that this stream cannot use.
    #[error("{stream}: cannot use {uri:?}: {reason}")]
    Target {
        /// Which stream.
        stream: Stream,
        /// What the client named.
        uri: String,
        /// What would be right.
        reason: &'static str,
    },
    /// A logger (`binary://`) did not start, or did not say that it is ready.
    #[error("{stream}: logger {path:?}: {source}")]
    Logger {
        /// Which stream.
        stream: Stream,
        /// The logger's binary.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The host refused a pipe, a descriptor or a thread.
    #[error("stdio: {what}: {source}")]
    System {
        /// The step.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl IoError {
    fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }
}
