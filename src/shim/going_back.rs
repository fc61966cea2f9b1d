//! How far a rollback or a recovery is, and what its steps find of what has happened to init meanwhile.

use std::time::{Duration, Instant};

use super::{
    container::Container,
    error::{Kind, Result, ShimError},
    reaper::Exit,
    state::Phase,
};

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GoingBack {
    /// The processes are still those that shall go.
    Begun,
    /// They are gone, or as good as that.
    Replacing,
    /// Those of a checkpoint take their place: it is they who may die now.
    Returning,
    /// They have died, and others are to take their place.
    Recovering,
}

impl Container {
    /// From now on signals for init are kept for the processes that come.
    pub(super) fn begin_going_back(&self) -> Result<()> {
        let mut inner = self.inner.lock();
        // Its death came first: whoever waits for us brings it back.
        if inner.going_back.is_some() {
            return Err(fallen());
        }
        inner.going_back = Some(GoingBack::Begun);
        drop(inner);
        self.still_wanted()
    }

    pub(super) fn is_recovering(&self) -> bool {
        self.inner.lock().going_back == Some(GoingBack::Recovering)
    }

    /// From here on it is a restored init that ends.
    pub(super) fn begin_returning(&self) {
        let mut inner = self.inner.lock();
        if inner.going_back == Some(GoingBack::Replacing) {
            inner.going_back = Some(GoingBack::Returning);
        }
    }

    /// However it went. A recovery that waits for that goes on from here. Returns the end of a restored init, which
    /// nobody has seen to yet.
    pub(super) fn end_going_back(&self) -> Option<Exit> {
        let mut inner = self.inner.lock();
        if inner.going_back == Some(GoingBack::Recovering) {
            return None;
        }
        let fallen = inner.take_fallen(self.init.live_pid());
        self.kill_restored_with(inner);
        fallen
    }

    /// An error if the container has ended, or is to be.
    pub(super) fn still_wanted(&self) -> Result<()> {
        let inner = self.inner.lock();
        let why = match inner.phase {
            Phase::Running | Phase::Paused if self.doors.is_doomed() => "it is being killed",
            Phase::Running | Phase::Paused if inner.init_gone => "its init has ended",
            Phase::Running | Phase::Paused => return Ok(()),
            _ => "it has ended",
        };
        Err(ShimError::new(Kind::FailedPrecondition, why))
    }

    /// From here on the end of init is not the end of the task.
    pub(super) fn begin_replacing(&self) -> Result<()> {
        self.still_wanted()?;
        let mut inner = self.inner.lock();
        if inner.going_back == Some(GoingBack::Recovering) {
            return Err(fallen());
        }
        let (told, now) = (self.init.pid(), self.init.live_pid());
        let reaper = self.host.reaper();
        let mine = match told == now {
            true => reaper.keep(now),
            false => reaper.disclaim(now),
        };
        if !mine {
            return Err(ShimError::new(Kind::Failed, "its init has ended"));
        }
        if told == now {
            inner.told_zombie = Some(told);
        }
        inner.going_back = Some(GoingBack::Replacing);
        Ok(())
    }

    /// Waits until the end of every exec has been told.
    pub(super) fn wait_for_execs(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let mut inner = self.inner.lock();
        while inner.running_execs > 0 {
            if self.changed.wait_until(&mut inner, end).timed_out() {
                let text = format!("killed execs are not gone after {limit:?}");
                return Err(ShimError::new(Kind::Failed, text));
            }
        }
        Ok(())
    }
}

fn fallen() -> ShimError {
    ShimError::new(Kind::FailedPrecondition, "its init has died")
}
