//! What things cost on this host, learnt from what they have cost.

use std::time::Duration;

use super::planner::Dump;

/// What a plan reckons with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// A dump of nothing.
    pub dump_start: Duration,
    /// Bytes that a dump takes in a second.
    pub dump_rate: f64,
    /// How long a pre-dump freezes the sandbox.
    pub pre_dump_freeze: Duration,
    /// Bytes of files that are captured in a second.
    pub files_rate: f64,
    /// A capture of no files.
    pub files_start: Duration,
    /// Bytes that reach the disk in a second.
    pub drain_rate: f64,
    /// A commit of nothing.
    pub drain_start: Duration,
    /// The share of what is captured that is written in the end.
    pub written_share: f64,
    /// Bytes of memory that change in a second while a sandbox waits.
    pub change_rate: f64,
}

impl Default for Costs {
    /// What they are on the machine where crab was made; the first few checkpoints put them right.
    fn default() -> Self {
        Self {
            dump_start: Duration::from_millis(70),
            dump_rate: 2e9,
            pre_dump_freeze: Duration::from_millis(60),
            files_rate: 200e6,
            files_start: Duration::from_millis(5),
            drain_rate: 100e6,
            drain_start: Duration::from_millis(5),
            written_share: 1.0,
            // It waits: what it writes there is little, and the first dump after a pre-dump tells. Of what was
            // looked at redis writes most, 40 pages a second.
            change_rate: 200e3,
        }
    }
}

impl Costs {
    /// How long a dump of so many bytes takes.
    pub(super) fn dump(&self, bytes: u64) -> Duration {
        self.dump_start + over(bytes, self.dump_rate)
    }

    /// How long a pre-dump of so many bytes takes, most of it without a freeze.
    pub(super) fn pre_dump(&self, bytes: u64) -> Duration {
        self.dump(bytes) + self.pre_dump_freeze
    }

    pub(super) fn files(&self, bytes: u64) -> Duration {
        self.files_start + over(bytes, self.files_rate)
    }

    /// Bytes that are written of so many captured ones, and the time for both.
    pub fn drain(&self, staged: u64) -> (u64, Duration) {
        let written = (staged as f64 * self.written_share) as u64;
        (written, self.drain_start + over(staged, self.drain_rate))
    }

    pub(super) fn changed_in(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * self.change_rate) as u64
    }
}

/// The time for so many bytes at a rate, at most an hour.
fn over(bytes: u64, rate: f64) -> Duration {
    const HOUR: Duration = Duration::from_secs(3600);
    Duration::try_from_secs_f64(bytes as f64 / rate).map_or(HOUR, |time| time.min(HOUR))
}

/// Learns [`Costs`] by exponentially weighted means: what a host does changes with its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Estimator {
    costs: Costs,
    dump: Seen,
    pre_dump: Times,
    change: Times,
    files: Seen,
    drain: Seen,
    share: Times,
}

/// How often a start and a rate have been measured.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Seen {
    start: Times,
    rate: Times,
}

/// How often something has been measured, as far as that matters.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Times(u8);

/// How much the newest measurement counts: the last ten make nine tenths.
const WEIGHT: f64 = 0.2;
/// Less than this is all start, and says nothing of a rate.
const TELLING: u64 = 4 << 20;
/// More than this is mostly bytes, and says little of the start.
const SMALL: u64 = 1 << 20;
/// Nobody dumps, or writes, slower or faster: what is beyond was not measured rightly.
const RATES: std::ops::RangeInclusive<f64> = 1e6..=1e11;

impl Estimator {
    /// What is known by now.
    pub fn costs(&self) -> &Costs {
        &self.costs
    }

    /// A dump has been taken, with the files beside it or without.
    pub fn dumped(&mut self, dump: Dump) {
        let costs = &mut self.costs;
        learn(
            dump.bytes,
            dump.took,
            (&mut costs.dump_start, &mut costs.dump_rate),
            &mut self.dump,
        );
    }

    /// A pre-dump has frozen the sandbox for so long.
    pub fn pre_dumped(&mut self, frozen: Duration) {
        let mut seconds = self.costs.pre_dump_freeze.as_secs_f64();
        self.pre_dump.mix(&mut seconds, frozen.as_secs_f64());
        self.costs.pre_dump_freeze = Duration::from_secs_f64(seconds);
    }

    /// Files have been captured, without a dump.
    pub fn files_captured(&mut self, bytes: u64, took: Duration) {
        let costs = &mut self.costs;
        let known = (&mut costs.files_start, &mut costs.files_rate);
        learn(bytes, took, known, &mut self.files);
    }

    /// What was captured is on disk.
    pub fn drained(&mut self, staged: u64, written: u64, took: Duration) {
        let costs = &mut self.costs;
        let known = (&mut costs.drain_start, &mut costs.drain_rate);
        learn(staged, took, known, &mut self.drain);
        if staged > SMALL {
            let share = (written as f64 / staged as f64).clamp(0.001, 1.5);
            self.share.mix(&mut costs.written_share, share);
        }
    }

    /// A dump after a pre-dump has found so many bytes changed in that time.
    pub fn changed(&mut self, bytes: u64, within: Duration) {
        if !within.is_zero() {
            let rate = bytes as f64 / within.as_secs_f64();
            let rate = rate.min(*RATES.end());
            self.change.mix(&mut self.costs.change_rate, rate);
        }
    }
}

fn learn(bytes: u64, took: Duration, known: (&mut Duration, &mut f64), seen: &mut Seen) {
    let (start, rate) = known;
    if bytes <= SMALL {
        let mut seconds = start.as_secs_f64();
        let by_bytes = over(bytes, *rate);
        seen.start
            .mix(&mut seconds, took.saturating_sub(by_bytes).as_secs_f64());
        *start = Duration::from_secs_f64(seconds);
    } else if bytes >= TELLING {
        // It cannot have been all start.
        let moving = took.saturating_sub(*start).max(took / 10);
        let measured = bytes as f64 / moving.as_secs_f64().max(1e-6);
        let measured = measured.clamp(*RATES.start(), *RATES.end());
        match seen.start {
            // What a start takes was never measured: this may have been one.
            Times(0) => *rate += WEIGHT * (measured - *rate),
            _ => seen.rate.mix(rate, measured),
        }
    }
}

impl Times {
    /// The first measurement takes the place of what was believed, and the next ones count as much as each
    /// other: another machine's values are worth little.
    fn mix(&mut self, mean: &mut f64, measured: f64) {
        self.0 = self.0.saturating_add(1);
        let weight = (1.0 / f64::from(self.0)).max(WEIGHT);
        *mean += weight * (measured - *mean);
    }
}
