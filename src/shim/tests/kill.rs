//! Kill: whom it reaches, and that death waits for nothing.

use super::{plan::Verb, *};

impl Bed {
    fn kill_all(&self, id: &str, signal: i32) -> Answer<Empty> {
        let request = KillRequest {
            id: id.into(),
            signal: signal as u32,
            all: true,
            ..Default::default()
        };
        self.service.kill(&context().1, request)
    }
}

#[test]
fn a_number_that_is_no_signal_is_refused() {
    let bed = Bed::running();
    for signal in [0, 65, -1, i32::MIN] {
        assert_eq!(code(bed.kill("c", "", signal)), Code::INVALID_ARGUMENT);
        assert_eq!(code(bed.kill_all("c", signal)), Code::INVALID_ARGUMENT);
    }
    for signal in [1, 64] {
        bed.kill("c", "", signal).unwrap();
    }
    assert_eq!(bed.machine.count("signal"), 2);
}

#[test]
fn a_signal_reaches_the_process_that_was_meant() {
    let bed = Bed::running();
    let init = bed.pids("c")[0];
    let exec = bed.run_exec("c", "e");
    bed.kill("c", "", libc::SIGTERM).unwrap();
    bed.kill("c", "e", libc::SIGHUP).unwrap();
    bed.kill_all("c", libc::SIGUSR1).unwrap();
    let calls = bed.machine.calls();
    assert_eq!(
        calls[calls.len() - 3..],
        [
            format!("signal {init} 15"),
            format!("signal {exec} 1"),
            "kill --all c 10".into()
        ]
    );
}

#[test]
fn a_process_that_has_ended_is_not_found() {
    let bed = Bed::running();
    let (init, exec) = (bed.pids("c")[0], bed.run_exec("c", "e"));
    bed.end(exec, 0, "exit c/e 0");
    assert_eq!(code(bed.kill("c", "e", 9)), Code::NOT_FOUND);
    bed.end(init, 0, "exit c 0");
    assert_eq!(code(bed.kill("c", "", 9)), Code::NOT_FOUND);
    assert_eq!(code(bed.kill_all("c", 9)), Code::NOT_FOUND);
    assert_eq!(bed.machine.count("signal"), 0);
}

#[test]
fn a_runtime_that_finds_nothing_to_kill_is_no_failure_of_the_shim() {
    let bed = Bed::running();
    for (why, expected) in [
        ("container does not exist", Code::NOT_FOUND),
        ("container not running", Code::NOT_FOUND),
        ("permission denied", Code::UNKNOWN),
    ] {
        bed.machine.fail(Verb::KillAll, why);
        assert_names(bed.kill_all("c", 15), expected, &["test/c", why]);
    }
}

#[test]
fn sigkill_thaws_a_paused_container_for_good() {
    let bed = Bed::running();
    bed.pause("c").unwrap();
    let group = bed.machine.group("c");
    bed.kill("c", "", libc::SIGTERM).unwrap();
    assert!(group.is_frozen());
    bed.kill("c", "", libc::SIGKILL).unwrap();
    assert!(!group.is_frozen());
    // Nothing freezes it again.
    assert_eq!(code(bed.checkpoint("c")), Code::UNKNOWN);
    assert!(!group.is_frozen());
    bed.end(bed.pids("c")[0], 137, "exit c 137");
    assert_eq!(bed.status("c", ""), Status::STOPPED);
    bed.delete("c", "").unwrap();
}

#[test]
fn a_signal_to_all_thaws_neither_a_dump_nor_a_paused_container() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let group = bed.machine.group("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    let kill = bed.go(|bed| bed.kill_all("c", libc::SIGUSR1));
    assert!(kill.waits());
    assert!(group.is_frozen());
    assert_eq!(bed.machine.count("kill --all"), 0);
    blocked.release();
    dump.get().unwrap();
    kill.get().unwrap();
    assert_eq!(bed.machine.count("kill --all c 10"), 1);
    assert!(!group.is_frozen());

    bed.pause("c").unwrap();
    bed.kill_all("c", libc::SIGUSR1).unwrap();
    assert!(group.is_frozen());
}

#[test]
fn whoever_is_to_be_stopped_is_dumped_first() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    let stop = bed.go(|bed| bed.kill("c", "", libc::SIGSTOP));
    assert!(stop.waits());
    // Any other does not.
    bed.kill("c", "", libc::SIGTERM).unwrap();
    assert_eq!(bed.machine.count("signal"), 1);
    blocked.release();
    dump.get().unwrap();
    stop.get().unwrap();
    assert_eq!(bed.machine.count("signal"), 2);
}

#[test]
fn a_kill_during_a_dump_thaws_at_once_and_fails_the_dump() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let group = bed.machine.group("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    assert!(group.is_frozen());
    bed.kill("c", "", libc::SIGKILL).unwrap();
    assert!(!group.is_frozen());
    bed.end(bed.pids("c")[0], 137, "exit c 137");
    blocked.release();
    assert_names(dump.get(), Code::UNKNOWN, &["test/c", "images"]);
    assert_eq!(group.freezes(), 1);
    assert!(!group.is_frozen());
    assert!(!bed.events().contains(&"checkpointed c".into()));
    bed.delete("c", "").unwrap();
}

#[test]
fn a_dump_of_a_container_that_is_being_killed_is_worth_nothing() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let group = bed.machine.group("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    bed.kill("c", "", libc::SIGKILL).unwrap();
    // As if CRIU itself had left it frozen.
    *group.cgroup.frozen.lock() = true;
    blocked.release();
    assert_names(dump.get(), Code::UNKNOWN, &["being killed"]);
    assert!(!group.is_frozen());
}

#[test]
fn the_end_of_init_thaws_what_init_has_left() {
    let bed = Bed::running();
    bed.pause("c").unwrap();
    bed.end(bed.pids("c")[0], 137, "exit c 137");
    assert!(!bed.machine.group("c").is_frozen());
}

#[test]
fn to_kill_an_exec_is_not_to_kill_the_container() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let exec = bed.run_exec("c", "e");
    bed.kill("c", "e", libc::SIGKILL).unwrap();
    bed.end(exec, 137, "exit c/e 137");
    assert!(!bed.container("c").doors.is_dying());
    bed.checkpoint("c").unwrap();
    bed.pause("c").unwrap();
}

#[test]
fn processes_that_share_their_pids_with_others_end_with_init() {
    let bed = Bed::new();
    bed.create_as(bed.request_with("c", &[])).unwrap();
    bed.end(bed.pids("c")[0], 0, "exit c 0");
    assert_eq!(bed.machine.count("kill --all c 9"), 1);

    let bed = Bed::running();
    bed.end(bed.pids("c")[0], 0, "exit c 0");
    assert_eq!(bed.machine.count("kill --all"), 0);
}

#[test]
fn an_exec_that_waits_for_a_dump_meets_the_containers_end() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    let start = bed.go(|bed| bed.start("c", "e"));
    assert!(start.waits());
    bed.end(bed.pids("c")[0], 137, "exit c 137");
    // The dump is still under way.
    assert_eq!(code(start.get()), Code::FAILED_PRECONDITION);
    blocked.release();
    dump.get().unwrap_err();
}
