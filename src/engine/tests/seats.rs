use super::*;

#[test]
fn urgent_goes_before_normal_that_came_within_the_handicap_and_not_before_older() {
    let handicap = Terms::default().handicap;
    for (head_start, urgent_is_first) in [
        (ms(0), true),
        (handicap - ms(1), true),
        (handicap + ms(1), false),
    ] {
        let mut host = Host::new(3, LIMITS);
        host.enter(2, at(0), &files(500 * MB), Class::Normal);
        host.take(2, at(0), Class::Normal).unwrap();
        // Both wait for tokens, of which there is a debt.
        host.enter(0, at(0), &files(MB), Class::Normal);
        let later = at(0).after(head_start);
        host.enter(1, later, &files(MB), Class::Urgent);
        let paid = at(4_510);
        let now = later.max(paid);
        let order = match urgent_is_first {
            true => [(1, Class::Urgent), (0, Class::Normal)],
            false => [(0, Class::Normal), (1, Class::Urgent)],
        };
        let [(first, its), (second, other)] = order;
        assert!(host.take(second, now, other).is_err(), "{head_start:?}");
        host.take(first, now, its).unwrap();
    }
}

#[test]
fn who_is_promoted_goes_first() {
    let mut host = Host::new(3, LIMITS);
    host.enter(0, at(0), &files(100 * MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(1), &files(MB), Class::Normal);
    host.enter(2, at(2), &files(MB), Class::Normal);
    assert!(host.take(2, at(2), Class::Normal).is_err());
    let until = host.take(2, at(3), Class::Urgent).unwrap_err();
    assert_eq!(
        until,
        at(510),
        "when there are tokens, not when the other one has them"
    );
    assert!(host.take(1, at(510), Class::Normal).is_err());
    host.take(2, at(510), Class::Urgent).unwrap();
}

#[test]
fn dumps_wait_for_dumps_and_files_do_not() {
    let mut host = Host::new(4, LIMITS);
    for slot in [0, 1] {
        host.enter(slot, at(0), &dump(MB), Class::Normal);
        host.take(slot, at(0), Class::Normal).unwrap();
    }
    host.enter(2, at(1), &dump(MB), Class::Normal);
    assert!(host.take(2, at(1), Class::Normal).is_err());
    host.enter(3, at(2), &files(MB), Class::Normal);
    host.take(3, at(2), Class::Normal).unwrap();
    // The drain is no dump any more.
    host.known.woken.borrow_mut().clear();
    let (table, known) = (&host.table, &host.known);
    host.seats[0].captured(table, at(3), MB, ms(10), known);
    assert_eq!(*host.known.woken.borrow(), [2]);
    host.take(2, at(3), Class::Normal).unwrap();
}

#[test]
fn dumps_that_somebody_waits_for_do_not_wait_for_those_that_nobody_waits_for() {
    let mut host = Host::new(6, LIMITS);
    for slot in [0, 1] {
        host.enter(slot, at(0), &dump(MB), Class::Normal);
        host.take(slot, at(0), Class::Normal).unwrap();
    }
    // As many again, and no more.
    for slot in [2, 3] {
        host.enter(slot, at(1), &dump(MB), Class::Normal);
        assert!(host.take(slot, at(1), Class::Normal).is_err());
        host.take(slot, at(2), Class::Urgent).unwrap();
    }
    host.enter(4, at(3), &dump(MB), Class::Urgent);
    assert!(host.take(4, at(3), Class::Urgent).is_err());
    // They count for the others.
    host.enter(5, at(3), &dump(MB), Class::Normal);
    let (table, known) = (&host.table, &host.known);
    host.seats[0].captured(table, at(4), MB, ms(10), known);
    assert!(host.take(5, at(4), Class::Normal).is_err());
    host.take(4, at(4), Class::Urgent).unwrap();
}

#[test]
fn who_has_waited_for_the_whole_handicap_is_as_urgent_as_any() {
    let handicap = Terms::default().handicap;
    let mut host = Host::new(4, Limits { dumps: 1, ..LIMITS });
    let long = Request {
        expected: Duration::from_secs(30),
        ..dump(MB)
    };
    host.enter(0, at(0), &long, Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(0), &dump(MB), Class::Normal);
    let before = at(0).after(handicap - ms(1));
    assert!(host.take(1, before, Class::Normal).is_err());
    let now = at(0).after(handicap);
    host.enter(2, now, &dump(MB), Class::Urgent);
    host.take(1, now, Class::Normal).unwrap();
    assert!(host.take(2, now, Class::Urgent).is_err());
}

#[test]
fn undrained_bytes_are_bounded_but_one_alone_may_have_more() {
    let limits = Limits {
        rate: None,
        undrained: 10 * MB,
        ..LIMITS
    };
    let mut host = Host::new(3, limits);
    host.enter(0, at(0), &files(30 * MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(1), &files(MB), Class::Urgent);
    assert!(host.take(1, at(1), Class::Urgent).is_err());
    let (table, known) = (&host.table, &host.known);
    host.seats[0].captured(table, at(2), 9 * MB, ms(10), known);
    host.take(1, at(2), Class::Urgent).unwrap();
    host.enter(2, at(3), &files(MB), Class::Normal);
    assert!(host.take(2, at(3), Class::Normal).is_err());
    host.settle(0, at(4), 30 * MB);
    host.take(2, at(4), Class::Normal).unwrap();
}

#[test]
fn of_two_that_take_at_once_the_second_looks_again() {
    let mut host = Host::new(2, LIMITS);
    host.enter(0, at(0), &files(30 * MB), Class::Urgent);
    let Next::Commit(first) = host.look(0, at(0), Class::Urgent) else {
        panic!("the first does not propose");
    };
    host.enter(1, at(0), &files(30 * MB), Class::Urgent);
    let Next::Commit(second) = host.look(1, at(0), Class::Urgent) else {
        panic!("the second does not propose");
    };
    assert!(host.commit(1, &second));
    assert!(!host.commit(0, &first), "50 MB were there, not 60");
    assert_eq!(host.table.status(0).phase, Phase::Waiting);
    assert_eq!(host.take(0, at(0), Class::Urgent), Err(at(100)));
}

#[test]
fn of_two_that_take_the_last_dump_at_once_one_has_it() {
    let limits = Limits {
        rate: None,
        dumps: 1,
        ..LIMITS
    };
    let mut host = Host::new(2, limits);
    host.enter(0, at(0), &dump(MB), Class::Normal);
    host.enter(1, at(0), &dump(MB), Class::Urgent);
    let Next::Commit(first) = host.look(1, at(0), Class::Urgent) else {
        panic!("the first does not propose");
    };
    // It says that it works before it does.
    assert!(host.take(0, at(0), Class::Normal).is_err());
    assert!(host.commit(1, &first));
    host.settle(1, at(5), MB);
    assert!(host.known.woken.borrow().contains(&0));
    host.take(0, at(5), Class::Normal).unwrap();
}

#[test]
fn who_waits_for_the_dead_waits_no_longer() {
    let limits = Limits { dumps: 1, ..LIMITS };
    let mut host = Host::new(3, limits);
    host.enter(0, at(0), &dump(MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(1), &dump(MB), Class::Urgent);
    host.enter(2, at(2), &dump(MB), Class::Normal);
    let until = host.take(2, at(2), Class::Normal).unwrap_err();
    assert!(
        until <= at(2).after(2 * Terms::default().recheck),
        "{until:?}"
    );
    // One who works, and one who comes first.
    host.known.dead.borrow_mut().extend([0, 1]);
    host.take(2, until, Class::Normal).unwrap();
}

#[test]
fn a_stopped_dump_counts_as_long_as_it_may_take() {
    let limits = Limits { dumps: 1, ..LIMITS };
    let mut host = Host::new(2, limits);
    host.enter(0, at(0), &dump(MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(1), &dump(MB), Class::Normal);
    // Four times the 100 ms that it has expected, and a second.
    assert!(host.take(1, at(1_399), Class::Normal).is_err());
    host.take(1, at(1_400), Class::Normal).unwrap();
}

#[test]
fn however_many_are_stopped_they_are_passed_together() {
    const STOPPED: usize = 40;
    let mut host = Host::new(STOPPED as u32 + 1, LIMITS);
    for slot in 0..STOPPED {
        host.enter(slot, at(0), &files(MB), Class::Urgent);
    }
    host.enter(STOPPED, at(1), &files(MB), Class::Urgent);
    let mut now = at(1);
    while let Err(until) = host.take(STOPPED, now, Class::Urgent) {
        assert!(until > now);
        now = until;
    }
    let patience = Terms::default().patience;
    assert_eq!(now, at(1).after(patience * 6), "1 + log2(40)");
    // They come back, with the rank that they had.
    let woken = host.known.woken.borrow().len();
    assert!(woken >= STOPPED, "{woken}");
    host.take(7, now, Class::Urgent).unwrap();
}

#[test]
fn a_forced_grant_is_charged_like_any_other() {
    let mut host = Host::new(2, LIMITS);
    host.enter(0, at(0), &files(50 * MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(0), &files(50 * MB), Class::Urgent);
    let (table, known) = (&host.table, &host.known);
    host.seats[1].force(table, at(0), known);
    assert_eq!(
        host.table.bucket().level(at(0), &LIMITS),
        Some(-50 * MB as i64)
    );
}

#[test]
fn a_dump_that_begins_in_the_far_future_is_damage_and_counts_for_nothing() {
    let limits = Limits { dumps: 1, ..LIMITS };
    let mut host = Host::new(2, limits);
    host.table.set(0, table::Field::Lease, u64::MAX);
    host.table.set_status(
        0,
        Status {
            phase: Phase::Working,
            class: Class::Normal,
            work: Work::Dump,
            since: Moment::from_micros(u64::MAX),
        },
    );
    host.enter(1, at(0), &dump(MB), Class::Normal);
    host.take(1, at(0), Class::Normal).unwrap();
}

#[test]
fn who_lacks_tokens_is_not_passed_and_who_has_them_is_not_waited_for() {
    let mut host = Host::new(3, LIMITS);
    host.enter(0, at(0), &files(250 * MB), Class::Normal);
    host.take(0, at(0), Class::Normal).unwrap();
    host.enter(1, at(0), &files(50 * MB), Class::Urgent);
    host.enter(2, at(1), &files(MB), Class::Urgent);
    // The first has its tokens after 2.5 s, and is given the time to take them.
    let mut now = at(1);
    while now < at(2_500) {
        now = host.take(2, now, Class::Urgent).unwrap_err();
        assert_eq!(host.table.status(1).phase, Phase::Waiting);
    }
    host.take(1, at(2_500), Class::Urgent).unwrap();
    host.take(2, now, Class::Urgent).unwrap();
}
