//! The engine: what a host may spend on checkpoints, and on whom first (D10).
//!
//! There is no daemon. The shims of a host share a [`Table`] of words in a file below `/run/crab`; each
//! protected sandbox is a [`Member`] with a slot in it. A member asks before it captures, with a number
//! of bytes that it expects to write; it is granted when it is its turn and there are tokens for them;
//! and when all is written it settles what it has really taken. What others hold is read from their
//! slots each time; a slot whose member is dead counts for nothing, as its lock tells.
//!
//! From the inside out: [`Bucket`] is the token bucket in one word; [`View::decide`] says, of one look at
//! the table, whose turn it is; [`Seat`] is one member's protocol, with the time as an argument; [`Member`]
//! adds the file, the clock, and a futex to sleep on. Tests drive seats in virtual time.
//!
//! [`plan`] decides what a checkpoint is to be, and what to ask for.
//!
//! The rules, and what is promised under which fault: `docs/engine.md`.

mod bucket;
mod decide;
mod estimator;
mod file;
mod limits;
mod mapping;
mod member;
mod moment;
mod planner;
mod report;
mod seat;
mod status;
mod table;

pub use bucket::Bucket;
pub use decide::{Seen, Verdict, View, Why};
pub use estimator::{Costs, Estimator};
pub use file::other_versions;
pub use limits::{Limits, Terms};
pub use member::{Caller, Denied, Grant, Member};
pub use moment::Moment;
pub use planner::{Action, Dump, Plan, PreDumps, Reason, Situation, plan};
pub use report::{Report, Row, Sums};
pub use seat::{Next, Others, Proposal, Request, Seat};
pub use status::{Class, Phase, Status, Work};
pub use table::{SLOTS, Table};

#[cfg(test)]
mod tests;
