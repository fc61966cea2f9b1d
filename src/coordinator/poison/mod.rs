//! What must not be dumped (D9b): processes that CRIU cannot dump, or dumps with exit code 0 and
//! can never restore, and those that it dumps and leaves something out of.
//!
//! [`Snapshot::read`] takes the facts from `/proc` while the sandbox stands still, [`judge`] knows
//! the rules and touches nothing. What only CRIU finds out is put into words by [`explain`].

mod connections;
mod explain;
mod rules;
mod snapshot;
mod sockets;
#[cfg(test)]
mod tests;
mod watches;

use std::fmt;

pub use explain::explain;
pub use rules::judge;
pub use snapshot::{Descriptor, Kind, Process, Snapshot, SnapshotError};
pub use sockets::{Address, Socket};
pub use watches::Watched;

/// What may be taken of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Everything: no rule speaks against a dump.
    Fine,
    /// Its files alone: a dump of these processes would fail, or be worth nothing.
    FilesOnly(Reasons),
    /// Nothing: not even its files are known to be whole.
    Refuse(Reasons),
}

/// Why, in words for the journal: each names a process and what can be done about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reasons(Vec<String>);

impl Reasons {
    /// So many are shown.
    const SHOWN: usize = 3;

    /// One reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(vec![reason.into()])
    }

    fn add(&mut self, reason: String) {
        // A process with a thousand such files has one cause.
        if !self.0.contains(&reason) {
            self.0.push(reason);
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    pub fn all(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0[..self.0.len().min(Self::SHOWN)].join("; "))?;
        match self.0.len().saturating_sub(Self::SHOWN) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}
