//! What is slow keeps nobody waiting who need not (D17).

use containerd_shim::protos::api::{ConnectRequest, StatsRequest};

use super::{plan::Verb, *};

/// Asks everything that never waits, of container `c`; a waiter is left behind.
fn assert_answers(bed: &Bed, status: Status) -> Call<Answer<WaitResponse>> {
    bed.go(move |bed| {
        assert_eq!(bed.status("c", ""), status);
        bed.pids("c");
        let request = ConnectRequest {
            id: "c".into(),
            ..Default::default()
        };
        bed.service.connect(&context().1, request).unwrap();
        let request = StatsRequest {
            id: "c".into(),
            ..Default::default()
        };
        bed.service.stats(&context().1, request).unwrap();
        bed.kill("c", "", libc::SIGTERM).unwrap();
    })
    .get();
    let waiter = bed.go(|bed| bed.wait("c", ""));
    assert!(waiter.waits());
    waiter
}

/// Lives a whole life beside container `c`.
fn assert_neighbour_lives(bed: &Bed, id: &'static str) {
    bed.go(move |bed| {
        let init = bed.run(id);
        let exec = bed.run_exec(id, "e");
        bed.end(exec, 0, &format!("exit {id}/e 0"));
        bed.pause(id).unwrap();
        bed.resume(id).unwrap();
        bed.checkpoint(id).unwrap();
        bed.end(init, 0, &format!("exit {id} 0"));
        bed.delete(id, "").unwrap();
    })
    .get();
}

#[test]
fn a_long_dump_holds_up_neither_questions_nor_neighbours() {
    let bed = Bed::running();
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    assert!(bed.machine.group("c").is_frozen());
    let waiter = assert_answers(&bed, Status::RUNNING);
    assert_neighbour_lives(&bed, "d");
    blocked.release();
    dump.get().unwrap();
    let init = bed.pids("c")[0];
    bed.machine.end(init, 0);
    waiter.get().unwrap();
}

#[test]
fn a_slow_start_holds_up_neither_questions_nor_neighbours() {
    let bed = Bed::new();
    let init = bed.create("c").unwrap().pid as i32;
    let blocked = bed.machine.block(Verb::Start);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    let waiter = assert_answers(&bed, Status::CREATED);
    assert_neighbour_lives(&bed, "d");
    blocked.release();
    start.get().unwrap();
    bed.machine.end(init, 0);
    waiter.get().unwrap();
}

#[test]
fn a_slow_exec_holds_up_neither_questions_nor_other_execs() {
    let bed = Bed::running();
    bed.exec("c", "slow").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "slow"));
    blocked.wait();
    let waiter = assert_answers(&bed, Status::RUNNING);
    let fast = bed.go(|bed| bed.run_exec("c", "fast")).get();
    bed.end(fast, 0, "exit c/fast 0");
    assert_neighbour_lives(&bed, "d");
    blocked.release();
    let slow = start.get().unwrap().pid as i32;
    bed.end(slow, 0, "exit c/slow 0");
    let init = bed.pids("c")[0];
    bed.machine.end(init, 0);
    waiter.get().unwrap();
}

#[test]
fn a_container_that_is_being_created_has_its_name_and_nothing_else() {
    let bed = Bed::new();
    let blocked = bed.machine.block(Verb::Create);
    let request = bed.request("c");
    let again = request.clone();
    let create = bed.go(|bed| bed.create_as(request));
    blocked.wait();
    assert_eq!(code(bed.state("c", "")), Code::NOT_FOUND);
    assert_eq!(code(bed.create_as(again)), Code::ALREADY_EXISTS);
    assert!(!bed.shutdown());
    assert_neighbour_lives(&bed, "d");
    assert!(!bed.shutdown());
    blocked.release();
    create.get().unwrap();
    assert_eq!(bed.status("c", ""), Status::CREATED);
}

#[test]
fn death_does_not_wait_for_a_slow_freeze() {
    let bed = Bed::running();
    let blocked = bed.machine.block(Verb::Freeze);
    let pause = bed.go(|bed| bed.pause("c"));
    blocked.wait();
    assert_eq!(bed.status("c", ""), Status::PAUSING);
    bed.go(|bed| bed.kill("c", "", libc::SIGKILL))
        .get()
        .unwrap();
    blocked.release();
    assert_names(pause.get(), Code::UNKNOWN, &["test/c", "being killed"]);
    assert!(!bed.machine.group("c").is_frozen());
    assert_eq!(bed.status("c", ""), Status::RUNNING);
}

#[test]
fn a_request_that_must_be_alone_waits_for_the_one_before_it() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    let pause = bed.go(|bed| bed.pause("c"));
    assert!(pause.waits());
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    blocked.release();
    dump.get().unwrap();
    pause.get().unwrap();
    assert_eq!(
        bed.events().split_off(2),
        ["checkpointed c", "paused c"],
        "the order in which they were alone"
    );
}

#[test]
fn no_exec_starts_during_a_dump_and_every_one_after_it() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    let start = bed.go(|bed| bed.run_exec("c", "e"));
    assert!(start.waits());
    assert_eq!(bed.machine.count("exec"), 0);
    blocked.release();
    dump.get().unwrap();
    start.get();
}
