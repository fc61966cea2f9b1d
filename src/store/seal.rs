//! Whether a pack was ever complete.
//!
//! A pack gets its name before it is on the disk: then name and contents become durable together, in one
//! commit of the file system's journal; a second one costs more at the device than most turns change. So a
//! power loss may leave a pack of which nobody was told, and which isn't whole. It must be told apart from
//! one that was complete, and is damaged: that is an error, and never removed.
//!
//! So a pack is *sealed* once it is durable: it becomes read-only, which itself need not be durable. If the
//! newest one isn't sealed, and the journal says nothing of it either, it counts if every byte is as it was
//! written, and is not there otherwise. All before it were complete when it was begun.

use std::{
    fs::{File, OpenOptions, Permissions},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::{
    StoreError,
    failpoint::failpoint,
    files, journal,
    pack::{Pack, PackName, Written},
};
use crate::sandbox::TurnNo;

const SEALED: u32 = 0o400;

/// Makes a pack durable that has its name by now, `path`, and seals it. If that fails its name is gone.
pub(super) fn commit(pack: &Written, path: &Path) -> Result<(), StoreError> {
    let durable = pack.sync(path).and_then(|()| {
        failpoint("sync packs");
        files::sync_parent(path)
    });
    if let Err(e) = durable {
        // What could not be written must not look as if it had been.
        if let Err(stays) = files::remove(path) {
            log::warn!("{stays}");
        }
        return Err(e);
    }
    failpoint("seal a pack");
    // The checkpoint is there, and its turn's line in the journal will say so, too.
    seal(&pack.file, path).unwrap_or_else(|e| log::warn!("{e}"));
    Ok(())
}

fn seal(file: &File, path: &Path) -> Result<(), StoreError> {
    let sealed = file.set_permissions(Permissions::from_mode(SEALED));
    sealed.map_err(files::io("seal", path))
}

/// Whether the newest pack in `packs`, that of `turn`, was never completed.
pub(super) fn is_unfinished(packs: &Path, turn: TurnNo) -> bool {
    // Of one that cannot be read nobody knows: whoever needs it is told why.
    look(packs, turn).unwrap_or(false)
}

fn look(packs: &Path, turn: TurnNo) -> Result<bool, StoreError> {
    let path = path_of(packs, turn);
    let meta = std::fs::symlink_metadata(&path).map_err(files::io("stat", &path))?;
    let is_open = meta.is_file() && meta.mode() & 0o7777 != SEALED;
    Ok(is_open && !was_reported(packs, turn)? && !Pack::is_whole(&path)?)
}

/// For the next writer: seals the newest pack in `packs`, or removes it if it was never completed.
pub(super) fn settle(packs: &Path) -> Result<(), StoreError> {
    let Some(PackName::Checkpoint(turn)) = PackName::all(packs)?.pop() else {
        return Ok(());
    };
    let path = path_of(packs, turn);
    match look(packs, turn) {
        Ok(true) => {
            log::warn!("{path:?} is removed: the machine went down before it was complete");
            files::remove(&path)?;
            return files::sync_dir(packs);
        }
        Ok(false) => {}
        Err(e) => {
            log::warn!("nobody can tell whether the newest checkpoint is complete: {e}");
            return Ok(());
        }
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(&path)
        .map_err(files::io("open", &path))?;
    let meta = file.metadata().map_err(files::io("stat", &path))?;
    if !meta.is_file() || meta.mode() & 0o7777 == SEALED {
        return Ok(());
    }
    // Who wrote it may have been killed before it was durable.
    file.sync_data().map_err(files::io("fdatasync", &path))?;
    files::sync_dir(packs)?;
    seal(&file, &path)
}

fn path_of(packs: &Path, turn: TurnNo) -> PathBuf {
    packs.join(PackName::Checkpoint(turn).file())
}

/// Whether the journal says that the turn has a checkpoint, which it does once that is durable.
fn was_reported(packs: &Path, turn: TurnNo) -> Result<bool, StoreError> {
    let journal = journal::read(&journal::path(packs.parent().unwrap_or(packs)))?;
    let line = journal.lines.iter().rev().find(|line| line.turn == turn);
    Ok(line.is_some_and(|line| line.durable_us.is_some()))
}
