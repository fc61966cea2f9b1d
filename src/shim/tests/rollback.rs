//! Rollback in place: what a client sees of it, and what every failure comes to.

use containerd_shim::protos::api::UpdateTaskRequest;

use super::{plan::Verb, *};
use crate::{
    coordinator::{
        machine::Event,
        rollback::{Failure, Replacement, RolledBack},
        turns::Asked,
    },
    sandbox::TurnNo,
    shim::{
        error::ShimError,
        rollback::{go_back, roll_back},
    },
    store::{Action, Trigger},
};

impl Bed {
    /// A container with a checkpoint of turn 1, whose file has changed since then.
    pub(super) fn gone_on(config: &str) -> Self {
        let bed = Self::protected(config);
        bed.machine.make_mortal();
        bed.container("c").checkpoint_now(Asked::default()).unwrap();
        bed.write("changed");
        bed
    }

    pub(super) fn write(&self, text: &str) {
        fs::write(self.path("upper").join("file"), text).unwrap();
    }

    pub(super) fn file(&self) -> String {
        fs::read_to_string(self.path("upper").join("file")).unwrap()
    }

    pub(super) fn update(&self, resources: &str) -> Answer<Empty> {
        let resources = Any {
            value: resources.into(),
            ..Default::default()
        };
        let request = UpdateTaskRequest {
            id: "c".into(),
            resources: Some(resources).into(),
            ..Default::default()
        };
        self.service.update(&context().1, request)
    }

    pub(super) fn roll_back(&self, turn: u64) -> Result<RolledBack, ShimError> {
        roll_back(&self.container("c"), TurnNo(turn))
    }

    /// The calls of the machine since the last one that begins with `since`.
    pub(super) fn calls_since(&self, since: &str) -> Vec<String> {
        let calls = self.machine.calls();
        let last = calls.iter().rposition(|call| call.starts_with(since));
        calls[last.unwrap()..].to_vec()
    }

    /// How the task ended, and that nothing of it is left.
    pub(super) fn ended_with(&self, status: u32) {
        self.wait_event(&format!("exit c {status}"));
        assert_eq!(self.status("c", ""), Status::STOPPED);
        assert_eq!(self.wait("c", "").unwrap().exit_status, status);
        assert_eq!(self.kept(), [0; 0], "an end that is told is reaped");
        self.delete("c", "").unwrap();
        let exits = self
            .events()
            .iter()
            .filter(|e| e.starts_with("exit c "))
            .count();
        assert_eq!(exits, 1, "told once");
    }

    pub(super) fn kept(&self) -> Vec<i32> {
        use crate::shim::host::Host;
        self.machine.reaper().kept()
    }
}

#[test]
fn the_client_sees_the_same_container_with_the_files_of_then() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    let events = bed.events();
    let report = bed.roll_back(1).unwrap();
    assert_eq!(
        (report.from, report.to, report.turn),
        (TurnNo(1), TurnNo(1), TurnNo(2))
    );
    assert_eq!(bed.file(), "text");
    assert_eq!(bed.events(), events, "nothing is told");
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    assert_eq!(bed.state("c", "").unwrap().pid, told as u32);
    let now = bed.pids("c")[0];
    assert_ne!(now, told);
    let rootfs = bed.path("bundles/c/rootfs");
    assert_eq!(
        bed.calls_since("signal"),
        [
            format!("signal {told} 9"),
            "forget c".into(),
            format!("unmount {}", rootfs.display()),
            format!("mount 1 {}", rootfs.display()),
            "restore c".into(),
        ]
    );
    assert_eq!(bed.kept(), [told], "nobody else gets its pid");
    // Signals go to who is there.
    bed.kill("c", "", libc::SIGTERM).unwrap();
    assert_eq!(bed.calls_since("signal"), [format!("signal {now} 15")]);
    bed.machine.end(now, 3);
    bed.wait_event("exit c 3");
    assert_eq!(bed.kept(), [0; 0]);
    let deleted = bed.delete("c", "").unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (told as u32, 3));
}

#[test]
fn a_sandbox_whose_files_are_half_way_does_not_run_again() {
    // What fails before it is killed, and after it.
    for kill_first in [false, true] {
        let bed = Bed::gone_on("");
        let container = bed.container("c");
        let told = bed.pids("c")[0];
        if kill_first {
            container.doors.give_up();
        }
        container.doors.on(Event::GoBack);
        let held = container.place().unwrap().freeze.hold().unwrap();
        let with = Replacement {
            laid: Err("the checkpoint is broken".into()),
            scratch: bed.dir.path(),
            half_way: Some(held),
        };
        let failed = go_back(&container, TurnNo(1), with).unwrap_err();
        assert!(matches!(failed, Failure::Ended(_)), "{failed:?}");
        let calls = bed.calls_since("signal");
        assert_eq!(calls[0], format!("signal {told} 9"), "{calls:?}");
    }
}

#[test]
fn turns_go_on_from_where_it_went_back_to() {
    let bed = Bed::gone_on("");
    bed.turn("a");
    bed.roll_back(1).unwrap();
    let head = |bed: &Bed| bed.store().head().unwrap().unwrap().turn();
    assert_eq!(head(&bed), TurnNo(1));
    bed.write("another way");
    bed.turn("b");
    let lines = bed.journal(4);
    let back = &lines[2];
    assert_eq!(
        (&back.trigger, back.action),
        (&Trigger::Rollback, Action::Skip)
    );
    assert_eq!(back.checkpoint, lines[0].checkpoint);
    let note = back.note.as_deref().unwrap();
    let said = "rolled back from turn 2 to turn 1, and its processes, too: ";
    assert!(note.starts_with(said), "{note}");
    assert!(back.durable_us.is_some() && back.freeze_us > 0, "{back:?}");
    let next = bed.store().get(lines[3].turn).unwrap();
    assert_eq!(next.manifest.facts.parent, Some(TurnNo(1)));
    assert_eq!(head(&bed), TurnNo(4));
    // What was left behind is still there.
    bed.roll_back(2).unwrap();
    assert_eq!(bed.file(), "changed");
    assert_eq!(head(&bed), TurnNo(2));
    bed.finish();
}

#[test]
fn a_second_rollback_leaves_no_second_zombie() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    for _ in 0..3 {
        bed.roll_back(1).unwrap();
        bed.write("changed");
    }
    assert_eq!(bed.kept(), [told]);
    assert_eq!(bed.pids("c").len(), 1);
    bed.kill("c", "", libc::SIGKILL).unwrap();
    bed.ended_with(137);
}

#[test]
fn live_execs_end_with_137_and_are_no_turn() {
    let bed = Bed::gone_on("");
    let (a, b) = (bed.run_exec("c", "a"), bed.run_exec("c", "b"));
    bed.roll_back(1).unwrap();
    // Before the rollback is: whoever waits for it need not wait for these.
    for exec in ["a", "b"] {
        assert!(bed.events().contains(&format!("exit c/{exec} 137")));
        assert_eq!(bed.status("c", exec), Status::STOPPED);
        bed.delete("c", exec).unwrap();
    }
    assert!(!bed.pids("c").iter().any(|pid| [a, b].contains(pid)));
    bed.turn("next");
    let lines = bed.journal(3);
    assert_eq!(lines[2].trigger, Trigger::Exec);
    assert!(
        lines[2].started_at >= lines[1].ended_at,
        "a turn of its own"
    );
    bed.finish();
}

#[test]
fn what_does_not_exist_or_is_broken_is_refused_before_anything_is_touched() {
    let bed = Bed::gone_on("");
    bed.container("c").checkpoint_now(Asked::default()).unwrap();
    let pack = bed.store().dir().join("packs/2.pack");
    let mut bytes = fs::read(&pack).unwrap();
    // In the first block, behind the header.
    bytes[20] ^= 1;
    fs::write(pack, bytes).unwrap();
    let calls = bed.machine.calls();
    for (turn, why) in [(2, "broken"), (7, "no checkpoint of turn 7")] {
        let refused = bed.roll_back(turn).unwrap_err().message;
        for words in ["test/c", why, "nothing was touched"] {
            assert!(refused.contains(words), "{refused}");
        }
    }
    assert_eq!(bed.machine.calls(), calls);
    assert_eq!(bed.file(), "changed");
    bed.journal(2);
    bed.finish();
}

#[test]
fn a_container_without_protection_says_how_to_get_it() {
    let bed = Bed::running();
    let refused = bed.roll_back(1).unwrap_err();
    assert!(
        refused.message.contains("dev.crab.enabled=true"),
        "{refused}"
    );
    let init = bed.pids("c")[0];
    bed.end(init, 0, "exit c 0");
    let refused = bed.roll_back(1).unwrap_err();
    assert!(
        refused.message.contains("cannot roll back a stopped"),
        "{refused}"
    );
}

#[test]
fn a_signal_meanwhile_reaches_who_comes() {
    let bed = Bed::gone_on("");
    let blocked = bed.machine.block(Verb::Forget);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.kill("c", "", libc::SIGTERM).unwrap();
    bed.kill("c", "", libc::SIGHUP).unwrap();
    blocked.release();
    back.get().unwrap();
    let now = bed.pids("c")[0];
    assert_eq!(
        bed.calls_since("restore"),
        ["restore c".into(), format!("signal {now} 1")]
    );
    bed.finish();
}

#[test]
fn a_signal_before_a_refusal_reaches_who_stays() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    let blocked = bed.machine.block(Verb::Freeze);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.kill("c", "", libc::SIGTERM).unwrap();
    assert_eq!(bed.machine.count("signal"), 0);
    blocked.fail("in the way");
    back.get().unwrap_err();
    assert_eq!(bed.calls_since("signal"), [format!("signal {told} 15")]);
    bed.finish();
}

#[test]
fn nobody_who_only_asks_has_to_wait() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    bed.exec("c", "e").unwrap();
    for verb in [Verb::Forget, Verb::Restore] {
        let blocked = bed.machine.block(verb);
        let back = bed.go(|bed| bed.roll_back(1));
        blocked.wait();
        let answers = bed.go(|bed| (bed.status("c", ""), bed.pids("c"), bed.state("c", "")));
        let (status, pids, state) = answers.get();
        assert_eq!((status, state.unwrap().pid), (Status::RUNNING, told as u32));
        assert_eq!(pids, [told], "never empty");
        let waiting = bed.go(|bed| bed.wait("c", ""));
        assert!(waiting.waits(), "it has not ended");
        blocked.release();
        back.get().unwrap();
    }
    bed.start("c", "e").unwrap();
    bed.finish();
}

#[test]
fn whoever_wants_to_change_it_waits() {
    let bed = Bed::gone_on("");
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Restore);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    let start = bed.go(|bed| bed.start("c", "e"));
    assert!(start.waits());
    blocked.release();
    back.get().unwrap();
    start.get().unwrap();

    let blocked = bed.machine.block(Verb::Restore);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    let pause = bed.go(|bed| bed.pause("c"));
    let again = bed.go(|bed| bed.roll_back(1));
    assert!(pause.waits() && again.waits());
    blocked.release();
    back.get().unwrap();
    pause.get().unwrap();
    again.get().unwrap();
    assert_eq!(bed.status("c", ""), Status::PAUSED);
    assert_eq!(bed.machine.count("restore"), 3);
}

#[test]
fn a_paused_sandbox_comes_back_paused() {
    let bed = Bed::gone_on("");
    bed.pause("c").unwrap();
    bed.roll_back(1).unwrap();
    assert_eq!(bed.status("c", ""), Status::PAUSED);
    assert!(bed.machine.group("c").is_frozen());
    bed.resume("c").unwrap();
    assert!(!bed.machine.group("c").is_frozen());
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    bed.turn("a");
    bed.finish();
}

#[test]
fn limits_that_the_client_has_changed_stay_changed() {
    let bed = Bed::gone_on("");
    bed.roll_back(1).unwrap();
    assert_eq!(bed.machine.count("update"), 0);
    bed.update(r#"{"memory":{"limit":1,"swap":2}}"#).unwrap();
    bed.update(r#"{"memory":{"limit":3},"pids":{"limit":4}}"#)
        .unwrap();
    bed.machine.fail(Verb::Update, "too low");
    bed.update(r#"{"pids":{"limit":0}}"#).unwrap_err();
    bed.roll_back(1).unwrap();
    let all = r#"update c {"memory":{"limit":3,"swap":2},"pids":{"limit":4}}"#;
    assert_eq!(bed.calls_since("restore"), ["restore c", all]);
    bed.finish();
}

#[test]
fn a_turn_that_ended_before_and_was_not_taken_yet_is_none() {
    let bed = Bed::gone_on("");
    let pid = bed.run_exec("c", "a");
    bed.exec("c", "b").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "b"));
    blocked.wait();
    // Waits for the start of b, and the rollback for it.
    let checkpoint = bed.go(|bed| bed.container("c").checkpoint_now(Asked::default()));
    assert!(checkpoint.waits());
    let back = bed.go(|bed| bed.roll_back(1));
    assert!(back.waits());
    bed.end(pid, 0, "exit c/a 0");
    blocked.fail("no such program");
    start.get().unwrap_err();
    checkpoint.get().unwrap();
    back.get().unwrap();
    bed.turn("next");
    let triggers = |bed: &Bed| -> Vec<_> {
        let lines = bed.journal(4).into_iter();
        lines.map(|line| line.trigger).collect()
    };
    let expected = [
        Trigger::Manual,
        Trigger::Manual,
        Trigger::Rollback,
        Trigger::Exec,
    ];
    assert_eq!(triggers(&bed), expected);
    bed.finish();
    assert_eq!(triggers(&bed), expected);
}

#[test]
fn an_init_that_is_gone_at_once_is_told() {
    let bed = Bed::gone_on("");
    bed.machine.end_at_once(Verb::Restore, 8);
    bed.roll_back(1).unwrap();
    bed.ended_with(8);
}

#[test]
fn an_init_that_ends_by_itself_before_the_kill_is_no_rollback() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    let blocked = bed.machine.block(Verb::Freeze);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.machine.end(told, 5);
    bed.wait_event("exit c 5");
    blocked.release();
    let failed = back.get().unwrap_err();
    assert!(failed.message.contains("nothing was touched"), "{failed}");
    assert_eq!(bed.file(), "changed");
    bed.ended_with(5);
}
