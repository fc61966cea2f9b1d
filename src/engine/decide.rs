//! Whose turn it is: a pure function of what can be seen in the table at one moment.

use std::time::Duration;

use super::{
    bucket::Bucket,
    limits::{Limits, Terms},
    moment::Moment,
    status::{Class, Phase, Status, Work},
    table::{Field, Table},
};

/// A member that does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its slot.
    pub slot: u32,
    /// What it does.
    pub status: Status,
    /// Bytes that it asks for, or has been charged.
    pub tokens: u64,
    /// Bytes that it captures, or has captured.
    pub staged: u64,
    /// Until when it counts, while it works or drains.
    pub until: Moment,
}

impl Seen {
    /// Those who wait go in this order.
    pub(super) fn rank(&self, terms: &Terms) -> (Moment, u32) {
        let came = self.status.since;
        let counts_from = match self.status.class {
            Class::Urgent => came,
            Class::Normal => came.after(terms.handicap),
        };
        (counts_from, self.slot)
    }

    fn is_waiting(&self) -> bool {
        self.status.phase == Phase::Waiting
    }

    /// Whether it works or drains, and not for longer than it may.
    pub(super) fn counts(&self, now: Moment, terms: &Terms) -> bool {
        // What begins in the far future is damage.
        let begun = self.status.since <= now.after(terms.longest_lease);
        self.holds() && begun && now < self.until
    }

    /// Whether it works or drains.
    pub(super) fn holds(&self) -> bool {
        matches!(self.status.phase, Phase::Working | Phase::Draining)
    }

    /// Whether it may begin beside so many dumps.
    fn may_join(&self, dumps: u64, now: Moment, limits: &Limits, terms: &Terms) -> bool {
        let bound = match self.presses(now, terms) {
            true => limits.pressing_dumps(),
            false => limits.dumps,
        };
        self.status.work == Work::Files || dumps < u64::from(bound)
    }

    /// Whether its rank is that of somebody who is waited for: it is urgent, or has waited for the whole
    /// handicap.
    fn presses(&self, now: Moment, terms: &Terms) -> bool {
        self.rank(terms).0 <= now
    }

    fn dumps(&self) -> bool {
        self.status.phase == Phase::Working && self.status.work == Work::Dump
    }
}

/// What one look at the table has found.
#[derive(Debug, Clone)]
pub struct View {
    /// The bucket as it was *before* the rest was read.
    pub bucket: Bucket,
    /// When.
    pub now: Moment,
    /// Who does something.
    pub members: Vec<Seen>,
}

/// Whether a member may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Go,
    /// Not yet.
    Wait {
        /// Why.
        why: Why,
        /// How many wait who come first.
        ahead: u32,
        /// It need not look again before, unless somebody wakes it.
        until: Moment,
    },
}

/// What a member waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Another one, which comes first.
    Turn {
        /// The slot of the first of all.
        head: u32,
        /// Whether that one could begin.
        ready: bool,
    },
    /// The end of a dump.
    Dumps,
    /// The end of a drain.
    Undrained,
    /// Tokens.
    Tokens,
}

impl View {
    /// Looks at everybody. `bucket` has to be read before `now`.
    pub fn of(table: &Table, bucket: Bucket, now: Moment, terms: &Terms) -> Self {
        let members = table.busy().map(|(slot, status)| {
            let lease = Duration::from_micros(table.get(slot, Field::Lease));
            Seen {
                slot,
                status,
                tokens: table.get(slot, Field::Tokens),
                staged: table.get(slot, Field::Staged),
                until: status.since.after(lease.min(terms.longest_lease)),
            }
        });
        Self {
            bucket,
            now,
            members: members.collect(),
        }
    }

    /// Whether this waiting member may begin. Tokens and captured bytes are had strictly in the order
    /// of the ranks. What captures files only goes before dumps while these wait for one another:
    /// it would not make them any faster. Dumps that press have a bound of their own, so none of them waits
    /// for one that nobody waits for.
    pub fn decide(&self, its: &Seen, limits: &Limits, terms: &Terms) -> Verdict {
        let mut ahead = 0;
        let mut head: Option<&Seen> = None;
        for other in self.ahead_of(its, limits, terms) {
            ahead += 1;
            if head.is_none_or(|head| other.rank(terms) < head.rank(terms)) {
                head = Some(other);
            }
        }
        let wait = |why, until| Verdict::Wait { why, ahead, until };
        if !self.may_begin(its, limits, terms) {
            let rank = its.rank(terms);
            let first = |other: &&Seen| {
                other.is_waiting() && other.status.work == Work::Dump && other.rank(terms) < rank
            };
            let dumps = self.members.iter().filter(first).count();
            return wait(
                Why::Dumps,
                self.now.after(spread(terms.recheck, dumps as u32)),
            );
        }
        let Some(head) = head else {
            return match self.lacks(its, limits, terms) {
                None => Verdict::Go,
                Some((why, until)) => wait(why, until),
            };
        };
        let lacks = self.lacks(head, limits, terms);
        let why = Why::Turn {
            head: head.slot,
            ready: lacks.is_none(),
        };
        let until = lacks.map_or(self.now, |(_, until)| until);
        wait(why, until.after(patience(ahead, terms)))
    }

    /// Those who wait and come before this one.
    pub(super) fn ahead_of(
        &self,
        its: &Seen,
        limits: &Limits,
        terms: &Terms,
    ) -> impl Iterator<Item = &Seen> {
        let rank = its.rank(terms);
        let dumps = self.dumps(terms);
        self.members.iter().filter(move |other| {
            let can_take = other.may_join(dumps, self.now, limits, terms);
            other.is_waiting() && can_take && other.rank(terms) < rank
        })
    }

    /// Whether the dumps that run leave room for it.
    fn may_begin(&self, its: &Seen, limits: &Limits, terms: &Terms) -> bool {
        its.may_join(self.dumps(terms), self.now, limits, terms)
    }

    /// What the first of the queue still lacks, and when to look again.
    fn lacks(&self, its: &Seen, limits: &Limits, terms: &Terms) -> Option<(Why, Moment)> {
        let others = self.undrained(Some(its.slot), terms);
        if others > 0 && others.saturating_add(its.staged) > limits.undrained {
            return Some((Why::Undrained, self.now.after(terms.recheck)));
        }
        let ready = self.bucket.ready_at(self.now, its.tokens, limits);
        (ready > self.now).then_some((Why::Tokens, ready))
    }

    /// Dumps that run.
    pub(super) fn dumps(&self, terms: &Terms) -> u64 {
        let run = |its: &&Seen| its.dumps() && its.counts(self.now, terms);
        self.members.iter().filter(run).count() as u64
    }

    /// Bytes that are, or will be, captured and are not on disk yet, perhaps without those of one slot.
    pub(super) fn undrained(&self, but: Option<u32>, terms: &Terms) -> u64 {
        let counts = |its: &&Seen| Some(its.slot) != but && its.counts(self.now, terms);
        let bytes = self.members.iter().filter(counts).map(|its| its.staged);
        bytes.fold(0, u64::saturating_add)
    }

    /// Who should look again after something has become free: the first of the queue, and, if that
    /// is a dump, which may wait for another one, the first that captures files only.
    pub(super) fn to_wake(&self, terms: &Terms) -> impl Iterator<Item = u32> {
        let first = |files_only: bool| {
            let wanted =
                |its: &&Seen| its.is_waiting() && (!files_only || its.status.work == Work::Files);
            let waiting = self.members.iter().filter(wanted);
            waiting
                .min_by_key(|its| its.rank(terms))
                .map(|its| its.slot)
        };
        let (head, files) = (first(false), first(true));
        head.into_iter().chain(files.filter(|_| files != head))
    }
}

/// How long one waits for those ahead of it to take what they can.
pub(super) fn patience(ahead: u32, terms: &Terms) -> Duration {
    spread(terms.patience, ahead.saturating_sub(1))
}

/// Longer for those far behind, so that not all of a long queue wake up at once.
fn spread(time: Duration, ahead: u32) -> Duration {
    time * (1 + ahead.saturating_add(1).ilog2())
}
