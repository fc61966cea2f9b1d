//! What ends a turn besides the end of its last exec: somebody's word, and the timer.

use super::{plan::Verb, *};
use crate::{
    sandbox::TurnNo,
    store::{Action, JournalLine, Missing, Trigger},
};

fn triggers(lines: &[JournalLine]) -> Vec<Trigger> {
    lines.iter().map(|line| line.trigger.clone()).collect()
}

#[test]
fn a_turn_ends_when_somebody_says_so_and_the_next_waits_for_it() {
    let bed = Bed::protected("");
    let blocked = bed.machine.block(Verb::Checkpoint);
    let turn = bed.go(|bed| bed.container("c").end_turn());
    blocked.wait();
    let next = bed.go(|bed| bed.run_exec("c", "a"));
    let doors = Arc::clone(&bed.container("c").doors);
    let deadline = Instant::now() + LIMIT;
    while doors.waiting() == 0 {
        assert!(Instant::now() < deadline, "nobody waits at the gate");
        thread::yield_now();
    }
    blocked.release();
    let line = turn.get().unwrap();
    assert_eq!(
        (&line.trigger, line.action),
        (&Trigger::Manual, Action::Full)
    );
    assert_eq!(bed.store().turns().unwrap(), [line.turn]);
    bed.end(next.get(), 0, "exit c/a 0");
    bed.finish();
    assert_eq!(
        triggers(&bed.journal(2)),
        [Trigger::Manual, Trigger::Exec],
        "the exec's turn has an end of its own"
    );
}

#[test]
fn a_word_in_the_middle_of_an_exec_keeps_the_files_and_the_rest_is_another_turn() {
    let bed = Bed::protected("");
    let pid = bed.run_exec("c", "a");
    let line = bed.container("c").end_turn().unwrap();
    assert_eq!(
        (line.action, &line.missing[0]),
        (Action::Files, &Missing::Processes)
    );
    let doors = Arc::clone(&bed.container("c").doors);
    let (execs, begin) = doors.turn_under_way().unwrap();
    assert_eq!(execs, ["a"]);
    assert!(begin >= line.ended_at, "{begin} < {}", line.ended_at);
    bed.end(pid, 0, "exit c/a 0");
    let lines = bed.journal(2);
    assert_eq!(triggers(&lines), [Trigger::Manual, Trigger::Exec]);
    assert_eq!(lines[1].started_at, begin);
    assert_eq!(doors.turn_under_way(), None);
    bed.finish();
}

#[test]
fn a_turn_that_cannot_be_saved_is_an_error_to_whoever_has_ended_it() {
    let bed = Bed::with("enabled = true\n");
    bed.run("c");
    let failed = bed.container("c").end_turn().unwrap_err().message;
    for words in ["test/c: turn", "turn 1 is not protected", "is no overlay"] {
        assert!(failed.contains(words), "{failed}");
    }
    bed.turn("a");
    bed.journal(2);
}

#[test]
fn nobody_ends_a_turn_of_a_sandbox_that_takes_none() {
    let bed = Bed::running();
    let refused = bed.container("c").end_turn().unwrap_err().message;
    assert!(refused.contains("not opted in"), "{refused}");
    let bed = Bed::protected("");
    let container = bed.container("c");
    bed.machine.end_all("c", 0);
    bed.wait_event("exit c 0");
    let refused = container.end_turn().unwrap_err().message;
    assert!(refused.contains("going away"), "{refused}");
}

#[test]
fn a_sandbox_whose_init_works_for_itself_is_kept_by_the_timer() {
    let bed = Bed::protected("timer = \"1s\"");
    let line = &bed.journal(1)[0];
    assert_eq!(
        (&line.trigger, line.action, line.turn),
        (&Trigger::Timer, Action::Full, TurnNo(1))
    );
    bed.finish();
}

#[test]
fn the_files_of_an_exec_that_takes_long_are_kept_by_the_timer_and_hold_nobody_up() {
    let bed = Bed::protected("timer = \"1s\"");
    let pid = bed.run_exec("c", "a");
    let line = &bed.journal(1)[0];
    assert_eq!(line.trigger, Trigger::Timer);
    assert_eq!(
        (line.action, &line.missing[0]),
        (Action::Files, &Missing::Processes)
    );
    let (a, b) = (pid, bed.run_exec("c", "b"));
    bed.end(a, 0, "exit c/a 0");
    bed.end(b, 0, "exit c/b 0");
    let deadline = Instant::now() + LIMIT;
    let whole = || {
        let lines = bed.store().journal().unwrap().lines;
        let exec = lines.into_iter().find(|l| l.trigger == Trigger::Exec);
        exec.map(|line| line.action)
    };
    while whole() != Some(Action::Full) {
        assert!(Instant::now() < deadline, "no turn after the execs");
        thread::yield_now();
    }
    bed.finish();
}
