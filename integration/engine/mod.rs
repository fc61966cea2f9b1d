//! What the engine is tried with: for its unit tests, and for the example `engine_sim`.

pub mod audit;
mod checks;
mod cpus;
pub mod random;
pub mod setup;
pub mod simulation;
