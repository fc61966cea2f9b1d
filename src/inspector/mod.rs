//! Which turn changed what: the programs in `bpf/` mark what changes in a sandbox in maps of the
//! kernel, and this reads them. See docs/inspector.md.
//!
//! What is lost, overflowed or not understood counts as changed, with the reason.

mod abi;
mod dirty;
mod epoch;
mod host;
mod joined;
mod load;
mod makers;
pub mod offers;
mod probes;
pub mod process;
mod slots;
mod sys;
#[cfg(test)]
mod tests;
mod watch;

pub use abi::did_bits;
pub use dirty::{Dirty, Happened, How, Inode};
pub use host::sweep;
pub use joined::Joined;
pub use load::{FAILPOINT, WORD, load, load_without};
pub use probes::ProbeSet;
pub use watch::{Subject, Watch};
