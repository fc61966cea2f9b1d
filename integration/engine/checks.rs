//! What must hold in every step, by the rules of docs/engine.md, not by the engine's code.

use std::time::Duration;

use crab::engine::{Class, Moment, Phase, Work};

use super::{
    setup::Outcome,
    simulation::{Doing, Sandbox, World},
};

impl World {
    /// Nobody goes before one who comes first.
    pub(super) fn check_order(&self, slot: u32, at: Moment) {
        let rank = |its: &Sandbox, class: Class| {
            let later = match class {
                Class::Urgent => Duration::ZERO,
                Class::Normal => self.setup.terms.handicap,
            };
            its.asked.after(later)
        };
        let taker = &self.sandboxes[slot as usize];
        // What has happened after the taker's look it cannot know.
        let settled =
            |its: &Sandbox| its.urgent_since.is_none_or(|since| since < at) && its.back < at;
        for (other, its) in self.sandboxes.iter().enumerate() {
            let waits = matches!(its.doing, Doing::Waiting)
                && settled(its)
                && its.stopped.is_none()
                && self.table.status(other as u32).phase == Phase::Waiting;
            let class = its.urgent_since.map_or(Class::Normal, |_| Class::Urgent);
            let first = rank(its, class) < rank(taker, taker.class);
            let may_be_passed = taker.request.work == Work::Files && its.request.work == Work::Dump;
            assert!(
                !(waits && first) || may_be_passed,
                "slot {slot} goes before slot {other}, which comes first"
            );
        }
    }

    /// Dumps at once, by the sandboxes' own knowledge, when one more has begun. Those that are stopped, or
    /// were, need not count, nor those that take longer than they may.
    pub(super) fn check_dumps(&self, slot: u32) {
        let taker = &self.sandboxes[slot as usize];
        if taker.request.work != Work::Dump {
            return;
        }
        let run = |its: &&Sandbox| {
            let lease = its.request.expected * 4 + Duration::from_secs(1);
            let capturing = matches!(its.doing, Doing::Capturing) && !its.was_stopped;
            let in_time = self.now.since(its.granted) < lease.min(self.setup.terms.longest_lease);
            capturing && its.request.work == Work::Dump && in_time
        };
        let running = self.sandboxes.iter().filter(run).count();
        let waited = taker.granted.since(taker.asked);
        let presses = taker.class == Class::Urgent || waited >= self.setup.terms.handicap;
        let bound = self.setup.limits.dumps as usize * if presses { 2 } else { 1 };
        assert!(running <= bound, "{running} dumps at once");
    }

    pub(super) fn finish(mut self) -> Outcome {
        let waiting = |its: &&Sandbox| !matches!(its.doing, Doing::Nothing);
        let left = self.sandboxes.iter().filter(waiting).count();
        assert_eq!(left, 0, "{left} sandboxes wait for ever");
        let limits = self.setup.limits;
        self.outcome.excess = self.windows.worst();
        self.outcome.promised = limits.burst.max(self.largest);
        if limits.rate.is_some() {
            assert!(
                self.outcome.excess <= self.outcome.promised,
                "{} bytes beyond the rate, promised are {}",
                self.outcome.excess,
                self.outcome.promised
            );
        }
        self.outcome.used = (self.written as f64 / self.setup.lasting.as_secs_f64()) as u64;
        self.outcome
    }
}
