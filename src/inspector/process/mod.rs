//! Whether a sandbox's processes are still what they were at dump P. (Doc to come.)

mod baseline;
mod descriptors;
mod facts;
mod image;
mod judge;
mod maps;
mod memory;
mod proc_fs;
mod snapshot;
mod socket;
mod tasks;
mod watches;
mod world;

#[cfg(test)]
mod tests;

pub use baseline::{Baseline, Settled};
pub use facts::{
    Acquittal, COMPARED_BYTES, CUT_CPU_CEILING, CUT_CPU_FLOOR, CUT_CPU_PER_MILLE, Did, KernelFacts,
    Others, Reason, Settings, Verdict, What,
};
pub use proc_fs::ProcessError;
pub use snapshot::{MAX_PROCESSES, MAX_TASKS, Registers, Snapshot, no_registers};
