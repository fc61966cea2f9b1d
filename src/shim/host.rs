//! What the shim needs of the machine below it, apart from containerd.
//!
//! The task service is tested over another implementation, without root.

use std::{
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{
    io::Pump,
    netns,
    reaper::Reaper,
    run_dir::{RUN, RunDir},
};
use crate::{
    cgroup::{self, Cgroup, CgroupError, OomWatch},
    config::{Config, Incremental},
    coordinator::freeze::Freezable,
    inspector::{self, Joined},
    memory,
    rootfs::{self, MountSpec, Mounted, Overlay},
    runtime::{
        Ended, OciRuntime, Spawner,
        runc::{Runc, is_crun},
    },
    sandbox::SandboxId,
};

/// How long the inspector's programs may take to be loaded: the kernel verifies them. A second or two; in an
/// emulated machine on a busy host a minute was seen.
const LOAD_LIMIT: Duration = Duration::from_secs(90);

/// A process that can be signalled without the danger of hitting another one.
pub trait Target: Send + Sync {
    /// Sends a signal by number.
    fn signal(&self, signal: i32) -> io::Result<()>;
    /// Waits until it has ended, reaped or not; false if it lives on for longer than `limit`.
    fn wait_end(&self, limit: Duration) -> io::Result<bool>;
}

/// A sandbox's cgroup.
pub trait ControlGroup: Freezable {
    /// Its directory in every hierarchy.
    fn directories(&self) -> Vec<PathBuf>;
    /// containerd's metrics message.
    fn stats(&self) -> Result<Any, CgroupError>;
    /// Calls `on_oom` whenever the kernel has killed for lack of memory. None where the host
    /// cannot tell.
    fn watch_oom(&self, on_oom: Box<dyn Fn() + Send + Sync>) -> Option<OomWatch>;
    /// The same cgroup as the coordinator sees it.
    fn freezable(self: Arc<Self>) -> Arc<dyn Freezable>;
}

impl ControlGroup for Cgroup {
    fn directories(&self) -> Vec<PathBuf> {
        Cgroup::directories(self)
    }

    fn stats(&self) -> Result<Any, CgroupError> {
        Cgroup::stats(self)
    }

    fn watch_oom(&self, on_oom: Box<dyn Fn() + Send + Sync>) -> Option<OomWatch> {
        OomWatch::new(self, on_oom)
            .inspect_err(|e| log::warn!("no OOM events: {e}"))
            .ok()
    }

    fn freezable(self: Arc<Self>) -> Arc<dyn Freezable> {
        self
    }
}

/// The machine.
pub trait Host: Send + Sync {
    /// Who reaps.
    fn reaper(&self) -> &Arc<Reaper>;
    /// Who moves stdio.
    fn pump(&self) -> &Arc<Pump>;
    /// Where the host's configuration is.
    fn config_file(&self) -> &Path;
    /// Where a sandbox's files of this boot are.
    fn run_dir(&self, sandbox: &SandboxId) -> RunDir;
    /// The runtime for one container.
    fn runtime(&self, config: &Config, namespace: &str, log_dir: &Path) -> Arc<dyn OciRuntime>;
    /// A handle on a process.
    fn target(&self, pid: i32) -> io::Result<Box<dyn Target>>;
    /// The cgroup that a process is in.
    fn cgroup(&self, pid: i32) -> Result<Arc<dyn ControlGroup>, CgroupError>;
    /// The directories of the cgroup that a container's specification names, those that are there.
    fn cgroup_named(&self, path: &Path, id: &str) -> Vec<PathBuf>;
    /// Makes a network namespace.
    fn create_netns(&self, path: &Path) -> io::Result<()>;
    /// Mounts a root file system.
    fn mount(&self, mounts: &[MountSpec], target: &Path) -> Result<(), String>;
    /// The overlay that is mounted at a path.
    fn overlay(&self, rootfs: &Path) -> Result<Overlay, String>;
    /// Unmounts it; one that is not mounted is no error.
    fn unmount(&self, target: &Path) -> Result<(), String>;
    /// Kills what is in a cgroup, whatever its freezer says.
    fn kill_cgroup(&self, directories: &[PathBuf]) -> Result<(), String>;
    /// Kills what is left in a cgroup and removes its directories, those that are there.
    fn remove_cgroup(&self, directories: &[PathBuf]) -> Result<(), String>;
    /// The programs that watch what changes in sandboxes, and a place among those who use them.
    fn join_inspector(&self) -> Result<Joined, String>;
}

/// The real machine.
pub struct Linux {
    /// Who reaps.
    pub reaper: Arc<Reaper>,
    /// Who moves stdio.
    pub pump: Arc<Pump>,
    /// Where the host's configuration is.
    pub config_file: PathBuf,
    /// Where the sandbox's files are.
    pub mounted: Mounted,
}

struct PidFd(std::os::fd::OwnedFd);

impl Target for PidFd {
    fn signal(&self, signal: i32) -> io::Result<()> {
        // Real-time signals have no name there, but are as good.
        let signal = Signal::from_named_raw(signal)
            .or_else(|| {
                let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
                // SAFETY: the number is one of the kernel's real-time signals that the C library
                // leaves to programs.
                real_time
                    .contains(&signal)
                    .then(|| unsafe { Signal::from_raw_unchecked(signal) })
            })
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        pidfd_send_signal(&self.0, signal).map_err(Into::into)
    }

    fn wait_end(&self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // Readable from the end of its last thread on.
            let mut ended = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ended, left) {
                Err(Errno::EINTR) => {}
                polled => return Ok(polled? > 0),
            }
        }
    }
}

impl Linux {
    /// Has the inspector's programs loaded by a short-lived child.
    fn load_programs(&self, run: &Path) -> Result<(), String> {
        let failed = |e: io::Error| format!("cannot load the inspector: {e}");
        let said = tempfile::tempfile().map_err(failed)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg(inspector::WORD).arg(run);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(said.try_clone().map_err(failed)?);
        match self.reaper.run(command, LOAD_LIMIT).map_err(failed)? {
            Ended::Exited(0) => Ok(()),
            ended => {
                let mut text = vec![0; 4096];
                let length = said.read_at(&mut text, 0).map_err(failed)?;
                let text = String::from_utf8_lossy(&text[..length]);
                Err(format!(
                    "cannot load the inspector ({ended:?}): {}",
                    text.trim()
                ))
            }
        }
    }
}

/// Whether a sandbox's dumps may build on each other. Those of crun have not been tried.
fn is_incremental(config: &Config) -> bool {
    let is_wanted = config.enabled && config.incremental != Incremental::Never;
    is_wanted && !is_crun(&config.runtime) && memory::is_tracked()
}

impl Host for Linux {
    fn reaper(&self) -> &Arc<Reaper> {
        &self.reaper
    }

    fn pump(&self) -> &Arc<Pump> {
        &self.pump
    }

    fn config_file(&self) -> &Path {
        &self.config_file
    }

    fn run_dir(&self, sandbox: &SandboxId) -> RunDir {
        RunDir::of(sandbox)
    }

    fn runtime(&self, config: &Config, namespace: &str, log_dir: &Path) -> Arc<dyn OciRuntime> {
        Arc::new(Runc {
            binary: config.runtime.to_string_lossy().into_owned(),
            root: config.root.join(namespace),
            systemd_cgroup: config.systemd_cgroup,
            incremental: is_incremental(config),
            log_dir: log_dir.to_owned(),
            spawner: Arc::clone(&self.reaper) as _,
        })
    }

    fn target(&self, pid: i32) -> io::Result<Box<dyn Target>> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(Box::new(PidFd(pidfd_open(pid, PidfdFlags::empty())?)))
    }

    fn cgroup(&self, pid: i32) -> Result<Arc<dyn ControlGroup>, CgroupError> {
        Ok(Arc::new(Cgroup::of_pid(pid)?))
    }

    fn cgroup_named(&self, path: &Path, id: &str) -> Vec<PathBuf> {
        cgroup::named(path, id).unwrap_or_else(|e| {
            log::error!("{id}: where its cgroup may be: {e}");
            Vec::new()
        })
    }

    fn create_netns(&self, path: &Path) -> io::Result<()> {
        netns::create(path)
    }

    fn mount(&self, mounts: &[MountSpec], target: &Path) -> Result<(), String> {
        rootfs::mount_all(mounts, target).map_err(|e| e.to_string())
    }

    fn overlay(&self, rootfs: &Path) -> Result<Overlay, String> {
        self.mounted.overlay(rootfs).map_err(|e| e.to_string())
    }

    fn unmount(&self, target: &Path) -> Result<(), String> {
        rootfs::unmount(target).map_err(|e| e.to_string())
    }

    fn kill_cgroup(&self, directories: &[PathBuf]) -> Result<(), String> {
        cgroup::kill(directories).map_err(|e| e.to_string())
    }

    fn remove_cgroup(&self, directories: &[PathBuf]) -> Result<(), String> {
        cgroup::remove(directories).map_err(|e| e.to_string())
    }

    fn join_inspector(&self) -> Result<Joined, String> {
        let run = Path::new(RUN);
        Joined::new(run, &|| self.load_programs(run))
    }
}
