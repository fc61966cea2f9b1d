//! The life of a container: its phases, and which request each of them allows.

use std::fmt;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// init waits for Start.
    Created,
    /// Nothing runs yet; Start restores from images.
    CreatedCheckpoint,
    /// init runs.
    Running,
    /// The client has frozen it.
    Paused,
    /// init has ended.
    Stopped,
    /// Nothing is left but the answer to a late question.
    Deleted,
}

/// What a client may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Start init.
    Start,
    /// Delete the container.
    Delete,
    /// Freeze it.
    Pause,
    /// Thaw it.
    Resume,
    /// Change its limits.
    Update,
    /// Dump it.
    Checkpoint,
    /// Add a process.
    Exec,
    /// Signal it.
    Kill,
    /// Go back to one of its checkpoints.
    Rollback,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created | Self::CreatedCheckpoint => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        })
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Delete => "delete",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Exec => "exec in",
            Self::Kill => "kill",
            Self::Rollback => "roll back",
        })
    }
}

/// A request that the container's phase does not allow.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cannot {request} a {phase} container")]
pub struct Refused {
    /// Where the container is.
    pub phase: Phase,
    /// What was asked.
    pub request: Request,
}

impl Phase {
    /// Says whether `request` may be tried in this phase.
    ///
    /// The table is that of containerd's runc shim.
    pub fn allows(self, request: Request) -> Result<(), Refused> {
        use Phase::{Created, CreatedCheckpoint, Deleted, Paused, Running, Stopped};
        use Request::{Checkpoint, Delete, Exec, Kill, Pause, Resume, Rollback, Start, Update};
        let allowed = match request {
            Start => matches!(self, Created | CreatedCheckpoint),
            Delete => matches!(self, Created | CreatedCheckpoint | Stopped),
            Pause => self == Running,
            Resume => self == Paused,
            Update => matches!(self, Created | Running | Paused),
            Checkpoint | Rollback => matches!(self, Running | Paused),
            Exec => matches!(self, Created | Running),
            Kill => !matches!(self, Deleted),
        };
        if allowed {
            Ok(())
        } else {
            Err(Refused {
                phase: self,
                request,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Phase::*, Request::*};

    #[test]
    fn every_phase_allows_what_containerds_shim_allows() {
        let requests = [
            Start, Delete, Pause, Resume, Update, Checkpoint, Exec, Kill, Rollback,
        ];
        let table = [
            (Created, "SD..U.EK."),
            (CreatedCheckpoint, "SD.....K."),
            (Running, "..P.UCEKB"),
            (Paused, "...RUC.KB"),
            (Stopped, ".D.....K."),
            (Deleted, "........."),
        ];
        for (phase, row) in table {
            for (request, letter) in requests.into_iter().zip(row.chars()) {
                assert_eq!(
                    phase.allows(request).is_ok(),
                    letter != '.',
                    "{request:?} in {phase:?}"
                );
            }
        }
    }

    #[test]
    fn a_refusal_says_what_and_why() {
        let refused = Stopped.allows(Exec).unwrap_err();
        assert_eq!(refused.to_string(), "cannot exec in a stopped container");
    }
}
