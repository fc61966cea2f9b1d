//! Delete: what is left, and trying again.

use containerd_shim::protos::types::mount::Mount;

use super::{plan::Verb, *};

fn stopped() -> Bed {
    let bed = Bed::new();
    let mut request = bed.request("c");
    request.rootfs.push(Mount::new());
    bed.create_as(request).unwrap();
    let init = bed.start("c", "").unwrap().pid as i32;
    bed.end(init, 3, "exit c 3");
    bed
}

#[test]
fn nothing_is_left_of_a_deleted_container() {
    let bed = stopped();
    assert!(bed.run_dir("c").exists());
    bed.delete("c", "").unwrap();
    assert!(!bed.run_dir("c").exists());
    let rootfs = bed.path("bundles/c/rootfs");
    let calls = bed.machine.calls();
    assert_eq!(
        calls[calls.len() - 2..],
        ["delete c".into(), format!("unmount {}", rootfs.display())]
    );
}

#[test]
fn a_delete_that_failed_can_be_tried_again() {
    for (verb, step) in [(Verb::Delete, "delete"), (Verb::Unmount, "unmount")] {
        let bed = stopped();
        bed.machine.fail(verb, "device is busy");
        let words = ["test/c", step, "device is busy"];
        assert_names(bed.delete("c", ""), Code::UNKNOWN, &words);
        assert_eq!(bed.status("c", ""), Status::STOPPED);
        assert!(!bed.shutdown());
        let answer = bed.delete("c", "").unwrap();
        assert_eq!(answer.exit_status, 3);
        assert_eq!(bed.events().last().unwrap(), "delete c 3");
        assert!(bed.shutdown());
    }
}

#[test]
fn of_two_deletes_one_finds_nothing() {
    let bed = stopped();
    let blocked = bed.machine.block(Verb::Delete);
    let first = bed.go(|bed| bed.delete("c", ""));
    blocked.wait();
    let second = bed.go(|bed| bed.delete("c", ""));
    assert!(second.waits());
    blocked.release();
    first.get().unwrap();
    assert_eq!(code(second.get()), Code::NOT_FOUND);
}

#[test]
fn a_created_container_ends_before_it_is_deleted() {
    let bed = Bed::new();
    let init = bed.create("c").unwrap().pid as i32;
    bed.machine.end_later(Verb::Delete);
    let delete = bed.go(|bed| bed.delete("c", ""));
    assert!(delete.waits());
    bed.machine.end(init, 137);
    assert_eq!(delete.get().unwrap().exit_status, 137);
    assert_eq!(bed.events(), ["create c", "exit c 137", "delete c 137"]);
}

#[test]
fn a_container_that_was_to_be_restored_is_unknown_to_the_runtime() {
    let bed = Bed::new();
    let mut request = bed.request("c");
    request.checkpoint = "/images".into();
    bed.create_as(request).unwrap();
    bed.delete("c", "").unwrap();
    assert_eq!(bed.machine.calls(), [""; 0]);
    assert!(!bed.run_dir("c").exists());
    assert_eq!(bed.events(), ["create c", "delete c 0"]);
}

/// A container whose shim has died; the link to that shim's socket, and its bundle.
fn dead() -> (Bed, PathBuf) {
    let bed = Bed::new();
    let mut request = bed.request("c");
    request.rootfs.push(Mount::new());
    let bundle = PathBuf::from(&request.bundle);
    let config =
        r#"{"linux":{"cgroupsPath":"/test/c","namespaces":[{"type":"pid"},{"type":"ipc"}]}}"#;
    fs::write(bundle.join("config.json"), config).unwrap();
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    bed.create_as(request).unwrap();
    let mut shim = std::process::Command::new("true").spawn().unwrap();
    shim.wait().unwrap();
    let link = bed.run_dir("c").join(crate::control::LINK);
    let socket = bed.path("run/shims").join(format!("{}.sock", shim.id()));
    std::os::unix::fs::symlink(socket, link).unwrap();
    (bed, bundle)
}

fn assert_cleared(bed: &Bed, bundle: &std::path::Path) {
    let calls = bed.machine.calls();
    assert_eq!(
        calls[calls.len() - 4..],
        [
            r#"kill cgroup ["/sys/fs/cgroup/fake", "/test/c"]"#.into(),
            "delete --force c".into(),
            r#"remove cgroup ["/sys/fs/cgroup/fake", "/test/c"]"#.into(),
            format!("unmount {}", bundle.join("rootfs").display()),
        ]
    );
    assert!(!bed.run_dir("c").exists());
}

#[test]
fn after_a_shims_death_all_it_had_is_removed_also_what_no_runtime_knows() {
    let (bed, bundle) = dead();
    let sandbox = crate::sandbox::SandboxId::new("test", "c").unwrap();
    let answer = super::super::delete::after_death(&*bed.machine, &sandbox, &bundle);
    assert_eq!(answer.exit_status, 137);
    assert_cleared(&bed, &bundle);
}

#[test]
fn a_dead_shims_sandbox_is_cleared_by_others_once_containerd_has_forgotten_it() {
    let (bed, bundle) = dead();
    let sweep = || super::super::orphans::sweep(&*bed.machine, &bed.path("run"));
    let before = bed.machine.calls();
    sweep();
    assert_eq!(bed.machine.calls(), before, "containerd will ask for it");
    fs::rename(&bundle, bed.path("bundles/forgotten")).unwrap();
    sweep();
    let calls = bed.machine.calls();
    assert_eq!(
        calls[before.len()..],
        [
            "end calls c",
            r#"kill cgroup ["/sys/fs/cgroup/fake", "/test/c"]"#,
            "delete --force c",
            r#"remove cgroup ["/sys/fs/cgroup/fake", "/test/c"]"#
        ]
    );
    assert!(!bed.run_dir("c").exists());
}
