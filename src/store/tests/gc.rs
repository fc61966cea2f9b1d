//! What is kept and what goes.

use super::{fixture::*, *};

#[test]
fn the_newest_the_named_and_the_armed_are_kept() {
    let bed = bed();
    let writer = bed.writer();
    for turn in [1, 2, 3, 5, 9, 10] {
        bed.checkpoint(&writer, turn);
    }
    writer.name("before-the-migration", TurnNo(2)).unwrap();
    writer.arm(TurnNo(3)).unwrap();
    let retain = |keep| numbers(writer.retain(&Retention::newest(keep)).unwrap().turns);
    assert_eq!(retain(10), [0; 0]);
    assert_eq!(retain(2), [1, 5]);
    assert_eq!(numbers(writer.turns().unwrap()), [2, 3, 9, 10]);
    assert_eq!(retain(0), [9]);
    writer.disarm().unwrap();
    writer.name("before-the-migration", TurnNo(10)).unwrap();
    assert_eq!(retain(1), [2, 3]);
    assert_eq!(numbers(writer.turns().unwrap()), [10]);
    assert_eq!(writer.verify(TurnNo(10)).unwrap(), []);
}

#[test]
fn what_was_gone_back_to_is_kept_until_its_way_has_newer_processes() {
    let bed = bed();
    let writer = bed.writer();
    for turn in 1..=3 {
        bed.checkpoint(&writer, turn);
    }
    writer.goes_on_from(TurnNo(1));
    // Turns whose processes could not be kept: what has some is turn 1, and not the way that was left.
    without_processes(&writer, 4);
    without_processes(&writer, 5);
    let retain = || numbers(writer.retain(&Retention::newest(1)).unwrap().turns);
    assert_eq!(retain(), [2, 3, 4]);
    bed.checkpoint(&writer, 6);
    assert_eq!(retain(), [1, 5]);
}

/// A checkpoint with a file of its own, one that changes every tenth turn, and one that never does.
fn turn(writer: &SandboxWriter, number: u64) -> Checkpoint {
    let pending = writer.begin(TurnNo(number)).unwrap();
    let upper = pending.upper_dir();
    fs::create_dir(&upper).unwrap();
    fs::write(upper.join("own"), noise(number, 100_000)).unwrap();
    fs::write(upper.join("tenth"), noise(1000 + number / 10, 100_000)).unwrap();
    fs::write(upper.join("first"), noise(9999, 100_000)).unwrap();
    commit(pending, Part::Whole)
}

#[test]
fn what_no_checkpoint_needs_goes_and_what_one_needs_stays() {
    let bed = bed();
    let writer = bed.writer();
    let mut largest = 0;
    for number in 1..=100 {
        turn(&writer, number);
        writer.retain(&Retention::newest(3)).unwrap();
        largest = largest.max(writer.size().unwrap());
        let packs = objects::list(&writer.packs_dir()).unwrap();
        assert!(packs.len() <= 3 + 8 + 12, "{} packs", packs.len());
    }
    // Three own files, one or two tenths, the first one; and eight turns that were not looked
    // through yet.
    assert!(largest < 2_000_000, "{largest} bytes");
    writer.collect().unwrap();
    let size = writer.size().unwrap();
    assert!(size < 650_000, "{size} bytes");
    for number in writer.turns().unwrap() {
        assert_eq!(writer.verify(number).unwrap(), []);
    }
    assert_eq!(writer.verify_packs().unwrap(), []);
    let laid = lay_out(&writer, TurnNo(100), &writer.scratch_dir()).unwrap();
    let first = fs::read(laid.upper_dir().join("first")).unwrap();
    assert!(first == noise(9999, 100_000));
}

/// One whose processes could not be kept: what CRIU left staged is none of it.
fn without_processes(writer: &SandboxWriter, number: u64) -> Checkpoint {
    let mut pending = writer.begin(TurnNo(number)).unwrap();
    fill(&mut pending);
    let facts = Facts {
        kind: Kind::Files,
        processes: 0,
        processes_of: None,
        references: Vec::new(),
        notes: vec!["processes: process 7 uses io_uring".into()],
        ..facts()
    };
    let upper = pending.upper_dir();
    pending.capture(&upper, Part::Whole, &|| false).unwrap();
    let committed = pending.commit(facts, Images::None, Files::Captured);
    committed.unwrap().0
}

#[test]
fn the_newest_checkpoint_with_processes_is_kept_whatever_came_after_it() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    bed.checkpoint(&writer, 2);
    for number in 3..=6 {
        let checkpoint = without_processes(&writer, number);
        assert!(!checkpoint.has_processes());
        assert_eq!(checkpoint.manifest.contents.image, []);
        assert!(checkpoint.manifest.contents.upper.is_some());
    }
    let limited = |limit| Retention {
        keep: 2,
        sandbox_limit: limit,
        store_limit: None,
    };
    let gone =
        |writer: &SandboxWriter, limit| numbers(writer.retain(&limited(limit)).unwrap().turns);
    assert_eq!(gone(&writer, None), [1, 3, 4]);
    // Also by one who did not see them made.
    drop(writer);
    let writer = bed.writer();
    assert_eq!(gone(&writer, Some(1)), [5]);
    assert_eq!(numbers(writer.turns().unwrap()), [2, 6]);
    let newest = writer.newest_with_processes().unwrap().unwrap();
    assert_eq!(newest.turn(), TurnNo(2));
    for turn in writer.turns().unwrap() {
        assert_eq!(writer.verify(turn).unwrap(), []);
    }
    bed.checkpoint(&writer, 7);
    assert_eq!(gone(&writer, Some(1)), [2, 6]);
    assert_eq!(numbers(writer.turns().unwrap()), [7]);
}

#[test]
fn a_broken_checkpoint_does_not_hide_an_older_one_with_processes() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let broken = bed.checkpoint(&writer, 2);
    without_processes(&writer, 3);
    let pack = writer.pack_path(broken.turn());
    fs::write(&pack, "x").unwrap();
    let newest = writer.newest_with_processes().unwrap().unwrap();
    assert_eq!(newest.turn(), TurnNo(1));
}

#[test]
fn a_limit_takes_the_oldest_and_never_the_newest() {
    let bed = bed();
    let writer = bed.writer();
    for number in 1..=5 {
        turn(&writer, number);
    }
    let limited = |limit| Retention {
        keep: 10,
        sandbox_limit: Some(limit),
        store_limit: None,
    };
    writer.name("kept", TurnNo(2)).unwrap();
    let freed = writer.retain(&limited(560_000)).unwrap();
    assert_eq!(numbers(freed.turns), [1, 3]);
    assert!(freed.bytes > 190_000, "{} bytes", freed.bytes);
    let freed = writer.retain(&limited(1)).unwrap();
    assert_eq!(numbers(freed.turns), [4]);
    assert_eq!(numbers(writer.turns().unwrap()), [2, 5]);
    assert_eq!(writer.verify(TurnNo(5)).unwrap(), []);
}

#[test]
fn a_reader_finds_what_a_collection_has_moved() {
    let bed = bed();
    let writer = bed.writer();
    for number in 1..=4 {
        turn(&writer, number);
    }
    let checkpoint = writer.latest().unwrap().unwrap();
    let mut tree = checkpoint.tree().unwrap().unwrap();
    writer.retain(&Retention::newest(1)).unwrap();
    writer.collect().unwrap();
    assert_eq!(tree.entries_under(Path::new("")).unwrap().len(), 3);
    let mut objects = checkpoint.objects().unwrap();
    let first = tree.lookup(Path::new("first")).unwrap().unwrap();
    let Node::File(content) = first.node else {
        panic!("{first:?}")
    };
    objects.get(&content.root).unwrap();
}

#[test]
fn a_sandbox_is_removed_whole_and_not_while_it_is_written() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let locked = bed.store.remove(&bed.id).unwrap_err();
    assert!(matches!(locked, StoreError::Locked { .. }), "{locked}");
    drop(writer);
    let freed = bed.store.remove(&bed.id).unwrap();
    assert_eq!(numbers(freed.turns), [1]);
    assert_eq!(bed.store.sandboxes().unwrap(), []);
    let dir = bed.store.root.join("default");
    fs::create_dir(dir.join(".gone-other")).unwrap();
    assert_eq!(bed.store.sandboxes().unwrap(), []);
    bed.store.tidy().unwrap();
    assert!(files::all_names(&dir).unwrap().is_empty());
}

#[test]
fn nothing_is_collected_while_a_checkpoint_cannot_be_read() {
    let bed = bed();
    let writer = bed.writer();
    for number in 1..=3 {
        turn(&writer, number);
    }
    writer.retain(&Retention::newest(2)).unwrap();
    let path = writer.pack_path(TurnNo(3));
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    writer.collect().unwrap_err();
    assert!(writer.packs_dir().join("1.kept").exists());
    fs::write(&path, &whole).unwrap();
    writer.collect().unwrap();
    assert_eq!(writer.verify(TurnNo(3)).unwrap(), []);
}
