//! What the coordinator needs of a sandbox: the shim's side of it.

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use super::{cut, doors::Doors, inspection::Scene, view::View};
use crate::{
    inspector::{self, Watch},
    rootfs::Overlay,
    store::Checkpoint,
};

/// What a turn needs of its sandbox.
pub trait Subject: Send + Sync {
    /// What takes part in a cut.
    fn parts(&self) -> Result<cut::Sandbox<'_>, String>;
    /// Why its processes can never be dumped; none if they can.
    fn never_dumped(&self) -> Option<String>;
    /// Where its root file system is mounted.
    fn root(&self) -> PathBuf;
    /// Its writable layer.
    fn overlay(&self) -> Result<Overlay, String>;
    /// What of its state lies in small files of the host, by the name under which a checkpoint keeps it:
    /// its specification, its limits, `/etc/hosts` and the like.
    fn artefacts(&self) -> Result<BTreeMap<String, Vec<u8>>, String>;
    /// A directory for CRIU's work and options.
    fn scratch(&self) -> PathBuf;
    /// Whether its init has a terminal.
    fn has_terminal(&self) -> bool;
    /// Begins to watch what changes in it.
    fn watch(&self) -> Result<Watch, String>;
    /// What there is to watch.
    fn to_watch(&self) -> Result<inspector::Subject, String>;
    /// When input last came to each of its processes that have some. While two answers are equal,
    /// none has come.
    fn input_marks(&self) -> Vec<Option<Instant>>;
    /// What the host's owner runs in each cut.
    fn frozen_hook(&self) -> Result<(), String>;
    /// Whether there is such a program: it finds the sandbox frozen.
    fn has_frozen_hook(&self) -> bool;
    /// What the host's owner runs when it is what it was at a checkpoint, before anything of it runs.
    fn restored_hook(&self) -> Result<(), String>;
    /// Shows it what there is to know of its turns.
    fn show(&self, view: &View) -> Result<(), String>;
    /// Restores a checkpoint of it beside it, and throws that away (D9b).
    fn prove(&self, checkpoint: &Checkpoint) -> Result<(), String>;
}

/// Calls `then` with the sandbox as it is to be looked at.
pub(super) fn scene<T>(
    (subject, overlay, doors): (&dyn Subject, &Overlay, &Doors),
    then: impl FnOnce(&Scene<'_>) -> T,
) -> Result<T, String> {
    let parts = subject.parts()?;
    Ok(then(&Scene {
        init: parts.scene.init_pid(),
        upper: &overlay.upperdir,
        cgroup: parts.freeze.cgroup(),
        marks: subject.input_marks(),
        is_marked: &|| doors.is_marked(),
        stop: &|| doors.is_dying(),
    }))
}
