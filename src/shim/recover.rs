//! Recovery in place: a sandbox that has died without having been asked to goes on from its last
//! checkpoint with processes, and its clients see the same container (D13).
//!
//! It is a rollback of what is dead already. The pid that the client was told stays, as an unreaped
//! zombie; init's streams are held open by the shim, so that its death is not their end. What a client
//! asks for meanwhile waits, and death alone does not.

use std::{path::Path, sync::Arc};

use super::{
    container::{Container, Inner},
    error::{Context, ShimError},
    going_back::GoingBack,
    reaper::Exit,
    rollback::{LATCH_LIMIT, end_with, replace, wait_for_the_dead},
    state::{Phase, Request},
};
use crate::{
    config::Recover,
    coordinator::{
        cut::Scene,
        recovery::Lost,
        rollback::{Failure, Step, Steps},
    },
    sandbox::TurnNo,
    store::Laid,
};

/// What becomes of a container whose init has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Its end is told.
    Told,
    /// It is to come back.
    Recovers,
    /// It had just come back, or not quite: whoever brings it back sees to it.
    Again,
}

/// Whether a signal is sent to end a process. Others tell it something: to read its configuration, that
/// its terminal has another size, or to stand still.
fn ends(signal: i32) -> bool {
    !matches!(
        signal,
        libc::SIGHUP
            | libc::SIGUSR1
            | libc::SIGUSR2
            | libc::SIGWINCH
            | libc::SIGCHLD
            | libc::SIGURG
            | libc::SIGCONT
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
    )
}

impl Inner {
    /// A client signals init.
    pub(super) fn note_signal(&mut self, signal: i32) {
        self.asked_to_end |= ends(signal);
        self.last_signal = Some(signal);
    }

    /// Whether an end of init is as it should be: a success, or what a client wanted.
    pub(super) fn is_clean(&self, exit: Exit) -> bool {
        let by_signal = |signal| exit.status == 128 + signal as u32;
        exit.status == 0 || self.asked_to_end || self.last_signal.is_some_and(by_signal)
    }

    /// The end of the init that has just come back and has this pid; not that of an earlier try.
    pub(super) fn take_fallen(&mut self, pid: i32) -> Option<Exit> {
        self.fell_again.take().filter(|exit| exit.pid == pid)
    }
}

impl Container {
    /// Whether it is configured to come back.
    pub(super) fn recovers(&self) -> bool {
        self.config.enabled && self.config.recover == Recover::Last
    }

    /// init has ended: the one with the pid in `exit`.
    pub(super) fn init_exited(self: &Arc<Self>, exit: Exit) {
        match self.fate(exit) {
            Fate::Told => self.init_ended(self.as_told(exit)),
            Fate::Recovers => recover(self, self.as_told(exit)),
            Fate::Again => {}
        }
    }

    /// With the pid that the client knows.
    pub(super) fn as_told(&self, exit: Exit) -> Exit {
        let pid = self.init.pid();
        Exit { pid, ..exit }
    }

    fn fate(&self, exit: Exit) -> Fate {
        let mut inner = self.inner.lock();
        let pid = self.init.live_pid();
        // What an earlier try had brought back and was ended with it.
        if exit.pid != pid {
            return Fate::Again;
        }
        if self.host.reaper().keeps(pid) {
            inner.told_zombie = Some(pid);
        }
        let comes_back = [GoingBack::Returning, GoingBack::Recovering];
        if inner.going_back.is_some_and(|it| comes_back.contains(&it)) {
            inner.fell_again = Some(exit);
            return Fate::Again;
        }
        let runs = matches!(inner.phase, Phase::Running | Phase::Paused) && !inner.starting;
        let may = self.recovers()
            && self.turns.get().is_some()
            && runs
            // A rollback that has not begun to replace it finds it dead.
            && matches!(inner.going_back, None | Some(GoingBack::Begun))
            && inner.told_zombie.is_some()
            && !inner.is_clean(exit)
            && !self.doors.is_doomed();
        if !may {
            return Fate::Told;
        }
        // In one step for every client: from here on it is not dead.
        inner.going_back = Some(GoingBack::Recovering);
        self.doors.fall();
        Fate::Recovers
    }
}

/// Brings it back, as often as it dies and may; else tells its end.
fn recover(container: &Arc<Container>, mut exit: Exit) {
    // A cut of the dead comes to nothing, and nobody is held frozen by it.
    container.release();
    let Ok(_alone) = container.alone(Request::Rollback) else {
        return container.init_ended(exit);
    };
    let mut touched = false;
    loop {
        match attempt(container, exit) {
            Ok(_) => {
                let mut inner = container.inner.lock();
                let Some(again) = inner.take_fallen(container.init.live_pid()) else {
                    // What was asked of the dead does not concern those who live.
                    inner.last_signal = None;
                    container.doors.rise();
                    return container.kill_restored_with(inner);
                };
                exit = container.as_told(again);
                // Its work was done, or a client wants no more of it.
                if inner.is_clean(exit) {
                    break;
                }
            }
            Err(Lost::Failed(_)) => touched = true,
            Err(Lost::GivenUp(_)) => break,
        }
    }
    if touched {
        return end_with(container, exit);
    }
    let mut inner = container.inner.lock();
    inner.going_back = None;
    inner.kill_at_start = None;
    inner.fell_again = None;
    drop(inner);
    container.init_ended(exit);
}

fn attempt(container: &Arc<Container>, exit: Exit) -> Result<TurnNo, Lost> {
    let gone = || Lost::GivenUp("it takes no turns".into());
    let turns = container.turns.get().ok_or_else(gone)?;
    let this = Arc::clone(container);
    turns.recover(
        describe(exit),
        Box::new(move |turn, laid, scratch| bring_back(&this, turn, &laid, scratch)),
    )
}

fn describe(exit: Exit) -> String {
    match i32::try_from(exit.status) {
        Ok(status) if (129..=192).contains(&status) => {
            format!("init was killed by signal {}", status - 128)
        }
        _ => format!("init ended with exit code {}", exit.status),
    }
}

/// The shim's part, between the checks and the line in the journal.
fn bring_back(
    container: &Arc<Container>,
    turn: TurnNo,
    laid: &Arc<Laid>,
    scratch: &Path,
) -> Result<Steps, Failure> {
    let untouched = |e: ShimError| Failure::Untouched(e.message);
    let ended = |e: ShimError| Failure::Ended(e.message);
    let mut steps = Steps::begin();
    let _latched = container.doors.latch(LATCH_LIMIT).ok_or_else(|| {
        Failure::Untouched(format!("an exec has been starting for {LATCH_LIMIT:?}"))
    })?;
    let place = container.place().map_err(untouched)?;
    wait_for_the_dead(container, &place).map_err(untouched)?;
    steps.done(Step::Kill);
    // What they have said is still delivered.
    container.drain();
    if let Some(io) = container.init.io() {
        let pipes = io.make_pipes().context("make new pipes");
        io.switch_to(pipes.map_err(untouched)?);
    }
    // A client's wish that it die comes after this, or is seen below.
    place.freeze.revive();
    drop(place);
    replace(container, turn, laid, scratch, &mut steps).map_err(ended)?;
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_told_as_a_person_would() {
        let exit = |status| Exit {
            pid: 1,
            status,
            at: time::OffsetDateTime::UNIX_EPOCH,
        };
        assert_eq!(describe(exit(3)), "init ended with exit code 3");
        assert_eq!(describe(exit(137)), "init was killed by signal 9");
        assert_eq!(describe(exit(128)), "init ended with exit code 128");
        assert_eq!(describe(exit(255)), "init ended with exit code 255");
    }
}
