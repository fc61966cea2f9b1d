//! Start from images: what a failure or a kill meanwhile comes to.

use super::{plan::Verb, *};

/// A bed with a container that Start will restore.
fn to_restore() -> Bed {
    let bed = Bed::new();
    let request = bed.request_from_images("c");
    assert_eq!(bed.create_as(request).unwrap().pid, 0);
    bed
}

#[test]
fn a_restored_container_is_a_container() {
    let bed = to_restore();
    assert_eq!(bed.machine.calls(), [""; 0]);
    assert_eq!(bed.pids("c"), [0; 0]);
    let init = bed.start("c", "").unwrap().pid as i32;
    assert_eq!(bed.machine.calls(), ["restore c"]);
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    let exec = bed.run_exec("c", "e");
    bed.end(exec, 0, "exit c/e 0");
    bed.end(init, 1, "exit c 1");
    bed.delete("c", "").unwrap();
    assert_eq!(bed.events()[..2], ["create c", "start c"]);
}

#[test]
fn a_restore_that_fails_leaves_no_process_and_names_the_images() {
    let bed = to_restore();
    bed.machine.fail(Verb::Restore, "criu failed");
    let words = ["test/c", "restore from", "to-restore", "criu failed"];
    assert_names(bed.start("c", ""), Code::UNKNOWN, &words);
    assert_eq!(bed.machine.calls(), ["restore c", "delete --force c"]);
    assert_eq!(bed.status("c", ""), Status::CREATED);
    bed.delete("c", "").unwrap();
    assert_eq!(bed.events(), ["create c", "delete c 0"]);
}

#[test]
fn a_kill_before_the_restore_is_the_end() {
    let bed = to_restore();
    bed.kill("c", "", libc::SIGTERM).unwrap();
    bed.wait_event("exit c 143");
    assert_eq!(code(bed.start("c", "")), Code::FAILED_PRECONDITION);
    assert_eq!(code(bed.kill("c", "", libc::SIGKILL)), Code::NOT_FOUND);
    assert_eq!(bed.wait("c", "").unwrap().exit_status, 143);
    bed.delete("c", "").unwrap();
    assert_eq!(
        bed.events(),
        ["create c", "exit c 143", "delete c 143"],
        "told once"
    );
}

#[test]
fn a_kill_during_the_restore_does_not_wait_and_reaches_the_process() {
    let bed = to_restore();
    let blocked = bed.machine.block(Verb::Restore);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    bed.go(|bed| bed.kill("c", "", libc::SIGKILL))
        .get()
        .unwrap();
    assert_eq!(bed.events(), ["create c"], "it has not ended yet");
    blocked.release();
    let init = start.get().unwrap().pid as i32;
    assert_eq!(
        bed.machine.calls(),
        ["restore c".into(), format!("signal {init} 9")]
    );
    bed.end(init, 137, "exit c 137");
    assert_eq!(bed.events(), ["create c", "start c", "exit c 137"]);
}

#[test]
fn a_kill_during_a_restore_that_fails_is_the_end() {
    let bed = to_restore();
    let blocked = bed.machine.block(Verb::Restore);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    bed.kill("c", "", libc::SIGTERM).unwrap();
    blocked.fail("criu failed");
    start.get().unwrap_err();
    bed.wait_event("exit c 143");
    assert_eq!(bed.status("c", ""), Status::STOPPED);
    bed.delete("c", "").unwrap();
}

#[test]
fn a_restored_init_that_is_gone_at_once_is_told_after_its_start() {
    let bed = to_restore();
    bed.machine.end_at_once(Verb::Restore, 8);
    bed.start("c", "").unwrap();
    bed.wait_event("exit c 8");
    assert_eq!(bed.events(), ["create c", "start c", "exit c 8"]);
}
