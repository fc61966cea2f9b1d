//! Turns: when a checkpoint is asked for, and who waits for it.

use containerd_shim::protos::types::mount::Mount;

use super::{plan::Verb, *};
use crate::{
    coordinator::turns::Asked,
    sandbox::SandboxId,
    store::{Action, JournalLine, SandboxStore, Store, Trigger},
};

const ENABLED: &str = "enabled = true\nnot_turns = [\"health*\"]\n";

impl Bed {
    /// A protected container `c`, with a writable layer.
    pub(super) fn protected(config: &str) -> Self {
        let bed = Self::unborn(config);
        bed.create_as(bed.protected_request()).unwrap();
        bed.start("c", "").unwrap();
        bed
    }

    /// The same, before it is created.
    pub(super) fn unborn(config: &str) -> Self {
        let bed = Self::with(&format!("{ENABLED}{config}"));
        let upper = bed.path("upper");
        fs::create_dir(&upper).unwrap();
        fs::write(upper.join("file"), "text").unwrap();
        bed.machine.set_upper(&upper);
        bed
    }

    /// A request for a container whose files are in `upper`.
    pub(super) fn protected_request(&self) -> CreateTaskRequest {
        let mut request = self.request("c");
        let option = |name: &str, dir: &str| format!("{name}={}", self.path(dir).display());
        request.rootfs.push(Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                option("lowerdir", "lower"),
                option("upperdir", "upper"),
                option("workdir", "work"),
            ],
            ..Default::default()
        });
        request
    }

    pub(super) fn store(&self) -> SandboxStore {
        let id = SandboxId::new("test", "c").unwrap();
        Store::open(&self.path("store")).unwrap().sandbox(&id)
    }

    /// The journal, once it has `count` lines.
    pub(super) fn journal(&self, count: usize) -> Vec<JournalLine> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let lines = self.store().journal().unwrap().lines;
            if lines.len() == count {
                return lines;
            }
            assert!(Instant::now() < deadline, "{lines:?}");
            thread::yield_now();
        }
    }

    /// One exec from its start to its end.
    pub(super) fn turn(&self, exec_id: &str) {
        let pid = self.run_exec("c", exec_id);
        self.end(pid, 0, &format!("exit c/{exec_id} 0"));
    }

    /// Ends the container, which ends its turns.
    pub(super) fn finish(&self) {
        self.machine.end_all("c", 0);
        self.wait("c", "").unwrap();
        self.delete("c", "").unwrap();
    }
}

#[test]
fn every_turn_is_durable_before_the_next_begins() {
    let bed = Bed::protected("");
    bed.turn("a");
    let pid = bed.run_exec("c", "b");
    // The gate has let it in.
    assert_eq!(bed.store().turns().unwrap().len(), 1);
    let line = &bed.journal(1)[0];
    assert_eq!((&line.trigger, line.action), (&Trigger::Exec, Action::Full));
    let checkpoint = bed.store().get(line.turn).unwrap();
    assert_eq!(line.checkpoint, Some(checkpoint.digest));
    let laid = checkpoint.lay_out_all(&bed.store().scratch_dir()).unwrap();
    let saved = fs::read_to_string(laid.upper_dir().join("file")).unwrap();
    assert_eq!(saved, "text");
    bed.end(pid, 0, "exit c/b 0");
    let turns: Vec<u64> = bed.journal(2).iter().map(|l| l.turn.0).collect();
    assert_eq!(turns, [1, 2]);
}

#[test]
fn the_gate_holds_the_next_exec_as_long_as_the_dump_takes() {
    let bed = Bed::protected("");
    let blocked = bed.machine.block(Verb::Checkpoint);
    bed.turn("a");
    blocked.wait();
    let next = bed.go(|bed| bed.run_exec("c", "b"));
    let doors = Arc::clone(&bed.container("c").doors);
    let deadline = Instant::now() + LIMIT;
    while doors.waiting() == 0 {
        assert!(Instant::now() < deadline, "nobody waits at the gate");
        thread::yield_now();
    }
    let health = bed.go(|bed| {
        let spec = r#"{"args":["healthcheck"]}"#;
        bed.exec_spec("c", "h", spec).unwrap();
        bed.start("c", "h").unwrap().pid as i32
    });
    assert!(next.waits() && health.waits());
    assert_eq!(bed.machine.count("exec"), 1);
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    blocked.release();
    let (next, health) = (next.get(), health.get());
    // Written down a moment after the gate has opened.
    let deadline = Instant::now() + LIMIT;
    let exposed = || bed.journal(1)[0].exposed_us;
    while exposed() < A_MOMENT.as_micros() as u64 {
        assert!(Instant::now() < deadline, "{} us", exposed());
        thread::yield_now();
    }
    bed.end(next, 0, "exit c/b 0");
    bed.end(health, 0, "exit c/h 0");
    bed.finish();
}

#[test]
fn the_gate_is_shut_before_anybody_hears_of_the_end() {
    let bed = Bed::running();
    let pid = bed.run_exec("c", "e");
    let container = bed.container("c");
    let process = container.process("e").unwrap();
    // Nothing is told as long as this is held.
    let inner = container.inner.lock();
    bed.machine.end(pid, 0);
    let deadline = Instant::now() + LIMIT;
    while !container.doors.inside().is_empty() {
        assert!(Instant::now() < deadline, "the turn has not ended");
        thread::yield_now();
    }
    assert_eq!(process.exit(), None);
    drop(inner);
    bed.wait_event("exit c/e 0");
}

#[test]
fn whoever_heard_of_the_end_by_waiting_comes_to_a_shut_gate() {
    let bed = Bed::protected("");
    for i in 0..20 {
        let exec = format!("e{i}");
        let pid = bed.run_exec("c", &exec);
        let next = bed.go(move |bed| {
            bed.wait("c", &exec).unwrap();
            bed.run_exec("c", &format!("next{i}"));
            bed.store().turns().unwrap()
        });
        bed.machine.end(pid, 0);
        assert_eq!(next.get().last().unwrap().0, 2 * i + 1);
        let pid = *bed.pids("c").last().unwrap();
        bed.end(pid, 0, &format!("exit c/next{i} 0"));
    }
    bed.finish();
}

#[test]
fn a_turn_ends_with_the_last_exec_that_counts() {
    let bed = Bed::protected("");
    let (a, b) = (bed.run_exec("c", "a"), bed.run_exec("c", "b"));
    bed.end(a, 0, "exit c/a 0");
    assert_eq!(bed.machine.count("checkpoint"), 0);
    bed.end(b, 0, "exit c/b 0");
    let spec = r#"{"args":["healthcheck"]}"#;
    bed.exec_spec("c", "h", spec).unwrap();
    let health = bed.start("c", "h").unwrap().pid as i32;
    bed.end(health, 0, "exit c/h 0");
    bed.journal(1);
    bed.finish();
    bed.journal(1);
}

#[test]
fn a_turn_that_cannot_be_saved_says_so_and_lets_the_next_begin() {
    // Without a writable layer.
    let bed = Bed::with(ENABLED);
    bed.run("c");
    bed.turn("a");
    bed.turn("b");
    for line in bed.journal(2) {
        let note = line.note.unwrap();
        assert!(note.contains("not protected"), "{note}");
        assert!(note.contains("is no overlay"), "{note}");
        assert_eq!((line.action, line.checkpoint), (Action::Skip, None));
    }
    assert_eq!(bed.machine.count("checkpoint"), 0);
}

#[test]
fn an_exec_that_fails_ends_no_turn() {
    let bed = Bed::protected("");
    bed.exec("c", "a").unwrap();
    bed.machine.fail(Verb::Exec, "no such program");
    bed.start("c", "a").unwrap_err();
    bed.turn("b");
    bed.journal(1);
    bed.finish();
    bed.journal(1);
}

#[test]
fn a_container_without_protection_has_no_gate() {
    let bed = Bed::running();
    bed.turn("a");
    bed.turn("b");
    bed.finish();
    assert!(!bed.path("store").exists());
    assert_eq!(bed.machine.count("checkpoint"), 0);
}

#[test]
fn death_during_a_turn_is_told_and_lets_go_of_the_store() {
    let bed = Bed::protected("");
    let blocked = bed.machine.block(Verb::Checkpoint);
    bed.turn("a");
    blocked.wait();
    bed.kill("c", "", libc::SIGKILL).unwrap();
    assert!(!bed.machine.group("c").is_frozen());
    bed.machine.end_all("c", 137);
    bed.wait_event("exit c 137");
    blocked.release();
    bed.delete("c", "").unwrap();
    let id = SandboxId::new("test", "c").unwrap();
    Store::open(&bed.path("store"))
        .unwrap()
        .writer(&id)
        .unwrap();
    let lines = bed.journal(1);
    let note = lines[0].note.as_deref().unwrap();
    assert!(note.contains("not protected"), "{note}");
    assert_eq!(bed.store().turns().unwrap(), []);
}

#[test]
fn a_checkpoint_by_hand_is_a_turn_with_a_name() {
    let bed = Bed::protected("");
    let line = bed.container("c").checkpoint_now(Asked {
        name: Some("base".into()),
        ..Asked::default()
    });
    let (line, _) = line.unwrap();
    assert_eq!(line.trigger, Trigger::Manual);
    assert_eq!(bed.store().named("base").unwrap(), line.turn);
    bed.pause("c").unwrap();
    bed.container("c").checkpoint_now(Asked::default()).unwrap();
    assert!(bed.machine.group("c").is_frozen());
    assert_eq!(bed.status("c", ""), Status::PAUSED);
    bed.resume("c").unwrap();
    bed.finish();
}

#[test]
fn a_clients_checkpoint_waits_for_the_end_of_the_turns() {
    let bed = Bed::protected("checkpoint_stops = false");
    let group = bed.machine.group("c");
    let (first, second) = (
        bed.machine.block(Verb::Checkpoint),
        bed.machine.block(Verb::Checkpoint),
    );
    bed.turn("a");
    first.wait();
    let client = bed.go(|bed| bed.checkpoint("c"));
    assert!(client.waits());
    assert_eq!(bed.machine.count("checkpoint"), 1);
    first.release();
    second.wait();
    assert!(group.is_frozen());
    bed.journal(1);
    second.release();
    client.get().unwrap();
    assert!(!group.is_frozen());
    assert_eq!(bed.store().turns().unwrap().len(), 1);
    bed.finish();
}

#[test]
fn a_live_exec_forbids_a_checkpoint_by_hand() {
    let bed = Bed::protected("");
    let exec = bed.run_exec("c", "e");
    let refused = bed
        .container("c")
        .checkpoint_now(Asked::default())
        .unwrap_err();
    assert!(refused.message.contains("live execs (e;"), "{refused}");
    bed.end(exec, 0, "exit c/e 0");
    bed.finish();
}
