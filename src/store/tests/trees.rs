//! Random trees: whole, as changes, and compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use proptest::prelude::*;

use rustix::fs::FileType;

use super::{fixture::*, *};

#[derive(Debug, Clone)]
pub(super) enum Op {
    File(PathBuf, u64, usize),
    Poke(PathBuf, u64),
    Dir(PathBuf),
    Symlink(PathBuf, u8),
    Link(PathBuf, PathBuf),
    Special(PathBuf, u8),
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    Mode(PathBuf, u8),
    Xattr(PathBuf, u8),
    Hole(PathBuf, u64),
}

fn path() -> impl Strategy<Value = PathBuf> {
    let name = prop_oneof!["[a-d]", Just("x\n\u{e9}".to_owned())];
    proptest::collection::vec(name, 1..4).prop_map(|names| names.iter().collect())
}

pub(super) fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![0..10usize, 60_000..70_000usize, 100_000..300_000usize];
    prop_oneof![
        4 => (path(), any::<u64>(), size).prop_map(|(p, s, n)| Op::File(p, s, n)),
        2 => (path(), any::<u64>()).prop_map(|(p, n)| Op::Poke(p, n)),
        3 => path().prop_map(Op::Dir),
        1 => (path(), any::<u8>()).prop_map(|(p, n)| Op::Symlink(p, n)),
        2 => (path(), path()).prop_map(|(a, b)| Op::Link(a, b)),
        1 => (path(), 0..4u8).prop_map(|(p, n)| Op::Special(p, n)),
        2 => path().prop_map(Op::Remove),
        2 => (path(), path()).prop_map(|(a, b)| Op::Rename(a, b)),
        1 => (path(), any::<u8>()).prop_map(|(p, n)| Op::Mode(p, n)),
        1 => (path(), any::<u8>()).prop_map(|(p, n)| Op::Xattr(p, n)),
        1 => (path(), 0..40_000_000u64).prop_map(|(p, n)| Op::Hole(p, n)),
    ]
}

/// Does it, if it can be done.
pub(super) fn run(root: &Path, op: &Op) {
    use std::os::unix::fs::FileExt;
    let at = |path: &PathBuf| root.join(path);
    // Whoever opens a FIFO waits for somebody at the other end.
    let plain = |path: &PathBuf| fs::symlink_metadata(at(path)).is_ok_and(|meta| meta.is_file());
    match op {
        Op::File(p, seed, size) => {
            let _ = fs::remove_file(at(p));
            let _ = fs::write(at(p), noise(*seed, *size));
        }
        Op::Poke(p, n) if plain(p) => {
            if let Ok(file) = fs::File::options().write(true).open(at(p)) {
                let _ = file.write_all_at(b"poke", n % 300_000);
            }
        }
        Op::Dir(p) => drop(fs::create_dir_all(at(p))),
        Op::Symlink(p, n) => drop(symlink(format!("to/{n}"), at(p))),
        Op::Link(a, b) => drop(fs::hard_link(at(a), at(b))),
        Op::Special(p, n) => {
            use rustix::fs::FileType;
            let (kind, number) = [
                (FileType::CharacterDevice, 0),
                (FileType::BlockDevice, 77),
                (FileType::Fifo, 0),
                (FileType::Socket, 0),
            ][usize::from(*n)];
            let mode = rustix::fs::Mode::RUSR;
            let _ = rustix::fs::mknodat(rustix::fs::CWD, at(p), kind, mode, number);
        }
        Op::Remove(p) => match fs::symlink_metadata(at(p)) {
            Ok(meta) if meta.is_dir() => drop(fs::remove_dir_all(at(p))),
            _ => drop(fs::remove_file(at(p))),
        },
        Op::Rename(a, b) => drop(fs::rename(at(a), at(b))),
        Op::Mode(p, n) => {
            if let Ok(meta) = fs::symlink_metadata(at(p))
                && !meta.is_symlink()
            {
                let mode = 0o700 | u32::from(*n);
                fs::set_permissions(at(p), fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        Op::Xattr(p, n) => {
            let name = format!("trusted.overlay.{}", n % 3);
            let flags = rustix::fs::XattrFlags::empty();
            let _ = rustix::fs::lsetxattr(at(p), name.as_str(), &[*n], flags);
        }
        Op::Hole(p, size) if plain(p) => {
            if let Ok(file) = fs::File::options().write(true).open(at(p)) {
                let _ = file.set_len(*size);
            }
        }
        Op::Poke(..) | Op::Hole(..) => {}
    }
}

/// What differs from `a` to `b`, as the store wants to be told it.
fn changes(a: &BTreeMap<PathBuf, Seen>, b: &BTreeMap<PathBuf, Seen>) -> LayerChanges {
    let differs = |path: &PathBuf| a.get(path) != b.get(path);
    let touched: BTreeSet<_> = b
        .iter()
        .filter(|(path, _)| differs(path))
        .filter_map(|(_, seen)| seen.link.clone())
        .collect();
    let kinds = |seen: &Seen| match seen.kind {
        "directory" => FileType::Directory,
        "symlink" => FileType::Symlink,
        "file" => FileType::RegularFile,
        "fifo" => FileType::Fifo,
        "socket" => FileType::Socket,
        "char" => FileType::CharacterDevice,
        _ => FileType::BlockDevice,
    };
    let changed = b
        .iter()
        .filter(|(path, seen)| {
            differs(path)
                || seen
                    .link
                    .as_ref()
                    .is_some_and(|link| touched.contains(link))
        })
        .map(|(path, seen)| (path.clone(), kinds(seen)));
    LayerChanges {
        removed: a
            .keys()
            .filter(|path| !b.contains_key(*path))
            .cloned()
            .collect(),
        changed: changed.collect(),
    }
}

fn copy(from: &Path, to: &Path) {
    let mut cp = std::process::Command::new("cp");
    assert!(cp.arg("-a").args([from, to]).status().unwrap().success());
}

/// Takes whatever has not changed out of a copy of the layer, so that the store cannot look at it.
fn strip(upper: &Path, all: &BTreeMap<PathBuf, Seen>, changes: &LayerChanges) {
    for (path, seen) in all.iter().rev() {
        if changes.changed.iter().any(|(changed, _)| changed == path) {
            continue;
        }
        let full = upper.join(path);
        match seen.kind {
            "directory" => {
                fs::set_permissions(&full, fs::Permissions::from_mode(0o123)).unwrap();
            }
            _ => fs::remove_file(&full).unwrap(),
        }
    }
    // The removals have changed the times of directories that are captured.
    for (path, _) in &changes.changed {
        let seen = &all[path];
        if seen.kind == "directory" {
            let time =
                std::time::UNIX_EPOCH + Duration::new(seen.mtime.0 as u64, seen.mtime.1 as u32);
            let dir = fs::File::open(upper.join(path)).unwrap();
            dir.set_modified(time).unwrap();
        }
    }
}

/// Paths that differ, with all below them; a directory's own time is no difference.
fn expected_diff(a: &BTreeMap<PathBuf, Seen>, b: &BTreeMap<PathBuf, Seen>) -> BTreeSet<PathBuf> {
    let timeless = |seen: Option<&Seen>| {
        seen.map(|seen| match seen.kind {
            "directory" => Seen {
                mtime: (0, 0),
                ..seen.clone()
            },
            _ => seen.clone(),
        })
    };
    let all = a.keys().chain(b.keys());
    all.filter(|path| timeless(a.get(*path)) != timeless(b.get(*path)))
        .cloned()
        .collect()
}

fn found_diff(before: &Checkpoint, after: &Checkpoint) -> BTreeSet<PathBuf> {
    let mut a = before.tree().unwrap().unwrap();
    let mut b = after.tree().unwrap().unwrap();
    let mut all = BTreeSet::new();
    for difference in a.diff(&mut b).unwrap() {
        let is_dir = |entry: &Option<TreeEntry>| {
            matches!(
                entry,
                Some(TreeEntry {
                    node: Node::Directory(_),
                    ..
                })
            )
        };
        let (was, is) = (is_dir(&difference.before), is_dir(&difference.after));
        for (tree, side, other) in [(&mut a, was, is), (&mut b, is, was)] {
            if side && !other {
                let below = tree.entries_under(&difference.path).unwrap();
                all.extend(below.into_iter().map(|(path, _)| path));
            }
        }
        all.insert(difference.path);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.min(2000) / 8, ..ProptestConfig::default() })]

    #[test]
    fn changes_to_a_tree_make_the_same_tree_as_the_whole(
        first in proptest::collection::vec(op(), 0..40),
        then in proptest::collection::vec(op(), 0..25),
    ) {
        let bed = bed();
        let writer = bed.writer();
        let live = bed.dir.path().join("live");
        fs::create_dir(&live).unwrap();
        first.iter().for_each(|op| run(&live, op));
        let before = look(&live);
        let pending = writer.begin(TurnNo(1)).unwrap();
        copy(&live, &pending.upper_dir());
        let base = commit(pending, Part::Whole);

        then.iter().for_each(|op| run(&live, op));
        let after = look(&live);
        let changes = changes(&before, &after);
        let pending = writer.begin(TurnNo(2)).unwrap();
        copy(&live, &pending.upper_dir());
        strip(&pending.upper_dir(), &after, &changes);
        let delta = commit(pending, Part::Changes { base: &base, changes: &changes });

        let pending = writer.begin(TurnNo(3)).unwrap();
        copy(&live, &pending.upper_dir());
        let whole = commit(pending, Part::Whole);
        prop_assert_eq!(&delta.manifest.contents.upper, &whole.manifest.contents.upper);
        let laid = delta.lay_out_all(&writer.scratch_dir()).unwrap();
        let back = look(&laid.upper_dir());
        prop_assert_eq!(&back, &after);
        prop_assert_eq!(found_diff(&base, &delta), expected_diff(&before, &after));
        writer.retain(&Retention::newest(1)).unwrap();
        writer.collect().unwrap();
        prop_assert_eq!(writer.verify(TurnNo(3)).unwrap(), []);
    }
}

/// Several thousand names in one directory, so that it has several levels of pages.
#[test]
fn one_name_of_many_changes_one_page() {
    let bed = bed();
    let writer = bed.writer();
    let live = bed.dir.path().join("live");
    fs::create_dir_all(live.join("dir")).unwrap();
    let name = |n: u64| live.join(format!("dir/name-{n:05}"));
    for n in 0..1000 {
        symlink("target", name(2 * n)).unwrap();
    }
    let mut before = look(&live);
    let pending = writer.begin(TurnNo(1)).unwrap();
    copy(&live, &pending.upper_dir());
    let mut base = commit(pending, Part::Whole);
    // In the middle, before the first, behind the last, several, one that goes, most of them.
    let rounds: [&[u64]; 6] = [&[1001], &[0], &[2001, 2003], &[5, 7, 1501], &[1001], &[]];
    for (turn, round) in (2..).zip(rounds) {
        for n in round {
            if fs::remove_file(name(*n)).is_err() {
                symlink("new", name(*n)).unwrap();
            }
        }
        if round.is_empty() {
            (10..900).for_each(|n| fs::remove_file(name(2 * n)).unwrap());
        }
        let after = look(&live);
        let changes = changes(&before, &after);
        let pending = writer.begin(TurnNo(turn)).unwrap();
        copy(&live, &pending.upper_dir());
        strip(&pending.upper_dir(), &after, &changes);
        let delta = commit(
            pending,
            Part::Changes {
                base: &base,
                changes: &changes,
            },
        );
        assert!(delta.stored < 20_000, "{} bytes", delta.stored);
        let pending = writer.begin(TurnNo(turn + 100)).unwrap();
        copy(&live, &pending.upper_dir());
        let whole = commit(pending, Part::Whole);
        assert_eq!(delta.manifest.contents.upper, whole.manifest.contents.upper);
        assert!(whole.stored < 2_000, "all of it is there: {}", whole.stored);
        assert_eq!(found_diff(&base, &delta), expected_diff(&before, &after));
        let mut tree = delta.tree().unwrap().unwrap();
        for (path, seen) in &after {
            let entry = tree.lookup(path).unwrap().unwrap();
            assert_eq!(
                u32::from(entry.mode),
                seen.attributes.0,
                "{}",
                escaped(path)
            );
        }
        assert!(tree.lookup(Path::new("dir/name-00001")).unwrap().is_none());
        (before, base) = (after, delta);
    }
}

#[test]
fn a_deep_tree_comes_back() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    let depth = 3000usize;
    make_deep(&pending.upper_dir(), depth);
    let made = commit(pending, Part::Whole);
    assert_eq!(
        made.manifest.contents.upper.as_ref().unwrap().entries,
        depth as u64 + 1
    );
    assert_eq!(writer.verify(TurnNo(1)).unwrap(), []);
    let laid = made.lay_out_all(&writer.scratch_dir()).unwrap();
    laid.remove().unwrap();
    let changes = LayerChanges {
        removed: vec![(0..depth).map(|_| "d").collect()],
        changed: Vec::new(),
    };
    let pending = writer.begin(TurnNo(2)).unwrap();
    make_deep(&pending.upper_dir(), depth - 1);
    let less = commit(
        pending,
        Part::Changes {
            base: &made,
            changes: &changes,
        },
    );
    assert_eq!(less.manifest.contents.upper.unwrap().entries, depth as u64);
}

#[test]
fn changes_that_make_no_sense_are_refused() {
    let bed = bed();
    let writer = bed.writer();
    let base = bed.checkpoint(&writer, 1);
    let refused = |changed: &[&str]| {
        let file = |path: &&str| (PathBuf::from(path), FileType::RegularFile);
        let changes = LayerChanges {
            removed: Vec::new(),
            changed: changed.iter().map(file).collect(),
        };
        let mut pending = writer.begin(TurnNo(2)).unwrap();
        fill(&mut pending);
        let part = Part::Changes {
            base: &base,
            changes: &changes,
        };
        try_commit(pending, Images::Staged, part)
            .unwrap_err()
            .to_string()
    };
    for path in ["../x", "/etc", "a/../../x"] {
        assert!(refused(&[path]).contains("leads out"), "{path}");
    }
    assert!(refused(&["nowhere/x"]).contains("not said to have changed"));
    assert!(refused(&["a/none"]).contains("it was moved"));
    assert!(refused(&["a"]).contains("something else"));
    assert_eq!(numbers(writer.turns().unwrap()), [1]);
}

/// What a checkpoint names may lie in a pack that cannot be opened any more: it is kept once more.
#[test]
fn a_chunk_is_kept_anew_if_its_pack_cannot_be_opened() {
    let bed = bed();
    let writer = bed.writer();
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    fill(&mut pending);
    fs::write(pending.upper_dir().join("big"), noise(1, 40 << 20)).unwrap();
    commit(pending, Part::Whole);
    // From here on nothing is needed of the first pack but the file's contents.
    let mut pending = writer.begin(TurnNo(2)).unwrap();
    fs::create_dir_all(pending.upper_dir()).unwrap();
    let big = pending.upper_dir().join("big");
    let mut content = noise(1, 40 << 20);
    content[7] ^= 1;
    fs::write(&big, &content).unwrap();
    pending.add_to_bundle("config.json", b"{}".to_vec());
    fs::write(pending.image_dir().join("pages-1.img"), noise(2, 10_000)).unwrap();
    let base = commit(pending, Part::Whole);
    let first = objects::list(&writer.packs_dir()).unwrap().remove(0);
    let path = writer.packs_dir().join(first.file());
    fs::write(&path, "none").unwrap();
    let changes = LayerChanges {
        removed: Vec::new(),
        changed: vec![("big".into(), FileType::RegularFile)],
    };
    content[7] ^= 2;
    let next = |turn| {
        let mut pending = writer.begin(TurnNo(turn)).unwrap();
        fs::create_dir_all(pending.upper_dir()).unwrap();
        fs::write(pending.upper_dir().join("big"), &content).unwrap();
        pending.add_to_bundle("config.json", b"{}".to_vec());
        fs::write(pending.image_dir().join("pages-1.img"), noise(2, 10_000)).unwrap();
        let part = Part::Changes {
            base: &base,
            changes: &changes,
        };
        commit(pending, part)
    };
    let whole = next(3);
    assert_eq!(writer.verify(TurnNo(3)).unwrap(), []);
    let laid = whole.lay_out_all(&writer.scratch_dir()).unwrap();
    laid.remove().unwrap();
}

/// They are in memory, of directories as of files.
#[test]
fn a_turn_that_changes_too_many_attributes_is_refused() {
    let bed = bed();
    let writer = bed.writer();
    let base = bed.checkpoint(&writer, 1);
    for kind in [FileType::RegularFile, FileType::Directory] {
        let capture = |count: usize| {
            let mut pending = writer.begin(TurnNo(2)).unwrap();
            fill(&mut pending);
            let mut changes = LayerChanges::default();
            for number in 0..count {
                let name = format!("n{number:03}");
                let path = pending.upper_dir().join(&name);
                match kind {
                    FileType::Directory => fs::create_dir(&path).unwrap(),
                    _ => fs::write(&path, "").unwrap(),
                }
                set_xattr(&path, "user.note", &[7; 3000]);
                changes.changed.push((name.into(), kind));
            }
            let part = Part::Changes {
                base: &base,
                changes: &changes,
            };
            let upper = pending.upper_dir();
            pending.capture(&upper, part, &|| false).map(|_| ())
        };
        capture(340).unwrap();
        let refused = capture(360).unwrap_err().to_string();
        assert!(
            refused.contains("1 MiB of extended attributes"),
            "{refused}"
        );
    }
}
