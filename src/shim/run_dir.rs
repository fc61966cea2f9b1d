//! A running sandbox's own directory below `/run/crab`, for root alone.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use crate::sandbox::SandboxId;

/// Everything of crab that does not outlive a boot.
pub const RUN: &str = "/run/crab";

/// The directory of one sandbox.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Where it is; it need not exist.
    pub fn of(sandbox: &SandboxId) -> Self {
        Self::below(Path::new(RUN), sandbox)
    }

    /// The same below another directory than [`RUN`].
    pub fn below(run: &Path, sandbox: &SandboxId) -> Self {
        Self(Self::all(run).join(sandbox.namespace()).join(sandbox.id()))
    }

    /// The directory of all of them: a directory for each namespace, with one for each sandbox.
    pub fn all(run: &Path) -> PathBuf {
        run.join("s")
    }

    /// Makes it, with its parents, mode 0700.
    pub fn create(&self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The directory of all of crab below which it is.
    pub fn run(&self) -> &Path {
        // run/s/NAMESPACE/ID
        self.0.ancestors().nth(3).unwrap_or(&self.0)
    }

    /// Where the network namespace is bound.
    pub fn netns(&self) -> PathBuf {
        self.0.join("netns")
    }

    /// HOME of CRIU for dumps.
    pub fn criu_home(&self, verb: &str) -> PathBuf {
        self.0.join(format!("criu-{verb}"))
    }

    /// CRIU's working directory.
    pub fn criu_work(&self) -> PathBuf {
        self.0.join("criu-work")
    }

    /// Removes it and the network namespace in it, and what a killed CRIU has mounted there. What is
    /// gone already is no error.
    pub fn remove(&self) -> io::Result<()> {
        super::netns::remove(&self.netns())?;
        crate::rootfs::unmount_below(&self.0).map_err(io::Error::other)?;
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}
