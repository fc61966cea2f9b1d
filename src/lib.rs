//! crab: a containerd shim v2 that gives every agent sandbox a restore point after each turn.

pub mod sandbox;
