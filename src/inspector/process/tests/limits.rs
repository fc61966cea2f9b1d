//! Bounds, refusals, and what a look costs.

use super::*;

#[test]
fn cpu_time_is_forgiven_up_to_floor_share_and_ceiling() {
    let settings = Settings::default();
    let table = [
        (0, 20),
        (1_000, 30),
        (60_000, 620),
        (10_000_000, 10_000),
        (u64::MAX / 1_000_000, 10_000),
    ];
    for (elapsed, limit) in table {
        let limit_now = settings.cpu_limit(Duration::from_millis(elapsed));
        assert_eq!(limit_now, Duration::from_millis(limit), "{elapsed}");
    }
}

#[test]
fn more_than_the_limits_is_an_error() {
    let pids: Vec<i32> = (1..).take(MAX_PROCESSES + 1).collect();
    let error = Snapshot::take(&pids, &no_registers).unwrap_err();
    assert!(matches!(
        error,
        ProcessError::Limit {
            what: "processes",
            ..
        }
    ));
    let actor = Actor::asleep("");
    let dir = proc_fs::Dir::open(actor.pid()).unwrap();
    let count = descriptors::read(&dir, &mut 100).unwrap().all.len();
    let (mut enough, mut few) = (count, count - 1);
    assert!(descriptors::read(&dir, &mut enough).is_ok());
    assert_eq!(enough, 0);
    let error = descriptors::read(&dir, &mut few).unwrap_err();
    assert!(matches!(
        error,
        ProcessError::Limit {
            what: "descriptors",
            ..
        }
    ));
}

#[test]
fn a_baseline_of_who_runs_or_ends_is_refused() {
    let mut child = Command::new("sh")
        .args(["-c", "while :; do :; done"])
        .spawn()
        .unwrap();
    let take = |pid| Baseline::take(&[pid], "/nonexistent".as_ref(), &no_registers);
    let pid = child.id().cast_signed();
    // Not while it waits for the disk at its start.
    eventually(|| take(pid).is_err());
    let refused = take(pid);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(refused.unwrap_err().to_string().contains("it runs"));
    assert!(matches!(take(pid), Err(ProcessError::Gone(_))));
}

/// `cargo test --lib cost_of_a_look -- --ignored --nocapture`
#[test]
#[ignore = "prints, proves nothing"]
fn cost_of_a_look() {
    let actors: Vec<_> = (0..9)
        .map(|_| Actor::asleep("p, q = socket.socketpair(); r, w = os.pipe()"))
        .collect();
    let pids: Vec<_> = actors.iter().map(Actor::pid).collect();
    let facts = facts(&pids);
    let median = |what: &str, f: &mut dyn FnMut()| {
        let mut times: Vec<_> = (0..50)
            .map(|_| {
                let start = Instant::now();
                f();
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!("{what}: {:?}", times[times.len() / 2]);
    };
    let mut baseline = baseline(&pids, no_registers);
    let take = || Snapshot::take(&pids, &no_registers).unwrap();
    assert_eq!(
        baseline.settle(take(), &facts, &settings(), Some(1)),
        Settled::Yes
    );
    median("quick", &mut || {
        assert!(baseline.quick(1, &facts, &settings()))
    });
    median(
        "snapshot of 9 processes in 9 of each namespace",
        &mut || drop(take()),
    );
    let now = take();
    median("verdict", &mut || {
        assert!(
            baseline
                .verdict(&now, &facts, &no_registers, &settings())
                .is_unchanged()
        );
    });
    median("snapshot of 1", &mut || drop(actors[0].snapshot()));
    median("baseline of 9", &mut || {
        drop(super::baseline(&pids, no_registers))
    });
}
