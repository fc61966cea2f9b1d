//! A sandbox's part in the engine: it asks, waits, and gives back.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    thread::futex,
    time::{ClockId, Timespec, clock_gettime},
};

use super::{
    file::Shared,
    limits::{Limits, Terms},
    moment::Moment,
    seat::{Next, Others, Request, Seat},
    status::Class,
    table::Table,
};

/// How often a member without the host's table looks for it.
const REJOIN: Duration = Duration::from_secs(1);

/// Why nothing was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Within the time that the caller has set. [`Member::force`] goes on without.
    #[error("the host's budget for checkpoints had no room for {0:?}")]
    TooLong(Duration),
    /// [`Caller::give_up`].
    #[error("given up while waiting for the host's budget")]
    GaveUp,
}

/// By which others speak to a member that waits.
#[derive(Default)]
pub struct Caller {
    urgent: AtomicBool,
    gave_up: AtomicBool,
    waits_at: Mutex<Option<Arc<Desk>>>,
}

impl Caller {
    /// One for whom nobody waits yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Somebody waits at the gate now.
    pub fn promote(&self) {
        self.urgent.store(true, SeqCst);
        self.ring();
    }

    /// It is not needed any more.
    pub fn give_up(&self) {
        self.gave_up.store(true, SeqCst);
        self.ring();
    }

    /// Whether somebody waits by it.
    pub fn is_waiting(&self) -> bool {
        self.waits_at.lock().is_some()
    }

    /// Whether [`Caller::promote`] was called.
    pub fn is_urgent(&self) -> bool {
        self.urgent.load(SeqCst)
    }

    /// Whether [`Caller::give_up`] was called.
    pub fn has_given_up(&self) -> bool {
        self.gave_up.load(SeqCst)
    }

    fn class(&self) -> Class {
        match self.is_urgent() {
            true => Class::Urgent,
            false => Class::Normal,
        }
    }

    fn ring(&self) {
        let desk = self.waits_at.lock().clone();
        if let Some(desk) = desk.filter(|desk| desk.is_whole()) {
            desk.wake(desk.slot());
        }
    }
}

/// A table with our slot in it.
enum Desk {
    /// The host's.
    Shared(Shared),
    /// Our own, while the host's cannot be had.
    Alone(Table),
}

impl Desk {
    fn table(&self) -> &Table {
        match self {
            Self::Shared(shared) => &shared.table,
            Self::Alone(table) => table,
        }
    }

    fn slot(&self) -> u32 {
        match self {
            Self::Shared(shared) => shared.slot(),
            Self::Alone(_) => 0,
        }
    }

    fn is_whole(&self) -> bool {
        match self {
            Self::Shared(shared) => shared.is_whole(),
            Self::Alone(_) => true,
        }
    }
}

impl Others for Desk {
    fn is_alive(&self, slot: u32) -> bool {
        match self {
            Self::Shared(shared) => shared.is_alive(slot),
            Self::Alone(_) => true,
        }
    }

    fn wake(&self, slot: u32) {
        let bell = self.table().bell(slot);
        bell.fetch_add(1, SeqCst);
        // Fails for no address that is mapped.
        let _ = futex::wake(bell, futex::Flags::empty(), 1);
    }
}

/// One sandbox.
pub struct Member {
    run: PathBuf,
    name: String,
    limits: Limits,
    terms: Terms,
    desk: Arc<Desk>,
    seat: Seat,
    /// Why it has a budget of its own, and when that was.
    alone: Option<(String, Instant)>,
}

impl Member {
    /// Joins the host's engine, in `run`, crab's directory below /run.
    ///
    /// If that is impossible the member has a budget of its own, of the same size, until it is
    /// possible: see [`Member::why_alone`].
    pub fn join(run: &Path, name: &str, limits: Limits, terms: Terms) -> Self {
        let (desk, alone) = sit_down(run);
        let seat = Seat::new(desk.table(), desk.slot(), name, limits, terms);
        let member = Self {
            run: run.to_owned(),
            name: name.to_owned(),
            limits,
            terms,
            desk: Arc::new(desk),
            seat,
            alone,
        };
        member.say_alone();
        member
    }

    /// Why this member has a budget of its own, if it has.
    pub fn why_alone(&self) -> Option<&str> {
        self.alone.as_ref().map(|(why, _)| why.as_str())
    }

    /// Its slot.
    pub fn slot(&self) -> u32 {
        self.seat.slot()
    }

    /// Waits until there is room, at most for `limit`.
    pub fn acquire(
        &mut self,
        request: &Request,
        caller: &Caller,
        limit: Duration,
    ) -> Result<Grant<'_>, Denied> {
        let begin = now();
        let at = self.wait(begin, request, caller, limit)?;
        Ok(self.grant(begin, at, false))
    }

    /// The same, but goes on without room when it has waited for so long: see [`Member::force`].
    pub fn acquire_or_force(
        &mut self,
        request: &Request,
        caller: &Caller,
        limit: Duration,
    ) -> Result<Grant<'_>, Denied> {
        let begin = now();
        match self.wait(begin, request, caller, limit) {
            Ok(at) => Ok(self.grant(begin, at, false)),
            Err(Denied::TooLong(_)) => Ok(self.take_anyway(begin, request)),
            Err(denied @ Denied::GaveUp) => Err(denied),
        }
    }

    fn wait(
        &mut self,
        begin: Moment,
        request: &Request,
        caller: &Caller,
        limit: Duration,
    ) -> Result<Moment, Denied> {
        let last = begin.after(limit);
        self.sit_well();
        self.enter(begin, request, caller);
        let outcome = loop {
            let desk = Arc::clone(&self.desk);
            let table = desk.table();
            let rung = table.bell(self.seat.slot()).load(SeqCst);
            if caller.has_given_up() {
                break Err(Denied::GaveUp);
            }
            let bucket = table.bucket();
            let now = now();
            if now >= last {
                break Err(Denied::TooLong(limit));
            }
            let next = self
                .seat
                .consider(table, bucket, now, caller.class(), &*desk);
            match next {
                Next::Again => {}
                Next::Commit(proposal) => {
                    if self.seat.commit(table, &proposal, &*desk) {
                        break Ok(proposal.at);
                    }
                }
                Next::Sleep(until) => self.sleep(rung, until.min(last).since(now)),
            }
            if !desk.is_whole() {
                self.sit_well();
                self.enter(begin, request, caller);
            }
        };
        *caller.waits_at.lock() = None;
        if outcome.is_err() {
            self.with_seat(|seat, desk| seat.leave(desk.table(), now(), desk));
        }
        outcome
    }

    fn grant(&mut self, begin: Moment, at: Moment, is_forced: bool) -> Grant<'_> {
        Grant {
            member: self,
            waited: at.since(begin),
            at,
            is_forced,
            is_settled: false,
        }
    }

    /// Goes on without room, and charges the host for it: those who come after wait the longer.
    pub fn force(&mut self, request: &Request) -> Grant<'_> {
        self.take_anyway(now(), request)
    }

    fn take_anyway(&mut self, begin: Moment, request: &Request) -> Grant<'_> {
        self.sit_well();
        let at = now();
        let table = self.desk.table();
        self.seat.enter(table, at, request, Class::Urgent);
        self.seat.force(table, at, &*self.desk);
        self.grant(begin, at, true)
    }

    /// Bytes that could be taken now; None if any number could.
    pub fn tokens(&mut self) -> Option<i64> {
        self.sit_well();
        self.desk.table().bucket().level(now(), &self.limits)
    }

    fn enter(&mut self, begin: Moment, request: &Request, caller: &Caller) {
        // Before our status can be seen, so that whoever promotes us finds us.
        *caller.waits_at.lock() = Some(Arc::clone(&self.desk));
        self.seat
            .enter(self.desk.table(), begin, request, caller.class());
    }

    fn sleep(&self, rung: u32, limit: Duration) {
        let bell = self.desk.table().bell(self.seat.slot());
        let timeout = Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        };
        // However it ends, by a wake-up, in time, or by a signal: one looks again.
        let _ = futex::wait(bell, futex::Flags::empty(), rung, Some(&timeout));
    }

    /// Comes over to the host's table, if ours is not that one.
    fn sit_well(&mut self) {
        let stale = match &self.alone {
            None => !self.desk.is_whole(),
            Some((_, since)) => since.elapsed() >= REJOIN,
        };
        if !stale {
            return;
        }
        let before = self.alone.take().map(|(why, _)| why);
        let (desk, alone) = sit_down(&self.run);
        self.alone = alone;
        if self.why_alone() != before.as_deref() {
            self.say_alone();
        }
        // Our own bucket goes on while nothing has changed.
        if self.alone.is_some() && before.is_some() {
            return;
        }
        self.seat = Seat::new(
            desk.table(),
            desk.slot(),
            &self.name,
            self.limits,
            self.terms,
        );
        self.desk = Arc::new(desk);
    }

    fn say_alone(&self) {
        if let Some(why) = self.why_alone() {
            log::warn!(
                "{}: has a budget for checkpoints of its own, beside the host's: {why}",
                self.name
            );
        }
    }

    /// Unless the table is gone: what was taken from it went with it.
    fn with_seat(&mut self, then: impl FnOnce(&mut Seat, &Desk)) {
        if self.desk.is_whole() {
            then(&mut self.seat, &self.desk);
        }
    }
}

fn sit_down(run: &Path) -> (Desk, Option<(String, Instant)>) {
    match Shared::join(run) {
        Ok(shared) => (Desk::Shared(shared), None),
        Err(e) => {
            let why = format!("{}: {e}", super::file::path(run).display());
            (Desk::Alone(Table::on_heap(1)), Some((why, Instant::now())))
        }
    }
}

/// Room for one checkpoint, until it is settled.
#[must_use]
pub struct Grant<'a> {
    member: &'a mut Member,
    /// How long it was waited for.
    pub waited: Duration,
    /// When it was charged.
    pub at: Moment,
    /// There was no room.
    pub is_forced: bool,
    is_settled: bool,
}

impl Grant<'_> {
    /// The capture is done and has so many bytes; the drain begins.
    pub fn captured(&mut self, staged: u64, expected_drain: Duration) {
        self.member.with_seat(|seat, desk| {
            seat.captured(desk.table(), now(), staged, expected_drain, desk);
        });
    }

    /// All is done, and so many bytes were written.
    pub fn settle(mut self, written: u64) {
        self.is_settled = true;
        self.member.with_seat(|seat, desk| {
            seat.settle(desk.table(), now(), written, desk);
        });
    }
}

impl Drop for Grant<'_> {
    /// Nobody has said what was written: it stays charged.
    fn drop(&mut self) {
        if !self.is_settled {
            self.member
                .with_seat(|seat, desk| seat.settle_as_charged(desk.table(), now(), desk));
        }
    }
}

/// The time of the engine.
pub(super) fn now() -> Moment {
    let time = clock_gettime(ClockId::Boottime);
    let micros = time.tv_sec * 1_000_000 + time.tv_nsec / 1000;
    Moment::from_micros(micros.cast_unsigned())
}
