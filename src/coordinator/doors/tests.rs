use std::{sync::mpsc, thread};

use super::*;

const SOON: Duration = Duration::from_secs(20);

/// Waits until one turn waits at the door.
fn until_one_waits(doors: &Doors) {
    let deadline = Instant::now() + SOON;
    while doors.waiting() == 0 {
        assert!(Instant::now() < deadline, "nobody waits at the door");
        thread::yield_now();
    }
}

#[test]
fn a_turn_ends_with_the_last_exec_that_counts() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    assert!(!doors.enter("b", true).started());
    assert!(!doors.enter("health", false).started());
    assert!(!doors.leave("a"));
    assert!(doors.leave("b"));
    doors.open();
    assert!(!doors.leave("health"));
}

#[test]
fn an_exec_that_never_ran_ends_no_turn() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).failed());
    assert!(!doors.leave("a"));
    assert!(doors.latch(SOON).is_some());
}

#[test]
fn a_turn_that_waited_for_a_start_that_does_not_count_ends_with_it() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    let entering = doors.enter("health", false);
    assert!(!doors.leave("a"), "nobody knows yet whether more comes");
    assert!(entering.started());
    doors.open();
    assert!(!doors.leave("health"));
    // One that counts goes on with the turn.
    assert!(!doors.enter("a", true).started());
    let entering = doors.enter("b", true);
    assert!(!doors.leave("a"));
    assert!(!entering.started());
    assert!(doors.leave("b"));
}

#[test]
fn a_turn_that_waited_for_a_start_ends_when_that_fails() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    let entering = doors.enter("b", true);
    assert!(!doors.leave("a"));
    assert!(entering.failed());
}

#[test]
fn the_next_exec_waits_until_the_last_turn_is_durable() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    assert!(doors.leave("a"));
    let (sender, entered) = mpsc::channel();
    let other = Arc::clone(&doors);
    let waiter = thread::spawn(move || {
        assert!(!other.enter("b", true).started());
        sender.send(()).unwrap();
    });
    until_one_waits(&doors);
    // A health check passes meanwhile.
    assert!(!doors.enter("health", false).started());
    assert!(entered.recv_timeout(Duration::from_millis(50)).is_err());
    assert!(doors.open() >= Duration::from_millis(50));
    entered.recv_timeout(SOON).unwrap();
    waiter.join().unwrap();
    assert_eq!(doors.open(), Duration::ZERO);
}

#[test]
fn a_turn_at_the_gate_makes_the_checkpoint_urgent_whichever_comes_first() {
    for caller_is_first in [true, false] {
        let doors = Doors::new();
        let caller = Caller::new();
        assert!(!doors.enter("a", true).started());
        assert!(doors.leave("a"));
        if caller_is_first {
            doors.set_caller(Some(Arc::clone(&caller)));
        }
        assert!(!caller.is_urgent());
        let other = Arc::clone(&doors);
        let waiter = thread::spawn(move || other.enter("b", true).started());
        until_one_waits(&doors);
        if !caller_is_first {
            doors.set_caller(Some(Arc::clone(&caller)));
        }
        assert!(caller.is_urgent());
        doors.open();
        waiter.join().unwrap();
    }
}

#[test]
fn a_checkpoint_of_the_dying_is_given_up_whichever_comes_first() {
    let (doors, before, after) = (Doors::new(), Caller::new(), Caller::new());
    doors.set_caller(Some(Arc::clone(&before)));
    assert!(!before.has_given_up());
    doors.give_up();
    doors.set_caller(Some(Arc::clone(&after)));
    assert!(before.has_given_up() && after.has_given_up());
}

#[test]
fn a_cut_waits_for_half_started_execs_and_holds_off_new_ones() {
    let doors = Doors::new();
    let entering = doors.enter("a", true);
    assert!(doors.latch(Duration::from_millis(20)).is_none());
    assert!(!entering.started());
    let latched = doors.latch(SOON).unwrap();
    let (sender, entered) = mpsc::channel();
    let other = Arc::clone(&doors);
    let waiter = thread::spawn(move || {
        assert!(!other.enter("health", false).started());
        sender.send(()).unwrap();
    });
    assert!(entered.recv_timeout(Duration::from_millis(50)).is_err());
    drop(latched);
    entered.recv_timeout(SOON).unwrap();
    waiter.join().unwrap();
}

#[test]
fn a_turn_that_is_undone_has_no_end() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    doors.on(Event::GoBack);
    let void = doors.void_turn();
    assert!(!doors.leave("a"));
    drop(void);
    assert_eq!(doors.take_turn_start(), None);
    assert!(!doors.enter("b", true).started());
    assert!(doors.leave("b"));
}

#[test]
fn a_turn_that_could_not_be_undone_ends_as_ever() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    doors.on(Event::GoBack);
    assert!(!doors.void_turn().take_back());
    assert!(doors.leave("a"));
    assert!(doors.take_turn_start().is_some());
}

#[test]
fn a_turn_that_ended_while_it_could_not_be_undone_is_told_then() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    doors.on(Event::GoBack);
    let void = doors.void_turn();
    assert!(!doors.leave("a"));
    assert!(void.take_back());
    assert!(doors.take_turn_start().is_some());
    // Once.
    assert!(!doors.enter("health", false).started());
    assert!(!doors.leave("health"));
    doors.open();
}

#[test]
fn a_turn_that_somebody_ends_shuts_the_gate_and_those_inside_go_on_with_another() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    let begin = doors.turn_under_way().unwrap().1;
    assert!(doors.end_turn_now());
    assert_eq!(doors.take_turn_start(), Some(begin));
    assert!(doors.turn_under_way().unwrap().1 >= begin);
    let other = Arc::clone(&doors);
    let waiter = thread::spawn(move || other.enter("b", true).started());
    until_one_waits(&doors);
    doors.open();
    assert!(!waiter.join().unwrap());
    assert!(!doors.leave("a"));
    assert!(doors.leave("b"));
    assert!(doors.take_turn_start().is_some());
    assert_eq!(doors.take_turn_start(), None);
    doors.give_up();
    assert!(!doors.end_turn_now());
}

#[test]
fn the_dying_wait_for_nothing() {
    let doors = Doors::new();
    assert!(!doors.enter("a", true).started());
    assert!(doors.leave("a"));
    doors.give_up();
    assert!(!doors.enter("b", true).started());
    assert!(!doors.leave("b"));
}
