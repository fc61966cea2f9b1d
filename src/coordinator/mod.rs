//! When to act: turn boundaries, the doors of a sandbox, its freezer, and the consistent cut.

pub mod cut;
pub mod doors;
pub mod freeze;
mod inspection;
mod memory_files;
pub mod poison;
mod processes;
pub mod rollback;
mod stored_images;
pub mod turns;
