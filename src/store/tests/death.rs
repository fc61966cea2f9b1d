//! Death at every step: a process is killed before each write, fsync and rename of whatever changes
//! a store, and the next one must find the newest complete checkpoint, whole.

use std::{os::unix::process::ExitStatusExt, process::Command};

use super::{fixture::*, *};
use crate::store::failpoint::testing::{PASSED, die_at};

/// Where the child finds the store, what it does, and where it dies.
const STORE: &str = "CRAB_TEST_STORE";
const DEED: &str = "CRAB_TEST_DEED";
const POINT: &str = "CRAB_TEST_POINT";

fn checkpoint(writer: &SandboxWriter, turn: u64) {
    let pending = writer.begin(TurnNo(turn)).unwrap();
    fs::write(pending.image_dir().join("pages-1.img"), noise(turn, 40_000)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    fs::write(pending.upper_dir().join("own"), noise(turn, 140_000)).unwrap();
    fs::write(
        pending.upper_dir().join("few"),
        noise(500 + turn / 3, 30_000),
    )
    .unwrap();
    fs::write(pending.upper_dir().join("all"), noise(999, 30_000)).unwrap();
    commit(pending, Part::Whole);
}

/// A deed, and whether a turn is there before and after it.
struct Deed {
    name: &'static str,
    run: fn(&Bed),
    /// Turns that must be there whatever happens, and those that may be.
    always: &'static [u64],
    maybe: &'static [u64],
}

const DEEDS: &[Deed] = &[
    Deed {
        name: "commit",
        run: |bed| checkpoint(&bed.writer(), 9),
        always: &[6, 7, 8],
        maybe: &[9],
    },
    Deed {
        name: "delta",
        run: |bed| {
            let writer = bed.writer();
            let base = writer.get(TurnNo(8)).unwrap();
            let pending = writer.begin(TurnNo(9)).unwrap();
            fs::create_dir(pending.upper_dir()).unwrap();
            fs::write(pending.upper_dir().join("own"), "new").unwrap();
            let changes = LayerChanges {
                removed: vec!["few".into()],
                changed: vec![("own".into(), rustix::fs::FileType::RegularFile)],
            };
            let part = Part::Changes {
                base: &base,
                changes: &changes,
            };
            try_commit(pending, Images::Same(&base), part).unwrap();
        },
        always: &[6, 7, 8],
        maybe: &[9],
    },
    Deed {
        name: "collect",
        run: |bed| {
            let writer = bed.writer();
            writer.retain(&Retention::newest(2)).unwrap();
            writer.collect().unwrap();
        },
        always: &[7, 8],
        maybe: &[6],
    },
    Deed {
        name: "limit",
        run: |bed| {
            let retention = Retention {
                keep: 9,
                sandbox_limit: Some(1),
                store_limit: None,
            };
            bed.writer().retain(&retention).unwrap();
        },
        always: &[8],
        maybe: &[6, 7],
    },
    Deed {
        name: "name and arm",
        run: |bed| {
            let writer = bed.writer();
            writer.name("x", TurnNo(7)).unwrap();
            writer.arm(TurnNo(6)).unwrap();
            writer.disarm().unwrap();
        },
        always: &[6, 7, 8],
        maybe: &[],
    },
    Deed {
        name: "remove",
        run: |bed| drop(bed.store.remove(&bed.id).unwrap()),
        always: &[],
        maybe: &[6, 7, 8],
    },
];

/// A store with three turns, and remains of others.
fn prepared() -> Bed {
    let bed = bed();
    let writer = bed.writer();
    for turn in 1..=8 {
        checkpoint(&writer, turn);
        writer.retain(&Retention::newest(3)).unwrap();
    }
    bed
}

#[test]
fn whenever_a_writer_dies_the_newest_complete_checkpoint_is_whole() {
    for deed in DEEDS {
        let bed = prepared();
        let master = bed.store.root.clone();
        // How many points there are.
        let counted = copy_of(&master, bed.dir.path(), "counted");
        PASSED.with(|passed| passed.set(0));
        (deed.run)(&counted);
        let points = PASSED.with(std::cell::Cell::get);
        assert!(points >= 2, "{}: {points} points", deed.name);
        for point in 0..points {
            let copy = copy_of(&master, bed.dir.path(), &format!("at-{point}"));
            let status = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "store::tests::death::child", "--nocapture"])
                .env(STORE, &copy.store.root)
                .env(DEED, deed.name)
                .env(POINT, point.to_string())
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert_eq!(
                status.signal(),
                Some(libc::SIGKILL),
                "{} {point}: {status}",
                deed.name
            );
            after(deed, point, &copy);
            fs::remove_dir_all(&copy.store.root).unwrap();
        }
    }
}

fn after(deed: &Deed, point: u64, bed: &Bed) {
    let what = format!("{} died at point {point}", deed.name);
    let reader = bed.store.sandbox(&bed.id);
    let whole = |store: &SandboxStore| {
        let turns = numbers(store.turns().unwrap());
        for turn in deed.always {
            assert!(turns.contains(turn), "{what}: {turns:?}");
        }
        for turn in &turns {
            let known = deed.always.contains(turn) || deed.maybe.contains(turn);
            assert!(known, "{what}: {turns:?}");
            assert_eq!(store.verify(TurnNo(*turn)).unwrap(), [], "{what}: {turn}");
        }
        turns
    };
    let before = whole(&reader);
    assert_eq!(reader.verify_packs().unwrap(), [], "{what}");
    reader.armed().unwrap();
    reader.names().unwrap();
    // The next writer tidies up, and goes on.
    bed.store.tidy().unwrap();
    let writer = bed.writer();
    assert_eq!(whole(&writer), before, "{what}");
    assert!(files::all_names(&writer.scratch_dir()).unwrap().is_empty());
    let hidden = |dir: &Path| {
        let names = files::all_names(dir).unwrap();
        names
            .into_iter()
            .filter(|name| name.starts_with('.'))
            .count()
    };
    for dir in ["", "packs", "names"] {
        assert_eq!(hidden(&writer.dir().join(dir)), 0, "{what}: {dir}");
    }
    checkpoint(&writer, 20);
    writer.retain(&Retention::newest(2)).unwrap();
    writer.collect().unwrap();
    for turn in writer.turns().unwrap() {
        assert_eq!(writer.verify(turn).unwrap(), [], "{what}: {turn}");
    }
    let latest = writer.latest().unwrap().unwrap();
    assert_eq!(latest.turn(), TurnNo(20), "{what}");
}

/// Not a test by itself: what the test above runs, and kills.
#[test]
fn child() {
    let (Ok(root), Ok(name)) = (std::env::var(STORE), std::env::var(DEED)) else {
        return;
    };
    let point = std::env::var(POINT).unwrap().parse().unwrap();
    // Beside the store: whoever is killed removes nothing.
    let beside = Path::new(&root).parent().unwrap();
    let bed = opened(root.as_ref(), tempfile::tempdir_in(beside).unwrap());
    let deed = DEEDS.iter().find(|deed| deed.name == name).unwrap();
    die_at(point);
    (deed.run)(&bed);
}

fn opened(root: &Path, dir: tempfile::TempDir) -> Bed {
    Bed {
        dir,
        store: Store::open(root).unwrap(),
        id: SandboxId::new("default", "box").unwrap(),
    }
}

fn copy_of(master: &Path, dir: &Path, name: &str) -> Bed {
    let root = dir.join(name);
    let copied = Command::new("cp")
        .arg("-a")
        .args([master, &root])
        .status()
        .unwrap();
    assert!(copied.success());
    opened(&root, tempfile::tempdir().unwrap())
}
