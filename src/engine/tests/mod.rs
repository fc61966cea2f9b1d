//! What the parts promise; then members in virtual time, and in processes that are killed and stopped.

#[path = "../../../integration/engine/mod.rs"]
mod tools;

mod bucket;
mod faults;
mod planner;
mod processes;
mod seats;
mod simulation;

use std::{cell::RefCell, num::NonZeroU64, time::Duration};

use super::*;

const MB: u64 = 1_000_000;

/// 100 MB/s, and 50 MB at once.
const LIMITS: Limits = Limits {
    rate: NonZeroU64::new(100 * MB),
    burst: 50 * MB,
    dumps: 2,
    undrained: 1_000 * MB,
};

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn at(millis: u64) -> Moment {
    Moment::from_micros((1_000_000 + millis) * 1000)
}

fn files(tokens: u64) -> Request {
    Request {
        work: Work::Files,
        tokens,
        staged: tokens,
        expected: ms(100),
    }
}

fn dump(tokens: u64) -> Request {
    Request {
        work: Work::Dump,
        ..files(tokens)
    }
}

/// Members of one table, of whom some are dead.
#[derive(Default)]
struct Known {
    dead: RefCell<Vec<u32>>,
    woken: RefCell<Vec<u32>>,
}

impl Others for Known {
    fn is_alive(&self, slot: u32) -> bool {
        !self.dead.borrow().contains(&slot)
    }

    fn wake(&self, slot: u32) {
        self.woken.borrow_mut().push(slot);
    }
}

/// A small host without a clock.
struct Host {
    table: Table,
    known: Known,
    seats: Vec<Seat>,
}

impl Host {
    fn new(seats: u32, limits: Limits) -> Self {
        let table = Table::on_heap(seats);
        let seat = |slot| Seat::new(&table, slot, "", limits, Terms::default());
        Self {
            seats: (0..seats).map(seat).collect(),
            known: Known::default(),
            table,
        }
    }

    fn enter(&mut self, slot: usize, now: Moment, request: &Request, class: Class) {
        self.seats[slot].enter(&self.table, now, request, class);
    }

    fn look(&mut self, slot: usize, now: Moment, class: Class) -> Next {
        let bucket = self.table.bucket();
        loop {
            let seat = &mut self.seats[slot];
            match seat.consider(&self.table, bucket, now, class, &self.known) {
                Next::Again => {}
                next => return next,
            }
        }
    }

    fn commit(&mut self, slot: usize, proposal: &Proposal) -> bool {
        self.seats[slot].commit(&self.table, proposal, &self.known)
    }

    /// Whether it is granted now; else when it will look again.
    fn take(&mut self, slot: usize, now: Moment, class: Class) -> Result<(), Moment> {
        match self.look(slot, now, class) {
            Next::Commit(proposal) => {
                assert!(self.commit(slot, &proposal));
                Ok(())
            }
            Next::Sleep(until) => Err(until),
            Next::Again => unreachable!(),
        }
    }

    fn settle(&mut self, slot: usize, now: Moment, written: u64) {
        self.seats[slot].settle(&self.table, now, written, &self.known);
    }
}
