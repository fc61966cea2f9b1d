//! When to act: turn boundaries, the doors of a sandbox, its freezer, and the consistent cut.

pub mod budget;
mod changed;
mod compare;
pub mod cut;
mod cut_error;
pub mod doors;
mod early;
pub mod freeze;
mod inspection;
mod look;
pub mod machine;
mod memory_files;
pub mod poison;
mod processes;
pub mod recovery;
mod references;
pub mod rollback;
mod rollback_files;
mod stand_still;
mod stored_images;
pub mod subject;
mod take;
pub mod turns;
pub mod view;
mod wanted;
mod without_processes;
mod worker;
