//! What every failure of a rollback, and every death in it, comes to.

use super::{plan::Verb, *};
use crate::{
    coordinator::turns::Asked,
    sandbox::TurnNo,
    store::{Action, Trigger},
};

#[test]
fn a_sandbox_that_does_not_freeze_goes_on_as_it_was() {
    let bed = Bed::gone_on("");
    let (told, exec) = (bed.pids("c")[0], bed.run_exec("c", "e"));
    bed.machine.fail(Verb::Freeze, "in the way");
    let refused = bed.roll_back(1).unwrap_err().message;
    assert!(
        refused.contains("in the way") && refused.contains("nothing was touched"),
        "{refused}"
    );
    assert_eq!(bed.pids("c"), [told, exec]);
    assert!(!bed.machine.group("c").is_frozen());
    assert_eq!((bed.kept(), bed.file().as_str()), (vec![], "changed"));
    // The turn that was under way still is, and later turns are.
    bed.end(exec, 0, "exit c/e 0");
    let lines = bed.journal(3);
    assert_eq!(
        (&lines[1].trigger, lines[1].checkpoint),
        (&Trigger::Rollback, None)
    );
    assert_eq!(lines[2].action, Action::Full);
    bed.roll_back(1).unwrap();
    bed.finish();
}

#[test]
fn a_turn_that_ends_while_a_rollback_is_refused_is_kept() {
    let bed = Bed::gone_on("");
    let exec = bed.run_exec("c", "e");
    let blocked = bed.machine.block(Verb::Freeze);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.end(exec, 0, "exit c/e 0");
    blocked.fail("in the way");
    back.get().unwrap_err();
    let lines = bed.journal(3);
    assert_eq!(
        (&lines[2].trigger, lines[2].action),
        (&Trigger::Exec, Action::Full)
    );
    bed.finish();
}

#[test]
fn a_failure_after_the_kill_is_the_end_and_says_what_to_do() {
    type Prepare = fn(&Bed);
    let steps: [(&str, Prepare); 6] = [
        ("forget failed", |bed| {
            bed.machine.fail(Verb::Forget, "forget failed")
        }),
        ("unmount failed", |bed| {
            bed.machine.fail(Verb::Unmount, "unmount failed")
        }),
        ("mount failed", |bed| {
            bed.machine.fail(Verb::Mount, "mount failed")
        }),
        ("criu failed", |bed| {
            bed.machine.fail(Verb::Restore, "criu failed")
        }),
        ("pid file", |bed| bed.machine.forget_pid_file(Verb::Restore)),
        ("cgroup failed", |bed| {
            bed.machine.fail(Verb::Cgroup, "cgroup failed")
        }),
    ];
    for (why, prepare) in steps {
        let bed = Bed::gone_on("");
        let exec = bed.run_exec("c", "e");
        prepare(&bed);
        let failed = bed.roll_back(1).unwrap_err().message;
        for words in ["test/c", why, "had to be ended", "crab restore c@1 --start"] {
            assert!(failed.contains(words), "{failed}");
        }
        assert_eq!(code(bed.start("c", "e")), Code::FAILED_PRECONDITION);
        assert!(!bed.machine.lives("c"), "{why}: somebody lives on");
        assert!(
            bed.events().contains(&"exit c/e 137".into()),
            "{why}: {exec}"
        );
        bed.ended_with(137);
        assert_eq!(bed.machine.count("remove cgroup"), 1, "{why}");
        let lines = bed.journal(2);
        assert!(
            lines[1].note.as_deref().unwrap().contains(why),
            "{:?}",
            lines[1]
        );
        assert_eq!(lines[1].checkpoint, None);
        assert_eq!(bed.store().verify(TurnNo(1)).unwrap().len(), 0);
        // An armed start has the store for itself.
        let id = crate::sandbox::SandboxId::new("test", "c").unwrap();
        let store = crate::store::Store::open(&bed.path("store")).unwrap();
        store.writer(&id).unwrap().arm(TurnNo(1)).unwrap();
    }
}

/// Clients wait for the end of the streams before they delete a task.
#[test]
fn the_streams_end_with_a_sandbox_that_could_not_be_brought_back() {
    use std::{io::Read, os::unix::fs::OpenOptionsExt};
    for verb in [Verb::Forget, Verb::Restore] {
        let bed = Bed::unborn("");
        bed.machine.make_mortal();
        let fifo = bed.path("stdout");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut open = fs::OpenOptions::new();
        let mut client = open
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&fifo)
            .unwrap();
        let mut request = bed.protected_request();
        request.stdout = fifo.to_str().unwrap().into();
        bed.create_as(request).unwrap();
        bed.start("c", "").unwrap();
        let turn = bed
            .container("c")
            .checkpoint_now(Asked::default())
            .unwrap()
            .0
            .turn;
        bed.machine.fail(verb, "it failed");
        bed.roll_back(turn.0).unwrap_err();
        let deadline = Instant::now() + LIMIT;
        // As long as a writer is there, nothing to read is no end.
        while client.read(&mut [0; 16]).is_err() {
            assert!(Instant::now() < deadline, "{verb:?}: no end of the stream");
            thread::yield_now();
        }
        bed.ended_with(137);
    }
}

#[test]
fn what_a_shim_leaves_that_dies_in_a_rollback_is_cleaned_up() {
    use crate::shim::delete::after_death;
    let bed = Bed::gone_on("");
    let id = crate::sandbox::SandboxId::new("test", "c").unwrap();
    let bundle = bed.path("bundles/c");
    bed.roll_back(1).unwrap();
    // As if another process did it.
    let answer = after_death(&*bed.machine, &id, &bundle);
    assert_eq!(answer.exit_status, 137);
    assert_eq!(
        answer.pid,
        bed.state("c", "").unwrap().pid,
        "the pid that the client knows"
    );
    let calls = bed.calls_since("end calls");
    let steps = [
        "end calls c",
        "kill cgroup",
        "delete --force c",
        "remove cgroup",
        "unmount",
    ];
    let done = calls
        .iter()
        .zip(steps)
        .all(|(call, step)| call.starts_with(step));
    assert!(calls.len() >= steps.len() && done, "{calls:?}");
}

#[test]
fn death_while_the_processes_are_replaced_does_not_wait() {
    let bed = Bed::gone_on("");
    let blocked = bed.machine.block(Verb::Restore);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.go(|bed| bed.kill("c", "", libc::SIGKILL))
        .get()
        .unwrap();
    assert!(bed.container("c").doors.is_dying());
    blocked.release();
    // What came back is killed at once.
    let _ = back.get();
    bed.ended_with(137);
}

#[test]
fn death_before_the_files_are_back_ends_it_there() {
    let bed = Bed::gone_on("");
    let blocked = bed.machine.block(Verb::Forget);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.go(|bed| bed.kill("c", "", libc::SIGKILL))
        .get()
        .unwrap();
    blocked.release();
    let failed = back.get().unwrap_err();
    assert!(failed.message.contains("being killed"), "{failed}");
    assert_eq!(bed.machine.count("restore"), 0);
    bed.ended_with(137);
}

#[test]
fn death_while_it_freezes_is_the_old_inits() {
    let bed = Bed::gone_on("");
    let told = bed.pids("c")[0];
    let blocked = bed.machine.block(Verb::Freeze);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.go(|bed| bed.kill("c", "", libc::SIGKILL))
        .get()
        .unwrap();
    assert_eq!(bed.calls_since("signal"), [format!("signal {told} 9")]);
    blocked.release();
    let failed = back.get().unwrap_err();
    assert!(failed.message.contains("nothing was touched"), "{failed}");
    bed.ended_with(137);
    assert_eq!(bed.file(), "changed");
}
