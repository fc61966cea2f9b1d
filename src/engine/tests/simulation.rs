use super::{
    tools::{
        setup::{Faults, Load, Outcome, Setup},
        simulation::run,
    },
    *,
};

/// A host that has more to do than it may: 60 sandboxes of agents without much patience.
fn crowded(seed: u64, faults: Faults) -> Setup {
    Setup {
        seed,
        sandboxes: 60,
        lasting: Duration::from_secs(60),
        limits: Limits {
            rate: NonZeroU64::new(10 * MB),
            burst: 10 * MB,
            dumps: 2,
            undrained: 100 * MB,
        },
        terms: Terms::default(),
        load: Load {
            tool: ms(1000),
            model: ms(2000),
            changing: 0.5,
            dumping: 0.4,
            files: 1e6,
            dump: 8e6,
            cpus: None,
        },
        faults,
        disk: 40 * MB,
    }
}

fn show(seed: u64, outcome: &mut Outcome) -> Duration {
    let longest = outcome.normal.at(1.0).max(outcome.urgent.at(1.0));
    println!(
        "seed {seed}: {} checkpoints, longest wait {longest:?}, queue {}, {} deaths, {} stops",
        outcome.checkpoints, outcome.queue, outcome.deaths, outcome.stops
    );
    longest
}

#[test]
fn a_crowded_host_keeps_its_budget_its_order_and_lets_nobody_starve() {
    for seed in 1..=3 {
        let mut outcome = run(crowded(seed, Faults::default()));
        let longest = show(seed, &mut outcome);
        assert!(outcome.checkpoints > 200, "{}", outcome.checkpoints);
        assert!(outcome.queue <= 60);
        // The budget is really what they wait for: the crowd uses all of it.
        assert!(outcome.used > 8 * MB, "{}", outcome.used);
        // The handicap, and then one request of each other sandbox.
        assert!(longest < Duration::from_secs(10 + 30), "{longest:?}");
    }
}

#[test]
fn deaths_and_stops_change_nothing_of_that() {
    for seed in 1..=3 {
        let mut outcome = run(crowded(
            seed,
            Faults {
                deaths: 0.01,
                stops: 0.02,
                stopped: Duration::from_secs(8),
            },
        ));
        let longest = show(seed, &mut outcome);
        assert!(outcome.deaths > 5 && outcome.stops > 10);
        assert!(outcome.checkpoints > 100, "{}", outcome.checkpoints);
        assert!(longest < Duration::from_secs(10 + 60), "{longest:?}");
    }
}

#[test]
fn one_seed_is_one_run() {
    let faults = Faults {
        deaths: 0.01,
        stops: 0.02,
        stopped: ms(500),
    };
    let [mut a, mut b] = [run(crowded(7, faults)), run(crowded(7, faults))];
    assert_eq!(a.checkpoints, b.checkpoints);
    assert_eq!(a.excess, b.excess);
    assert_eq!(a.normal.at(0.9), b.normal.at(0.9));
}
