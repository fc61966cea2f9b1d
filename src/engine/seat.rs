//! One member's place in the table: how it waits, takes, and gives back.
//!
//! Nothing here sleeps, or asks for the time: that is left to whoever drives it, which is a process in
//! production ([`Member`](super::Member)) and virtual time in the simulation.
//!
//! **Taking needs no lock**, so nobody can be stopped or die while holding one. A member that finds that
//! it is its turn first says that it works, and then changes the bucket, by one compare-and-swap. If
//! anybody has taken anything since the member looked, this fails, and it takes back what it said. So
//! of two that take at once the second has seen the first, and what is taken can never be more than
//! what one of them alone would have seen as free.

use std::time::Duration;

use super::{
    bucket::Bucket,
    decide::{Seen, Verdict, View, Why, patience},
    limits::{Limits, Terms},
    moment::{Moment, micros},
    status::{Class, Phase, Status, Work},
    table::{Field, Table},
};

/// The other members, as far as the table does not tell.
pub trait Others {
    /// Whether a slot's member lives, be it stopped.
    fn is_alive(&self, slot: u32) -> bool;
    /// Makes a member look again, if it waits.
    fn wake(&self, slot: u32);
}

/// What a member asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What it is to do.
    pub work: Work,
    /// Bytes that it expects to write to disk in the end.
    pub tokens: u64,
    /// Bytes that it expects to capture, most of which may not reach the disk.
    pub staged: u64,
    /// How long it expects to work, without the drain.
    pub expected: Duration,
}

impl Request {
    /// For how long it counts: with room for a busy host.
    fn lease(&self) -> Duration {
        self.expected.saturating_mul(4) + Duration::from_secs(1)
    }
}

/// What to do next.
#[derive(Debug)]
pub enum Next {
    /// It is our turn, if [`Seat::commit`] says so, too.
    Commit(Proposal),
    /// Something has changed: look again at once.
    Again,
    /// Sleep until then, or until woken.
    Sleep(Moment),
}

/// A change of the bucket that is not made yet.
#[derive(Debug, Clone, Copy)]
pub struct Proposal {
    seen: Bucket,
    wanted: Bucket,
    /// When it was seen.
    pub at: Moment,
}

/// The one who is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Suspect {
    slot: u32,
    status: Status,
    since: Moment,
}

/// A slot of the table, to whom it belongs.
#[derive(Debug)]
pub struct Seat {
    slot: u32,
    limits: Limits,
    terms: Terms,
    /// What the table should say of us.
    status: Status,
    /// What we have been charged and have not settled.
    charged: u64,
    suspect: Option<Suspect>,
}

impl Seat {
    /// Takes a slot that nobody else uses.
    pub fn new(table: &Table, slot: u32, name: &str, limits: Limits, terms: Terms) -> Self {
        table.set_status(slot, Status::IDLE);
        let numbers = [
            (Field::Tokens, 0),
            (Field::Staged, 0),
            (Field::Lease, 0),
            (Field::Pid, std::process::id().into()),
            (Field::Rate, limits.rate.map_or(0, Into::into)),
            (Field::Burst, limits.burst),
            (Field::Dumps, limits.dumps.into()),
            (Field::Undrained, limits.undrained),
        ];
        for (field, number) in numbers {
            table.set(slot, field, number);
        }
        table.set_name(slot, name);
        Self {
            slot,
            limits,
            terms,
            status: Status::IDLE,
            charged: 0,
            suspect: None,
        }
    }

    /// Its number.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Begins to wait.
    pub fn enter(&mut self, table: &Table, now: Moment, request: &Request, class: Class) {
        table.set(self.slot, Field::Tokens, request.tokens);
        table.set(self.slot, Field::Staged, request.staged);
        table.set(self.slot, Field::Lease, micros(request.lease()));
        self.suspect = None;
        self.charged = request.tokens;
        self.status = Status {
            phase: Phase::Waiting,
            class,
            work: request.work,
            since: now,
        };
        table.set_status(self.slot, self.status);
    }

    /// Looks whether it is our turn. `bucket` has to be read before `now`.
    pub fn consider(
        &mut self,
        table: &Table,
        bucket: Bucket,
        now: Moment,
        class: Class,
        others: &dyn Others,
    ) -> Next {
        // We may have been passed, promoted, or overwritten by a damaged file.
        self.status.class = class;
        if table.status(self.slot) != self.status {
            table.set_status(self.slot, self.status);
        }
        let view = View::of(table, bucket, now, &self.terms);
        let me = Seen {
            slot: self.slot,
            status: self.status,
            tokens: self.charged,
            staged: table.get(self.slot, Field::Staged),
            until: now,
        };
        match view.decide(&me, &self.limits, &self.terms) {
            Verdict::Go => self.propose(table, &view),
            Verdict::Wait { why, ahead, until } => {
                if self.bury(table, &view, why, others) {
                    return Next::Again;
                }
                if self.is_overdue(&view, why, ahead) {
                    self.pass(table, &view, &me, others);
                    return Next::Again;
                }
                Next::Sleep(until.min(now.after(self.terms.longest_sleep)))
            }
        }
    }

    fn propose(&mut self, table: &Table, view: &View) -> Next {
        let working = Status {
            phase: Phase::Working,
            since: view.now,
            ..self.status
        };
        if !table.swap_status(self.slot, self.status, working) {
            return Next::Again;
        }
        Next::Commit(Proposal {
            seen: view.bucket,
            wanted: view.bucket.take(view.now, self.charged, &self.limits),
            at: view.now,
        })
    }

    /// Takes what was proposed. False if somebody else has taken something: look again.
    pub fn commit(&mut self, table: &Table, proposal: &Proposal, others: &dyn Others) -> bool {
        let taken = table.swap_bucket(proposal.seen, proposal.wanted);
        if taken {
            self.granted(table, proposal.at);
        } else {
            table.set_status(self.slot, self.status);
        }
        // Others may have decided to wait because we said that we work, or wait for their turn.
        self.wake_next(table, proposal.at, others);
        taken
    }

    /// Takes what is not there, after a wait that was too long: those who come after wait for it.
    pub fn force(&mut self, table: &Table, now: Moment, others: &dyn Others) {
        let working = Status {
            phase: Phase::Working,
            since: now,
            ..self.status
        };
        table.set_status(self.slot, working);
        let (bytes, limits) = (self.charged, self.limits);
        change(table, |bucket| bucket.take(now, bytes, &limits));
        self.granted(table, now);
        table.add(self.slot, Field::Forced, 1);
        self.wake_next(table, now, others);
    }

    fn granted(&mut self, table: &Table, now: Moment) {
        let waited = micros(now.since(self.status.since));
        table.add(self.slot, Field::Grants, 1);
        table.add(self.slot, Field::Granted, self.charged);
        table.add(self.slot, Field::WaitedMicros, waited);
        self.status.phase = Phase::Working;
        self.status.since = now;
    }

    /// The capture is done, and has taken so many bytes; the drain begins.
    pub fn captured(
        &mut self,
        table: &Table,
        now: Moment,
        staged: u64,
        expected_drain: Duration,
        others: &dyn Others,
    ) {
        let lease = expected_drain.saturating_mul(4) + Duration::from_secs(1);
        table.set(self.slot, Field::Staged, staged);
        table.set(self.slot, Field::Lease, micros(lease));
        self.status.phase = Phase::Draining;
        self.status.since = now;
        table.set_status(self.slot, self.status);
        self.wake_next(table, now, others);
    }

    /// The work is over, and has written so many bytes: what was charged too much is given back, what
    /// was charged too little is taken.
    pub fn settle(&mut self, table: &Table, now: Moment, written: u64, others: &dyn Others) {
        let (charged, limits) = (std::mem::take(&mut self.charged), self.limits);
        change(table, |bucket| match written.checked_sub(charged) {
            Some(more) => bucket.take(now, more, &limits),
            None => bucket.give_back(now, charged - written, &limits),
        });
        table.add(self.slot, Field::Written, written);
        self.leave(table, now, others);
    }

    /// The same, if nobody knows what was written.
    pub fn settle_as_charged(&mut self, table: &Table, now: Moment, others: &dyn Others) {
        self.settle(table, now, self.charged, others);
    }

    /// Wants nothing any more.
    pub fn leave(&mut self, table: &Table, now: Moment, others: &dyn Others) {
        self.status = Status::IDLE;
        table.set_status(self.slot, self.status);
        self.wake_next(table, now, others);
    }

    /// Whether one of those who are waited for is dead: it doesn't count any more.
    fn bury(&self, table: &Table, view: &View, why: Why, others: &dyn Others) -> bool {
        let in_the_way = |its: &&Seen| match why {
            Why::Turn { head, .. } => its.slot == head,
            Why::Dumps | Why::Undrained => its.counts(view.now, &self.terms),
            Why::Tokens => false,
        };
        let mut found = false;
        for its in view.members.iter().filter(in_the_way) {
            if its.slot != self.slot && !others.is_alive(its.slot) {
                // A new member of the slot has another status by now.
                table.swap_status(its.slot, its.status, Status::IDLE);
                found = true;
            }
        }
        found
    }

    /// Whether the first of the queue has been able to take for long enough, and has not.
    fn is_overdue(&mut self, view: &View, why: Why, ahead: u32) -> bool {
        let head = match why {
            Why::Turn { head, ready: true } => view.members.iter().find(|its| its.slot == head),
            _ => None,
        };
        let Some(head) = head else {
            self.suspect = None;
            return false;
        };
        let same = |known: &Suspect| known.slot == head.slot && known.status == head.status;
        let suspect = self.suspect.filter(same).unwrap_or(Suspect {
            slot: head.slot,
            status: head.status,
            since: view.now,
        });
        let overdue = view.now.since(suspect.since) >= patience(ahead, &self.terms);
        self.suspect = (!overdue).then_some(suspect);
        overdue
    }

    /// Passes all who come first. They are woken: those who live and run come back, with the rank
    /// that they had; so it takes no longer if more than one of them is stopped.
    fn pass(&self, table: &Table, view: &View, me: &Seen, others: &dyn Others) {
        for its in view.ahead_of(me, &self.limits, &self.terms) {
            let passed = Status {
                phase: Phase::Passed,
                ..its.status
            };
            if table.swap_status(its.slot, its.status, passed) {
                others.wake(its.slot);
            }
        }
    }

    fn wake_next(&self, table: &Table, now: Moment, others: &dyn Others) {
        let view = View::of(table, table.bucket(), now, &self.terms);
        for slot in view.to_wake(&self.terms) {
            others.wake(slot);
        }
    }
}

/// Changes the bucket, whatever others do at the same time.
fn change(table: &Table, to: impl Fn(Bucket) -> Bucket) {
    loop {
        let bucket = table.bucket();
        if table.swap_bucket(bucket, to(bucket)) {
            return;
        }
    }
}
