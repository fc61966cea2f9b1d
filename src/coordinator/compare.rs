//! Holding a sandbox against its newest checkpoint: its files, and the processes of the dump.

use std::path::Path;

use super::{
    changed,
    inspection::Scene,
    known::{Dump, Known, Outline, ToRead},
    look::Look,
    memory_files::Mounts,
    processes::{Glimpse, Processes, Since},
};
use crate::{
    inspector::{Dirty, Watch},
    rootfs::layer::{Comparison, Layer},
    sandbox::TurnNo,
    store::{Ahead, Effect},
};

/// The index of the writable layer, or what to add to the one that there is.
pub(super) fn outline(
    known: Option<&Known>,
    dirty: &Dirty,
    scene: &Scene<'_>,
) -> Result<Outline, String> {
    if let Some(known) = known
        && dirty.doubts.is_empty()
    {
        let (candidates, scope) = changed::candidates(dirty);
        // An index that does not fit any more is made anew.
        if let Ok(delta) = known
            .layer
            .compare(scene.upper, &candidates, scope, scene.stop)
        {
            return Ok(Outline::Delta(delta));
        }
    }
    let new = Layer::outline(scene.upper, scene.stop);
    new.map(Outline::New).map_err(|e| e.to_string())
}

/// What is better read before the freeze: the large files that differ, or all if it is not known which
/// do.
pub(super) fn ahead(
    watch: &Watch,
    known: Option<&Known>,
    scene: &Scene<'_>,
) -> Result<ToRead, String> {
    let pids = scene.cgroup.procs().map_err(|e| e.to_string())?;
    let unseen = watch.can_change_unseen(&pids).map_err(|e| e.to_string())?;
    let dirty = watch.look().map_err(|e| e.to_string())?;
    let which = match known.filter(|_| dirty.doubts.is_empty()) {
        None => Ahead::All,
        Some(known) => {
            let (candidates, scope) = changed::candidates(&dirty);
            let comparison = known
                .layer
                .compare(scene.upper, &candidates, scope, scene.stop)
                .map_err(|e| e.to_string())?;
            Ahead::Files(comparison.large().map(Path::to_owned).collect())
        }
    };
    Ok(ToRead { which, unseen })
}

/// What there is to compare with, and what has been seen of the processes.
pub(super) struct Basis<'k> {
    layer: &'k Layer,
    dump: &'k Dump,
    processes: &'k Processes,
    glimpse: Glimpse<'k>,
    /// The sandbox goes on from another checkpoint than the one that the layer is held against.
    elsewhere: bool,
}

/// Before the kernel side is asked; None if there are no processes to compare with. `since`: an earlier look
/// at them.
pub(super) fn glimpse<'k>(
    known: Option<&Known>,
    scene: &Scene<'_>,
    since: Since<'k>,
) -> Option<Glimpse<'k>> {
    let processes = known?.dump.as_ref()?.processes.as_ref()?;
    Some(processes.glimpse(scene, since))
}

/// What there is to compare with, or why everything counts as changed. `dirty` was read after the glimpse.
pub(super) fn basis<'k>(
    known: Option<&'k Known>,
    glimpse: Option<Glimpse<'k>>,
    dirty: &Dirty,
    latest: Option<TurnNo>,
) -> Result<Basis<'k>, String> {
    if !dirty.doubts.is_empty() {
        return Err(dirty.doubts.join("; "));
    }
    let known = known.ok_or("no checkpoint to compare with")?;
    if latest != Some(known.head()) {
        return Err("the last checkpoint is not in the store".into());
    }
    let dump = known.dump.as_ref();
    let dump = dump.ok_or("the last checkpoint has no processes")?;
    let processes = dump.processes.as_ref().zip(glimpse);
    let (processes, glimpse) =
        processes.ok_or("the processes of the last checkpoint are not known")?;
    Ok(Basis {
        layer: &known.layer,
        dump,
        processes,
        glimpse,
        elsewhere: known.is_elsewhere(),
    })
}

/// What differs from the newest checkpoint; with the comparison of the writable layer, if nothing writes
/// to it.
pub(super) fn compare(
    basis: Basis<'_>,
    watch: &Watch,
    dirty: &Dirty,
    scene: &Scene<'_>,
) -> (Look, Option<Comparison>) {
    let Basis {
        layer,
        dump,
        processes,
        glimpse,
        elsewhere,
    } = basis;
    let mut look = Look::default();
    if elsewhere {
        look.add(Effect::Files);
        look.tell("its files were rolled back");
    }
    let files = changed::files(
        layer,
        &dump.memory_files,
        &dump.mounts,
        dirty,
        scene,
        &mut look,
    );
    let same_mounts = processes.look((watch, dirty), scene, glimpse, files.orphans, &mut look);
    let differ = || !Mounts::of(scene.init).is_ok_and(|now| now == dump.mounts);
    if !same_mounts && differ() {
        look.add(Effect::Mounts);
    }
    let has_large = |comparison: &Comparison| comparison.large().next().is_some();
    look.large = files.comparison.as_ref().is_none_or(has_large);
    if look.effects == [Effect::Files] && !files.elsewhere {
        look.only_files = match (&files.comparison, &dump.references) {
            (Some(comparison), Ok(references)) => {
                let touched = references.touched(&comparison.changes, comparison.linked());
                if let Some((changed, used)) = touched {
                    look.tell(format!("{changed:?} changed, and a process uses {used:?}"));
                }
                touched.is_none()
            }
            (Some(_), Err(e)) => {
                look.tell(format!(
                    "it is not known which files the processes use: {e}"
                ));
                false
            }
            (None, _) => false,
        };
    }
    (look, files.comparison)
}
