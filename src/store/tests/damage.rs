//! Bytes that are not what they were, and bytes that never were a store.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::{fixture::*, *};
use crate::store::{
    codec::Input,
    entry::{decode_leaf, decode_node, decode_root},
    manifest::Manifest,
    pack::Pack,
};

/// Three checkpoints that share things, and a pack of one that is gone.
fn store() -> (Bed, SandboxWriter) {
    let bed = bed();
    let writer = bed.writer();
    for turn in 1..=4 {
        let mut pending = writer.begin(TurnNo(turn)).unwrap();
        let pages = [noise(1, 40_960), noise(turn, 8192)].concat();
        fs::write(pending.image_dir().join("pages-1.img"), pages).unwrap();
        pending.add_to_bundle("config.json", b"{}".to_vec());
        let upper = pending.upper_dir();
        fs::create_dir_all(upper.join("a/b")).unwrap();
        fs::write(upper.join("a/b/file"), noise(2, 70_000)).unwrap();
        fs::write(upper.join("text"), "word ".repeat(20_000)).unwrap();
        fs::write(upper.join("own"), noise(100 + turn, 3000)).unwrap();
        commit(pending, Part::Whole);
    }
    writer.retain(&Retention::newest(3)).unwrap();
    (bed, writer)
}

fn packs(store: &SandboxStore) -> Vec<PathBuf> {
    let names = objects::list(&store.packs_dir()).unwrap();
    names
        .iter()
        .map(|name| store.packs_dir().join(name.file()))
        .collect()
}

#[test]
fn every_byte_that_flips_is_named_and_refused() {
    let (_bed, writer) = store();
    let sound: BTreeSet<u64> = numbers(writer.turns().unwrap()).into_iter().collect();
    assert_eq!(sound.len(), 3);
    let packs = packs(&writer);
    let total: usize = packs.iter().map(|p| fs::read(p).unwrap().len()).sum();
    let (mut seed, mut lost) = (0u64, 0);
    for round in 0..200u64 {
        seed = u64::from_le_bytes(noise(round + 1, 8).try_into().unwrap());
        let mut at = seed as usize % total;
        let mut chosen = packs.iter().map(|path| (path, fs::read(path).unwrap()));
        let (path, whole) = chosen
            .find(|(_, bytes)| {
                let here = at < bytes.len();
                if !here {
                    at -= bytes.len();
                }
                here
            })
            .unwrap();
        let mut broken = whole.clone();
        broken[at] ^= 1 << (seed >> 60 & 7);
        fs::write(path, &broken).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let faults = writer.verify_packs().unwrap();
        assert!(
            faults.iter().any(|fault| fault.path.ends_with(name)),
            "byte {at} of {name}: {faults:?}"
        );
        // Whoever verifies clean is laid out as it was; whoever does not is refused.
        for turn in &sound {
            let clean = matches!(writer.verify(TurnNo(*turn)), Ok(faults) if faults.is_empty());
            let laid = lay_out(&writer, TurnNo(*turn), &writer.scratch_dir());
            assert_eq!(clean, laid.is_ok(), "byte {at} of {name}, turn {turn}");
            lost += usize::from(!clean);
            let left = files::all_names(&writer.scratch_dir()).unwrap();
            assert!(laid.is_ok() || left.is_empty(), "{left:?}");
        }
        fs::write(path, &whole).unwrap();
    }
    assert_ne!(seed, 0);
    assert!(lost > 200, "{lost} turns were lost");
}

#[test]
fn every_byte_of_a_checkpoint_alone_matters_to_it() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let path = writer.pack_path(TurnNo(1));
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut broken = whole.clone();
        broken[at] ^= 0x10;
        fs::write(&path, &broken).unwrap();
        let laid = lay_out(&writer, TurnNo(1), &writer.scratch_dir());
        assert!(laid.is_err(), "byte {at} of {}", whole.len());
    }
}

#[test]
fn a_pack_that_is_cut_short_is_refused() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let path = writer.pack_path(TurnNo(1));
    let whole = fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        fs::write(&path, &whole[..length]).unwrap();
        let error = writer.get(TurnNo(1)).unwrap_err();
        assert!(
            matches!(error, StoreError::Damaged { .. }),
            "{length}: {error}"
        );
        assert_ne!(writer.verify_packs().unwrap(), [], "{length}");
    }
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    writer.get(TurnNo(1)).unwrap_err();
}

#[test]
fn a_newer_pack_is_told_from_a_damaged_one() {
    let bed = bed();
    let writer = bed.writer();
    bed.checkpoint(&writer, 1);
    let path = writer.pack_path(TurnNo(1));
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 3;
    fs::write(&path, &bytes).unwrap();
    let newer = writer.get(TurnNo(1)).unwrap_err();
    assert!(
        matches!(newer, StoreError::Newer { found: 3, .. }),
        "{newer}"
    );
    assert!(newer.to_string().contains("use the newer one"), "{newer}");
}

#[test]
fn verify_names_the_files_that_are_lost() {
    let (_bed, writer) = store();
    // What turn 2 shares with all others lies in the pack of turn 1, which is gone.
    fs::remove_file(writer.packs_dir().join("1.kept")).unwrap();
    let faults = writer.verify(TurnNo(2)).unwrap();
    let named: Vec<_> = faults.iter().map(|fault| fault.path.as_str()).collect();
    for path in [
        "image/pages-1.img",
        "bundle/config.json",
        "upper/a/b/file",
        "upper/text",
    ] {
        assert!(named.contains(&path), "{path}: {named:?}");
    }
    assert!(!named.contains(&"upper/own"), "{named:?}");
    assert!(
        faults[0].reason.contains("no pack has object"),
        "{faults:?}"
    );
}

#[test]
fn a_damaged_pack_does_not_hinder_the_next_checkpoint() {
    let (_bed, writer) = store();
    for path in packs(&writer) {
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    }
    let mut pending = writer.begin(TurnNo(9)).unwrap();
    fill(&mut pending);
    commit(pending, Part::Whole);
    assert_eq!(writer.verify(TurnNo(9)).unwrap(), []);
}

/// Runs in a mount namespace of its own, with a file system of 1 MiB at the store; false without
/// the right to.
fn on_a_small_disk(run: impl FnOnce(&Bed) + Send) -> bool {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };
    let run = || {
        if let Err(e) = unshare(CloneFlags::CLONE_NEWNS) {
            eprintln!("skipped: no mount namespace: {e}");
            return false;
        }
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let options = Some("size=1M,mode=0700");
        mount(
            Some("small"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        let bed = Bed {
            store: Store::open(&dir.path().join("crab")).unwrap(),
            id: SandboxId::new("default", "box").unwrap(),
            dir: tempfile::tempdir().unwrap(),
        };
        run(&bed);
        drop(bed);
        nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
        true
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

#[test]
fn a_full_disk_fails_a_commit_and_a_read_only_one_can_be_read() {
    on_a_small_disk(|bed| {
        use nix::{
            errno::Errno,
            mount::{MsFlags, mount},
        };
        let writer = bed.writer();
        bed.checkpoint(&writer, 1);
        let outside = bed.dir.path().join("large");
        fs::write(&outside, noise(1, 2 << 20)).unwrap();
        let pending = writer.begin(TurnNo(2)).unwrap();
        fs::create_dir(pending.upper_dir()).unwrap();
        // Staged as much as fits, so that nothing is left for the pack.
        let _ = fs::copy(&outside, pending.upper_dir().join("large"));
        let error = try_commit(pending, Images::Staged, Part::Whole).unwrap_err();
        assert!(error.to_string().contains("No space left"), "{error}");
        assert_eq!(numbers(writer.turns().unwrap()), [1]);
        assert_eq!(writer.verify(TurnNo(1)).unwrap(), []);
        bed.checkpoint(&writer, 3);

        drop(writer);
        let none = None::<&str>;
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        let disk = bed.store.root.parent().unwrap();
        // Until no child that another test starts has what the writer had open.
        let until = Instant::now() + Duration::from_secs(30);
        while let Err(e) = mount(none, disk, none, flags, none) {
            assert!(e == Errno::EBUSY && Instant::now() < until, "{e}");
        }
        let error = bed.store.writer(&bed.id).unwrap_err();
        assert!(error.to_string().contains("Read-only"), "{error}");
        let reader = bed.store.sandbox(&bed.id);
        assert_eq!(reader.verify(TurnNo(3)).unwrap(), []);
    });
}

/// Bytes that look like a pack at first sight more often than chance would have it.
fn almost_a_pack() -> impl Strategy<Value = Vec<u8>> {
    let whole = {
        let bed = bed();
        let writer = bed.writer();
        bed.checkpoint(&writer, 1);
        fs::read(writer.pack_path(TurnNo(1))).unwrap()
    };
    let size = whole.len();
    let patch = (0..size, proptest::collection::vec(any::<u8>(), 1..9));
    (proptest::collection::vec(patch, 1..4), 0..size).prop_map(move |(patches, cut)| {
        let mut bytes = whole.clone();
        for (at, patch) in patches {
            for (byte, new) in bytes[at..].iter_mut().zip(patch) {
                *byte = new;
            }
        }
        if cut % 4 == 0 {
            bytes.remove(cut);
        }
        bytes
    })
}

fn read_everything(store: &SandboxStore) {
    let _ = store.get(TurnNo(1));
    let _ = store.verify(TurnNo(1));
    let _ = store.verify_packs();
    let _ = lay_out(store, TurnNo(1), &store.scratch_dir());
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let bed = bed();
        let path = bed.dir.path().join("file");
        fs::write(&path, &bytes).unwrap();
        let _ = crate::store::journal::read(&path);
        let _ = arm::armed(&path);
        let _ = Manifest::parse(&bytes, &path, &bed.id, TurnNo(1));
        let _ = Pack::open(&path);
        let _ = decode_leaf(&bytes);
        let _ = decode_node(&bytes);
        let _ = decode_root(&bytes);
        let mut input = Input(&bytes);
        let _ = (input.short(), input.digest(), input.u64(), input.end());
    }

    #[test]
    fn no_bytes_that_are_almost_a_pack_make_the_readers_panic(bytes in almost_a_pack()) {
        let bed = bed();
        let writer = bed.writer();
        fs::write(writer.pack_path(TurnNo(1)), &bytes).unwrap();
        read_everything(&writer);
    }

    #[test]
    fn entries_that_are_read_are_written_the_same(
        count in 1..3u16,
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let bytes = [&count.to_le_bytes()[..], &bytes].concat();
        if let Ok(entries) = decode_leaf(&bytes) {
            let mut again = u16::try_from(entries.len()).unwrap().to_le_bytes().to_vec();
            entries.iter().for_each(|entry| entry.encode(&mut again).unwrap());
            prop_assert_eq!(again, bytes);
        }
    }

    #[test]
    fn digests_and_hexadecimal_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
        prop_assert_eq!(crate::digest::unhex(&crate::digest::hex(&bytes)), Some(bytes.clone()));
        let digest = Digest::of(&bytes);
        prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    }
}
