//! The files of a sandbox: where its writable layer is, how it is mounted, what of it has changed, and
//! how another is put into its place.
//!
//! The writable layer of a mounted overlay is read, never edited: the kernel keeps showing what it
//! cached. A state is put back as a *new* upper directory while nothing is mounted (D13).

pub mod layer;
pub mod merged;
mod mount;
mod mounted;
mod mountinfo;
mod overlay;
mod put_back;

#[cfg(test)]
mod tests;

pub use mount::{MountError, MountSpec, mount_all, unmount, unmount_below, unmount_busy_is_error};
pub use mounted::Mounted;
pub(crate) use mountinfo::{MountEntry, parse_mountinfo};
pub use overlay::{NoOverlay, Overlay};
pub use put_back::{PutBackError, Replaced, put_back, remount_with};

/// How names begin of what crab leaves beside an upper directory when it is interrupted.
pub(crate) const LEFTOVER: &str = ".crab-";
