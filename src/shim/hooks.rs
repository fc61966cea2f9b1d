//! Programs of the host's owner that run while a sandbox stands still.
//!
//! `/etc/crab/hooks/frozen` runs inside every cut, after the dump and before the thaw, for
//! example to take a snapshot of a volume that belongs to the same moment. `restored` runs after
//! a restore, before the first instruction of any process. Arguments: namespace, container id,
//! host pid of init. A hook that fails, or takes longer than a dump may (`dump_timeout`), fails its cut
//! or restore.

use std::{path::Path, process::Command};

use super::container::Container;
use crate::runtime::{Ended, Spawner};

const FROZEN: &str = "/etc/crab/hooks/frozen";
const RESTORED: &str = "/etc/crab/hooks/restored";

/// Whether a restore must stop before the first instruction.
pub fn restored_exists() -> bool {
    Path::new(RESTORED).exists()
}

/// Whether a cut must freeze, even where nothing runs.
pub fn frozen_exists() -> bool {
    Path::new(FROZEN).exists()
}

/// Runs the hook of a cut, if there is one.
pub fn run_frozen(container: &Container) -> Result<(), String> {
    if !frozen_exists() {
        return Ok(());
    }
    run(container, FROZEN)
}

/// Runs the hook of a restore and lets the processes go, which [`super::hold`] has frozen.
pub fn run_restored(container: &Container) -> Result<(), String> {
    let place = container.place().map_err(|e| e.to_string())?;
    let held = place.freeze.hold().map_err(|e| e.to_string())?;
    let done = run(container, RESTORED);
    drop(held);
    done
}

/// Runs the hook of a restore, if there is one, of a sandbox that crab holds frozen.
pub fn run_restored_while_held(container: &Container) -> Result<(), String> {
    match restored_exists() {
        true => run(container, RESTORED),
        false => Ok(()),
    }
}

fn run(container: &Container, hook: &str) -> Result<(), String> {
    let mut command = Command::new(hook);
    command.args([container.sandbox.namespace(), container.sandbox.id()]);
    command.arg(container.init.live_pid().to_string());
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::null());
    command.stderr(std::process::Stdio::null());
    match container
        .host
        .reaper()
        .run(command, container.config.dump_timeout)
    {
        Ok(Ended::Exited(0)) => Ok(()),
        Ok(ended) => Err(format!("hook {hook}: {ended:?}")),
        Err(e) => Err(format!("hook {hook}: {e}")),
    }
}
