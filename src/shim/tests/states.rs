//! What may follow what, in the codes that containerd's clients act on.

use containerd_shim::protos::api::{ConnectRequest, UpdateTaskRequest};

use super::*;

/// One request to container `c`; None if it was granted.
type Ask = fn(&Bed) -> Option<Code>;

fn verdict<T: Debug>(answer: Answer<T>) -> Option<Code> {
    answer.is_err().then(|| code(answer))
}

fn update(bed: &Bed) -> Answer<Empty> {
    let resources = Any {
        value: b"{}".to_vec(),
        ..Default::default()
    };
    let request = UpdateTaskRequest {
        id: "c".into(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    bed.service.update(&context().1, request)
}

/// A bed whose container `c` is in a phase.
fn bed_in(phase: &str) -> Bed {
    let bed = Bed::new();
    if phase == "created from images" {
        bed.create_as(bed.request_from_images("c")).unwrap();
        return bed;
    }
    let init = bed.create("c").unwrap().pid as i32;
    if phase != "created" {
        bed.start("c", "").unwrap();
    }
    match phase {
        "paused" => drop(bed.pause("c").unwrap()),
        "stopped" | "deleted" => bed.end(init, 0, "exit c 0"),
        _ => {}
    }
    if phase == "deleted" {
        bed.delete("c", "").unwrap();
    }
    bed
}

#[test]
fn every_request_is_granted_or_refused_by_containerds_rules() {
    let requests: [(&str, Ask); 8] = [
        ("start", |b| verdict(b.start("c", ""))),
        ("exec", |b| verdict(b.exec("c", "e"))),
        ("pause", |b| verdict(b.pause("c"))),
        ("resume", |b| verdict(b.resume("c"))),
        ("update", |b| verdict(update(b))),
        ("checkpoint", |b| verdict(b.checkpoint("c"))),
        ("kill", |b| verdict(b.kill("c", "", libc::SIGTERM))),
        ("delete", |b| verdict(b.delete("c", ""))),
    ];
    // '.' granted, 'f' failed_precondition, 'n' not_found
    let table = [
        ("created", "..ff.f.."),
        ("created from images", ".fffff.."),
        ("running", "f..f...f"),
        ("paused", "fff....f"),
        ("stopped", "ffffffn."),
        ("deleted", "nnnnnnnn"),
    ];
    for (phase, row) in table {
        for ((name, ask), letter) in requests.into_iter().zip(row.chars()) {
            let expected = match letter {
                'f' => Some(Code::FAILED_PRECONDITION),
                'n' => Some(Code::NOT_FOUND),
                _ => None,
            };
            assert_eq!(ask(&bed_in(phase)), expected, "{name} when {phase}");
        }
    }
}

#[test]
fn an_exec_has_rules_of_its_own() {
    let requests: [(&str, Ask); 5] = [
        ("add", |b| verdict(b.exec("c", "e"))),
        ("start", |b| verdict(b.start("c", "e"))),
        ("kill", |b| verdict(b.kill("c", "e", libc::SIGTERM))),
        ("delete", |b| verdict(b.delete("c", "e"))),
        ("state", |b| verdict(b.state("c", "e"))),
    ];
    // 'a' already_exists
    let table = [
        ("unknown", ".nnnn"),
        ("added", "a.f.."),
        ("running", "af.f."),
        ("stopped", "afn.."),
        ("deleted", ".nnnn"),
    ];
    for (step, row) in table {
        for ((name, ask), letter) in requests.into_iter().zip(row.chars()) {
            let bed = Bed::running();
            match step {
                "unknown" => {}
                "added" => drop(bed.exec("c", "e").unwrap()),
                _ => {
                    let pid = bed.run_exec("c", "e");
                    if step != "running" {
                        bed.end(pid, 0, "exit c/e 0");
                    }
                }
            }
            if step == "deleted" {
                bed.delete("c", "e").unwrap();
            }
            let expected = match letter {
                'a' => Some(Code::ALREADY_EXISTS),
                'f' => Some(Code::FAILED_PRECONDITION),
                'n' => Some(Code::NOT_FOUND),
                _ => None,
            };
            assert_eq!(ask(&bed), expected, "{name} when {step}");
        }
    }
}

#[test]
fn state_says_where_a_container_is() {
    for (phase, status) in [
        ("created", Status::CREATED),
        ("created from images", Status::CREATED),
        ("running", Status::RUNNING),
        ("paused", Status::PAUSED),
        ("stopped", Status::STOPPED),
    ] {
        let bed = bed_in(phase);
        let state = bed.state("c", "").unwrap();
        assert_eq!(state.status.unwrap(), status, "{phase}");
        assert_eq!(state.id, "c");
        assert_eq!(state.bundle, bed.path("bundles/c").to_str().unwrap());
        assert_eq!(state.pid == 0, phase == "created from images", "{phase}");
        assert_eq!(state.exited_at.is_some(), phase == "stopped", "{phase}");
    }
}

#[test]
fn execs_of_a_paused_container_are_paused_and_then_what_they_were() {
    let bed = Bed::running();
    bed.exec("c", "added").unwrap();
    bed.run_exec("c", "runs");
    let ended = bed.run_exec("c", "ended");
    bed.end(ended, 6, "exit c/ended 6");
    bed.pause("c").unwrap();
    for exec in ["added", "runs", "ended"] {
        assert_eq!(bed.status("c", exec), Status::PAUSED);
    }
    bed.resume("c").unwrap();
    assert_eq!(bed.status("c", "added"), Status::CREATED);
    assert_eq!(bed.status("c", "runs"), Status::RUNNING);
    let state = bed.state("c", "ended").unwrap();
    assert_eq!(state.status.unwrap(), Status::STOPPED);
    assert_eq!((state.id.as_str(), state.exit_status), ("ended", 6));
    assert_eq!(state.pid as i32, ended);
}

#[test]
fn an_update_that_is_no_json_never_reaches_the_runtime() {
    let bed = Bed::running();
    let request = UpdateTaskRequest {
        id: "c".into(),
        ..Default::default()
    };
    let answer = bed.service.update(&context().1, request);
    assert_names(answer, Code::INVALID_ARGUMENT, &["test/c", "update"]);
    assert_eq!(bed.machine.count("update"), 0);
    update(&bed).unwrap();
    assert_eq!(bed.machine.count("update c {}"), 1);
}

#[test]
fn names_that_are_no_identifiers_are_refused_and_leave_nothing() {
    let bed = Bed::running();
    let long = "a".repeat(77);
    for name in [
        "", ".", "..", "../x", "a/b", "-a", "a b", "é", "a\n", "a\0", &long,
    ] {
        let mut request = bed.request("d");
        request.id = name.into();
        assert_eq!(code(bed.create_as(request)), Code::INVALID_ARGUMENT);
        if !name.is_empty() {
            assert_eq!(code(bed.exec("c", name)), Code::INVALID_ARGUMENT);
        }
        assert_eq!(code(bed.state(name, "")), Code::NOT_FOUND, "{name:?}");
    }
    let found: Vec<_> = fs::read_dir(bed.path("run/s/test"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(found, ["c"]);
    assert_eq!(bed.events(), ["create c", "start c"]);
}

#[test]
fn a_container_of_a_shim_that_knows_it_not_is_not_found() {
    let bed = Bed::running();
    for answer in [
        code(bed.state("x", "")),
        code(bed.wait("x", "")),
        code(bed.wait("c", "x")),
        code(bed.kill("x", "", 9)),
        code(bed.delete("x", "")),
        code(bed.start("c", "x")),
    ] {
        assert_eq!(answer, Code::NOT_FOUND);
    }
    // containerd connects before it knows.
    let request = ConnectRequest {
        id: "x".into(),
        ..Default::default()
    };
    let answer = bed.service.connect(&context().1, request).unwrap();
    assert_eq!((answer.task_pid, answer.shim_pid), (0, std::process::id()));
}

#[test]
fn the_shim_ends_with_its_last_container() {
    let bed = Bed::new();
    let (a, b) = (bed.run("a"), bed.run("b"));
    assert_eq!(code(bed.create("a")), Code::ALREADY_EXISTS);
    assert!(!bed.shutdown());
    bed.end(a, 0, "exit a 0");
    bed.delete("a", "").unwrap();
    assert!(!bed.shutdown());
    assert_eq!(bed.status("b", ""), Status::RUNNING);
    bed.end(b, 0, "exit b 0");
    assert!(!bed.shutdown());
    bed.delete("b", "").unwrap();
    assert!(bed.shutdown());
    // Its name is free again.
    bed.run("a");
}
