//! What containerd is told, and in which order.

use super::{plan::Verb, *};

impl Bed {
    /// Waits until the container knows that its init has ended, told or not.
    pub(super) fn until_init_is_gone(&self, container: &Container) {
        let deadline = Instant::now() + LIMIT;
        while container.inner.lock().init_exit.is_none() {
            assert!(Instant::now() < deadline, "{:?}", self.events());
            thread::yield_now();
        }
    }
}

#[test]
fn a_whole_life_is_told_in_containerds_order() {
    let bed = Bed::new();
    let init = bed.run("c");
    let exec = bed.run_exec("c", "e");
    bed.end(exec, 7, "exit c/e 7");
    bed.delete("c", "e").unwrap();
    bed.pause("c").unwrap();
    bed.resume("c").unwrap();
    bed.end(init, 3, "exit c 3");
    let deleted = bed.delete("c", "").unwrap();
    assert_eq!((deleted.pid as i32, deleted.exit_status), (init, 3));
    assert_eq!(
        bed.events(),
        [
            "create c",
            "start c",
            "added c/e",
            "started c/e",
            "exit c/e 7",
            "paused c",
            "resumed c",
            "exit c 3",
            "delete c 3"
        ]
    );
}

#[test]
fn an_init_that_ends_before_its_create_returns_is_told_after_it() {
    let bed = Bed::new();
    for i in 0..50 {
        let id = format!("c{i}");
        bed.machine.end_at_once(Verb::Create, 9);
        bed.create(&id).unwrap();
        bed.wait_event(&format!("exit {id} 9"));
        let last = bed.events().split_off(2 * i);
        assert_eq!(last, [format!("create {id}"), format!("exit {id} 9")]);
    }
}

#[test]
fn an_init_that_ends_before_its_start_returns_is_told_after_it() {
    let bed = Bed::new();
    let init = bed.create("c").unwrap().pid as i32;
    let container = bed.container("c");
    let blocked = bed.machine.block(Verb::Start);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    bed.machine.end(init, 5);
    bed.until_init_is_gone(&container);
    assert_eq!(bed.events(), ["create c"]);
    blocked.release();
    start.get().unwrap();
    bed.wait_event("exit c 5");
    assert_eq!(bed.events(), ["create c", "start c", "exit c 5"]);
    assert_eq!(bed.status("c", ""), Status::STOPPED);
}

#[test]
fn an_init_that_ends_while_its_start_fails_is_told() {
    let bed = Bed::new();
    let init = bed.create("c").unwrap().pid as i32;
    let container = bed.container("c");
    let blocked = bed.machine.block(Verb::Start);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    bed.machine.end(init, 5);
    bed.until_init_is_gone(&container);
    blocked.fail("no such program");
    assert_names(start.get(), Code::UNKNOWN, &["test/c", "no such program"]);
    bed.wait_event("exit c 5");
    assert_eq!(bed.events(), ["create c", "exit c 5"]);
    bed.delete("c", "").unwrap();
}

#[test]
fn an_exec_that_ends_before_its_start_returns_is_told_after_it() {
    let bed = Bed::running();
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "e"));
    blocked.wait();
    let pid = *bed.machine.group("c").cgroup.procs.lock().last().unwrap();
    bed.machine.end(pid, 4);
    blocked.release();
    assert_eq!(start.get().unwrap().pid as i32, pid);
    bed.wait_event("exit c/e 4");
    assert_eq!(
        bed.events().split_off(2),
        ["added c/e", "started c/e", "exit c/e 4"]
    );
}

#[test]
fn inits_end_is_told_last_and_the_container_runs_until_then() {
    let bed = Bed::new();
    let init = bed.run("c");
    let (a, b) = (bed.run_exec("c", "a"), bed.run_exec("c", "b"));
    bed.machine.end(init, 137);
    bed.until_init_is_gone(&bed.container("c"));
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    assert_eq!(code(bed.delete("c", "")), Code::FAILED_PRECONDITION);
    bed.end(a, 137, "exit c/a 137");
    assert!(!bed.events().contains(&"exit c 137".into()));
    bed.machine.end(b, 137);
    bed.wait_event("exit c 137");
    assert_eq!(
        bed.events().split_off(6),
        ["exit c/a 137", "exit c/b 137", "exit c 137"]
    );
}

#[test]
fn an_exec_under_way_is_told_before_the_end_of_init() {
    let bed = Bed::new();
    let init = bed.run("c");
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "e"));
    blocked.wait();
    bed.machine.end(init, 137);
    bed.until_init_is_gone(&bed.container("c"));
    bed.machine.end_all("c", 137);
    blocked.release();
    start.get().unwrap();
    bed.wait_event("exit c 137");
    assert_eq!(
        bed.events().split_off(3),
        ["started c/e", "exit c/e 137", "exit c 137"]
    );
}

#[test]
fn an_exec_that_fails_to_start_lets_the_end_of_init_be_told() {
    let bed = Bed::new();
    let init = bed.run("c");
    bed.exec("c", "e").unwrap();
    let blocked = bed.machine.block(Verb::Exec);
    let start = bed.go(|bed| bed.start("c", "e"));
    blocked.wait();
    bed.machine.end(init, 137);
    bed.until_init_is_gone(&bed.container("c"));
    blocked.fail("container is gone");
    start.get().unwrap_err();
    bed.wait_event("exit c 137");
    bed.delete("c", "").unwrap();
}

#[test]
fn an_exec_in_a_created_container_does_not_bring_inits_end_before_its_start() {
    let bed = Bed::new();
    let init = bed.create("c").unwrap().pid as i32;
    let exec = bed.run_exec("c", "e");
    let blocked = bed.machine.block(Verb::Start);
    let start = bed.go(|bed| bed.start("c", ""));
    blocked.wait();
    bed.machine.end(init, 1);
    bed.until_init_is_gone(&bed.container("c"));
    bed.end(exec, 2, "exit c/e 2");
    blocked.release();
    start.get().unwrap();
    bed.wait_event("exit c 1");
    bed.delete("c", "").unwrap();
    assert_eq!(
        bed.events().split_off(3),
        ["exit c/e 2", "start c", "exit c 1", "delete c 1"]
    );
}

#[test]
fn whoever_waited_and_deletes_at_once_comes_after_the_end_was_told() {
    let bed = Bed::new();
    let init = bed.run("c");
    let gone = bed.go(|bed| {
        bed.wait("c", "").unwrap();
        bed.delete("c", "").unwrap();
    });
    let held = bed.hold_event("exit c 0");
    bed.machine.end(init, 0);
    held.wait();
    assert!(gone.waits());
    held.release();
    gone.get();
    assert_eq!(bed.events().split_off(2), ["exit c 0", "delete c 0"]);
}

#[test]
fn an_exec_id_that_is_used_again_at_once_is_told_in_order() {
    let bed = Bed::running();
    let pid = bed.run_exec("c", "e");
    let again = bed.go(|bed| {
        bed.wait("c", "e").unwrap();
        bed.delete("c", "e").unwrap();
        bed.exec("c", "e").unwrap();
    });
    let held = bed.hold_event("exit c/e 0");
    bed.machine.end(pid, 0);
    held.wait();
    assert!(again.waits());
    held.release();
    again.get();
    assert_eq!(bed.events().split_off(4), ["exit c/e 0", "added c/e"]);
}

#[test]
fn lack_of_memory_is_told() {
    let bed = Bed::running();
    bed.machine.group("c").out_of_memory();
    bed.wait_event("oom c");
}

#[test]
fn every_waiter_wakes_and_later_ones_do_not_wait() {
    let bed = Bed::running();
    let init = bed.machine.group("c").cgroup.procs.lock()[0];
    let waiters: Vec<_> = (0..20).map(|_| bed.go(|bed| bed.wait("c", ""))).collect();
    assert!(waiters[0].waits());
    bed.machine.end(init, 42);
    for waiter in waiters {
        let answer = waiter.get().unwrap();
        assert_eq!(answer.exit_status, 42);
        assert!(answer.exited_at.seconds > 0);
    }
    assert_eq!(bed.wait("c", "").unwrap().exit_status, 42);
}

#[test]
fn a_waiter_whose_client_has_gone_returns() {
    let bed = Bed::running();
    let (client, context) = context();
    let request = WaitRequest {
        id: "c".into(),
        ..Default::default()
    };
    let waiter = bed.go(move |bed| bed.service.wait(&context, request));
    assert!(waiter.waits());
    drop(client);
    assert_names(waiter.get(), Code::UNKNOWN, &["client went away"]);
    assert_eq!(bed.status("c", ""), Status::RUNNING);
}
