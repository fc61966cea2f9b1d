//! Who may enter a sandbox, and when a turn is over.
//!
//! Every exec passes here. The *latch* shuts the door for the time of a cut (D7); the *gate*
//! keeps it shut until the last turn is durable (D11). When the last exec that counts has left,
//! a turn has ended (D3).

mod absence;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, MutexGuard};
use time::OffsetDateTime;

use self::absence::Absences;
use super::{
    cut::CutError,
    machine::{Event, Life, Machine, Work},
};
use crate::engine::Caller;

/// Nobody waits longer than this at the door, whatever holds it shut (D11).
pub const GATE_LIMIT: Duration = Duration::from_secs(120);

#[derive(Default)]
struct State {
    /// Cuts under way or about to begin.
    latched: u32,
    /// Turns that ended and are not durable yet.
    closed: u32,
    /// Execs between their request and their pid.
    starting: u32,
    /// Execs that ever came in.
    entered: u64,
    /// Execs that run, and whether each counts as a turn.
    inside: BTreeMap<String, bool>,
    /// A turn would have ended, had not another exec been on the doorstep.
    owed: bool,
    /// Turns waiting at the door, and since when the first of them has.
    waiting: u32,
    first_wait: Option<Instant>,
    /// When the first exec of the current turn entered.
    turn_start: Option<OffsetDateTime>,
    /// When the last turn ended, if none has begun since; and how long it was until one began.
    ended: Option<Instant>,
    absences: Absences,
    /// The checkpoint that waits for the host's budget.
    caller: Option<Arc<Caller>>,
    /// Whether it lives, and what is done with it.
    machine: Machine,
}

impl State {
    fn on(&mut self, event: Event) {
        match self.machine.after(event) {
            Ok(machine) => self.machine = machine,
            Err(illegal) => {
                log::error!("the coordinator is not where it should be: {illegal}");
                #[cfg(test)]
                assert_eq!(illegal.to_string(), "", "no such transition");
            }
        }
    }

    fn is_doomed(&self) -> bool {
        self.machine.life == Life::Doomed
    }

    /// Ends the turn if nothing that counts is inside or about to be.
    fn end_turn(&mut self) -> bool {
        let ended = self.owed
            && self.machine.work != Work::Replacing
            && self.machine.life == Life::Alive
            && self.starting == 0
            && !self.inside.values().any(|is_turn| *is_turn);
        if ended {
            self.owed = false;
            self.closed += 1;
            self.ended = Some(Instant::now());
        }
        ended
    }
}

/// The doors of one sandbox.
#[derive(Default)]
pub struct Doors {
    /// Held by the one cut under way.
    cut: Mutex<()>,
    /// How many dumps of its processes have begun.
    dumps: AtomicU64,
    /// Since which of them the kernel marks what is written to; 0 if it does not.
    marked: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Doors {
    /// New doors, open.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// An exec wants to start: waits at latch and gate, at most [`GATE_LIMIT`].
    ///
    /// `is_turn`: whether it counts (D3). One that doesn't waits at the latch alone.
    pub fn enter(self: &Arc<Self>, exec_id: &str, is_turn: bool) -> Entering {
        let begin = Instant::now();
        let mut state = self.state.lock();
        if is_turn && let Some(ended) = state.ended.take() {
            state.absences.add(begin.saturating_duration_since(ended));
        }
        let mut waited = false;
        let is_shut = |state: &State| match state.machine.life {
            Life::Alive => state.latched > 0 || (is_turn && state.closed > 0),
            Life::Fallen => true,
            Life::Doomed => false,
        };
        while is_shut(&state) {
            if is_turn && !waited {
                state.waiting += 1;
                state.first_wait.get_or_insert(begin);
                waited = true;
                if let Some(caller) = &state.caller {
                    caller.promote();
                }
            }
            let end = begin + GATE_LIMIT;
            if self.changed.wait_until(&mut state, end).timed_out() {
                log::warn!(
                    "exec {exec_id} has waited {GATE_LIMIT:?} for a checkpoint: letting it in"
                );
                break;
            }
        }
        if waited {
            state.waiting -= 1;
            if state.waiting == 0 {
                state.first_wait = None;
            }
        }
        state.starting += 1;
        state.entered += 1;
        if is_turn {
            state.turn_start.get_or_insert_with(OffsetDateTime::now_utc);
        }
        Entering {
            doors: Arc::clone(self),
            exec_id: exec_id.to_owned(),
            is_turn,
        }
    }

    /// An exec has ended. True when a turn ended with it; the gate is shut then, and the caller
    /// opens it with [`Doors::open`] when the turn is durable.
    pub fn leave(&self, exec_id: &str) -> bool {
        let mut state = self.state.lock();
        state.owed |= state.inside.remove(exec_id).unwrap_or(false);
        let ended = state.end_turn();
        self.changed.notify_all();
        ended
    }

    /// The turn whose end shut the gate is durable (or will never be). Returns how long the next
    /// turn has been held up: the exposed delay.
    pub fn open(&self) -> Duration {
        let mut state = self.state.lock();
        state.closed = state.closed.saturating_sub(1);
        self.changed.notify_all();
        state.first_wait.map_or(Duration::ZERO, |t| t.elapsed())
    }

    /// Says which checkpoint waits for the host's budget: it becomes urgent when a turn waits at the
    /// gate, and is given up when the sandbox is to die.
    pub fn set_caller(&self, caller: Option<Arc<Caller>>) {
        let mut state = self.state.lock();
        if let Some(caller) = &caller {
            if state.waiting > 0 {
                caller.promote();
            }
            if state.machine.life != Life::Alive {
                caller.give_up();
            }
        }
        state.caller = caller;
    }

    /// Waits until no other cut is under way; none may begin as long as this is held. A client's
    /// checkpoint and a turn's would thaw each other's processes.
    pub fn cut_alone(&self, limit: Duration) -> Option<Alone<'_>> {
        let cut = self.cut.try_lock_for(limit)?;
        Some(Alone {
            dumps: &self.dumps,
            _cut: cut,
        })
    }

    /// How many dumps of its processes have begun, whoever wanted them.
    pub fn dumps(&self) -> u64 {
        self.dumps.load(Ordering::SeqCst)
    }

    /// The kernel marks what is written to since this dump.
    pub fn mark_since(&self, dump: u64) {
        self.marked.store(dump, Ordering::SeqCst);
    }

    /// Whether the kernel's marks are those since the last dump: no further one has begun, which clears them.
    pub fn is_marked(&self) -> bool {
        let dumps = self.dumps();
        dumps != 0 && self.marked.load(Ordering::SeqCst) == dumps
    }

    /// Whether a turn waits to begin.
    pub fn is_awaited(&self) -> bool {
        self.state.lock().waiting > 0
    }

    /// For how long the agent is expected to be away from now on: as at the median of the last turns.
    pub fn expected_absence(&self) -> Duration {
        let state = self.state.lock();
        let gone = state.ended.map_or(Duration::ZERO, |ended| ended.elapsed());
        state.absences.median().saturating_sub(gone)
    }

    /// Shuts the door for a cut and waits until no exec is half-way through it.
    pub fn latch(self: &Arc<Self>, limit: Duration) -> Option<Latched> {
        let end = Instant::now() + limit;
        let mut state = self.state.lock();
        state.latched += 1;
        let latched = Latched(Arc::clone(self));
        while state.starting > 0 {
            if self.changed.wait_until(&mut state, end).timed_out() {
                drop(state);
                return None;
            }
        }
        Some(latched)
    }

    /// How many execs have ever come in: also those that were let in at a latch after [`GATE_LIMIT`].
    pub(super) fn entered(&self) -> u64 {
        self.state.lock().entered
    }

    /// An exec comes in that has waited too long.
    #[cfg(test)]
    pub(super) fn enter_at_once(&self) {
        self.state.lock().entered += 1;
    }

    /// The turn under way is undone: until the returned value is dropped, no turn ends, and then it is
    /// none. Unless that is taken back.
    pub fn void_turn(self: &Arc<Self>) -> Void {
        self.on(Event::Replace);
        Void {
            doors: Arc::clone(self),
            is_over: false,
        }
    }

    /// Something has happened that moves the coordinator.
    pub(crate) fn on(&self, event: Event) {
        self.state.lock().on(event);
    }

    /// Whether it lives, and what is done with it.
    pub fn machine(&self) -> Machine {
        self.state.lock().machine
    }

    /// How many turns wait to begin.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> u32 {
        self.state.lock().waiting
    }

    /// Execs that run now.
    pub fn inside(&self) -> Vec<String> {
        self.state.lock().inside.keys().cloned().collect()
    }

    /// Ends the turn under way, whoever is inside: somebody who knows says so. The gate is shut as
    /// after [`Doors::leave`]; false, and it is not, if the sandbox is to die.
    pub fn end_turn_now(&self) -> bool {
        let mut state = self.state.lock();
        let ended = state.machine.life == Life::Alive;
        state.closed += u32::from(ended);
        if ended {
            state.ended = Some(Instant::now());
        }
        ended
    }

    /// When the turn that ended last had begun. Of execs that live on, another one begins now.
    pub fn take_turn_start(&self) -> Option<OffsetDateTime> {
        let mut state = self.state.lock();
        match state.inside.values().any(|is_turn| *is_turn) {
            true => state.turn_start.replace(OffsetDateTime::now_utc()),
            false => state.turn_start.take(),
        }
    }

    /// The execs that count and run, and since when no turn has ended.
    pub fn turn_under_way(&self) -> Option<(Vec<String>, OffsetDateTime)> {
        let state = self.state.lock();
        let execs = state.inside.iter().filter(|(_, is_turn)| **is_turn);
        let execs: Vec<String> = execs.map(|(exec_id, _)| exec_id.clone()).collect();
        let begin = state.turn_start.filter(|_| !execs.is_empty())?;
        Some((execs, begin))
    }

    /// Whether a cut is to be given up: after [`Doors::give_up`], or [`Doors::fall`].
    pub fn is_dying(&self) -> bool {
        self.state.lock().machine.life != Life::Alive
    }

    /// Whether [`Doors::give_up`] was called: nothing comes back.
    pub fn is_doomed(&self) -> bool {
        self.state.lock().is_doomed()
    }

    /// Waits for [`Doors::give_up`], at most `limit`; whether it was called.
    pub fn wait_doomed(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.state.lock();
        while !state.is_doomed() && !self.changed.wait_until(&mut state, end).timed_out() {}
        state.is_doomed()
    }

    /// Its processes are dead, and others may take their place.
    pub fn fall(&self) {
        let mut state = self.state.lock();
        state.on(Event::Fall);
        if let Some(caller) = &state.caller {
            caller.give_up();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Others have taken their place. The turn of the dead had no end.
    pub fn rise(&self) {
        let mut state = self.state.lock();
        state.on(Event::Rise);
        state.owed = false;
        state.turn_start = None;
        drop(state);
        self.changed.notify_all();
    }

    /// The sandbox is to die.
    pub fn give_up(&self) {
        let mut state = self.state.lock();
        state.on(Event::GiveUp);
        if let Some(caller) = &state.caller {
            caller.give_up();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// It is not: it could not be killed.
    pub fn take_heart(&self) {
        self.on(Event::TakeHeart);
    }
}

/// The one cut under way.
pub struct Alone<'d> {
    dumps: &'d AtomicU64,
    _cut: MutexGuard<'d, ()>,
}

impl Alone<'_> {
    /// A dump begins: which of the sandbox's it is, counted from 1. `upon`: the one that it builds upon,
    /// which must be the last one.
    pub(super) fn begin_dump(&self, upon: Option<u64>) -> Result<u64, CutError> {
        let before = self.dumps.load(Ordering::SeqCst);
        if upon.is_some_and(|upon| upon != before) {
            return Err(CutError::Disturbed(
                "another checkpoint came between this and the one that it builds upon".into(),
            ));
        }
        self.dumps.store(before + 1, Ordering::SeqCst);
        Ok(before + 1)
    }
}

/// An exec on the doorstep.
#[must_use]
pub struct Entering {
    doors: Arc<Doors>,
    exec_id: String,
    is_turn: bool,
}

impl Entering {
    /// The exec runs. True when a turn ended with that, as in [`Doors::leave`]: the last exec that counts
    /// has left while this one, which doesn't, was on the doorstep.
    #[must_use]
    pub fn started(self) -> bool {
        let mut state = self.doors.state.lock();
        state.starting -= 1;
        state.inside.insert(self.exec_id, self.is_turn);
        self.doors.changed.notify_all();
        state.end_turn()
    }

    /// The exec never ran. True when a turn ended with that, as in [`Doors::leave`].
    pub fn failed(self) -> bool {
        let mut state = self.doors.state.lock();
        state.starting -= 1;
        self.doors.changed.notify_all();
        state.end_turn()
    }
}

/// A shut door, until dropped.
pub struct Latched(Arc<Doors>);

impl Drop for Latched {
    fn drop(&mut self) {
        self.0.state.lock().latched -= 1;
        self.0.changed.notify_all();
    }
}

/// See [`Doors::void_turn`].
pub struct Void {
    doors: Arc<Doors>,
    is_over: bool,
}

impl Void {
    /// It is not undone. True when a turn has ended since, as in [`Doors::leave`].
    #[must_use]
    pub fn take_back(mut self) -> bool {
        self.is_over = true;
        let mut state = self.doors.state.lock();
        state.on(Event::Replaced);
        state.end_turn()
    }
}

impl Drop for Void {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let mut state = self.doors.state.lock();
        state.on(Event::Replaced);
        // Of execs that live on the turn goes on.
        if !state.inside.values().any(|is_turn| *is_turn) {
            state.turn_start = None;
            state.owed = false;
        }
    }
}

#[cfg(test)]
mod tests;
