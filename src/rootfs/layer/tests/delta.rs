//! What a capture of changes alone takes, put upon the checkpoint before, has to give the layer as it
//! is: by the snapshots of the test's own.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    os::unix::fs::symlink,
};

use super::{fixture::*, *};
use crate::{
    sandbox::{SandboxId, TurnNo},
    store::{
        Ahead, Captured, Checkpoint, Facts, Files, Host, Images, Kind, LayerChanges, Part, Pending,
        SandboxWriter, Store, StoreError,
    },
    tree::TreeError,
};

/// Checkpoints of a layer, each made of the one before and what differs.
pub(super) struct Replica {
    writer: SandboxWriter,
    newest: RefCell<Checkpoint>,
}

impl Replica {
    pub(super) fn of(bed: &Bed) -> Self {
        let writer = writer(bed);
        let mut pending = writer.begin(TurnNo(1)).unwrap();
        pending.capture(&bed.upper(), Part::Whole, &never).unwrap();
        let newest = RefCell::new(commit(pending));
        Self { writer, newest }
    }

    fn begin(&self) -> Pending {
        let turn = self.newest.borrow().turn().0 + 1;
        self.writer.begin(TurnNo(turn)).unwrap()
    }

    pub(super) fn follow(&self, bed: &Bed, comparison: &Comparison) -> LayerChanges {
        self.follow_with(bed, comparison, self.begin()).0
    }

    fn follow_with(
        &self,
        bed: &Bed,
        comparison: &Comparison,
        mut pending: Pending,
    ) -> (LayerChanges, Captured) {
        let changes = changes(comparison);
        check(&changes, comparison);
        let base = self.newest.borrow().clone();
        let part = Part::Changes {
            base: &base,
            changes: &changes,
        };
        let captured = pending.capture(&bed.upper(), part, &never).unwrap();
        assert_eq!(captured.names, changes.changed.len() as u64);
        let made = commit(pending);
        let laid = made.lay_out_all(&bed.beside()).unwrap();
        assert_eq!(
            Snapshot::of(&laid.upper_dir()).differences(&Snapshot::of(&bed.upper())),
            [],
            "{changes:?}"
        );
        laid.remove().unwrap();
        self.newest.replace(made);
        (changes, captured)
    }
}

fn writer(bed: &Bed) -> SandboxWriter {
    let store = Store::open(&bed.dir.path().join("store")).unwrap();
    store.writer(&SandboxId::new("ns", "box").unwrap()).unwrap()
}

fn changes(comparison: &Comparison) -> LayerChanges {
    LayerChanges {
        removed: comparison.removed(),
        changed: comparison.changed(),
    }
}

fn commit(pending: Pending) -> Checkpoint {
    let facts = Facts {
        parent: None,
        created_at: time::OffsetDateTime::UNIX_EPOCH,
        kind: Kind::Full,
        processes: 0,
        processes_of: None,
        references: Vec::new(),
        host: Host::detect(),
        pipes: Vec::new(),
        runtime: serde_json::Value::Null,
        notes: Vec::new(),
    };
    pending
        .commit(facts, Images::Staged, Files::Captured)
        .unwrap()
        .0
}

/// It is what the comparison says, in order.
fn check(changes: &LayerChanges, comparison: &Comparison) {
    let sorted = |paths: Vec<&PathBuf>| paths.is_sorted_by(|a, b| a.as_os_str() < b.as_os_str());
    let changed = || changes.changed.iter().map(|(path, _)| path);
    assert!(sorted(changes.removed.iter().collect()) && sorted(changed().collect()));
    let entries = comparison.changes.iter().filter(|c| c.now.is_some());
    let linked = comparison.linked.iter().map(|(path, _)| path);
    let own: BTreeSet<PathBuf> = entries.map(|c| &c.path).chain(linked).cloned().collect();
    let shown = |path: &PathBuf| match path.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => path.clone(),
    };
    assert_eq!(changed().map(shown).collect::<BTreeSet<_>>(), own);
}

fn paths(all: &[&str]) -> Vec<PathBuf> {
    all.iter().map(PathBuf::from).collect()
}

/// Compares with what was there before `change`, with everything as a candidate.
fn changes_of(change: impl FnOnce(&Bed)) -> LayerChanges {
    let bed = everything();
    let (layer, replica) = (bed.read(), Replica::of(&bed));
    change(&bed);
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    replica.follow(&bed, &comparison)
}

#[test]
fn every_kind_of_change_is_captured_and_nothing_else() {
    if !root() {
        return;
    }
    type Act = fn(&Bed);
    let table: &[(&str, Act, &[&str], &[&str])] = &[
        ("nothing", |_| {}, &[], &[]),
        ("made and unmade", made_and_unmade, &[], &[]),
        (
            "a file",
            |b| write(b, "dir/sub/one", b"x", 0),
            &[],
            &["dir/sub/one"],
        ),
        (
            "attributes of a directory",
            |b| chmod(b, "dir/sub", 0o700),
            &[],
            &["dir/sub"],
        ),
        ("of the root", |b| chmod(b, "", 0o711), &[], &[""]),
        (
            "new directories",
            added,
            &[],
            &["empty/x", "empty/x/y", "empty/x/y/z"],
        ),
        (
            "a tree that went",
            |b| fs::remove_dir_all(b.at("dir/sub")).unwrap(),
            &["dir/sub"],
            &[],
        ),
        ("directory to file", dir_to_file, &[], &["dir/sub"]),
        (
            "directory to symbolic link",
            dir_to_symlink,
            &[],
            &["dir/sub"],
        ),
        ("file to directory", file_to_dir, &[], &["file", "file/x"]),
        ("another inode with equal names in it", anew, &[], &[]),
        ("an equal file", equal, &[], &[]),
        ("longer", longer, &[], &["sparse"]),
        (
            "bytes of a linked file",
            |b| write(b, "link", b"L", 0),
            &[],
            &["dir/link", "link"],
        ),
        (
            "one link of two went",
            |b| fs::remove_file(b.at("link")).unwrap(),
            &["link"],
            &["dir/link"],
        ),
        (
            "a third link",
            |b| fs::hard_link(b.at("link"), b.at("other/link")).unwrap(),
            &[],
            &["dir/link", "link", "other/link"],
        ),
        (
            "a link of what had none",
            |b| fs::hard_link(b.at("file"), b.at("dir/second")).unwrap(),
            &[],
            &["dir/second", "file"],
        ),
        (
            "linked to another",
            |b| link_over(b, "link", "twin"),
            &[],
            &["dir/link", "link", "twin"],
        ),
        ("linked no more", unlinked, &[], &["dir/link", "link"]),
        (
            "a link moved",
            |b| fs::rename(b.at("link"), b.at("new")).unwrap(),
            &["link"],
            &["dir/link", "new"],
        ),
        ("opaque no more", not_opaque, &[], &["other"]),
        (
            "a whiteout",
            |b| replace_by_whiteout(b, "file"),
            &[],
            &["file"],
        ),
        (
            "a whiteout of many",
            |b| fs::remove_file(b.at("white")).unwrap(),
            &["white"],
            &[],
        ),
        (
            "a file over a whiteout",
            file_over_whiteout,
            &[],
            &["white"],
        ),
        ("a device", device, &[], &["char"]),
    ];
    for (what, act, removed, changed) in table {
        let changes = changes_of(act);
        assert_eq!(changes.removed, paths(removed), "{what}");
        let now: Vec<PathBuf> = changes.changed.into_iter().map(|(path, _)| path).collect();
        assert_eq!(now, paths(changed), "{what}");
    }
}

#[test]
fn what_is_no_longer_what_was_compared_is_an_error() {
    if !root() {
        return;
    }
    type Act = fn(&Bed);
    let meddle: [(&str, Act); 4] = [
        ("gone", |b| fs::remove_file(b.at("dir/sub/one")).unwrap()),
        ("a directory", |b| {
            fs::remove_file(b.at("dir/sub/one")).unwrap();
            fs::create_dir(b.at("dir/sub/one")).unwrap();
        }),
        ("a link", |b| {
            fs::remove_file(b.at("dir/sub/one")).unwrap();
            symlink("/etc/passwd", b.at("dir/sub/one")).unwrap();
        }),
        ("a link above", |b| {
            fs::rename(b.at("dir/sub"), b.beside().join("sub")).unwrap();
            symlink(b.beside().join("sub"), b.at("dir/sub")).unwrap();
        }),
    ];
    for (what, act) in meddle {
        let bed = everything();
        let (layer, replica) = (bed.read(), Replica::of(&bed));
        write(&bed, "dir/sub/one", b"new", 0);
        let comparison = bed.compare(&layer, &[], Scope::Everything);
        act(&bed);
        let base = replica.newest.borrow().clone();
        let part = Part::Changes {
            base: &base,
            changes: &changes(&comparison),
        };
        let error = replica.begin().capture(&bed.upper(), part, &never);
        assert!(
            matches!(error, Err(StoreError::Tree(TreeError::Changed { .. }))),
            "{what}: {error:?}"
        );
    }
}

#[test]
fn what_changes_while_it_is_captured_is_an_error() {
    let bed = everything();
    let (layer, replica) = (bed.read(), Replica::of(&bed));
    // Large enough for the stop function to be asked within the file.
    fs::write(bed.at("dir/sub/one"), noise(1, 1 << 20)).unwrap();
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    let asked = Cell::new(0);
    let meddle = || {
        asked.set(asked.get() + 1);
        if asked.get() == 4 {
            write(&bed, "dir/sub/one", b"!", 0);
        }
        false
    };
    let base = replica.newest.borrow().clone();
    let part = Part::Changes {
        base: &base,
        changes: &changes(&comparison),
    };
    let error = replica.begin().capture(&bed.upper(), part, &meddle);
    assert!(asked.get() >= 4);
    assert!(
        matches!(error, Err(StoreError::Tree(TreeError::Changed { .. }))),
        "{error:?}"
    );
}

const LARGE: usize = 5 << 20;

/// A layer in which a large file has changed, the comparison, and a capture for which it was read ahead.
fn read_ahead(bed: &Bed) -> (Replica, Comparison, Pending) {
    fs::create_dir(bed.at("dir")).unwrap();
    fs::write(bed.at("dir/large"), noise(1, LARGE)).unwrap();
    let (layer, replica) = (bed.read(), Replica::of(bed));
    fs::write(bed.at("dir/large"), noise(2, LARGE)).unwrap();
    fs::write(bed.at("dir/small"), noise(3, 1000)).unwrap();
    fs::hard_link(bed.at("dir/large"), bed.at("large")).unwrap();
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    let large: Vec<PathBuf> = comparison.large().map(Path::to_owned).collect();
    assert_eq!(large, paths(&["dir/large", "large"]));
    let mut pending = replica.begin();
    pending
        .read_ahead(
            &bed.upper(),
            &Ahead::Files(large),
            None,
            &|_, _| false,
            &never,
        )
        .unwrap();
    assert_eq!(pending.ahead(), 1, "two names of one inode");
    (replica, comparison, pending)
}

fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..size).map(|_| next()).collect()
}

#[test]
fn what_was_read_ahead_is_not_read_again() {
    let bed = Bed::new(tempfile::tempdir_in("/dev/shm").unwrap());
    fs::write(bed.at("file"), "then").unwrap();
    let mapped = Mapped::of(&bed.at("file"));
    mapped.put(b'T');
    let mut pending = writer(&bed).begin(TurnNo(1)).unwrap();
    let read = pending.read_ahead(&bed.upper(), &Ahead::All, None, &|_, _| false, &never);
    read.unwrap();
    // Bytes that come without a sign are not in it: that is how it shows.
    mapped.put(b't');
    pending.capture(&bed.upper(), Part::Whole, &never).unwrap();
    let laid = commit(pending).lay_out_all(&bed.beside()).unwrap();
    assert_eq!(fs::read(laid.upper_dir().join("file")).unwrap(), b"Then");
}

#[test]
fn what_was_written_since_it_was_read_ahead_is_read_again() {
    // A store through a mapping leaves no trace but the bytes: the caller knows the inode.
    let bed = Bed::new(on_disk());
    let (replica, comparison, mut pending) = read_ahead(&bed);
    let meta = fs::metadata(bed.at("large")).unwrap();
    pending.distrust(|_, ino| ino == meta.ino());
    assert_eq!(pending.ahead(), 0);
    let mtime = (meta.mtime(), meta.mtime_nsec());
    write(&bed, "large", b"!", 7);
    mtime_of(&bed.at("large"), mtime);
    replica.follow_with(&bed, &comparison, pending);

    // One that leaves a trace shows by itself.
    let bed = Bed::new(on_disk());
    let (replica, comparison, pending) = read_ahead(&bed);
    write(&bed, "large", b"!", 7);
    replica.follow_with(&bed, &comparison, pending);
}

#[test]
fn what_can_change_without_a_sign_is_not_read_ahead() {
    let bed = Bed::new(on_disk());
    for name in ["mapped", "other"] {
        fs::write(bed.at(name), noise(1, 100)).unwrap();
    }
    let [mapped] = bed.named(["mapped"])[..] else {
        unreachable!()
    };
    let writer = writer(&bed);
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    let is_written = |dev, ino| mapped == Candidate { dev, ino };
    pending
        .read_ahead(&bed.upper(), &Ahead::All, None, &is_written, &never)
        .unwrap();
    assert_eq!(pending.ahead(), 1);
}

#[test]
fn a_whole_layer_is_read_ahead_while_it_changes() {
    let bed = everything();
    let writer = writer(&bed);
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    let read = pending.read_ahead(&bed.upper(), &Ahead::All, None, &|_, _| false, &never);
    read.unwrap();
    assert!(pending.ahead() > 3);
    write(&bed, "dir/sub/one", b"new", 0);
    fs::remove_file(bed.at("file")).unwrap();
    pending.capture(&bed.upper(), Part::Whole, &never).unwrap();
    let made = commit(pending);
    let laid = made.lay_out_all(&bed.beside()).unwrap();
    let back = Snapshot::of(&laid.upper_dir());
    assert_eq!(back.differences(&Snapshot::of(&bed.upper())), []);
    assert_eq!(writer.verify(TurnNo(1)).unwrap(), []);
}
