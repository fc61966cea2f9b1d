//! What is committed is read back.

use super::{fixture::*, *};

#[test]
fn what_is_committed_is_read_back() {
    let bed = bed();
    let reader = bed.store.sandbox(&bed.id);
    assert!(reader.latest().unwrap().is_none());
    assert!(!reader.dir().exists(), "reading made something");
    let writer = bed.writer();
    let made = bed.checkpoint(&writer, 7);
    let latest = reader.latest().unwrap().unwrap();
    assert_eq!(latest.manifest, made.manifest);
    assert_eq!((latest.digest, latest.stored), (made.digest, made.stored));
    assert_eq!(latest.manifest.facts, facts());
    assert_eq!(latest.manifest.contents.image.len(), 2);
    assert_eq!(latest.manifest.contents.upper.as_ref().unwrap().entries, 10);
    assert_eq!(reader.verify(TurnNo(7)).unwrap(), []);
    assert_eq!(reader.verify_packs().unwrap(), []);
    let laid = lay_out(&reader, TurnNo(7), &reader.scratch_dir()).unwrap();
    assert_eq!(
        fs::read(laid.bundle_dir().join("config.json")).unwrap(),
        b"{}"
    );
    assert_eq!(
        fs::read(laid.image_dir().join("pages-1.img")).unwrap(),
        vec![9; 10_000]
    );
    assert!(laid.upper_dir().join("z").exists());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(reader.dir()), 0o700);
    assert_eq!(mode(&reader.pack_path(TurnNo(7))), 0o400);
    let twice = writer.begin(TurnNo(7)).err().unwrap();
    assert!(matches!(twice, StoreError::Exists { .. }), "{twice}");
    let tmp = reader.scratch_dir();
    assert_eq!(files::all_names(&tmp).unwrap().len(), 1, "staging is gone");
    drop(laid);
    assert!(files::all_names(&tmp).unwrap().is_empty());
}

#[test]
fn a_tree_with_one_of_everything_comes_back() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    zoo(&pending.upper_dir());
    // Too large to be read whole.
    let sparse = pending.upper_dir().join("sparse");
    let spread = fs::metadata(&sparse).unwrap();
    let upper = pending.upper_dir();
    let (checkpoint, staging) = try_commit(pending, Images::Staged, Part::Whole).unwrap();
    fs::remove_file(&sparse).unwrap();
    let wanted = look(&upper);
    drop(staging);
    let laid = checkpoint.lay_out_all(&writer.scratch_dir()).unwrap();
    let back = laid.upper_dir().join("sparse");
    let meta = fs::metadata(&back).unwrap();
    use std::os::unix::fs::{FileExt, MetadataExt};
    assert_eq!((meta.len(), meta.mtime()), (1 << 40, spread.mtime()));
    assert!(meta.blocks() <= 256, "{} blocks", meta.blocks());
    let mut found = [0; 6];
    let file = fs::File::open(&back).unwrap();
    file.read_exact_at(&mut found, 5 << 30).unwrap();
    assert_eq!(&found, b"middle");
    fs::remove_file(&back).unwrap();
    let mut found = look(&laid.upper_dir());
    // The test has removed a name from each root, and so changed its mtime.
    let root = found.get_mut(Path::new("")).unwrap();
    root.mtime = wanted[Path::new("")].mtime;
    assert_eq!(found, wanted);
}

#[test]
fn an_abandoned_checkpoint_leaves_nothing_and_a_crash_leaves_nothing_for_long() {
    let bed = bed();
    let writer = bed.writer();
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    fill(&mut pending);
    drop(pending);
    assert!(files::all_names(&writer.scratch_dir()).unwrap().is_empty());

    let mut pending = writer.begin(TurnNo(1)).unwrap();
    fill(&mut pending);
    std::mem::forget(pending);
    fs::write(writer.packs_dir().join(".tmp-1.pack"), "half").unwrap();
    assert_eq!(writer.turns().unwrap(), []);
    assert!(writer.latest().unwrap().is_none());
    // The forgotten one still holds the lock of this process.
    let lock: std::os::fd::OwnedFd = writer.lock_file().try_clone().unwrap().into();
    rustix::fs::flock(lock, rustix::fs::FlockOperation::Unlock).unwrap();
    let writer = bed.writer();
    assert!(files::all_names(&writer.scratch_dir()).unwrap().is_empty());
    assert!(files::all_names(&writer.packs_dir()).unwrap().is_empty());
    bed.checkpoint(&writer, 1);
}

#[test]
fn a_checkpoint_is_written_into_the_file_that_was_made_for_it_if_that_is_there() {
    use std::{os::unix::fs::MetadataExt, time::Duration};
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let bed = bed();
    let writer = bed.writer();
    let make = |took| {
        writer.guard().spare.took(Duration::from_micros(took));
        writer.make_ready();
    };
    let spare = writer.packs_dir().join(".tmp-pack");
    // Not where that takes no time.
    make(20);
    assert!(!spare.exists());
    make(1000);
    // Held open: nobody else gets its inode.
    let held = fs::File::open(&spare).unwrap();
    let made = held.metadata().unwrap().ino();
    make(1000);
    assert_eq!(inode(&spare), made);
    bed.checkpoint(&writer, 1);
    assert_eq!(inode(&writer.pack_path(TurnNo(1))), made);
    drop(held);
    // There was none, or somebody has removed it.
    bed.checkpoint(&writer, 2);
    make(1000);
    fs::remove_file(&spare).unwrap();
    bed.checkpoint(&writer, 3);
    // A checkpoint that is given up takes it with it; a writer leaves none.
    make(1000);
    writer.begin(TurnNo(4)).unwrap().prepare().unwrap();
    assert!(!spare.exists());
    make(1000);
    assert_eq!(fs::metadata(&spare).unwrap().len(), 0);
    let dir = writer.packs_dir();
    drop(writer);
    let mut names = files::all_names(&dir).unwrap();
    names.sort();
    assert_eq!(names, ["1.pack", "2.pack", "3.pack"]);
}

#[test]
fn the_next_writer_leaves_what_is_laid_out_alone_while_it_is_used() {
    let bed = bed();
    let writer = bed.writer();
    let checkpoint = bed.checkpoint(&writer, 1);
    drop(writer);
    let scratch = bed.store.sandbox(&bed.id).scratch_dir();
    let laid = checkpoint.lay_out_all(&scratch).unwrap();
    drop(bed.writer());
    assert!(laid.image_dir().join("core-1.img").exists());
    let copy = scratch.join("laid-0-0");
    fs::create_dir(&copy).unwrap();
    drop(bed.writer());
    assert!(!copy.exists());
}

#[test]
fn equal_content_is_kept_once() {
    let bed = bed();
    let writer = bed.writer();
    let fill = |pending: &Pending, seed| {
        let pages = [noise(1, 1 << 20), noise(seed, 8192), vec![0; 1 << 20]].concat();
        fs::write(pending.image_dir().join("pages-1.img"), pages).unwrap();
        fs::create_dir(pending.upper_dir()).unwrap();
        fs::write(pending.upper_dir().join("a"), noise(5, 1 << 20)).unwrap();
        fs::write(pending.upper_dir().join("b"), noise(5, 1 << 20)).unwrap();
    };
    let pending = writer.begin(TurnNo(1)).unwrap();
    fill(&pending, 2);
    let first = commit(pending, Part::Whole);
    assert!((2 << 20..(2 << 20) + 60_000).contains(&first.stored));
    let pending = writer.begin(TurnNo(2)).unwrap();
    fill(&pending, 3);
    let second = commit(pending, Part::Whole);
    assert!((8192..40_000).contains(&second.stored), "{}", second.stored);
    assert_eq!(writer.verify(TurnNo(2)).unwrap(), []);
    let zeros = &second.manifest.contents.image[0];
    assert_eq!(
        (zeros.size, zeros.data),
        ((2 << 20) + 8192, (1 << 20) + 8192)
    );
}

#[test]
fn one_byte_more_in_a_large_file_writes_one_chunk_and_its_lists() {
    let bed = bed();
    let writer = bed.writer();
    let size = 40 << 20;
    let fill = |pending: &Pending, at: Option<u64>| {
        fs::create_dir(pending.upper_dir()).unwrap();
        let path = pending.upper_dir().join("large");
        fs::write(&path, noise(1, size)).unwrap();
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().write(true).open(&path).unwrap();
        if let Some(at) = at {
            file.write_all_at(b"changed", at).unwrap();
        }
    };
    let pending = writer.begin(TurnNo(1)).unwrap();
    fill(&pending, None);
    commit(pending, Part::Whole);
    for (turn, at) in [(2, 30 << 20), (3, size as u64)] {
        let pending = writer.begin(TurnNo(turn)).unwrap();
        fill(&pending, Some(at));
        let made = commit(pending, Part::Whole);
        assert!(made.stored < 100_000, "{} bytes", made.stored);
    }
    let laid = lay_out(&writer, TurnNo(3), &writer.scratch_dir()).unwrap();
    let wanted = [noise(1, size), b"changed".to_vec()].concat();
    assert!(fs::read(laid.upper_dir().join("large")).unwrap() == wanted);
}

#[test]
fn processes_and_files_may_be_those_of_an_earlier_checkpoint() {
    let bed = bed();
    let writer = bed.writer();
    let first = bed.checkpoint(&writer, 1);
    let pending = writer.begin(TurnNo(2)).unwrap();
    let (same, _) = pending
        .commit(facts(), Images::Same(&first), Files::Same(&first))
        .unwrap();
    assert_eq!(same.manifest.contents.image, first.manifest.contents.image);
    assert_eq!(same.manifest.contents.upper, first.manifest.contents.upper);
    assert!(same.stored < 2000, "{} bytes", same.stored);
    // Complete in itself.
    writer.retain(&Retention::newest(1)).unwrap();
    assert_eq!(numbers(writer.turns().unwrap()), [2]);
    writer.collect().unwrap();
    assert_eq!(writer.verify(TurnNo(2)).unwrap(), []);
    let pending = writer.begin(TurnNo(3)).unwrap();
    let gone = pending.commit(facts(), Images::Same(&first), Files::None);
    assert!(matches!(gone, Err(StoreError::NoTurn { .. })), "{gone:?}");
}

#[test]
fn a_checkpoint_may_not_refer_to_another() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    symlink("../../0/image", pending.image_dir().join("parent")).unwrap();
    let error = pending
        .commit(facts(), Images::Staged, Files::None)
        .unwrap_err();
    assert!(error.to_string().contains("parent"), "{error}");
    assert_eq!(writer.turns().unwrap(), []);
    assert!(files::all_names(&writer.packs_dir()).unwrap().is_empty());
}

#[test]
fn a_checkpoint_without_new_images_leaves_no_trace_beside_its_pack() {
    let bed = bed();
    let writer = bed.writer();
    let base = bed.checkpoint(&writer, 1);
    let mut pending = writer.begin_without_images(TurnNo(2)).unwrap();
    pending.prepare().unwrap();
    pending.add_to_bundle("config.json", b"another".to_vec());
    let tmp = writer.scratch_dir();
    assert!(files::all_names(&tmp).unwrap().is_empty());
    let parts = (Images::Same(&base), Files::Same(&base));
    let (made, staging) = pending.commit(facts(), parts.0, parts.1).unwrap();
    drop(staging);
    assert_eq!(writer.verify(TurnNo(2)).unwrap(), []);
    let laid = made.lay_out_all(&tmp).unwrap();
    let config = fs::read(laid.bundle_dir().join("config.json")).unwrap();
    assert_eq!(config, b"another");
    assert!(laid.image_dir().join("core-1.img").exists());
}

/// Overlay's index has names for what has several.
#[test]
fn an_inode_with_a_name_outside_of_the_layer_is_kept_like_any_other() {
    let bed = bed();
    let writer = bed.writer();
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    fill(&mut pending);
    let upper = pending.upper_dir();
    fs::hard_link(upper.join("z"), upper.with_file_name("outside")).unwrap();
    let made = commit(pending, Part::Whole);
    assert_eq!(writer.verify(TurnNo(1)).unwrap(), []);
    let laid = made.lay_out_all(&writer.scratch_dir()).unwrap();
    let back = laid.upper_dir().join("z");
    assert_eq!(fs::read(&back).unwrap(), b"z");
    assert_eq!(fs::metadata(&back).unwrap().nlink(), 1);
}

#[test]
fn the_digest_of_a_tree_does_not_depend_on_where_its_holes_are() {
    let bed = bed();
    let digest = |turn, fill: &dyn Fn(&fs::File)| {
        let writer = bed.writer();
        let pending = writer.begin(TurnNo(turn)).unwrap();
        fs::create_dir(pending.upper_dir()).unwrap();
        let file = fs::File::create(pending.upper_dir().join("file")).unwrap();
        fill(&file);
        let time = std::time::UNIX_EPOCH;
        file.set_modified(time).unwrap();
        let upper = fs::File::open(pending.upper_dir()).unwrap();
        upper.set_modified(time).unwrap();
        let made = commit(pending, Part::Whole);
        made.manifest.contents.upper.unwrap().digest
    };
    use std::os::unix::fs::FileExt;
    let hole = digest(1, &|f| {
        f.set_len(1_000_000).unwrap();
        f.write_all_at(b"x", 500_000).unwrap();
    });
    let zeros = digest(2, &|f| {
        f.write_all_at(&vec![0; 1_000_000], 0).unwrap();
        f.write_all_at(b"x", 500_000).unwrap();
    });
    let other = digest(3, &|f| {
        f.set_len(1_000_000).unwrap();
        f.write_all_at(b"x", 500_001).unwrap();
    });
    assert_eq!(hole, zeros);
    assert_ne!(hole, other);
}

#[test]
fn a_manifest_with_fields_of_a_later_version_is_still_read() {
    let bed = bed();
    let made = bed.checkpoint(&bed.writer(), 1);
    let path = Path::new("x");
    let json = made.manifest.to_json(path).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["created_at"], "2025-11-23T17:10:00.25Z");
    assert_eq!(json["pipes"][0]["pending"], "00ff0a");
    assert_eq!(json["references"][0]["path"], "a/100%25 %0a");
    json["later"] = 1.into();
    json["host"]["later"] = 1.into();
    let bytes = serde_json::to_vec(&json).unwrap();
    let read = Manifest::parse(&bytes, path, &bed.id, TurnNo(1)).unwrap();
    assert_eq!(read, made.manifest);
    let other = Manifest::parse(&bytes, path, &bed.id, TurnNo(2)).unwrap_err();
    assert!(other.to_string().contains("about turn 1"), "{other}");
    json["contents"]["image"][0]["path"] = "../x".into();
    let bytes = serde_json::to_vec(&json).unwrap();
    Manifest::parse(&bytes, path, &bed.id, TurnNo(1)).unwrap_err();
    let newer = br#"{"format": 3, "everything": "else"}"#;
    let newer = Manifest::parse(newer, path, &bed.id, TurnNo(1)).unwrap_err();
    assert!(
        matches!(newer, StoreError::Newer { found: 3, .. }),
        "{newer}"
    );
}

#[test]
fn a_file_of_an_image_is_read_in_place() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    let bytes = [noise(1, 5000), vec![0; 10_000], noise(2, 1_500_000)].concat();
    fs::write(pending.image_dir().join("pages-1.img"), &bytes).unwrap();
    let committed = pending.commit(facts(), Images::Staged, Files::None);
    let made = committed.unwrap().0;
    assert!(made.image_file("pages-2.img").unwrap().is_none());
    let mut file = made.image_file("pages-1.img").unwrap().unwrap();
    assert_eq!(file.size(), bytes.len() as u64);
    for (at, length) in [(0, 0), (0, 1), (4095, 2), (3, 20_000), (900_000, 615_000)] {
        let mut found = vec![7; length];
        file.read_exact_at(&mut found, at as u64).unwrap();
        assert!(found == bytes[at..at + length], "{at} {length}");
    }
    let beyond = file.read_exact_at(&mut [0; 2], bytes.len() as u64 - 1);
    beyond.unwrap_err();
}

#[test]
fn processes_upon_another_file_than_at_their_dump_are_told() {
    let bed = bed();
    let writer = bed.writer();
    let first = bed.checkpoint(&writer, 1);
    let entry = |path: &str| first.lookup(Path::new(path)).unwrap().unwrap().digest();
    let reference = |path: &str, entry| Reference {
        path: path.into(),
        entry,
    };
    let file = reference("a/file", Some(entry("a/file")));
    let absent = reference("a/none", None);
    // A directory changes with every name in it.
    let directory = reference("a", None);
    let mut turn = 1;
    let mut changed = |references: &[&Reference], files: Files<'_>| {
        turn += 1;
        let mut pending = writer.begin(TurnNo(turn)).unwrap();
        fill(&mut pending);
        fs::write(pending.upper_dir().join("a/none"), "").unwrap();
        let facts = Facts {
            references: references.iter().map(|one| (*one).clone()).collect(),
            ..facts()
        };
        let upper = pending.upper_dir();
        pending.capture(&upper, Part::Whole, &|| false).unwrap();
        let committed = pending.commit(facts, Images::Staged, files).unwrap().0;
        committed.changed_reference().unwrap()
    };
    let same = Files::Same(&first);
    assert_eq!(changed(&[&file, &absent, &directory], same), None);
    // Made anew, it has another mtime.
    assert_eq!(changed(&[&file], Files::Captured), Some("a/file".into()));
    assert_eq!(changed(&[&directory], Files::Captured), None);
    assert_eq!(changed(&[&absent], Files::Captured), Some("a/none".into()));
}

#[test]
fn one_name_and_what_is_below_it_is_laid_out() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    zoo(&pending.upper_dir());
    fs::remove_file(pending.upper_dir().join("sparse")).unwrap();
    let upper = pending.upper_dir();
    let (made, staging) = try_commit(pending, Images::Staged, Part::Whole).unwrap();
    let mut tree = made.tree().unwrap().unwrap();
    for name in ["a", "link", "whiteout", "fifo", "a/file", "nothing"] {
        let dest = bed.dir.path().join("dest");
        tree.lay_out(Path::new(name), &dest).unwrap();
        let (mut found, mut wanted) = (look(&dest), look(&upper.join(name)));
        // One of its names lies elsewhere in the tree.
        found.values_mut().for_each(|seen| seen.link = None);
        wanted.values_mut().for_each(|seen| seen.link = None);
        assert_eq!(found, wanted, "{name}");
        crate::tree::remove_tree(&dest).unwrap();
    }
    tree.lay_out(Path::new("none"), &upper.join("x"))
        .unwrap_err();
    drop(staging);
}
