//! What makes a second look necessary.

use super::*;

/// A pair of pipe ends that nobody uses, and a name for them.
const PIPE: &str = "import os\nr, w = os.pipe()\nos.dup2(w, 99)";

fn resting(actor: &Actor, baseline: &Baseline) -> Rest {
    baseline.at_rest(&actor.snapshot()).unwrap()
}

fn now(actor: &Actor) -> Stillness {
    Stillness::of(&[actor.pid()]).unwrap().unwrap()
}

#[test]
fn nothing_has_happened_until_something_does() {
    let actor = Actor::asleep(PIPE);
    let baseline = actor.baseline();
    let rest = resting(&actor, &baseline);
    assert!(baseline.still_rests(&rest, &now(&actor)));

    // Nobody runs for that.
    write_through(actor.pid(), 99, b"x");
    assert!(!baseline.still_rests(&rest, &now(&actor)));
    // It would not be told again.
    assert!(baseline.at_rest(&actor.snapshot()).is_none());

    let baseline = actor.baseline();
    let rest = resting(&actor, &baseline);
    assert!(baseline.still_rests(&rest, &now(&actor)));
    actor.enter(&[
        "python3",
        "-c",
        "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))",
    ]);
    assert!(!baseline.still_rests(&rest, &now(&actor)));

    let rest = resting(&actor, &baseline);
    assert!(baseline.still_rests(&rest, &now(&actor)));
    let before = now(&actor);
    for signal in [libc::SIGSTOP, libc::SIGCONT] {
        // SAFETY: takes two integers.
        assert_eq!(unsafe { libc::kill(actor.pid(), signal) }, 0);
    }
    eventually(|| {
        Stillness::of(&[actor.pid()])
            .unwrap()
            .is_some_and(|now| now != before)
    });
    assert!(!baseline.still_rests(&rest, &now(&actor)));
}

#[test]
fn another_process_beside_it_is_no_rest() {
    let (actor, other) = (Actor::asleep(""), Actor::asleep(""));
    let baseline = actor.baseline();
    let rest = resting(&actor, &baseline);
    let both = Stillness::of(&[actor.pid(), other.pid()]);
    assert!(!baseline.still_rests(&rest, &both.unwrap().unwrap()));
    // Two networks, of which one alone would be looked at.
    let pids = [actor.pid(), other.pid()];
    let snapshot = Snapshot::take(&pids, &no_registers).unwrap();
    assert!(baseline.at_rest(&snapshot).is_none());
}
