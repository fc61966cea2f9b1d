//! What is remembered of packs holds as long as they are what they were.

use super::{fixture::*, *};
use crate::store::pack::Pack;

/// A checkpoint of a file of its own, and one that all have.
fn take(writer: &SandboxWriter, turn: u64, seed: u64) -> Checkpoint {
    let pending = writer.begin(TurnNo(turn)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    fs::write(pending.upper_dir().join("file"), noise(seed, 3000)).unwrap();
    fs::write(pending.upper_dir().join("same"), "same").unwrap();
    commit(pending, Part::Whole)
}

/// One byte of the trailer is another one.
fn break_pack(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - 20;
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn numbers_of(shelved: &std::collections::HashMap<PathBuf, Pack>) -> Vec<&str> {
    let names = shelved.keys().filter_map(|path| path.file_name()?.to_str());
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    names
}

#[test]
fn the_packs_of_a_commit_are_known_to_the_next_one() {
    let bed = bed();
    let writer = bed.writer();
    take(&writer, 1, 1);
    take(&writer, 2, 2);
    take(&writer, 3, 3);
    // The one that was just written is opened by the next.
    let shelf = &writer.guard().shelf;
    let shelved = shelf.take();
    assert_eq!(numbers_of(&shelved), ["1.pack", "2.pack"]);
    assert!(shelved.values().all(Pack::is_fresh));
    shelf.put(shelved.into_values());
    // One that is there under another name now is another one.
    writer.retain(&Retention::newest(2)).unwrap();
    take(&writer, 4, 1);
    assert_eq!(numbers_of(&shelf.take()), ["1.kept", "2.pack", "3.pack"]);
    assert_eq!(writer.verify(TurnNo(4)).unwrap(), []);
}

#[test]
fn a_pack_that_is_broken_meanwhile_is_not_built_upon() {
    let bed = bed();
    let writer = bed.writer();
    take(&writer, 1, 1);
    take(&writer, 2, 2);
    break_pack(&writer.pack_path(TurnNo(1)));
    // The bytes that the first one held.
    take(&writer, 3, 1);
    assert_ne!(writer.verify(TurnNo(1)).ok(), Some(Vec::new()));
    assert_eq!(writer.verify(TurnNo(3)).unwrap(), []);
}

#[test]
fn the_newest_checkpoint_is_read_again_once_its_file_is_another() {
    let bed = bed();
    let writer = bed.writer();
    let made = take(&writer, 1, 1);
    assert_eq!(writer.current(TurnNo(1)).unwrap().manifest, made.manifest);
    // Also one that is not the last, and then it is.
    take(&writer, 2, 2);
    for turn in [1, 1, 2, 2] {
        assert_eq!(writer.current(TurnNo(turn)).unwrap().turn(), TurnNo(turn));
    }
    break_pack(&writer.pack_path(TurnNo(2)));
    writer.current(TurnNo(2)).unwrap_err();
    fs::remove_file(writer.pack_path(TurnNo(2))).unwrap();
    let gone = writer.current(TurnNo(2)).unwrap_err();
    assert!(matches!(gone, StoreError::NoTurn { .. }), "{gone}");
}

#[test]
fn what_is_remembered_takes_little_memory() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    for number in 0..1600u32 {
        let path = pending.upper_dir().join(number.to_string());
        fs::write(path, number.to_le_bytes()).unwrap();
    }
    commit(pending, Part::Whole);
    // Its index is read as a whole, for all that it has.
    let pending = writer.begin(TurnNo(2)).unwrap();
    fs::create_dir(pending.upper_dir()).unwrap();
    for number in 0..1600u32 {
        let path = pending.upper_dir().join(format!("{number} again"));
        fs::write(path, number.to_le_bytes()).unwrap();
    }
    commit(pending, Part::Whole);
    assert_eq!(numbers_of(&writer.guard().shelf.take()), [""; 0]);
}
