//! Execs: how they fail, and that a failure shuts no door.

use containerd_shim::protos::{protobuf::Message, shim::oci::ProcessDetails};

use super::{plan::Verb, *};

/// Checks that execs and checkpoints go on as if nothing had been.
fn assert_doors_open(bed: &Bed) {
    let pid = bed.run_exec("c", "next");
    bed.end(pid, 0, "exit c/next 0");
    bed.checkpoint("c").unwrap();
    assert_eq!(bed.container("c").doors.inside(), [""; 0]);
}

#[test]
fn an_exec_that_cannot_start_is_stopped_and_can_be_deleted() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    let waiter = bed.go(|bed| bed.wait("c", "e"));
    bed.machine.fail(Verb::Exec, "no such program");
    let words = ["test/c", "exec e", "no such program"];
    assert_names(bed.start("c", "e"), Code::UNKNOWN, &words);
    assert_eq!(waiter.get().unwrap().exit_status, 255);
    let state = bed.state("c", "e").unwrap();
    assert_eq!(state.status.unwrap(), Status::STOPPED);
    assert_eq!((state.pid, state.exit_status), (0, 255));
    assert_eq!(code(bed.start("c", "e")), Code::FAILED_PRECONDITION);
    assert_eq!(bed.delete("c", "e").unwrap().exit_status, 255);
    assert_eq!(bed.events().split_off(2), ["added c/e"]);
    assert_doors_open(&bed);
}

#[test]
fn an_exec_without_a_pid_file_has_failed() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    bed.machine.forget_pid_file(Verb::Exec);
    let words = ["test/c", "exec e", "e.pid"];
    assert_names(bed.start("c", "e"), Code::UNKNOWN, &words);
    assert_eq!(bed.status("c", "e"), Status::STOPPED);
    bed.delete("c", "e").unwrap();
    let unknown = *bed.machine.group("c").cgroup.procs.lock().last().unwrap();
    bed.machine.end(unknown, 0);
    assert_doors_open(&bed);
}

#[test]
fn an_exec_without_a_place_for_its_output_has_failed() {
    let bed = Bed::running();
    let request = ExecProcessRequest {
        id: "c".into(),
        exec_id: "e".into(),
        stdout: "/nowhere/stdout".into(),
        spec: Some(Any {
            value: b"{}".to_vec(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    bed.service.exec(&context().1, request).unwrap();
    let words = ["test/c", "/nowhere/stdout"];
    assert_names(bed.start("c", "e"), Code::UNKNOWN, &words);
    assert_eq!(bed.machine.count("exec"), 0);
    bed.delete("c", "e").unwrap();
    assert_doors_open(&bed);
}

#[test]
fn what_an_exec_is_made_of_does_not_stay() {
    let bed = Bed::running();
    let pid = bed.run_exec("c", "e");
    assert_eq!(
        bed.machine.calls().last().unwrap(),
        r#"exec c {"args":["true"],"terminal":false}"#
    );
    bed.end(pid, 0, "exit c/e 0");
    let left = fs::read_dir(bed.run_dir("c")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["remains.json"]);
}

#[test]
fn a_process_that_is_no_object_is_refused() {
    let bed = Bed::running();
    for spec in ["", "[]", "1", "\"x\"", "null", "{"] {
        let answer = bed.exec_spec("c", "e", spec);
        assert_names(answer, Code::INVALID_ARGUMENT, &["test/c", "exec e"]);
    }
    assert_eq!(code(bed.state("c", "e")), Code::NOT_FOUND);
}

#[test]
fn an_exec_is_started_once_however_many_ask() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let first = bed.go(|bed| bed.start("c", "e"));
    blocked.wait();
    let second = bed.go(|bed| bed.start("c", "e"));
    assert_eq!(code(second.get()), Code::FAILED_PRECONDITION);
    blocked.release();
    first.get().unwrap();
    assert_eq!(bed.machine.count("exec"), 1);
}

#[test]
fn an_exec_on_its_way_is_neither_deleted_nor_signalled() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "e"));
    blocked.wait();
    assert_eq!(code(bed.delete("c", "e")), Code::FAILED_PRECONDITION);
    assert_eq!(code(bed.kill("c", "e", 9)), Code::FAILED_PRECONDITION);
    assert_eq!(bed.status("c", "e"), Status::CREATED);
    blocked.release();
    let pid = start.get().unwrap().pid as i32;
    bed.kill("c", "e", 9).unwrap();
    bed.end(pid, 137, "exit c/e 137");
}

#[test]
fn an_exec_refused_by_a_paused_container_starts_after_the_resume() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    bed.pause("c").unwrap();
    assert_eq!(code(bed.start("c", "e")), Code::FAILED_PRECONDITION);
    bed.resume("c").unwrap();
    assert_eq!(bed.status("c", "e"), Status::CREATED);
    let pid = bed.start("c", "e").unwrap().pid as i32;
    bed.end(pid, 0, "exit c/e 0");
    assert_doors_open(&bed);
}

#[test]
fn no_exec_starts_once_init_has_ended() {
    let bed = Bed::running();
    let pid = bed.run_exec("c", "a");
    bed.exec("c", "b").unwrap();
    let init = bed.pids("c")[0];
    bed.machine.end(init, 0);
    bed.until_init_is_gone(&bed.container("c"));
    let words = ["test/c", "init has ended"];
    assert_names(bed.start("c", "b"), Code::FAILED_PRECONDITION, &words);
    bed.end(pid, 0, "exit c/a 0");
    bed.wait_event("exit c 0");
    bed.delete("c", "").unwrap();
}

#[test]
fn pids_say_which_exec_they_are() {
    let bed = Bed::running();
    let exec = bed.run_exec("c", "e");
    let request = PidsRequest {
        id: "c".into(),
        ..Default::default()
    };
    let answer = bed.service.pids(&context().1, request).unwrap();
    let [init, second] = &answer.processes[..] else {
        panic!("{answer:?}");
    };
    assert!(init.info.is_none());
    assert_eq!(second.pid as i32, exec);
    assert_eq!(second.info.type_url, "containerd.runc.v1.ProcessDetails");
    let details = ProcessDetails::parse_from_bytes(&second.info.value).unwrap();
    assert_eq!(details.exec_id, "e");
    bed.end(exec, 0, "exit c/e 0");
    assert_eq!(bed.pids("c").len(), 1);
}
