//! Bounds, refusals, and what a look costs.

use std::collections::BTreeSet;

use super::*;
use crate::test_child::TestChild;

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

/// As redis does with /proc/self/stat, ten times a second.
#[test]
fn a_descriptor_that_is_closed_meanwhile_is_no_error() {
    let actor = Actor::ready(
        r#"os.closerange(3, 1000); null, pipe = os.open("/dev/null", 0), os.pipe()"#,
        "while True: os.dup2(null, 40); os.dup2(pipe[0], 41); os.close(40); os.close(41)",
    );
    let dir = proc_fs::Dir::open(actor.pid()).unwrap();
    let read = || {
        let table = descriptors::read(&dir, &mut 100).unwrap();
        table.all.iter().map(|one| one.fd).collect::<Vec<_>>()
    };
    let always = read();
    fs::write(actor.path("go"), "").unwrap();
    eventually(|| read() != always);
    let seen: BTreeSet<Vec<i32>> = (0..2000).map(|_| read()).collect();
    for table in &seen {
        let (kept, copies) = table.split_at(always.len());
        assert_eq!(kept, always);
        assert!(copies.iter().all(|fd| [40, 41].contains(fd)), "{table:?}");
    }
    assert!(seen.len() > 1, "{seen:?}");
    drop(actor);
    assert!(matches!(
        descriptors::read(&dir, &mut 100),
        Err(ProcessError::Gone(_))
    ));
}

#[test]
fn a_baseline_of_who_runs_or_ends_is_refused() {
    let child = TestChild::busy();
    let pid = child.pid();
    let take = || Baseline::take(&[pid], "/nonexistent".as_ref(), &no_registers);
    // Not while it waits for the disk at its start.
    eventually(|| take().is_err_and(|error| error.to_string().contains("it runs")));
    drop(child);
    assert!(matches!(take(), Err(ProcessError::Gone(_))));
}
