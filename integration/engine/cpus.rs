//! A host's CPUs, shared evenly by all who want one.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use crab::engine::Moment;

/// Work that is under way; each has had the same since the last of them came.
pub struct Cpus<T> {
    number: u64,
    /// Nanoseconds of a CPU that somebody has had who was there from the beginning.
    served: u64,
    /// When that was reckoned.
    last: Moment,
    count: u64,
    work: BinaryHeap<Reverse<Work<T>>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Work<T> {
    /// It is done when so much is served.
    until: u64,
    /// Of two that end at once the first that came is the first.
    count: u64,
    what: T,
}

impl<T: Ord> Cpus<T> {
    pub fn new(number: u32) -> Self {
        Self {
            number: number.into(),
            served: 0,
            last: Moment::from_micros(0),
            count: 0,
            work: BinaryHeap::new(),
        }
    }

    /// Something wants so much of a CPU. There must be none whose end is due.
    pub fn add(&mut self, now: Moment, takes: Duration, what: T) {
        self.serve(now);
        self.count += 1;
        self.work.push(Reverse(Work {
            until: self.served + takes.as_nanos() as u64,
            count: self.count,
            what,
        }));
    }

    /// When the next one is done, if nobody else comes.
    pub fn next(&self) -> Option<Moment> {
        let Reverse(first) = self.work.peek()?;
        let (all, at_once) = self.shares();
        let left = first.until.saturating_sub(self.served) * all;
        Some(
            self.last
                .after(Duration::from_micros(left.div_ceil(at_once * 1000))),
        )
    }

    /// The next one is done.
    pub fn pop(&mut self, now: Moment) -> Option<T> {
        self.serve(now);
        self.work.pop().map(|Reverse(work)| work.what)
    }

    fn serve(&mut self, now: Moment) {
        let (all, at_once) = self.shares();
        let micros = now.since(self.last).as_micros() as u64;
        if let Some(served) = (micros * 1000 * at_once).checked_div(all) {
            self.served += served;
        }
        self.last = now;
    }

    /// How many there are, and how many of them are served at once.
    fn shares(&self) -> (u64, u64) {
        let all = self.work.len() as u64;
        (all, all.min(self.number))
    }
}
