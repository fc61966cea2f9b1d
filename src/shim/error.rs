//! Errors as containerd's client sees them.

use std::fmt::Display;

use containerd_shim::protos::ttrpc::{self, Code};

use super::state::{Phase, Refused};
use crate::sandbox::BadName;

/// What kind of no it is. containerd's clients act on this alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// No such container or process.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Not in this phase of its life.
    FailedPrecondition,
    /// The request makes no sense.
    InvalidArgument,
    /// It was tried and failed.
    Failed,
}

/// A request that was not fulfilled.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ShimError {
    /// For programs.
    pub kind: Kind,
    /// For people.
    pub message: String,
}

/// What a request comes to.
pub type Result<T> = std::result::Result<T, ShimError>;

impl ShimError {
    /// An error of this kind.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// No such thing.
    pub fn not_found(what: impl Display) -> Self {
        Self::new(Kind::NotFound, format!("{what}: not found"))
    }
}

/// Says which step failed.
pub trait Context<T> {
    /// Turns an error into [`Kind::Failed`] with `step` in front of it.
    fn context(self, step: impl Display) -> Result<T>;
}

impl<T, E: Display> Context<T> for std::result::Result<T, E> {
    fn context(self, step: impl Display) -> Result<T> {
        self.map_err(|e| ShimError::new(Kind::Failed, format!("{step}: {e}")))
    }
}

impl From<Refused> for ShimError {
    fn from(refused: Refused) -> Self {
        let kind = match refused.phase {
            // It goes from the service's list a moment later.
            Phase::Deleted => Kind::NotFound,
            _ => Kind::FailedPrecondition,
        };
        Self::new(kind, refused.to_string())
    }
}

impl From<BadName> for ShimError {
    fn from(bad: BadName) -> Self {
        Self::new(Kind::InvalidArgument, bad.to_string())
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let code = match error.kind {
            Kind::NotFound => Code::NOT_FOUND,
            Kind::AlreadyExists => Code::ALREADY_EXISTS,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::Failed => Code::UNKNOWN,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.message))
    }
}
