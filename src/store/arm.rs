//! Arming: which turn the next start of a container restores.

use std::path::Path;

use serde::Deserialize;

use super::{FORMAT, StoreError, files};
use crate::sandbox::TurnNo;

const MAX_SIZE: u64 = 4096;

#[derive(Deserialize)]
struct Armed {
    format: u32,
    turn: TurnNo,
}

pub(super) fn arm(path: &Path, turn: TurnNo) -> Result<(), StoreError> {
    files::replace(
        path,
        format!("{{\"format\":{FORMAT},\"turn\":{turn}}}\n").as_bytes(),
    )
}

/// None if it isn't armed.
pub(super) fn armed(path: &Path) -> Result<Option<TurnNo>, StoreError> {
    let Some(text) = files::read(path, MAX_SIZE)? else {
        return Ok(None);
    };
    let armed: Armed = serde_json::from_slice(&text).map_err(|e| StoreError::Damaged {
        path: path.to_owned(),
        reason: e.to_string(),
    })?;
    if armed.format > FORMAT {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found: armed.format.into(),
            known: FORMAT,
        });
    }
    Ok(Some(armed.turn))
}

/// That it isn't armed is fine.
pub(super) fn disarm(path: &Path) -> Result<(), StoreError> {
    match files::remove(path)? {
        true => path.parent().map_or(Ok(()), files::sync_dir),
        false => Ok(()),
    }
}
