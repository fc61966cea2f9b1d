//! A place among those who use the programs of this host.

use std::path::Path;

use super::{abi::SLOTS, host::Host};
use crate::slot_lock::SlotLock;

/// The programs, loaded if nobody had done that yet, and a slot for one sandbox. Until this is dropped the
/// programs stay: whoever joins early has them in time.
pub struct Joined {
    pub(super) host: Host,
    slot: Option<SlotLock>,
}

impl Joined {
    /// Joins those who use them.
    ///
    /// `run`: crab's directory below /run. `load` has [`super::load`] run in another process.
    pub fn new(run: &Path, load: &dyn Fn() -> Result<(), String>) -> Result<Self, String> {
        let (host, slot) = Host::join(run, load)?;
        Ok(Self {
            host,
            slot: Some(slot),
        })
    }

    /// Its slot; that of nobody once it has been left.
    pub(super) fn slot(&self) -> u32 {
        self.slot.as_ref().map_or(SLOTS, SlotLock::number)
    }

    /// The last one on this host removes the programs.
    pub(super) fn leave(&mut self) -> Result<(), String> {
        match self.slot.take() {
            Some(slot) => self.host.leave(slot),
            None => Ok(()),
        }
    }

    pub(super) fn is_left(&self) -> bool {
        self.slot.is_none()
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Err(e) = self.leave() {
            log::warn!("the inspector: {e}");
        }
    }
}
