//! The file, and what may happen to it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    thread,
    time::Instant,
};

use super::*;
use crate::engine::file::path;

const SOON: Duration = Duration::from_secs(20);

fn member(run: &Path, name: &str) -> Member {
    Member::join(run, name, LIMITS, Terms::default())
}

/// Takes the whole burst and keeps it.
fn take_all(member: &mut Member) {
    let grant = member.acquire(&files(50 * MB), &Caller::default(), SOON);
    grant.unwrap().settle(50 * MB);
}

/// Whether what one takes the other has not. It is given back.
fn share(a: &mut Member, b: &mut Member) -> bool {
    let grant = a.force(&files(500 * MB));
    let level = b.tokens().unwrap();
    grant.settle(0);
    level < -100 * MB as i64
}

#[test]
fn members_of_one_host_share_its_budget() {
    let dir = tempfile::tempdir().unwrap();
    let [mut a, mut b] = ["a", "b"].map(|name| member(dir.path(), name));
    assert!(share(&mut a, &mut b));
    assert_eq!((a.why_alone(), b.why_alone()), (None, None));
}

#[test]
fn what_is_not_settled_stays_charged_and_what_failed_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = member(dir.path(), "a");
    drop(a.acquire(&files(500 * MB), &Caller::default(), SOON));
    let charged = a.tokens().unwrap();
    assert!(charged < -100 * MB as i64, "{charged}");
    a.force(&files(500 * MB)).settle(0);
    let after = a.tokens().unwrap();
    assert!(after >= charged, "{after}");
}

#[test]
fn a_damaged_or_lost_file_is_replaced_and_all_members_come_over() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 5] = [
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("emptied", |path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(0)
                .unwrap();
        }),
        ("cut", |path| {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(4096)
                .unwrap();
        }),
        ("of another boot", |path| {
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&[7; 16], 16).unwrap();
        }),
        ("replaced", |path| fs::write(path, "nonsense").unwrap()),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let [mut a, mut b] = ["a", "b"].map(|name| member(dir.path(), name));
        take_all(&mut a);
        damage(&path(dir.path()));
        assert!(share(&mut b, &mut a), "{what}");
        assert!(share(&mut a, &mut b), "{what}");
    }
}

#[test]
fn garbage_in_every_word_holds_nobody_up_and_gives_nothing_away() {
    let dir = tempfile::tempdir().unwrap();
    let [mut a, mut b] = ["a", "b"].map(|name| member(dir.path(), name));
    let mut random = tools::random::Random(5);
    for round in 0..20 {
        let garbage: Vec<u8> = (0..Table::BYTES).map(|_| random.next() as u8).collect();
        let file = File::options().write(true).open(path(dir.path())).unwrap();
        // All but the header.
        file.write_all_at(&garbage[64..], 64).unwrap();
        let begin = Instant::now();
        a.force(&files(500 * MB)).settle(500 * MB);
        let before = begin.elapsed();
        let level = b.tokens().unwrap();
        let most = 50 * MB as i64 + before.as_micros() as i64 * 100 - 500 * MB as i64;
        assert!(level <= most, "round {round}: {level} after {before:?}");
        let denied = b.acquire(&files(MB), &Caller::default(), ms(20)).err();
        assert_eq!(denied, Some(Denied::TooLong(ms(20))), "round {round}");
    }
}

#[test]
fn where_there_can_be_no_file_a_member_is_alone_until_there_can() {
    let dir = tempfile::tempdir().unwrap();
    let there = path(dir.path());
    fs::create_dir(&there).unwrap();
    let mut a = member(dir.path(), "a");
    let why = a.why_alone().unwrap().to_owned();
    assert!(why.starts_with(there.to_str().unwrap()), "{why}");
    // With a budget of the same size.
    take_all(&mut a);
    a.force(&files(500 * MB)).settle(500 * MB);
    assert!(a.tokens().unwrap() < -100 * MB as i64);
    fs::remove_dir(&there).unwrap();
    let end = Instant::now() + SOON;
    while a.why_alone().is_some() {
        assert!(Instant::now() < end, "still alone");
        a.tokens();
        thread::yield_now();
    }
    assert!(share(&mut a, &mut member(dir.path(), "b")));
}

#[test]
fn a_symbolic_link_is_not_followed() {
    let [dir, elsewhere] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    drop(member(elsewhere.path(), "x"));
    std::os::unix::fs::symlink(path(elsewhere.path()), path(dir.path())).unwrap();
    assert!(member(dir.path(), "a").why_alone().is_some());
}

#[test]
fn a_full_disk_is_said_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let options = Some("size=64k");
    let tmpfs = Some("tmpfs");
    nix::mount::mount(
        tmpfs,
        dir.path(),
        tmpfs,
        nix::mount::MsFlags::empty(),
        options,
    )
    .unwrap();
    let mut a = member(dir.path(), "a");
    let why = a.why_alone().map(str::to_owned);
    take_all(&mut a);
    let left = fs::read_dir(dir.path()).unwrap().count();
    nix::mount::umount(dir.path()).unwrap();
    assert!(why.is_some_and(|why| why.contains("No space left")));
    assert_eq!(left, 0, "half a file is no file");
}

#[test]
fn slots_of_those_who_have_left_are_given_again() {
    let dir = tempfile::tempdir().unwrap();
    let a = member(dir.path(), "a");
    for _ in 0..3 {
        let b = member(dir.path(), "b");
        assert_eq!((a.slot(), b.slot()), (0, 1));
    }
}

/// Waits in a thread for tokens that come in half an hour, until `then` does something about it.
fn waits(dir: &Path, then: impl FnOnce(&Caller)) -> Result<(), Denied> {
    let mut debtor = member(dir, "debtor");
    debtor.force(&files(180_000 * MB)).settle(180_000 * MB);
    let caller = Caller::new();
    let (run, its) = (dir.to_owned(), Arc::clone(&caller));
    let waiter = thread::spawn(move || {
        let mut waiter = member(&run, "waiter");
        waiter
            .acquire(&files(MB), &its, SOON)
            .map(|grant| grant.settle(MB))
    });
    let end = Instant::now() + SOON;
    while !caller.is_waiting() {
        assert!(Instant::now() < end, "nobody waits");
        thread::yield_now();
    }
    then(&caller);
    waiter.join().unwrap()
}

#[test]
fn who_waits_can_give_up() {
    let dir = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    assert_eq!(waits(dir.path(), Caller::give_up), Err(Denied::GaveUp));
    assert!(begin.elapsed() < SOON);
}

#[test]
fn who_waits_can_become_urgent() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let class = || {
        let report = Report::read(run, &LIMITS, &Terms::default()).unwrap();
        let members = report.unwrap().members;
        members.first().map(|its| (its.name.clone(), its.class))
    };
    let until = |wanted: Class| {
        let end = Instant::now() + SOON;
        while class() != Some(("waiter".into(), wanted)) {
            assert!(Instant::now() < end, "{:?}", class());
            thread::yield_now();
        }
    };
    let denied = waits(run, |caller| {
        until(Class::Normal);
        caller.promote();
        until(Class::Urgent);
        caller.give_up();
    });
    assert_eq!(denied, Err(Denied::GaveUp));
}

#[test]
fn who_waits_when_the_file_goes_away_goes_on_with_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let table = path(dir.path());
    // Not made shorter: whoever touches it in that moment dies (see Mapping), the test as well.
    let done = waits(dir.path(), |_| fs::remove_file(&table).unwrap());
    assert_eq!(done, Ok(()));
}
