//! Signals, and that death waits for nothing (D7b).

use parking_lot::MutexGuard;

use super::{
    container::{Container, Inner},
    error::{Kind, Result, ShimError},
    going_back::GoingBack,
    process::Step,
    reaper::Exit,
    state::{Phase, Request},
};
use crate::coordinator::doors::{Alone, GATE_LIMIT};

/// Signals that stop a process.
const STOPS: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

impl Container {
    /// Signals init, an exec, or (`all`) every process.
    pub fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let process = self.process(exec_id)?;
        self.phase().allows(Request::Kill)?;
        let signal = i32::try_from(signal)
            .ok()
            .filter(|s| (1..=64).contains(s))
            .ok_or_else(|| {
                ShimError::new(Kind::InvalidArgument, format!("{signal} is no signal"))
            })?;
        if exec_id.is_empty() {
            self.inner.lock().note_signal(signal);
        }
        if exec_id.is_empty() && (self.kill_before_restore(signal) || self.kill_going_back(signal))
        {
            return Ok(());
        }
        let deadly = signal == libc::SIGKILL && exec_id.is_empty();
        if deadly {
            self.doors.give_up();
        }
        let sent = if all && exec_id.is_empty() && self.init.step() == Step::Running {
            match deadly {
                true => self.signal_all(signal),
                false => self.signal_all_between_cuts(signal),
            }
        } else {
            // CRIU waits for ever for a process that is stopped under its hands.
            let _no_cut = STOPS.contains(&signal).then(|| self.no_cut()).transpose()?;
            process.signal(signal)
        };
        match &sent {
            Ok(()) if deadly => self.release(),
            Err(e) if deadly && e.kind != Kind::NotFound => self.doors.take_heart(),
            _ => {}
        }
        sent
    }

    fn signal_all(&self, signal: i32) -> Result<()> {
        let sent = self.runtime.kill_all(self.sandbox.id(), signal);
        sent.map_err(|e| {
            let gone = e.is_unknown_container() || e.to_string().contains("not running");
            let kind = if gone { Kind::NotFound } else { Kind::Failed };
            ShimError::new(kind, format!("{}: {e}", self.sandbox))
        })
    }

    /// The runtime freezes those whom it signals, and thaws them, whoever else wants them frozen: not while a
    /// cut does, and the client still does afterwards.
    fn signal_all_between_cuts(&self, signal: i32) -> Result<()> {
        let _no_cut = self.no_cut()?;
        let sent = self.signal_all(signal);
        let kept = self.place().map(|place| place.freeze.keep_paused());
        if let Ok(Err(e)) = kept {
            log::warn!("{}: paused, and signalled: {e}", self.sandbox);
        }
        sent
    }

    /// Waits until no cut is under way; none begins as long as this is held.
    fn no_cut(&self) -> Result<Alone<'_>> {
        self.doors.cut_alone(GATE_LIMIT).ok_or_else(|| {
            let text = format!("{}: kill: a checkpoint does not end", self.sandbox);
            ShimError::new(Kind::Failed, text)
        })
    }

    /// Signals an init that no image has been read for yet; false if there is one.
    fn kill_before_restore(&self, signal: i32) -> bool {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::CreatedCheckpoint || self.init.pid() != 0 {
            return false;
        }
        if inner.busy {
            inner.kill_at_start = Some(signal);
        } else {
            // There is no process yet: this is the end of a container that never began.
            inner.init_exit = Some(never_began(signal));
            self.tell_init_exit(inner);
        }
        true
    }

    /// Signals an init that is being rolled back; false if none is. The processes that come hear of
    /// it. Death alone does not wait for that.
    fn kill_going_back(&self, signal: i32) -> bool {
        let deadly = signal == libc::SIGKILL;
        let mut inner = self.inner.lock();
        match inner.going_back {
            None => return false,
            // The processes are still the old ones.
            Some(GoingBack::Begun) if deadly => return false,
            _ => {}
        }
        if inner.kill_at_start != Some(libc::SIGKILL) {
            inner.kill_at_start = Some(signal);
        }
        drop(inner);
        if deadly {
            self.doors.give_up();
            self.release();
        }
        true
    }

    /// The restore is over: a signal that came meanwhile reaches what it has made.
    pub(super) fn kill_restored(&self) {
        self.kill_restored_with(self.inner.lock());
    }

    pub(super) fn kill_restored_with(&self, mut inner: MutexGuard<'_, Inner>) {
        inner.going_back = None;
        // Death may have been on its way to those who are gone.
        let deadly = Some(libc::SIGKILL).filter(|_| self.doors.is_doomed() && !inner.init_gone);
        let Some(signal) = deadly.or(inner.kill_at_start.take()) else {
            return;
        };
        if self.init.pid() == 0 {
            inner.init_exit = Some(never_began(signal));
        } else if let Err(e) = self.init.signal(signal) {
            log::warn!("{}: {e}", self.sandbox);
        }
    }

    /// A frozen process does not die (v1): whoever holds it lets go, and nobody freezes it again.
    pub(super) fn release(&self) {
        let place = self.place.read().clone();
        if let Some(place) = place {
            place.freeze.release_for_death();
        }
    }
}

/// The end of an init that was killed before it had a process.
fn never_began(signal: i32) -> Exit {
    Exit {
        pid: 0,
        status: 128 + signal as u32,
        at: time::OffsetDateTime::now_utc(),
    }
}
