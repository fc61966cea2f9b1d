//! A pack: one file with objects, and, if it is a checkpoint's, its manifest.
//!
//! ```text
//! header   magic, format
//! blocks   zstd, or plain where that is no larger; several objects each
//! table    32 bytes a block: where, how long, checksum
//! fanout   how many objects have digests with lower first bits
//! index    44 bytes an object, by digest: block, offset, kind and length
//! manifest zstd of JSON; none in a pack that holds objects for others alone
//! trailer  lengths and checksums of all of these
//! ```
//!
//! Every byte is covered by some checksum; `docs/store-format.md` has every field.

mod format;
#[cfg(test)]
pub(super) mod hostile;
mod name;
mod reader;
mod squeeze;
mod writer;

pub use format::FORMAT;
pub(super) use format::Place;
pub(super) use name::PackName;
pub(super) use reader::{Pack, Stamp};
pub(super) use writer::{PackWriter, Written};
