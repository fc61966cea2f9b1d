//! Where CRIU writes a dump before it is in the store.

use std::path::{Path, PathBuf};

use super::{subject::Subject, worker::Worker};
use crate::{
    memory,
    sandbox::TurnNo,
    store::{Pending, StoreError},
};

/// So many bytes of processes' memory may lie in the host's, beside the processes themselves, until they are in
/// a pack.
const MOST: u64 = 64 << 20;
/// The file system in memory must have room for so many times that: processes grow until they are frozen.
const SPARE: u64 = 8;

impl Worker {
    /// Starts a turn's checkpoint with a dump. Small ones are made in memory: some fifty files that are
    /// removed a moment later cost the disk ten times their compressed contents, and time in the freeze.
    pub(super) fn begin_dump(
        &self,
        subject: &dyn Subject,
        turn: TurnNo,
    ) -> Result<Pending, StoreError> {
        let builds_up = self.obstacle().is_none();
        match in_memory(subject, builds_up) {
            Some(place) => self.store.begin_in(turn, &place),
            None => self.store.begin(turn),
        }
    }
}

/// The directory in memory in which a dump has room for sure; None if there is none, or if dumps build upon each
/// other where the runtime can do that (`builds_up`).
fn in_memory(subject: &dyn Subject, builds_up: bool) -> Option<PathBuf> {
    let parts = subject.parts().ok()?;
    if builds_up && parts.runtime.is_incremental() {
        return None;
    }
    let procs = parts.freeze.cgroup().procs().ok()?;
    let mut bytes = 0u64;
    for pid in procs {
        bytes = bytes.saturating_add(memory::own_bytes(pid).ok()?);
    }
    let place = subject.scratch();
    let has_room = bytes <= MOST && room_in_memory(&place)? / SPARE >= bytes;
    has_room.then_some(place)
}

/// Bytes that are free where a directory is, if that is a file system in memory.
fn room_in_memory(place: &Path) -> Option<u64> {
    let its = rustix::fs::statfs(place).ok()?;
    let is_in_memory = u64::try_from(its.f_type).ok()? == u64::try_from(libc::TMPFS_MAGIC).ok()?;
    let room = its
        .f_bavail
        .saturating_mul(u64::try_from(its.f_bsize).ok()?);
    is_in_memory.then_some(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_a_disk_is_not_in_memory() {
        assert!(room_in_memory(Path::new("/dev/shm")).is_some_and(|room| room > 0));
        assert_eq!(room_in_memory(Path::new("/proc")), None);
        assert_eq!(room_in_memory(Path::new("/nowhere")), None);
    }
}
