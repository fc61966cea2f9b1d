//! What a dump builds upon, and what ends that.

use super::{plan::Verb, *};
use crate::{coordinator::turns::Asked, runtime::Checkpoint, store::JournalLine};

impl Bed {
    /// A protected container on a kernel that tells which pages change, and nobody who clears marks.
    fn tracked(config: &str) -> Self {
        Self::marked(&format!("incremental = true\n{config}"))
    }

    /// A protected container on a kernel that tells which pages change.
    fn marked(config: &str) -> Self {
        let bed = Self::protected(&format!("checkpoint_stops = false\n{config}"));
        bed.machine.make_mortal();
        bed.machine.track_memory();
        bed
    }

    fn keep(&self) -> JournalLine {
        let taken = self.container("c").checkpoint_now(Asked::default());
        taken.unwrap().0
    }

    /// What each dump built upon, and whether it was a pre-dump.
    fn upon(&self) -> Vec<(Option<String>, bool)> {
        let upon = |args: &Checkpoint| {
            let parent = args.parent_path.as_ref();
            (parent.map(|p| p.display().to_string()), args.pre_dump)
        };
        self.machine.checkpoints().iter().map(upon).collect()
    }

    fn last_upon(&self) -> Option<String> {
        self.upon().pop().unwrap().0
    }
}

const LAST: &str = "../../parent";

#[test]
fn each_dump_builds_upon_the_last_one() {
    let bed = Bed::tracked("");
    for _ in 0..3 {
        bed.keep();
    }
    let upon = |path: &str| (Some(path.to_owned()), false);
    assert_eq!(bed.upon(), [(None, false), upon(LAST), upon(LAST)]);
    let dumps = bed.machine.checkpoints();
    let home = dumps[0].home.as_ref().unwrap();
    let conf = fs::read_to_string(home.join(".criu/default.conf")).unwrap();
    assert!(conf.contains("track-mem\n"), "{conf}");
    assert!(bed.path("store/test/c/tmp/parent/inventory.img").exists());
}

#[test]
fn where_nobody_tells_which_pages_change_each_dump_has_everything() {
    let bed = Bed::protected("");
    bed.keep();
    bed.keep();
    assert_eq!(bed.upon(), [(None, false), (None, false)]);
    assert!(!bed.path("store/test/c/tmp/parent").exists());
}

#[test]
fn where_nobody_sees_who_clears_marks_each_dump_has_everything_unless_asked_for() {
    for config in ["", "incremental = \"auto\"\n", "incremental = false\n"] {
        let bed = Bed::marked(&format!("pre_dumps = \"2\"\n{config}"));
        bed.keep();
        bed.keep();
        let whole = (None, false);
        assert_eq!(bed.upon(), [whole.clone(), whole], "{config}");
    }
}

#[test]
fn whatever_may_have_cleared_marks_or_replaced_processes_ends_the_chain() {
    type Deed = fn(&Bed);
    let deeds: [(&str, Deed); 3] = [
        ("a client's checkpoint", |bed| {
            bed.checkpoint("c").unwrap();
        }),
        ("a dump that fails", |bed| {
            bed.machine.fail(Verb::Checkpoint, "no");
            let failed = bed.container("c").checkpoint_now(Asked::default());
            assert!(failed.is_err());
        }),
        ("a rollback", |bed| {
            bed.roll_back(1).unwrap();
        }),
    ];
    for (what, deed) in deeds {
        let bed = Bed::tracked("");
        bed.keep();
        deed(&bed);
        bed.keep();
        assert_eq!(bed.last_upon(), None, "{what}");
        bed.keep();
        assert_eq!(bed.last_upon().as_deref(), Some(LAST), "{what}");
    }
}

#[test]
fn pre_dumps_build_upon_the_last_dump_and_the_dump_upon_them() {
    let bed = Bed::tracked("pre_dumps = \"2\"\n");
    bed.keep();
    let line = bed.keep();
    let of = |upon: Option<&str>, pre_dump| (upon.map(str::to_owned), pre_dump);
    assert_eq!(
        bed.upon(),
        [
            of(None, true),
            of(Some("../pre-1"), true),
            of(Some("../pre-2"), false),
            of(Some(LAST), true),
            of(Some("../pre-1"), true),
            of(Some("../pre-2"), false),
        ]
    );
    assert_eq!(line.pre_dumps, 2);
    let note = line.note.unwrap();
    assert!(note.contains("2 pre-dump(s)"), "{note}");
}

#[test]
fn a_pre_dump_that_fails_is_built_upon_by_nobody() {
    let bed = Bed::tracked("pre_dumps = \"2\"\n");
    bed.keep();
    bed.machine.fail(Verb::Checkpoint, "no memory");
    let line = bed.keep();
    assert_eq!(
        bed.upon()[3..],
        [(Some(LAST.to_owned()), true), (None, false)]
    );
    let note = line.note.unwrap();
    assert!(line.pre_dumps == 0 && note.contains("no memory"), "{note}");
}

#[test]
fn whoever_waits_at_the_door_waits_for_no_further_pre_dump() {
    let bed = Bed::tracked("pre_dumps = \"2\"\n");
    let blocked = bed.machine.block(Verb::Checkpoint);
    bed.turn("a");
    blocked.wait();
    let next = bed.go(|bed| bed.run_exec("c", "b"));
    let doors = Arc::clone(&bed.container("c").doors);
    let deadline = Instant::now() + LIMIT;
    while doors.waiting() == 0 {
        assert!(Instant::now() < deadline, "nobody waits");
        thread::yield_now();
    }
    blocked.release();
    next.get();
    assert_eq!(bed.journal(1)[0].pre_dumps, 1);
    assert_eq!(bed.last_upon().as_deref(), Some("../pre-1"));
}
