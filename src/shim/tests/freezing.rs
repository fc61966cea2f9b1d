//! Pause, Resume and Checkpoint, and how they go together (D7b).

use containerd_shim::protos::{
    protobuf::{Message, UnknownValue},
    shim::oci::CheckpointOptions,
};

use super::{plan::Verb, *};

impl Bed {
    fn checkpoint_with(&self, options: &CheckpointOptions) -> Answer<Empty> {
        let request = CheckpointTaskRequest {
            id: "c".into(),
            path: self.path("images").to_str().unwrap().into(),
            options: Some(Any {
                value: options.write_to_bytes().unwrap(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.service.checkpoint(&context().1, request)
    }
}

#[test]
fn the_client_never_sees_crabs_own_freeze() {
    let bed = Bed::running();
    let group = bed.machine.group("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    assert!(group.is_frozen());
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    blocked.release();
    dump.get().unwrap();
    assert!(!group.is_frozen());
    assert_eq!(bed.events().last().unwrap(), "checkpointed c");
}

#[test]
fn a_paused_container_stays_paused_through_a_checkpoint() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let group = bed.machine.group("c");
    bed.pause("c").unwrap();
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    assert_eq!(bed.status("c", ""), Status::PAUSED);
    let resume = bed.go(|bed| bed.resume("c"));
    assert!(resume.waits());
    assert!(group.is_frozen());
    blocked.release();
    dump.get().unwrap();
    resume.get().unwrap();
    assert!(!group.is_frozen());
    assert_eq!(bed.status("c", ""), Status::RUNNING);

    bed.pause("c").unwrap();
    bed.checkpoint("c").unwrap();
    assert!(group.is_frozen());
    assert_eq!(bed.status("c", ""), Status::PAUSED);
    bed.resume("c").unwrap();
    assert!(!group.is_frozen());
}

#[test]
fn criu_is_started_before_the_freeze_and_dumps_in_it() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    bed.machine.fail(Verb::Freeze, "a task does not stop");
    let words = ["test/c", "a task does not stop"];
    assert_names(bed.checkpoint("c"), Code::UNKNOWN, &words);
    assert_eq!(bed.machine.count("checkpoint"), 1, "it was started");
    let image = bed.path("images").join("inventory.img");
    assert!(!image.exists(), "it was not let go");
    bed.checkpoint("c").unwrap();
    assert!(image.exists());
}

#[test]
fn a_pause_that_fails_changes_nothing() {
    let bed = Bed::running();
    bed.machine.fail(Verb::Freeze, "a task does not stop");
    let words = ["test/c", "pause", "a task does not stop"];
    assert_names(bed.pause("c"), Code::UNKNOWN, &words);
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    assert_eq!(code(bed.resume("c")), Code::FAILED_PRECONDITION);
    bed.pause("c").unwrap();
    assert_eq!(
        bed.events().split_off(2),
        ["paused c"],
        "one pause was told"
    );
}

#[test]
fn a_live_exec_forbids_a_checkpoint_by_name() {
    let bed = Bed::running();
    let exec = bed.run_exec("c", "build");
    let words = ["test/c", "build", &exec.to_string()];
    assert_names(bed.checkpoint("c"), Code::FAILED_PRECONDITION, &words);
    assert!(!bed.machine.group("c").is_frozen());
    assert_eq!(bed.machine.count("checkpoint"), 0);
    // The latch is open again.
    let other = bed.run_exec("c", "other");
    bed.end(exec, 0, "exit c/build 0");
    bed.end(other, 0, "exit c/other 0");
    bed.checkpoint("c").unwrap();
}

#[test]
fn without_options_the_configuration_says_whether_a_checkpoint_stops() {
    for (config, stops) in [
        ("", true),
        ("checkpoint_stops = true", true),
        ("checkpoint_stops = false", false),
    ] {
        let bed = Bed::with(config);
        bed.run("c");
        bed.checkpoint("c").unwrap();
        assert_eq!(bed.machine.checkpoints()[0].leave_running, !stops);
    }
}

#[test]
fn options_say_themselves_whether_a_checkpoint_stops() {
    let bed = Bed::running();
    for exit in [false, true] {
        let options = CheckpointOptions {
            exit,
            ..Default::default()
        };
        bed.checkpoint_with(&options).unwrap();
        let args = bed.machine.checkpoints().pop().unwrap();
        assert_eq!(args.leave_running, !exit);
    }
}

#[test]
fn every_option_reaches_the_runtime() {
    let bed = Bed::running();
    bed.checkpoint_with(&CheckpointOptions::default()).unwrap();
    let plain = bed.machine.checkpoints().pop().unwrap();
    assert_eq!(plain.image_path, bed.path("images"));
    assert_eq!(plain.parent_path, None);
    assert_eq!(plain.cgroups_mode, None);
    assert!(!plain.tcp_established && !plain.external_unix_sockets);
    assert!(!plain.shell_job && !plain.file_locks);
    assert!(plain.home.unwrap().starts_with(bed.run_dir("c")));

    let mut options = CheckpointOptions {
        open_tcp: true,
        external_unix_sockets: true,
        terminal: true,
        file_locks: true,
        empty_namespaces: vec!["network".into()],
        cgroups_mode: "soft".into(),
        image_path: bed.path("elsewhere").to_str().unwrap().into(),
        work_path: bed.path("work").to_str().unwrap().into(),
        ..Default::default()
    };
    // `parent_path`, which our protos do not name.
    let parent = UnknownValue::LengthDelimited(b"../parent".to_vec());
    let fields = options.special_fields.mut_unknown_fields();
    fields.add_value(10, parent);
    bed.checkpoint_with(&options).unwrap();
    let args = bed.machine.checkpoints().pop().unwrap();
    assert_eq!(args.image_path, bed.path("elsewhere"));
    assert_eq!(args.work_path, bed.path("work"));
    assert_eq!(args.parent_path.unwrap(), PathBuf::from("../parent"));
    assert_eq!(args.empty_namespaces, ["network"]);
    assert_eq!(args.cgroups_mode.unwrap(), "soft");
    assert!(args.tcp_established && args.external_unix_sockets);
    assert!(args.shell_job && args.file_locks);
    // What the user asked for by name is theirs.
    assert!(bed.path("work/dump.log").exists());
    assert!(!bed.run_dir("c").join("criu-work").exists());
}

#[test]
fn options_or_paths_that_make_no_sense_are_refused() {
    let bed = Bed::running();
    let ask = |path: &str, options: Option<&[u8]>| {
        let request = CheckpointTaskRequest {
            id: "c".into(),
            path: path.into(),
            options: options
                .map(|bytes| Any {
                    value: bytes.to_vec(),
                    ..Default::default()
                })
                .into(),
            ..Default::default()
        };
        bed.service.checkpoint(&context().1, request)
    };
    for (answer, word) in [
        (ask("", None), "no image path"),
        (ask("images", None), "no absolute path"),
        (ask("/images", Some(&[0xff])), "options"),
    ] {
        assert_names(answer, Code::INVALID_ARGUMENT, &["test/c", word]);
    }
    assert_eq!(bed.machine.group("c").freezes(), 0);
}

#[test]
fn a_dump_that_fails_says_what_criu_said_and_lets_all_go_on() {
    let bed = Bed::running();
    bed.machine.fail(Verb::Checkpoint, "criu failed");
    let words = ["test/c", "images", "criu failed", "CRIU was here"];
    assert_names(bed.checkpoint("c"), Code::UNKNOWN, &words);
    assert!(!bed.machine.group("c").is_frozen());
    assert!(bed.path("bundles/c/criu-dump.log").exists());
    assert_eq!(bed.events().split_off(2), [""; 0]);
    bed.run_exec("c", "e");
}

#[test]
fn a_dump_during_which_a_process_came_is_discarded() {
    let bed = Bed::with("checkpoint_stops = false");
    bed.run("c");
    let group = bed.machine.group("c");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    group.cgroup.procs.lock().push(4);
    blocked.release();
    assert_names(dump.get(), Code::UNKNOWN, &["stand still", "[4]"]);
    group.cgroup.procs.lock().pop();

    let blocked = bed.machine.block(Verb::Checkpoint);
    let dump = bed.go(|bed| bed.checkpoint("c"));
    blocked.wait();
    *group.cgroup.frozen.lock() = false;
    blocked.release();
    assert_names(dump.get(), Code::UNKNOWN, &["stand still", "thawed"]);
    bed.checkpoint("c").unwrap();
}
