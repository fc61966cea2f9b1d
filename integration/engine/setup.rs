//! What a simulated host is like, and what came of it.

use std::time::Duration;

use crab::engine::{Limits, Terms};

use super::audit::Times;

/// What the agents of a host do.
#[derive(Clone, Copy)]
pub struct Load {
    /// How long a tool runs, at the mean.
    pub tool: Duration,
    /// How long a model takes, at the median.
    pub model: Duration,
    /// The share of turns that change something.
    pub changing: f64,
    /// The share of these that need a dump.
    pub dumping: f64,
    /// Bytes of files, and of a dump, at the median.
    pub files: f64,
    pub dump: f64,
    /// Whether CPUs are scarce.
    pub cpus: Option<Busy>,
}

/// CPUs, shared evenly among the dumps and captures and the sandboxes' own work.
#[derive(Clone, Copy)]
pub struct Busy {
    pub number: u32,
    /// What a tool wants of one, at the mean, after it has run for [`Load::tool`].
    pub own: Duration,
    /// What a dump wants of one, besides what it takes by its size.
    pub dump: Duration,
}

/// How often something goes wrong.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    /// The share of steps at which a member dies.
    pub deaths: f64,
    /// The share of steps at which a member is stopped.
    pub stops: f64,
    /// For how long, at the mean.
    pub stopped: Duration,
}

#[derive(Clone, Copy)]
pub struct Setup {
    pub seed: u64,
    pub sandboxes: u32,
    /// No turn begins after this.
    pub lasting: Duration,
    pub limits: Limits,
    pub terms: Terms,
    pub load: Load,
    pub faults: Faults,
    /// What the disk really does, in bytes per second.
    pub disk: u64,
}

/// What came of it.
pub struct Outcome {
    pub checkpoints: u64,
    pub deaths: u64,
    pub stops: u64,
    /// From asking to the grant, of those for whom nobody waited.
    pub normal: Times,
    /// From the moment at which somebody waited to the grant, of the others.
    pub urgent: Times,
    /// How long agents stood at the gate, of all turns.
    pub exposed: Times,
    /// The same, of the turns with a dump.
    pub exposed_dumps: Times,
    /// How long tools took for what they wanted of a CPU, if CPUs are scarce.
    pub own: Times,
    /// The longest queue.
    pub queue: usize,
    /// Most bytes of any window beyond the rate, and what the engine promises.
    pub excess: u64,
    pub promised: u64,
    /// Bytes that were written per second.
    pub used: u64,
}
