//! What a sandbox's writable layer held at the last capture, and what has changed since.
//!
//! The kernel names inodes that may have changed, the *candidates*. [`Layer`] is an index of the
//! layer (overlay's upper directory) as it was captured: names, inodes, attributes, and digests of
//! contents. [`Layer::compare`] looks at the candidates alone and says which names differ by the
//! definition in `docs/state.md`. It costs time in proportion to the candidates, not to the layer.
//!
//! Three rules that everything here follows:
//! - An inode is acquitted by equal content and equal attributes, never by an equal ctime.
//! - Whatever comes or goes in a directory makes that directory a candidate. So a directory that is
//!   no candidate holds the names it held, under the inodes it held.
//! - A name with another inode is no change by itself: inode numbers are no part of a state.
//!
//! The order of calls around one capture: `compare` while the sandbox is frozen, then
//! [`Layer::apply`] once the capture is durable (also of an empty comparison, if the candidates are
//! then forgotten: the index has to learn new inode numbers) and [`Layer::learn`] of the digests that
//! the comparison did not need and the capture knows.

mod apply;
mod changes;
mod compare;
mod content;
mod deep;
mod delta;
mod facts;
mod fingerprint;
mod index;
mod learn;
mod links;
mod listing;
mod read;

#[cfg(test)]
mod tests;

pub use apply::ApplyError;
pub use changes::{Attributes, Candidate, Change, Comparison, LARGE, Now, Scope, What};
pub use fingerprint::{Fingerprint, Limits, holds_files};
pub use index::Layer;
