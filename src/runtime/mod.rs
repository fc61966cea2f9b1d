//! Speaks runc and crun: typed arguments in, typed errors out.
//!
//! [`OciRuntime`] is the seam: the task service knows only this trait, so that it can be tested
//! over a fake without root. [`runc::Runc`] is the real one and the only place that builds a
//! runtime's command line.

mod calls;
pub mod criu_conf;
pub mod criu_stats;
pub mod criu_version;
pub mod descriptors;
pub mod empty_tar;
mod empty_untar;
mod log_file;
mod prepare;
pub mod runc;
pub mod start_line;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// How a command that crab ran has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Signaled(i32),
}

/// Runs helper commands to their end.
///
/// The shim is a child subreaper and reaps every child itself, so nobody else may wait for one:
/// whoever wants to run a command asks the reaper through this trait.
pub trait Spawner: Send + Sync {
    /// Starts `command` and waits until it has ended.
    ///
    /// # Errors
    /// When the command cannot be started, or has not ended within `limit` (it is killed then).
    fn run(&self, command: Command, limit: Duration) -> io::Result<Ended>;

    /// The same, in a process group of its own, which is killed also as soon as `stop` says so.
    fn run_unless(
        &self,
        command: Command,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<Ended>;
}

/// What went wrong in a call to the OCI runtime.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime said no.
    #[error("{runtime} {verb} failed: {message}")]
    Refused {
        /// The runtime's name, as configured.
        runtime: String,
        /// Which of its commands.
        verb: &'static str,
        /// The last error line of its log, or what it wrote to stderr.
        message: String,
    },
    /// It could not be started, or was killed.
    #[error("cannot run {runtime} {verb}: {source}")]
    Spawn {
        /// The runtime's name, as configured.
        runtime: String,
        /// Which of its commands.
        verb: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Something around the call failed.
    #[error("{what} {}: {source}", path.display())]
    File {
        /// The step.
        what: &'static str,
        /// The file it was about.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl RuntimeError {
    /// Whether the runtime does not know the container (any more).
    pub fn is_unknown_container(&self) -> bool {
        matches!(self, Self::Refused { message, .. } if message.contains("does not exist"))
    }

    /// Whether runc could not seal the copy of itself that it goes on in: the kernel gives up
    /// (`memfd_wait_for_pins`) if somebody else, reclaim or DAMON, holds on to a page of it for a tenth of
    /// a second. Nothing of the container has been touched then, and the next try is another copy.
    fn is_unsealed_copy(&self) -> bool {
        let is = |message: &str| {
            message.contains("cloned binary") && message.contains("Device or resource busy")
        };
        matches!(self, Self::Refused { message, .. } if is(message))
    }
}

/// Where the process's stdin, stdout and stderr come from.
pub enum Stdio {
    /// Three descriptors that the process inherits.
    Fds([OwnedFd; 3]),
    /// A terminal: the runtime sends its master to this socket.
    Console(PathBuf),
}

impl Stdio {
    /// The same, for a call that may have to be made once more.
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Fds([stdin, stdout, stderr]) => {
                Self::Fds([stdin.try_clone()?, stdout.try_clone()?, stderr.try_clone()?])
            }
            Self::Console(socket) => Self::Console(socket.clone()),
        })
    }
}

/// Arguments of `create`.
pub struct Create<'a> {
    /// The container.
    pub id: &'a str,
    /// The directory that holds `config.json`.
    pub bundle: &'a Path,
    /// Where the runtime writes the pid of init.
    pub pid_file: &'a Path,
    /// stdio of init.
    pub stdio: Stdio,
    /// `--no-pivot`.
    pub no_pivot_root: bool,
    /// `--no-new-keyring`.
    pub no_new_keyring: bool,
}

/// Arguments of `exec`.
pub struct Exec<'a> {
    /// The container.
    pub id: &'a str,
    /// A file with the OCI `process` object.
    pub process: &'a Path,
    /// Where the runtime writes the pid.
    pub pid_file: &'a Path,
    /// stdio of the process.
    pub stdio: Stdio,
}

/// Arguments of `checkpoint`. Paths must exist.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint {
    /// `--pre-dump`: memory alone, while the processes run on.
    pub pre_dump: bool,
    /// Where the images go.
    pub image_path: PathBuf,
    /// CRIU's working directory; its `dump.log` is here.
    pub work_path: PathBuf,
    /// Images of the previous dump, relative to `image_path`: pages that were not written to since are
    /// left out, and the kernel begins anew to tell which are.
    pub parent_path: Option<PathBuf>,
    /// Let the processes live on.
    pub leave_running: bool,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--ext-unix-sk`.
    pub external_unix_sockets: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--empty-ns`, one each.
    pub empty_namespaces: Vec<String>,
    /// `--manage-cgroups-mode`.
    pub cgroups_mode: Option<String>,
    /// A directory whose `.criu/default.conf` CRIU shall read (see [`criu_conf`]).
    pub home: Option<PathBuf>,
    /// After this time the dump counts as hung.
    pub limit: Duration,
}

/// Arguments of `restore`.
pub struct Restore<'a> {
    /// The container.
    pub id: &'a str,
    /// The directory that holds `config.json`.
    pub bundle: &'a Path,
    /// Where the images are, with the `descriptors.json` of this restore.
    pub image_path: &'a Path,
    /// CRIU's working directory; its `restore.log` is here.
    pub work_path: &'a Path,
    /// Where the runtime writes the pid of init.
    pub pid_file: &'a Path,
    /// stdio of init.
    pub stdio: Stdio,
    /// Descriptors to inherit under the numbers they have, which `descriptors.json` names.
    pub extra_fds: Vec<OwnedFd>,
    /// `--tcp-established`.
    pub tcp_established: bool,
    /// `--shell-job`.
    pub shell_job: bool,
    /// `--file-locks`.
    pub file_locks: bool,
    /// `--no-pivot`.
    pub no_pivot_root: bool,
    /// As in [`Checkpoint::home`].
    pub home: Option<PathBuf>,
}

/// An OCI runtime that can checkpoint.
pub trait OciRuntime: Send + Sync {
    /// Creates a container; its init waits for [`OciRuntime::start`].
    fn create(&self, args: Create<'_>) -> Result<(), RuntimeError>;
    /// Lets init run.
    fn start(&self, id: &str) -> Result<(), RuntimeError>;
    /// Starts another process in the container, detached.
    fn exec(&self, args: Exec<'_>) -> Result<(), RuntimeError>;
    /// Sends `signal` to every process of the container.
    fn kill_all(&self, id: &str, signal: i32) -> Result<(), RuntimeError>;
    /// Removes the container; with `force`, kills it first. An unknown one is no error.
    fn delete(&self, id: &str, force: bool) -> Result<(), RuntimeError>;
    /// Makes the runtime forget a container whose processes are all gone, and nothing else: its
    /// cgroup stays as it is, for a restore under the same id. An unknown one is no error.
    fn forget(&self, id: &str) -> Result<(), RuntimeError>;
    /// Ends what a dead shim has left under way: calls about a container that go on without it.
    fn end_calls(&self, id: &str) -> Result<(), RuntimeError>;
    /// Dumps the container's processes. When `stop` says so, the dump is killed, which only a
    /// sandbox that is to die can bear.
    fn checkpoint(
        &self,
        id: &str,
        args: &Checkpoint,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), RuntimeError>;
    /// Makes a running container from images.
    fn restore(&self, args: Restore<'_>) -> Result<(), RuntimeError>;
    /// Changes limits; `resources` is the JSON of OCI `LinuxResources`.
    fn update(&self, id: &str, resources: &[u8]) -> Result<(), RuntimeError>;
    /// Whether a dump may build on the one before ([`Checkpoint::parent_path`]).
    fn is_incremental(&self) -> bool;
}

/// Where a program is that is named by a path, or found on PATH.
pub fn on_path(name: &Path) -> Option<PathBuf> {
    match name.parent() {
        Some(dir) if dir != Path::new("") => Some(name.to_owned()).filter(|its| its.is_file()),
        _ => behind(0, name),
    }
}

/// The first of that name on PATH, behind so many of its directories.
fn behind(skipped: usize, name: &Path) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let programs = std::env::split_paths(&path).skip(skipped);
    programs
        .map(|dir| dir.join(name))
        .find(|program| program.is_file())
}

/// This very program, for others to run as long as this process lives: by name it may be another one
/// since an upgrade, or gone.
pub fn own_program() -> PathBuf {
    format!("/proc/{}/exe", std::process::id()).into()
}
