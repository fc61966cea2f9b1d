//! How long the agent is away between two turns.

use std::{collections::VecDeque, time::Duration};

/// So many are remembered: an agent's pace changes with what it does.
const LAST: usize = 9;

/// How long it was away the last times.
#[derive(Debug, Default)]
pub(super) struct Absences(VecDeque<Duration>);

impl Absences {
    pub(super) fn add(&mut self, absence: Duration) {
        if self.0.len() == LAST {
            self.0.pop_front();
        }
        self.0.push_back(absence);
    }

    /// The median, the shorter one of two; nothing if nothing is known.
    pub(super) fn median(&self) -> Duration {
        let mut sorted: Vec<Duration> = self.0.iter().copied().collect();
        sorted.sort_unstable();
        let middle = sorted.len().saturating_sub(1) / 2;
        sorted.get(middle).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_long_absence_is_not_expected_again_and_old_ones_are_forgotten() {
        let mut absences = Absences::default();
        let seconds = Duration::from_secs;
        assert_eq!(absences.median(), seconds(0));
        for length in [8, 600, 9] {
            absences.add(seconds(length));
        }
        assert_eq!(absences.median(), seconds(9));
        for _ in 0..LAST {
            absences.add(seconds(2));
        }
        assert_eq!(absences.median(), seconds(2));
        absences.add(seconds(700));
        assert_eq!(absences.0.len(), LAST);
    }
}
