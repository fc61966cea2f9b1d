//! A pack that a power loss has left must not pass for a checkpoint, nor damage for a power loss.

use std::{
    fs::Permissions,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt},
    },
};

use super::{fixture::*, journal::line, *};
use crate::store::{
    pack::PackWriter,
    seal::{self, settle},
};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// As it is between its rename and its seal.
fn unseal(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Makes of a file, whose length it is told, what may be left of it.
type Tear = fn(&fs::File, u64);

/// What may be left of a file of this length whose writes were on their way.
fn tears(length: u64) -> Vec<(&'static str, Tear)> {
    assert!(length > 3 * 4096, "several pages");
    vec![
        ("empty", |file, _| file.set_len(0).unwrap()),
        ("cut", |file, length| file.set_len(length / 2).unwrap()),
        ("no last byte", |file, length| {
            file.set_len(length - 1).unwrap();
        }),
        ("zeros", |file, length| {
            file.write_all_at(&vec![0; length as usize], 0).unwrap();
        }),
        ("no first page", |file, _| {
            file.write_all_at(&[0; 4096], 0).unwrap();
        }),
        ("a page of a block", |file, _| {
            file.write_all_at(&[0; 4096], 4096).unwrap();
        }),
        ("no last sector", |file, length| {
            file.write_all_at(&[0; 512], length - 512).unwrap();
        }),
    ]
}

fn tear(path: &Path, tear: Tear) {
    unseal(path);
    let file = fs::File::options().write(true).open(path).unwrap();
    tear(&file, file.metadata().unwrap().len());
}

/// Two checkpoints; the path of the newest, and how long it is.
fn two() -> (Bed, PathBuf, u64) {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let mut pending = writer.begin(TurnNo(2)).unwrap();
    fill(&mut pending);
    fs::write(pending.image_dir().join("pages-1.img"), noise(7, 40_000)).unwrap();
    commit(pending, Part::Whole);
    let path = writer.pack_path(TurnNo(2));
    assert_eq!(mode(&path), 0o400);
    let length = fs::metadata(&path).unwrap().len();
    (bed, path, length)
}

#[test]
fn what_was_never_complete_is_not_there_and_its_number_is_free() {
    let (_, _, length) = two();
    for (what, how) in tears(length) {
        let (bed, path, _) = two();
        tear(&path, how);
        let reader = bed.store.sandbox(&bed.id);
        assert_eq!(numbers(reader.turns().unwrap()), [1], "{what}");
        assert_eq!(reader.latest().unwrap().unwrap().turn(), TurnNo(1));
        assert_eq!(reader.verify_packs().unwrap(), [], "{what}");
        assert_eq!(reader.verify(TurnNo(1)).unwrap(), [], "{what}");
        assert!(path.exists(), "a reader removes nothing");
        let writer = bed.writer();
        assert!(!path.exists(), "{what}");
        bed.checkpoint(&writer, 2);
        assert_eq!(writer.verify(TurnNo(2)).unwrap(), []);
    }
}

#[test]
fn what_is_whole_counts_also_before_it_is_sealed() {
    let (bed, path, _) = two();
    unseal(&path);
    let reader = bed.store.sandbox(&bed.id);
    assert_eq!(numbers(reader.turns().unwrap()), [1, 2]);
    assert_eq!(mode(&path), 0o600);
    let writer = bed.writer();
    assert_eq!(mode(&path), 0o400, "the next writer seals it");
    assert_eq!(writer.verify(TurnNo(2)).unwrap(), []);
}

#[test]
fn damage_is_no_power_loss() {
    let (_, _, length) = two();
    for (what, how) in tears(length) {
        // Sealed.
        let (bed, path, _) = two();
        tear(&path, how);
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        still_there_and_damaged(&bed, what);
        // Known to the journal.
        let (bed, path, _) = two();
        let writer = bed.writer();
        writer.append(&line(2), Sync::Later).unwrap();
        writer.append(&line(3), Sync::Later).unwrap();
        drop(writer);
        tear(&path, how);
        still_there_and_damaged(&bed, what);
        // Not the newest: it was complete when the next one was begun.
        let (bed, path, _) = two();
        bed.checkpoint(&bed.writer(), 3);
        tear(&path, how);
        still_there_and_damaged(&bed, what);
    }
}

fn still_there_and_damaged(bed: &Bed, what: &str) {
    for _ in 0..2 {
        let reader = bed.store.sandbox(&bed.id);
        assert!(reader.turns().unwrap().contains(&TurnNo(2)), "{what}");
        let faults = reader.verify_packs().unwrap();
        let named = |fault: &Fault| fault.path == "packs/2.pack";
        assert!(faults.iter().any(named), "{what}: {faults:?}");
        // The next writer leaves it as it is, too.
        drop(bed.writer());
    }
}

#[test]
fn a_turn_whose_journal_tells_of_no_checkpoint_proves_nothing() {
    let (bed, path, _) = two();
    let failed = JournalLine {
        durable_us: None,
        ..line(2)
    };
    bed.writer().append(&failed, Sync::Later).unwrap();
    tear(&path, |file, length| file.set_len(length / 2).unwrap());
    assert_eq!(numbers(bed.store.sandbox(&bed.id).turns().unwrap()), [1]);
}

#[test]
fn what_cannot_be_made_durable_has_no_name() {
    let (bed, ..) = two();
    let writer = bed.writer();
    let path = writer.pack_path(TurnNo(3));
    let mut pack = PackWriter::create(&path).unwrap().finish(None).unwrap();
    // Nobody can sync a pipe.
    let (pipe, _other) = std::io::pipe().unwrap();
    pack.file = OwnedFd::from(pipe).into();
    let error = seal::commit(&pack, &path).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("fdatasync") && text.contains("3.pack"),
        "{text}"
    );
    assert!(!path.exists());
    assert_eq!(numbers(writer.turns().unwrap()), [1, 2]);
}

#[test]
fn what_is_no_file_is_left_to_whoever_needs_it() {
    let (bed, path, _) = two();
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    settle(&bed.store.sandbox(&bed.id).packs_dir()).unwrap();
    assert!(bed.store.sandbox(&bed.id).latest().is_err());
    assert!(path.is_dir());
}
