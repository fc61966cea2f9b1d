//! Points in time.

use std::time::Duration;

/// A point in time: microseconds of CLOCK_BOOTTIME, which never goes back, goes on while the host
/// sleeps, and is the same for all processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Moment(u64);

impl Moment {
    /// How many bits a moment has at most: enough for nine years without a boot.
    pub(super) const BITS: u32 = 48;
    const LAST: u64 = (1 << Self::BITS) - 1;

    /// The moment so many microseconds after the host has booted.
    pub const fn from_micros(micros: u64) -> Self {
        Self(if micros > Self::LAST {
            Self::LAST
        } else {
            micros
        })
    }

    /// Microseconds since the host has booted.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// This moment and a while after it.
    pub fn after(self, while_: Duration) -> Self {
        Self::from_micros(self.0.saturating_add(micros(while_)))
    }

    /// How long after `earlier` this is; nothing if it is before it.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// A duration in whole microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
