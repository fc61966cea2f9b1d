//! Recovery in place: who comes back, what a client sees of it, and whose end is told all the same.

use super::{plan::Verb, *};
use crate::{
    coordinator::{
        machine::Event,
        rollback::{Failure, Replacement},
        turns::Asked,
    },
    sandbox::TurnNo,
    shim::{going_back::GoingBack, rollback::go_back, state::Request},
    store::{JournalLine, Trigger},
};

pub(super) const RECOVER: &str = "recover = \"last\"\n";

impl Bed {
    /// A container that comes back, with a checkpoint of turn 1, whose file has changed since then.
    pub(super) fn recovering() -> Self {
        let bed = Self::protected(RECOVER);
        bed.machine.make_mortal();
        bed.container("c").checkpoint_now(Asked::default()).unwrap();
        bed.write("changed");
        bed
    }

    /// The journal, once its last line says that it has come back, or that it could not.
    pub(super) fn recovered(&self, count: usize) -> Vec<JournalLine> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let lines = self.store().journal().unwrap().lines;
            let done = lines.last().is_some_and(|line| {
                line.trigger == Trigger::Recovery && line.ended_at > line.started_at
            });
            if lines.len() == count && done {
                return lines;
            }
            assert!(Instant::now() < deadline, "{lines:?}");
            thread::yield_now();
        }
    }

    /// Waits until nothing is under way any more; its init's pid.
    pub(super) fn settled(&self) -> i32 {
        let container = self.container("c");
        let deadline = Instant::now() + LIMIT;
        while container.inner.lock().going_back.is_some() {
            assert!(Instant::now() < deadline, "it does not come back");
            thread::yield_now();
        }
        container.init.live_pid()
    }

    /// It dies, and comes back; its new init's pid.
    fn dies(&self, status: u32, lines: usize) -> i32 {
        let before = self.container("c").init.live_pid();
        self.machine.end_all("c", status);
        self.recovered(lines);
        let now = self.settled();
        assert_ne!(now, before);
        now
    }

    pub(super) fn unreaped(&self) -> Vec<i32> {
        use crate::shim::host::Host;
        self.machine.reaper().kept()
    }
}

#[test]
fn a_sandbox_that_dies_goes_on_from_its_last_checkpoint_and_nothing_is_told() {
    let bed = Bed::recovering();
    let told = bed.pids("c")[0];
    let events = bed.events();
    let waiting = bed.go(|bed| bed.wait("c", ""));
    let now = bed.dies(139, 2);
    assert_eq!(bed.events(), events);
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    assert_eq!(bed.state("c", "").unwrap().pid, told as u32);
    assert_eq!((bed.pids("c"), bed.unreaped()), (vec![now], vec![told]));
    assert_eq!(bed.file(), "text");
    assert!(waiting.waits(), "it has not ended");
    let lines = bed.journal(2);
    let line = &lines[1];
    assert_eq!(line.checkpoint, lines[0].checkpoint);
    let note = line.note.as_deref().unwrap();
    assert_eq!(
        note,
        "init was killed by signal 11: went back from turn 1 to turn 1"
    );
    // Another time, and by another end.
    bed.write("later");
    bed.turn("a");
    bed.journal(3);
    bed.write("lost");
    bed.dies(1, 4);
    assert_eq!(bed.unreaped(), [told]);
    assert_eq!(bed.file(), "later");
    assert_eq!(bed.store().head().unwrap().unwrap().turn().0, 3);
    // A client's end of it is one.
    let now = bed.pids("c")[0];
    bed.kill("c", "", libc::SIGTERM).unwrap();
    assert_eq!(bed.calls_since("signal"), [format!("signal {now} 15")]);
    bed.machine.end_all("c", 143);
    bed.wait_event("exit c 143");
    assert_eq!(waiting.get().unwrap().exit_status, 143);
    assert_eq!(bed.unreaped(), [0; 0], "an end that is told is reaped");
    bed.delete("c", "").unwrap();
}

#[test]
fn what_a_client_wanted_and_a_success_are_told() {
    let ends: [(Option<i32>, u32); 5] = [
        (None, 0),
        (Some(libc::SIGTERM), 143),
        (Some(libc::SIGTERM), 1),
        (Some(libc::SIGINT), 2),
        // Not sent to end it, but it did.
        (Some(libc::SIGHUP), 129),
    ];
    for (signal, status) in ends {
        let bed = Bed::recovering();
        if let Some(signal) = signal {
            bed.kill("c", "", signal).unwrap();
        }
        bed.machine.end_all("c", status);
        bed.wait_event(&format!("exit c {status}"));
        assert_eq!(bed.machine.count("restore"), 0, "{signal:?} {status}");
        assert!(!bed.store().was_alive());
        assert_eq!(bed.unreaped(), [0; 0]);
        bed.delete("c", "").unwrap();
    }
    let bed = Bed::recovering();
    bed.kill("c", "", libc::SIGKILL).unwrap();
    bed.wait_event("exit c 137");
    assert_eq!(bed.machine.count("restore"), 0);
    // A signal that only tells something makes nobody mortal.
    let bed = Bed::recovering();
    bed.kill("c", "", libc::SIGHUP).unwrap();
    bed.dies(139, 2);
    bed.finish();
}

#[test]
fn a_clients_checkpoint_that_stops_it_is_no_death() {
    let bed = Bed::recovering();
    let blocked = bed.machine.block(Verb::Checkpoint);
    let client = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    bed.machine.end_all("c", 137);
    bed.wait_event("exit c 137");
    blocked.release();
    let _ = client.get();
    assert_eq!(bed.machine.count("restore"), 0);
}

#[test]
fn by_default_and_without_a_checkpoint_its_end_is_told() {
    for (config, checkpoint) in [("", true), (RECOVER, false)] {
        let bed = Bed::protected(config);
        if checkpoint {
            bed.container("c").checkpoint_now(Asked::default()).unwrap();
        }
        bed.machine.end_all("c", 139);
        bed.wait_event("exit c 139");
        assert_eq!(bed.machine.count("restore"), 0);
        bed.delete("c", "").unwrap();
        assert_eq!(bed.unreaped(), [0; 0]);
        // It had not ended as it should, which its next start is to know.
        assert_eq!(bed.store().was_alive(), !config.is_empty());
    }
}

#[test]
fn execs_end_with_it_and_those_that_come_meanwhile_wait() {
    let bed = Bed::recovering();
    bed.run_exec("c", "a");
    bed.exec("c", "b").unwrap();
    let blocked = bed.machine.block(Verb::Restore);
    bed.machine.end_all("c", 137);
    blocked.wait();
    bed.wait_event("exit c/a 137");
    let start = bed.go(|bed| bed.start("c", "b"));
    assert!(start.waits());
    // Nobody who only asks has to wait.
    let told = bed.state("c", "").unwrap().pid as i32;
    assert_eq!(
        (bed.pids("c"), bed.status("c", "")),
        (vec![told], Status::RUNNING)
    );
    blocked.release();
    let pid = start.get().unwrap().pid as i32;
    bed.end(pid, 0, "exit c/b 0");
    let deadline = Instant::now() + LIMIT;
    let triggers = || -> Vec<_> {
        let lines = bed.store().journal().unwrap().lines.into_iter();
        lines.map(|line| line.trigger).collect()
    };
    // The exec that died with it may have had an end, before anybody knew.
    while triggers().last() != Some(&Trigger::Exec) {
        assert!(Instant::now() < deadline, "{:?}", triggers());
        thread::yield_now();
    }
    let after = triggers().into_iter().rev().nth(1);
    assert_eq!(after, Some(Trigger::Recovery));
    bed.finish();
}

#[test]
fn a_death_during_a_turn_is_recovered_once_that_has_come_to_nothing() {
    let bed = Bed::recovering();
    let blocked = bed.machine.block(Verb::Checkpoint);
    bed.turn("a");
    blocked.wait();
    bed.machine.end_all("c", 139);
    let deadline = Instant::now() + LIMIT;
    while bed.machine.group("c").is_frozen() {
        assert!(Instant::now() < deadline, "the dead are held frozen");
        thread::yield_now();
    }
    blocked.fail("the container does not run");
    bed.recovered(3);
    bed.settled();
    assert_eq!(bed.file(), "text");
    assert!(!bed.machine.group("c").is_frozen());
    bed.turn("b");
    bed.journal(4);
    bed.finish();
}

#[test]
fn a_try_that_fails_is_not_the_last() {
    let bed = Bed::recovering();
    bed.machine.fail(Verb::Restore, "CRIU is busy");
    bed.machine.end_all("c", 139);
    let lines = bed.recovered(3);
    bed.settled();
    assert_eq!(lines[1].checkpoint, None);
    let note = lines[1].note.as_deref().unwrap();
    assert!(
        note.contains("failed") && note.contains("CRIU is busy"),
        "{note}"
    );
    assert!(lines[2].checkpoint.is_some());
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    bed.turn("a");
    bed.finish();
}

#[test]
fn who_dies_again_and_again_without_a_turn_is_told_in_the_end() {
    let bed = Bed::recovering();
    for lines in 2..=4 {
        bed.dies(139, lines);
    }
    bed.machine.end_all("c", 139);
    bed.wait_event("exit c 139");
    assert_eq!(bed.machine.count("restore"), 3);
    assert_eq!(bed.unreaped(), [0; 0]);
    bed.delete("c", "").unwrap();
    assert!(bed.store().was_alive());
}

#[test]
fn a_client_that_wants_it_dead_does_not_wait_for_the_next_try() {
    let bed = Bed::recovering();
    bed.dies(139, 2);
    let blocked = bed.machine.block(Verb::Restore);
    bed.machine.end_all("c", 139);
    let container = bed.container("c");
    let deadline = Instant::now() + LIMIT;
    while container.inner.lock().going_back.is_none() {
        assert!(Instant::now() < deadline, "nobody has noticed");
        thread::yield_now();
    }
    // It waits a second for this try, or has begun it: either way it is killed.
    bed.kill("c", "", libc::SIGKILL).unwrap();
    blocked.release();
    bed.wait_event("exit c 139");
    assert!(bed.machine.count("restore") <= 2);
    bed.delete("c", "").unwrap();
}

/// While it waits for the turn before it, and when it has begun.
#[test]
fn a_rollback_that_finds_it_dead_leaves_it_to_the_recovery() {
    for (verb, count) in [(Verb::Checkpoint, 4), (Verb::Freeze, 3)] {
        let bed = Bed::recovering();
        let container = bed.container("c");
        let before = container.init.live_pid();
        let eventually = |what: &dyn Fn() -> bool| {
            let deadline = Instant::now() + LIMIT;
            while !what() {
                assert!(Instant::now() < deadline, "{verb:?}");
                thread::yield_now();
            }
        };
        let blocked = bed.machine.block(verb);
        if verb == Verb::Checkpoint {
            let exec = bed.run_exec("c", "e");
            bed.end(exec, 0, "exit c/e 0");
            blocked.wait();
        }
        let back = bed.go(|bed| bed.roll_back(1));
        match verb {
            Verb::Freeze => blocked.wait(),
            _ => eventually(&|| container.inner.lock().busy),
        }
        bed.machine.end_all("c", 139);
        eventually(&|| container.inner.lock().going_back == Some(GoingBack::Recovering));
        blocked.release();
        let refused = back.get().unwrap_err().message;
        let word = "it goes on from its last checkpoint";
        assert!(refused.ends_with(word), "{refused}");
        let lines = bed.recovered(count);
        let refused = &lines[count - 2];
        assert_eq!(
            (&refused.trigger, refused.checkpoint),
            (&Trigger::Rollback, None)
        );
        assert_ne!(bed.settled(), before);
        assert_eq!(bed.status("c", ""), Status::RUNNING);
        assert_eq!(bed.file(), "text");
        bed.finish();
    }
}

#[test]
fn one_that_dies_while_its_files_are_half_way_is_brought_back_with_all_of_them() {
    let bed = Bed::recovering();
    let container = bed.container("c");
    let alone = container.alone(Request::Rollback).unwrap();
    container.doors.on(Event::GoBack);
    let held = container.place().unwrap().freeze.hold().unwrap();
    bed.machine.end_all("c", 137);
    let deadline = Instant::now() + LIMIT;
    while container.inner.lock().going_back.is_none() {
        assert!(Instant::now() < deadline, "nobody has noticed");
        thread::yield_now();
    }
    let with = Replacement {
        laid: Err("the checkpoint is broken".into()),
        scratch: bed.dir.path(),
        half_way: Some(held),
    };
    let failed = go_back(&container, TurnNo(1), with).unwrap_err();
    assert!(matches!(failed, Failure::Untouched(_)), "{failed:?}");
    container.doors.on(Event::WentBack);
    drop(alone);
    bed.recovered(2);
    bed.settled();
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    assert_eq!(bed.file(), "text");
    bed.finish();
}

#[test]
fn the_next_start_after_a_death_that_nobody_saw_goes_on_too() {
    let bed = Bed::recovering();
    bed.finish();
    let store = bed.store();
    assert!(!store.was_alive(), "it has ended as it should");
    // As a shim that was killed leaves it.
    store.set_alive(true).unwrap();
    bed.create_as(bed.protected_request()).unwrap();
    assert_eq!(bed.file(), "text");
    bed.start("c", "").unwrap();
    assert_eq!(bed.machine.count("restore"), 1);
    assert!(store.was_alive());
    bed.finish();
    bed.create_as(bed.protected_request()).unwrap();
    bed.start("c", "").unwrap();
    assert_eq!(bed.machine.count("restore"), 1, "it boots");
    bed.finish();
    // Whoever does not want that cancels it, as an armed restore.
    store.set_alive(true).unwrap();
    let id = crate::sandbox::SandboxId::new("test", "c").unwrap();
    let store = crate::store::Store::open(&bed.path("store")).unwrap();
    store.writer(&id).unwrap().disarm().unwrap();
    bed.create_as(bed.protected_request()).unwrap();
    bed.start("c", "").unwrap();
    assert_eq!(bed.machine.count("restore"), 1, "it boots");
    bed.finish();
}
