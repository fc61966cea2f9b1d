//! What a host may spend, and how long anybody may stand in another's way.

use std::{num::NonZeroU64, time::Duration};

/// No charge counts for more time than this, and no debt for more than twice as much: what is beyond
/// it in the shared file can only be damage.
pub(super) const HORIZON: Duration = Duration::from_secs(3600);

/// What the host may spend on checkpoints. Each member goes by its own; they are meant to be equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes per second that are written to disk in the long run; None: any.
    pub rate: Option<NonZeroU64>,
    /// Bytes that may be written at once after a pause.
    pub burst: u64,
    /// How many dumps run at once before one that nobody waits for has to wait.
    pub dumps: u32,
    /// Bytes that are captured and not yet written to disk, of all sandboxes. A single one may take
    /// more, alone.
    pub undrained: u64,
}

impl Limits {
    /// How many dumps run at once before one has to wait that somebody waits for, or that has waited for
    /// long.
    pub fn pressing_dumps(&self) -> u32 {
        self.dumps.saturating_mul(2)
    }

    /// How long the host takes to earn so many bytes, in microseconds, rounded up.
    pub(super) fn price(&self, bytes: u64) -> u64 {
        self.time_of(bytes, u128::div_ceil)
    }

    /// How long it takes to earn the burst, in microseconds, rounded down.
    pub(super) fn depth(&self) -> u64 {
        self.time_of(self.burst, |bytes, rate| bytes / rate)
    }

    fn time_of(&self, bytes: u64, divide: impl Fn(u128, u128) -> u128) -> u64 {
        let Some(rate) = self.rate else { return 0 };
        let time = divide(u128::from(bytes) * 1_000_000, u128::from(rate.get()));
        u64::try_from(time).map_or(u64::MAX, |time| time.min(HORIZON.as_micros() as u64))
    }
}

/// How long anybody may stand in another's way. Production has [`Terms::default`]; tests are shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Who waits at no gate ranks as if it had come so much later: what comes urgently within this
    /// time goes first, what comes after it does not. So none starves.
    pub handicap: Duration,
    /// A member that does not take what it could have is passed by the next one after this.
    pub patience: Duration,
    /// How often it is looked whether somebody who is waited for has died.
    pub recheck: Duration,
    /// No wait goes on for longer than this without another look, be it that a wake-up was lost.
    pub longest_sleep: Duration,
    /// A dump or a drain that takes longer than it was expected to, or than this, does not count any
    /// more: its process may be stopped.
    pub longest_lease: Duration,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            handicap: Duration::from_secs(10),
            patience: Duration::from_millis(100),
            recheck: Duration::from_millis(250),
            longest_sleep: Duration::from_secs(5),
            longest_lease: Duration::from_secs(30),
        }
    }
}
