//! Turns and the host's budget for checkpoints.

use std::num::NonZeroU64;

use super::*;
use crate::engine::{Caller, Class, Limits, Member, Phase, Report, Request, Row, Terms, Work};

/// What the sandboxes of these tests are configured with.
const CONFIG: &str = "engine.dumps = 1\nengine.rate = \"100MB\"\n";

fn limits() -> Limits {
    Limits {
        rate: NonZeroU64::new(100_000_000),
        burst: 256 << 20,
        dumps: 1,
        undrained: 1 << 30,
    }
}

impl Bed {
    fn engine(&self) -> Report {
        let report = Report::read(&self.path("run"), &limits(), &Terms::default()).unwrap();
        report.unwrap_or_else(|| Report::of_nobody(&limits()))
    }

    /// The container's place in the queue, once it has one that is so.
    fn until_asks(&self, wanted: impl Fn(&Row) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let members = self.engine().members;
            if members
                .iter()
                .any(|its| its.name == "test/c" && wanted(its))
            {
                return;
            }
            assert!(Instant::now() < deadline, "{members:?}");
            thread::yield_now();
        }
    }

    /// Another sandbox, whose dump is the one that may run.
    fn neighbour(&self) -> Member {
        Member::join(&self.path("run"), "neighbour", limits(), Terms::default())
    }
}

fn large() -> Request {
    Request {
        work: Work::Dump,
        tokens: 1 << 20,
        staged: 1 << 20,
        expected: Duration::from_secs(600),
    }
}

#[test]
fn a_turn_asks_the_host_and_settles_what_it_has_written() {
    let bed = Bed::protected(CONFIG);
    bed.turn("a");
    let line = bed.journal(1).remove(0);
    let deadline = Instant::now() + LIMIT;
    while bed.engine().idle == 0 {
        assert!(Instant::now() < deadline, "{:?}", bed.engine());
        thread::yield_now();
    }
    let report = bed.engine();
    assert_eq!((report.sums.grants, report.sums.forced), (1, 0));
    assert_eq!(report.sums.written, line.bytes_written);
    assert_eq!(report.others_limits, 0);
    assert!(report.members.is_empty());
    bed.finish();
}

#[test]
fn a_checkpoint_waits_for_the_host_before_it_freezes_and_becomes_urgent_at_the_gate() {
    let bed = Bed::protected(CONFIG);
    let [mut neighbour, mut pressing] = [bed.neighbour(), bed.neighbour()];
    let dump = neighbour
        .acquire(&large(), &Caller::default(), LIMIT)
        .unwrap();
    // And the one more that may run if somebody waits for it.
    let waited_for = Caller::default();
    waited_for.promote();
    let others = pressing.acquire(&large(), &waited_for, LIMIT).unwrap();
    bed.turn("a");
    bed.until_asks(|its| its.phase == Phase::Waiting && its.class == Class::Normal);
    assert_eq!(bed.machine.count("checkpoint"), 0);
    let next = bed.go(|bed| bed.run_exec("c", "b"));
    bed.until_asks(|its| its.class == Class::Urgent);
    assert!(next.waits());
    // It need not wait for the other one.
    others.settle(0);
    let pid = next.get();
    let line = bed.journal(1).remove(0);
    assert!(line.checkpoint.is_some());
    drop(dump);
    bed.end(pid, 0, "exit c/b 0");
    bed.finish();
}

#[test]
fn a_sandbox_that_dies_waits_for_no_budget() {
    let bed = Bed::protected(CONFIG);
    let mut neighbour = bed.neighbour();
    let others = neighbour
        .acquire(&large(), &Caller::default(), LIMIT)
        .unwrap();
    bed.turn("a");
    bed.until_asks(|its| its.phase == Phase::Waiting);
    bed.finish();
    let line = bed.journal(1).remove(0);
    assert!(line.note.unwrap().contains("given up while waiting"));
    drop(others);
}
