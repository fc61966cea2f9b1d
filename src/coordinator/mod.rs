//! When to act: turn boundaries, the doors of a sandbox, its freezer, and the consistent cut.

pub mod budget;
mod changed;
mod compare;
pub mod cut;
pub mod doors;
pub mod freeze;
mod inspection;
mod memory_files;
pub mod poison;
mod processes;
mod references;
pub mod rollback;
mod stand_still;
mod stored_images;
mod take;
pub mod turns;
