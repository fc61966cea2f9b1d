//! What callers rely on, and what a sandbox may try.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::File,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt, fs::symlink},
    },
};

use rustix::fs::{CWD, FileType, Mode, OFlags};

use super::*;
use crate::tree::TreeError;

fn simple(dir: tempfile::TempDir) -> Bed {
    let bed = Bed::new(dir);
    fs::create_dir_all(bed.at("a/b")).unwrap();
    fs::write(bed.at("a/b/f"), "one").unwrap();
    fs::write(bed.at("a/g"), "two").unwrap();
    bed
}

/// A store through a mapping whose page is writable already changes no time in a tmpfs.
#[test]
fn an_inode_is_not_acquitted_by_equal_times() {
    let bed = simple(tempfile::tempdir_in("/dev/shm").unwrap());
    let mapped = fixture::Mapped::of(&bed.at("a/g"));
    mapped.put(b't');
    let times = || {
        let meta = fs::metadata(bed.at("a/g")).unwrap();
        (meta.ctime(), meta.ctime_nsec(), meta.mtime_nsec())
    };
    let then = times();
    let layer = bed.read();
    let candidates = bed.named(["a/g"]);
    assert!(
        bed.compare(&layer, &candidates, Scope::Candidates)
            .is_empty()
    );
    mapped.put(b'T');
    assert_eq!(times(), then, "the test needs equal times");
    let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
    assert_eq!(words(&comparison.changes), [("a/g".into(), "content")]);
    assert_eq!(comparison.bytes_read, 3);
}

#[test]
fn what_has_no_name_in_the_layer_is_outside() {
    let bed = simple(on_disk());
    let layer = bed.read();
    fs::write(bed.beside().join("work"), "").unwrap();
    let beside = bed.named(["../beside", "../beside/work"]);
    let foreign = Candidate { dev: 1, ino: 1 };
    let mut candidates = beside.clone();
    candidates.extend([foreign, foreign]);
    candidates.extend(bed.named(["a", "a/g", "a/b/f"]));
    for scope in [Scope::Candidates, Scope::Search, Scope::Everything] {
        let comparison = bed.compare(&layer, &candidates, scope);
        assert!(comparison.is_empty());
        let mut outside = [beside[0], beside[1], foreign];
        outside.sort_unstable();
        assert_eq!(comparison.outside, outside, "{scope:?}");
    }
}

#[test]
fn a_search_finds_names_whose_directory_is_no_candidate() {
    let bed = simple(on_disk());
    let mut layer = bed.read();
    fs::create_dir_all(bed.at("a/b/new/x")).unwrap();
    fs::write(bed.at("a/b/new/x/y"), "").unwrap();
    let candidates = bed.named(["a/b/new/x/y"]);
    let narrow = bed.compare(&layer, &candidates, Scope::Candidates);
    assert!(narrow.is_empty());
    assert_eq!(narrow.outside, candidates);
    let found = bed.compare(&layer, &candidates, Scope::Search);
    assert!(found.outside.is_empty());
    let new = ["a/b/new", "a/b/new/x", "a/b/new/x/y"];
    assert_eq!(
        words(&found.changes),
        new.map(|p| (PathBuf::from(p), "added"))
    );
    apply(&bed, &mut layer, found);
}

/// The nearest directory that is where it was tells what became of the others.
#[test]
fn an_inode_that_was_moved_is_missed_where_it_was() {
    let bed = simple(on_disk());
    let mut layer = bed.read();
    fs::rename(bed.at("a"), bed.at("z")).unwrap();
    let comparison = bed.compare(&layer, &bed.named(["z/b/f"]), Scope::Candidates);
    let expected = [
        ("a", "removed"),
        ("a/b", "removed"),
        ("a/b/f", "removed"),
        ("a/g", "removed"),
        ("z", "added"),
        ("z/b", "added"),
        ("z/b/f", "added"),
        ("z/g", "added"),
    ];
    let expected = expected.map(|(p, w)| (PathBuf::from(p), w));
    assert_eq!(words(&comparison.changes), expected);
    apply(&bed, &mut layer, comparison);
}

#[test]
fn an_inode_is_compared_under_a_name_that_is_left() {
    let bed = simple(on_disk());
    fs::hard_link(bed.at("a/g"), bed.at("a/b/before")).unwrap();
    let layer = bed.read();
    fs::remove_file(bed.at("a/b/before")).unwrap();
    fs::write(bed.at("a/g"), "written").unwrap();
    let comparison = bed.compare(&layer, &bed.named(["a/g"]), Scope::Candidates);
    let expected = [("a/b/before", "removed"), ("a/g", "content")];
    let expected = expected.map(|(p, w)| (PathBuf::from(p), w));
    assert_eq!(words(&comparison.changes), expected);
}

#[test]
fn a_comparison_is_applied_to_the_index_it_was_made_with_or_not_at_all() {
    let bed = simple(on_disk());
    let mut layer = bed.read();
    fs::remove_file(bed.at("a/g")).unwrap();
    let one = bed.compare(&layer, &bed.named(["a"]), Scope::Candidates);
    let two = bed.compare(&layer, &bed.named(["a"]), Scope::Candidates);
    layer.apply(one).unwrap();
    assert_eq!(layer.apply(two), Err(ApplyError::Stale));
    assert_eq!(told(&layer), told(&bed.read()));
}

#[test]
fn a_file_without_a_digest_is_never_acquitted_and_learns_it_from_the_capture() {
    let bed = simple(on_disk());
    let mut layer = Layer::outline(&bed.upper(), &never).unwrap();
    assert_eq!(layer.without_digest(), 2);
    let candidates = bed.named(["a/g"]);
    let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
    assert_eq!(words(&comparison.changes), [("a/g".into(), "content")]);

    // As a capture would tell it, which has not seen the other file.
    let meta = fs::metadata(bed.at("a/g")).unwrap();
    let told = told(&bed.read())[Path::new("a/g")].content.unwrap();
    let contents = HashMap::from([((meta.dev(), meta.ino()), told)]);
    fs::write(bed.at("a/g"), "TWO").unwrap();
    assert_eq!(layer.learn(&contents), 1);
    assert_eq!(layer.without_digest(), 1);
    let time = meta.modified().unwrap();
    let file = File::options().write(true).open(bed.at("a/g")).unwrap();
    file.set_modified(time).unwrap();
    let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
    assert_eq!(words(&comparison.changes), [("a/g".into(), "content")]);
    fs::write(bed.at("a/g"), "two").unwrap();
    file.set_modified(time).unwrap();
    assert!(
        bed.compare(&layer, &candidates, Scope::Candidates)
            .is_empty()
    );

    // A later capture tells of the other one.
    let rest = bed.read();
    let content = |id| Some(((rest.dev(), rest.ino(id)), rest.content(id)?));
    assert_eq!(layer.learn(&rest.ids().filter_map(content).collect()), 1);
    assert_eq!(layer.without_digest(), 0);
}

#[test]
fn another_directory_in_its_place_is_compared_with_everything() {
    let bed = simple(on_disk());
    let mut layer = bed.read();
    let copy = bed.beside().join("copy");
    let mut cp = std::process::Command::new("cp");
    let done = cp.arg("-a").args([&bed.upper(), &copy]).status();
    assert!(done.unwrap().success());
    fs::write(copy.join("a/new"), "").unwrap();
    fs::rename(bed.upper(), bed.beside().join("old")).unwrap();
    fs::rename(&copy, bed.upper()).unwrap();
    let comparison = bed.compare(&layer, &[], Scope::Candidates);
    assert_eq!(words(&comparison.changes), [("a/new".into(), "added")]);
    apply(&bed, &mut layer, comparison);
}

#[test]
fn one_inode_that_hides_many_names_costs_one_look() {
    if !root() {
        return;
    }
    let bed = simple(on_disk());
    let white = bed.beside().join("white");
    rustix::fs::mknodat(CWD, &white, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    for n in 0..5000 {
        fs::hard_link(&white, bed.at(format!("a/{n}"))).unwrap();
    }
    let layer = bed.read();
    fs::hard_link(&white, bed.at("a/b/white")).unwrap();
    let asked = Cell::new(0);
    let count = || {
        asked.set(asked.get() + 1);
        false
    };
    let candidates = bed.named(["a/b", "a/b/white"]);
    let comparison = layer
        .compare(&bed.upper(), &candidates, Scope::Candidates, &count)
        .unwrap();
    assert_eq!(words(&comparison.changes), [("a/b/white".into(), "added")]);
    assert!(asked.get() < 20, "{}", asked.get());
}

#[test]
fn every_long_step_can_be_stopped() {
    let bed = simple(on_disk());
    let layer = bed.read();
    fs::write(bed.at("a/g"), "").unwrap();
    let stopped = |result: Result<Comparison, TreeError>| {
        assert!(
            matches!(result, Err(TreeError::Stopped { .. })),
            "{result:?}"
        );
    };
    let candidates = bed.named(["a", "../beside"]);
    for scope in [Scope::Candidates, Scope::Search, Scope::Everything] {
        stopped(layer.compare(&bed.upper(), &candidates, scope, &|| true));
    }
    let read = Layer::read(&bed.upper(), &|| true);
    assert!(matches!(read, Err(TreeError::Stopped { .. })));
}

/// Names of all bytes; a directory whose path is longer than the kernel takes at once.
#[test]
fn hostile_names_and_depths_are_names_like_others() {
    let bed = simple(on_disk());
    let long = "x".repeat(255);
    let names: [&[u8]; 5] = [b"\n", b"\xff\xfe", b"...", b" ", long.as_bytes()];
    for name in names {
        fs::write(bed.at(OsStr::from_bytes(name)), name).unwrap();
    }
    symlink("/etc/passwd", bed.at("a/b/etc")).unwrap();
    let mut dir: OwnedFd = File::open(bed.at("a")).unwrap().into();
    let name = CString::new("d".repeat(250)).unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    for _ in 0..60 {
        rustix::fs::mkdirat(&dir, &name, Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, &name, flags, Mode::empty()).unwrap();
    }
    let layer = bed.read();
    let file = |content: &[u8]| {
        let flags = OFlags::CREATE | OFlags::WRONLY;
        let file = rustix::fs::openat(&dir, c"deep", flags, Mode::RUSR).unwrap();
        rustix::io::pwrite(&file, content, 0).unwrap();
        rustix::fs::fstat(&file).unwrap()
    };
    let stat = file(b"1");
    let above = rustix::fs::fstat(&dir).unwrap();
    let mut candidates = bed.named(names.map(OsStr::from_bytes));
    for stat in [stat, above] {
        let (dev, ino) = (stat.st_dev, stat.st_ino);
        candidates.push(Candidate { dev, ino });
    }
    let mut layer = layer;
    let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
    let depth = |c: &Comparison| {
        c.changes
            .iter()
            .map(|c| c.path.iter().count())
            .collect::<Vec<_>>()
    };
    assert_eq!((comparison.len(), depth(&comparison)), (1, vec![62]));
    apply(&bed, &mut layer, comparison);
    file(b"2222");
    let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
    assert_eq!((comparison.len(), depth(&comparison)), (1, vec![62]));
    apply(&bed, &mut layer, comparison);
}
