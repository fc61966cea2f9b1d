//! Whether a sandbox's processes are still what they were at the last full dump P (DESIGN.md, D6).
//!
//! Written N below for the moment of the look, F for the files. The answer *unchanged* means:
//! P's image, with the files of N, is a state that the sandbox could have been in at N. Everything
//! here is evidence against it; where evidence is missing, the answer is *changed*.
//!
//! ```text
//! Baseline::take      in P's freeze, after CRIU: counters, descriptors, queues, mappings, …
//! Baseline::settle    after the thaw, once all tasks have blocked again
//! Baseline::quick     nothing ran at all: two small files of /proc
//! Snapshot::take      the same things at N; then the facts of BPF and the shim are read
//! Baseline::verdict   each process is acquitted by one rule, or the sandbox has changed
//! ```
//!
//! # The rules
//! The set is the processes of P; all of them must still be there, and no other.
//!
//! **(a) not run**: no thread was given a CPU, nothing was put into the queues of its descriptors,
//! nobody set anything for it, no signal was queued. A process that does not run changes nothing
//! of itself; what others can do to it is compared, or is a *limit* below.
//!
//! **(b) equal**: memory, all registers and descriptors equal the image. Only if somebody can read
//! the registers: a loop may count in one while memory, stack pointer and program counter stay.
//!
//! **(c) consistent cut**: it ran, and no datum went from it to anybody, and none that was meant
//! for it from anybody to it. Let X be what happened from P to N. Take the steps of the processes
//! acquitted so out of X, and put them after all others. No other step saw an effect of theirs (none
//! left the set: no file, socket, pipe, signal, or shared object was written by them), so it can be
//! taken just as it was, and gives the same F and the same messages to the outside. The order of
//! steps of different processes promises nothing to anybody; a slow CPU could have made this one.
//! So at N of the reordered history the files are F, and the set is as P left it: the image is a
//! true state. And no step of theirs took something away that now would be lost (a message read
//! from a pipe would be in neither the old memory nor the newer pipe); reading a file takes nothing
//! away. What the set exchanged within itself (stores to its own shared memory) is undone on both
//! sides, since all of the set comes from P. A process of the set that is *not* acquitted changes
//! the whole sandbox, so none of the others needs to be consistent with its newer state.
//!
//! What is lost is the work of a process that told nobody: timers, caches, a statistics counter.
//! That is bounded by CPU time ([`Settings::cpu_limit`]), never more than [`CUT_CPU_CEILING`].
//!
//! # Order of reading
//! Processes first, then `facts`. All evidence only adds up from P on (counters, sticky flags, the
//! watches), so what the snapshot misses since it happened later is in the facts, or in the next
//! look. The other way round a message could be in a queue when facts are read, be received, and be
//! in neither. A queue is not a counter: two equal readings hide what went through, which is why a
//! process that ran needs the flags and the watches besides.
//!
//! # Limits
//! docs/inspector-processes.md goes through the attacks. These get past (a) or (c), none past (b):
//! an exec that writes the memory of a sleeping process (`/proc/PID/mem` is told by
//! [`KernelFacts::memory_reached`]; `process_vm_writev` is not); a tracer that ignores SIGCHLD; a
//! connection without a byte to a unix socket; observing what a process shows of itself (a lock
//! taken and given back, memory peeked at).

mod baseline;
mod descriptors;
mod facts;
mod image;
mod ipc;
mod judge;
mod maps;
mod memory;
mod network;
mod proc_fs;
mod queues;
mod references;
mod rest;
mod snapshot;
mod stillness;
mod tasks;
mod traveller;
mod watches;
mod world;

#[cfg(test)]
mod tests;

pub use baseline::{Baseline, Settled};
pub use facts::{
    Acquittal, COMPARED_BYTES, CUT_CPU_CEILING, CUT_CPU_FLOOR, CUT_CPU_PER_MILLE, Did, KernelFacts,
    Others, Reason, Settings, Verdict, What,
};
pub use image::{ImageDir, ImageFile, Images};
pub use maps::shared_memory;
pub use memory::{Marks, no_marks};
pub use proc_fs::ProcessError;
pub use references::references;
pub use rest::Rest;
pub use snapshot::{MAX_PROCESSES, MAX_TASKS, Registers, Snapshot, no_registers};
pub use stillness::Stillness;
