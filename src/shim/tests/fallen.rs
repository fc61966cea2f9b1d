//! What has just come back and dies before the recovery or the rollback is over.

use super::{
    plan::{Blocked, Verb},
    recover::RECOVER,
    *,
};
use crate::coordinator::turns::Asked;

impl Bed {
    /// A container that comes back; its checkpoint has limits, which are put back when its new init is known.
    fn recovering_with_limits() -> Self {
        let bed = Self::protected(RECOVER);
        bed.machine.make_mortal();
        bed.update(r#"{"pids":{"limit":4}}"#).unwrap();
        bed.container("c").checkpoint_now(Asked::default()).unwrap();
        bed.write("changed");
        bed
    }

    /// The next init that comes back, by what `begin` does, ends with `status`. Returns when that was noticed, while
    /// its limits are still to be set.
    fn comes_back_dead<T>(&self, status: u32, begin: impl FnOnce() -> T) -> (Blocked, T) {
        let blocked = self.machine.block(Verb::Update);
        self.machine.end_at_once(Verb::Restore, status);
        let begun = begin();
        blocked.wait();
        let container = self.container("c");
        let deadline = Instant::now() + LIMIT;
        while container.inner.lock().fell_again.is_none() {
            assert!(Instant::now() < deadline, "nobody has noticed");
            thread::yield_now();
        }
        (blocked, begun)
    }
}

#[test]
fn who_is_gone_again_at_once_is_brought_back_once_more() {
    let bed = Bed::recovering();
    // What the client has changed is put back last: until then its end must have been seen.
    bed.update(r#"{"pids":{"limit":4}}"#).unwrap();
    let (blocked, ()) = bed.comes_back_dead(8, || bed.machine.end_all("c", 139));
    blocked.release();
    let lines = bed.recovered(3);
    bed.settled();
    let note = lines[2].note.as_deref().unwrap();
    assert!(note.starts_with("init ended with exit code 8"), "{note}");
    assert_eq!(bed.status("c", ""), Status::RUNNING);
    bed.finish();
}

#[test]
fn who_is_gone_as_a_rollback_ends_comes_back_or_is_told() {
    for recovers in [true, false] {
        let bed = match recovers {
            true => Bed::recovering(),
            false => Bed::gone_on(""),
        };
        bed.update(r#"{"pids":{"limit":4}}"#).unwrap();
        let (blocked, back) = bed.comes_back_dead(8, || bed.go(|bed| bed.roll_back(1)));
        blocked.release();
        back.get().unwrap();
        if !recovers {
            bed.ended_with(8);
            continue;
        }
        let lines = bed.recovered(3);
        bed.settled();
        let note = lines[2].note.as_deref().unwrap();
        assert!(note.starts_with("init ended with exit code 8"), "{note}");
        assert_eq!(bed.status("c", ""), Status::RUNNING);
        assert_eq!(bed.file(), "text");
        assert_eq!(bed.machine.count("restore"), 2);
        bed.turn("a");
        bed.finish();
    }
}

#[test]
fn the_death_of_a_try_that_failed_is_not_that_of_the_next_one() {
    let bed = Bed::recovering_with_limits();
    let (blocked, ()) = bed.comes_back_dead(8, || bed.machine.end_all("c", 139));
    blocked.fail("no limits");
    let lines = bed.recovered(3);
    let now = bed.settled();
    assert!(lines[1].note.as_deref().unwrap().contains("no limits"));
    assert!(lines[2].checkpoint.is_some());
    assert_eq!(bed.machine.count("restore"), 2);
    assert_eq!(
        (bed.pids("c"), bed.status("c", "")),
        (vec![now], Status::RUNNING)
    );
    bed.turn("a");
    bed.finish();
}

#[test]
fn whose_work_is_done_as_it_comes_back_has_ended() {
    let bed = Bed::recovering();
    bed.update(r#"{"pids":{"limit":4}}"#).unwrap();
    let (blocked, ()) = bed.comes_back_dead(0, || bed.machine.end_all("c", 139));
    blocked.release();
    bed.wait_event("exit c 0");
    assert_eq!(bed.machine.count("restore"), 1);
    assert_eq!(bed.unreaped(), [0; 0]);
    assert!(!bed.store().was_alive());
    bed.delete("c", "").unwrap();
}

#[test]
fn a_death_that_makes_a_rollback_fail_is_told() {
    for status in [0, 8] {
        let bed = Bed::recovering_with_limits();
        let (blocked, back) = bed.comes_back_dead(status, || bed.go(|bed| bed.roll_back(1)));
        blocked.fail("no limits");
        let failed = back.get().unwrap_err().message;
        assert!(failed.contains("no limits"), "{failed}");
        bed.ended_with(status);
        assert_eq!(bed.store().was_alive(), status != 0);
    }
}

#[test]
fn a_death_does_not_forget_the_limits_that_a_client_has_set() {
    let bed = Bed::recovering_with_limits();
    bed.update(r#"{"pids":{"limit":8}}"#).unwrap();
    let (blocked, back) = bed.comes_back_dead(8, || bed.go(|bed| bed.roll_back(1)));
    // Those of then are put back, those of now are not.
    bed.machine.fail(Verb::Update, "it is dead");
    blocked.release();
    back.get().unwrap();
    bed.recovered(3);
    bed.settled();
    let limits = bed.container("c").limits.lock().clone().unwrap();
    assert_eq!(limits["pids"]["limit"], 8);
    bed.finish();
}

#[test]
fn whom_a_client_kills_in_a_rollback_boots_at_the_next_start() {
    let bed = Bed::recovering();
    let blocked = bed.machine.block(Verb::Forget);
    let back = bed.go(|bed| bed.roll_back(1));
    blocked.wait();
    bed.kill("c", "", libc::SIGKILL).unwrap();
    blocked.release();
    back.get().unwrap_err();
    bed.ended_with(137);
    assert!(!bed.store().was_alive());
}
