//! Prints how long agents wait for the host's budget, for more and more sandboxes.

#[path = "mod.rs"]
mod engine;

use std::{num::NonZeroU64, time::Duration};

use crab::engine::{Limits, Terms};
use engine::{
    audit::Times,
    simulation::{Faults, Load, Outcome, Setup, run},
};

/// Sandboxes, and for how many seconds.
const DENSITIES: [(u32, u64); 5] = [
    (60, 600),
    (600, 300),
    (2_500, 120),
    (5_000, 60),
    (10_000, 40),
];

fn main() {
    let seed = std::env::args().nth(1).and_then(|word| word.parse().ok());
    let seed = seed.unwrap_or(1);
    println!("400 MB/s, burst 400 MB, 4 dumps at once, 2 GiB undrained; seed {seed}");
    println!(
        "{:>9}  {:>11}  {:>8}  {:>20}  {:>20}  {:>20}  {:>6}  {:>7}  faults",
        "sandboxes",
        "checkpoints",
        "written",
        "wait of normal",
        "wait of urgent",
        "exposed",
        "queue",
        "excess"
    );
    println!(
        "{:>9}  {:>11}  {:>8}  {3}  {3}  {3}  {4:>6}  {5:>7}",
        "",
        "",
        "MB/s",
        format_args!("{:>6}{:>7}{:>7}", "p50", "p99", "max"),
        "most",
        "/ burst"
    );
    for faulty in [false, true] {
        for (sandboxes, seconds) in DENSITIES {
            print(
                sandboxes,
                faulty,
                run(setup(seed, sandboxes, seconds, faulty)),
            );
        }
    }
}

fn setup(seed: u64, sandboxes: u32, seconds: u64, faulty: bool) -> Setup {
    Setup {
        seed,
        sandboxes,
        lasting: Duration::from_secs(seconds),
        limits: Limits {
            rate: NonZeroU64::new(400_000_000),
            burst: 400_000_000,
            dumps: 4,
            undrained: 2 << 30,
        },
        terms: Terms::default(),
        load: Load {
            tool: Duration::from_secs(3),
            model: Duration::from_secs(6),
            changing: 0.25,
            dumping: 0.2,
            files: 1e6,
            dump: 25e6,
        },
        faults: match faulty {
            true => Faults {
                deaths: 0.002,
                stops: 0.002,
                stopped: Duration::from_secs(5),
            },
            false => Faults::default(),
        },
        disk: 800_000_000,
    }
}

fn print(sandboxes: u32, faulty: bool, mut outcome: Outcome) {
    let times = |times: &mut Times| {
        let shown = [0.5, 0.99, 1.0].map(|share| format!("{:.3}", times.at(share).as_secs_f64()));
        format!("{:>6}{:>7}{:>7}", shown[0], shown[1], shown[2])
    };
    println!(
        "{sandboxes:>9}  {:>11}  {:>8.1}  {}  {}  {}  {:>6}  {:>7.2}  {}",
        outcome.checkpoints,
        outcome.used as f64 / 1e6,
        times(&mut outcome.normal),
        times(&mut outcome.urgent),
        times(&mut outcome.exposed),
        outcome.queue,
        outcome.excess as f64 / outcome.promised as f64,
        match faulty {
            true => format!("{} deaths, {} stops", outcome.deaths, outcome.stops),
            false => "none".to_owned(),
        },
    );
}
