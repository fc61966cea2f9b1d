//! Holding a restored sandbox before its first instruction.
//!
//! CRIU runs an action script when every task is restored and none has been let go yet
//! (`pre-resume`). Ours is this very program: it freezes the sandbox's cgroup, so that the tasks
//! go from CRIU's hands into the freezer. Sending no signal, it leaves none pending, as stopping
//! the tasks would (`leave-stopped`).

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{cgroup::Cgroup, runtime::own_program};

/// The word on the command line that means [`main`].
pub const WORD: &str = "hold-restored";
const LIMIT: Duration = Duration::from_secs(10);

/// Writes the script that CRIU is to run, and returns where it is.
pub fn write_script(dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join("hold");
    let exe = own_program();
    let text = format!("#!/bin/sh\nexec '{}' {WORD}\n", exe.display());
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
    Ok(path)
}

/// CRIU's call: freezes at `pre-resume`, does nothing at any other action.
pub fn main() -> anyhow::Result<()> {
    if env::var("CRTOOLS_SCRIPT_ACTION").is_ok_and(|action| action != "pre-resume") {
        return Ok(());
    }
    let init = env::var("CRTOOLS_INIT_PID").context("CRTOOLS_INIT_PID")?;
    let init: i32 = init.parse().context("CRTOOLS_INIT_PID")?;
    let cgroup = Cgroup::of_pid(init)?;
    let Some(dir) = cgroup.freezer_dir().or(cgroup.unified_dir()) else {
        bail!("process {init} has no cgroup that can be frozen");
    };
    // CRIU has moved into the sandbox's cgroup to fork the tasks there, and must not freeze
    // itself; nor must this process, which is its child.
    let root = hierarchy(dir).join("cgroup.procs");
    let mut out = vec![process::id()];
    out.push(std::os::unix::process::parent_id());
    for pid in out {
        fs::write(&root, pid.to_string()).with_context(|| format!("move {pid} to {root:?}"))?;
    }
    cgroup.freeze(LIMIT)?;
    Ok(())
}

/// The topmost directory of the hierarchy that a cgroup belongs to.
fn hierarchy(cgroup: &Path) -> &Path {
    cgroup
        .ancestors()
        .take_while(|dir| dir.join("cgroup.procs").exists())
        .last()
        .unwrap_or(cgroup)
}
