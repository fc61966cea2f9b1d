//! Prints how long agents wait for the host's budget, for more and more sandboxes (`engine_sim SEED
//! densities`), and for more and more dumps at once where CPUs are scarce (`engine_sim SEED bounds`).

#[path = "mod.rs"]
mod engine;

use std::{num::NonZeroU64, time::Duration};

use crab::engine::{Limits, Terms};
use engine::{
    audit::Times,
    setup::{Busy, Faults, Load, Outcome, Setup},
    simulation::run,
};

/// Sandboxes, and for how many seconds.
const DENSITIES: [(u32, u64); 5] = [
    (60, 600),
    (600, 300),
    (2_500, 120),
    (5_000, 60),
    (10_000, 40),
];

/// CPUs, and bounds on dumps at once that are tried on each.
const BOUNDS: [(u32, &[u32]); 2] = [(2, &[2, 4, 8, 16, 1024]), (8, &[8, 16, 32, 64, 1024])];

fn main() {
    let mut words = std::env::args().skip(1);
    let seed = words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    let wanted = words.next();
    for (name, table) in [("densities", densities as fn(u64)), ("bounds", bounds)] {
        if wanted.as_deref().is_none_or(|wanted| wanted == name) {
            table(seed);
            println!();
        }
    }
}

fn densities(seed: u64) {
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
            cpus: None,
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

/// What a bound on dumps at once does where CPUs are scarce: to agents who wait for dumps, and to tools.
fn bounds(seed: u64) {
    println!(
        "30 sandboxes for each CPU, whose tools want 45 % of it, and dumps as much; seed {seed}"
    );
    println!(
        "{:>4}  {:>5}  {:>6}  {:>28}  {:>20}",
        "CPUs", "dumps", "turns", "exposed, turns with a dump", "tools' slowdown"
    );
    println!(
        "{:>4}  {:>5}  {:>6}  {:>7}{:>7}{:>7}{:>7}  {:>10}{:>10}",
        "", "", "", "p50", "p95", "p99", "max", "mean", "p99"
    );
    for (cpus, dumps) in BOUNDS {
        for dumps in dumps {
            let mut outcome = run(crowded(seed, cpus, *dumps));
            let own = OWN.as_secs_f64();
            let exposed = [0.5, 0.95, 0.99, 1.0];
            let exposed = exposed.map(|q| outcome.exposed_dumps.at(q).as_secs_f64());
            println!(
                "{cpus:>4}  {dumps:>5}  {:>6}  {:>7.3}{:>7.3}{:>7.3}{:>7.3}  {:>10.2}{:>10.2}",
                outcome.own.len(),
                exposed[0],
                exposed[1],
                exposed[2],
                exposed[3],
                outcome.own.mean().as_secs_f64() / own,
                outcome.own.at(0.99).as_secs_f64() / own,
            );
        }
    }
}

/// What a tool wants of a CPU.
const OWN: Duration = Duration::from_millis(80);

fn crowded(seed: u64, cpus: u32, dumps: u32) -> Setup {
    let free = setup(seed, 30 * cpus, 1200, false);
    Setup {
        limits: Limits {
            dumps,
            ..free.limits
        },
        load: Load {
            tool: Duration::from_millis(100),
            model: Duration::from_secs(4),
            changing: 0.5,
            dumping: 0.55,
            cpus: Some(Busy {
                number: cpus,
                own: OWN,
                dump: Duration::from_millis(200),
            }),
            ..free.load
        },
        ..free
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
