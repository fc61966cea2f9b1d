//! Whether what the engine grants keeps its promises, by reckoning of its own.

use crab::engine::Moment;

/// Finds the window in which most was taken beyond what the rate earns in it: of all windows, by
/// Kadane's algorithm.
pub struct Windows {
    /// Bytes per second.
    rate: u64,
    last: Moment,
    /// Bytes × 1,000,000 of the worst window that ends now.
    ending: i128,
    worst: i128,
}

impl Windows {
    pub fn new(rate: u64) -> Self {
        Self {
            rate,
            last: Moment::from_micros(0),
            ending: 0,
            worst: 0,
        }
    }

    /// So many bytes were taken, or, negative, given back.
    pub fn flow(&mut self, at: Moment, bytes: i64) {
        assert!(at >= self.last, "the engine's changes are in order");
        let earned = i128::from(self.rate) * at.since(self.last).as_micros() as i128;
        self.ending = (self.ending - earned).max(0) + i128::from(bytes) * 1_000_000;
        self.ending = self.ending.max(0);
        self.worst = self.worst.max(self.ending);
        self.last = at;
    }

    /// The most bytes of a window beyond the rate.
    pub fn worst(&self) -> u64 {
        (self.worst / 1_000_000) as u64
    }
}

/// Times, to be asked for percentiles.
#[derive(Default)]
pub struct Times(Vec<u64>);

impl Times {
    pub fn add(&mut self, time: std::time::Duration) {
        self.0.push(time.as_micros() as u64);
    }

    /// How many.
    #[allow(dead_code, reason = "the example's")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    #[allow(dead_code, reason = "the example's")]
    pub fn mean(&self) -> std::time::Duration {
        let micros = self.0.iter().sum::<u64>() / (self.0.len() as u64).max(1);
        std::time::Duration::from_micros(micros)
    }

    /// `share`: 0.5 for the median, 1.0 for the longest.
    pub fn at(&mut self, share: f64) -> std::time::Duration {
        self.0.sort_unstable();
        let last = self.0.len().saturating_sub(1) as f64;
        let time = self.0.get((last * share).round() as usize);
        std::time::Duration::from_micros(time.copied().unwrap_or(0))
    }
}
