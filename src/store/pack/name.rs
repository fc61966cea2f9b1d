//! What the packs of a sandbox are called.

use std::path::Path;

use super::super::{StoreError, files};
use crate::sandbox::TurnNo;

/// How the names of checkpoints' packs end.
const PACK: &str = ".pack";
/// How those end whose checkpoint is gone, and which hold objects for others.
const KEPT: &str = ".kept";

/// What a pack's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PackName {
    /// Objects alone.
    Kept(TurnNo),
    /// A checkpoint.
    Checkpoint(TurnNo),
}

impl PackName {
    pub fn parse(name: &str) -> Option<Self> {
        let numbered = |suffix: &str| {
            let number = name.strip_suffix(suffix)?;
            let turn: TurnNo = number.parse().ok()?;
            (turn.to_string() == number).then_some(turn)
        };
        numbered(PACK)
            .map(Self::Checkpoint)
            .or_else(|| numbered(KEPT).map(Self::Kept))
    }

    pub fn turn(self) -> TurnNo {
        match self {
            Self::Kept(turn) | Self::Checkpoint(turn) => turn,
        }
    }

    pub fn file(self) -> String {
        match self {
            Self::Kept(turn) => format!("{turn}{KEPT}"),
            Self::Checkpoint(turn) => format!("{turn}{PACK}"),
        }
    }

    /// All in a directory, the newest last; also one that was never completed.
    pub fn all(dir: &Path) -> Result<Vec<Self>, StoreError> {
        let names = files::names(dir)?;
        let mut packs: Vec<_> = names.iter().filter_map(|name| Self::parse(name)).collect();
        packs.sort_unstable_by_key(|name| (name.turn(), *name));
        Ok(packs)
    }
}
