//! When to act: turn boundaries, the doors of a sandbox, its freezer, and the consistent cut.

pub mod cut;
pub mod doors;
pub mod freeze;
mod inspection;
mod memory_files;
mod processes;
pub mod rollback;
pub mod turns;
