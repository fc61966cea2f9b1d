//! A pre-dump: memory is dumped while the processes run on, so that less is left for the freeze.
//!
//! CRIU freezes the sandbox by itself for it, for as long as it takes to take hold of the pages. The door is
//! latched throughout: an exec that came half-way into it would be taken hold of as well. It is a moment;
//! whoever waits at the door meanwhile is a reason not to begin another one.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use super::{
    cut::{CutError, LATCH_LIMIT, Sandbox, strangers},
    poison::{self, Snapshot, Verdict},
};
use crate::runtime::{self, criu_stats};

/// What a pre-dump has come to.
pub(super) struct PreDumped {
    /// Which of the sandbox's dumps it is.
    pub(super) number: u64,
    /// For how long CRIU has frozen the sandbox.
    pub(super) frozen: Duration,
    /// When it began.
    pub(super) began: Instant,
}

impl Sandbox<'_> {
    /// Dumps memory into where `args` says, upon the sandbox's dump of this number. None if this is no
    /// moment for it: the client has paused the sandbox, or the dump to come would fail.
    pub(super) fn pre_dump(
        &self,
        upon: Option<u64>,
        args: impl FnOnce() -> Result<runtime::Checkpoint, CutError>,
    ) -> Result<Option<PreDumped>, CutError> {
        let alone = self.doors.cut_alone(LATCH_LIMIT).ok_or(CutError::Busy)?;
        let _latched = self.doors.latch(LATCH_LIMIT).ok_or(CutError::Latch)?;
        // A Pause waits until CRIU, which thaws what it has frozen, is done.
        let Some(_awake) = self.freeze.awake() else {
            return Ok(None);
        };
        let procs: BTreeSet<i32> = self.freeze.cgroup().procs()?.into_iter().collect();
        let init = self.scene.init_pid();
        let fits = strangers(&procs, init).is_empty()
            && self.stopped()?.is_empty()
            && Snapshot::read(&procs, init)
                .is_ok_and(|found| matches!(poison::judge(&found), Verdict::Fine));
        if !fits {
            return Ok(None);
        }
        let number = alone.begin_dump(upon)?;
        let args = args()?;
        let began = Instant::now();
        self.run_criu(&args)
            .map_err(|source| CutError::dump(&args, None, source))?;
        let frozen = criu_stats::frozen_in(&args.work_path).unwrap_or_else(|e| {
            log::warn!("how long a pre-dump has frozen the sandbox: {e}");
            began.elapsed()
        });
        Ok(Some(PreDumped {
            number,
            frozen,
            began,
        }))
    }
}
