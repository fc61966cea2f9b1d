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
