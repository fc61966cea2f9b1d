//! The files of a cut: read ahead, read again if they were written since, captured; and the host's own files
//! that are kept with them.

use std::{collections::BTreeMap, path::Path};

use super::{
    doors::Doors,
    inspection::Inspection,
    known::ToRead,
    subject::{Subject, scene},
    worker::text,
};
use crate::{
    inspector::Inode,
    rootfs::{Overlay, layer::Comparison},
    store::{Captured, Checkpoint, LayerChanges, Part, Pending},
};

/// Reads what is large, or everything if it is not known what has changed, before anything stands still.
pub(super) fn read_ahead(
    of: (&dyn Subject, &Overlay, &Doors),
    inspection: &Inspection,
    pending: &mut Pending,
    before: Option<&Checkpoint>,
) -> Result<(), String> {
    let read = scene(of, |scene| {
        let Some(ToRead { which, unseen }) = inspection.ahead(scene) else {
            return Ok(());
        };
        let is_written = |dev, ino| unseen.contains(&Inode { dev, ino });
        pending.read_ahead(scene.upper, &which, before, &is_written, scene.stop)
    })?;
    read.map_err(text)
}

/// In the freeze: what was read ahead and may have been written since is read again.
pub(super) fn distrust(inspection: &Inspection, pending: &mut Pending) {
    if pending.ahead() > 0 {
        let written = inspection.written();
        pending.distrust(|dev, ino| written.has(dev, ino));
    }
}

/// Captures a writable layer: what differs from a checkpoint, if that is known, or all of it.
pub(super) fn capture(
    pending: &mut Pending,
    upper: &Path,
    known: Option<(&Checkpoint, &Comparison)>,
    doors: &Doors,
) -> Result<Captured, String> {
    let changes = known.map(|(_, comparison)| LayerChanges {
        removed: comparison.removed(),
        changed: comparison.changed(),
    });
    let part = match (known, &changes) {
        (Some((base, _)), Some(changes)) => Part::Changes { base, changes },
        _ => Part::Whole,
    };
    let captured = pending.capture(upper, part, &|| doors.is_dying());
    captured.map_err(text)
}

/// Adds what is kept of the host's files.
pub(super) fn add_artefacts(pending: &mut Pending, artefacts: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in artefacts {
        pending.add_to_bundle(name, bytes.clone());
    }
}
