//! crab: a containerd shim v2 that gives every agent sandbox a restore point after each turn.

// What tests share with examples names the crate as examples do.
#[cfg(test)]
extern crate self as crab;

pub mod cgroup;
pub mod cli;
pub mod config;
pub mod content;
pub mod control;
pub mod coordinator;
pub mod digest;
pub mod engine;
pub mod inspector;
pub mod memory;
pub mod packet_lock;
mod page_map;
pub mod rootfs;
pub mod runtime;
pub mod sandbox;
pub mod shim;
pub mod slot_lock;
pub mod store;
#[cfg(test)]
mod test_child;
pub mod tree;
