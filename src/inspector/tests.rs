//! What needs no sandbox. How the programs, the shims and their deaths go together is tested in
//! `integration/inspector`.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};

use super::{
    abi::{self, InodeKey, Plain, SLOTS, Seen, epoch_bits},
    dirty::Dirty,
    epoch::{Epoch, FIRST_ROOM},
    host::put,
    probes::ProbeSet,
    slots::Slots,
};
use crate::slot_lock::SlotLock;

fn slots() -> (tempfile::TempDir, Slots) {
    let dir = tempfile::tempdir().unwrap();
    let slots = Slots::at(dir.path().join("slots"));
    (dir, slots)
}

fn claim(slots: &Slots) -> SlotLock {
    slots.claim().unwrap().unwrap()
}

#[test]
fn a_slot_is_one_owners_until_it_is_dropped() {
    let (_dir, slots) = slots();
    assert!(slots.all_free().unwrap());
    let (first, second) = (claim(&slots), claim(&slots));
    assert_eq!((first.number(), second.number()), (0, 1));
    assert!(!slots.is_free(0).unwrap() && !slots.is_free(1).unwrap());
    assert!(slots.is_free(2).unwrap());
    drop(first);
    assert!(slots.is_free(0).unwrap() && !slots.is_free(1).unwrap());
    assert!(!slots.all_free().unwrap());
    assert_eq!(claim(&slots).number(), 0, "the lowest that is free");
    drop(second);
    assert!(slots.all_free().unwrap());
}

#[test]
fn a_dropped_slot_is_free_even_while_a_child_has_its_descriptor() {
    let (_dir, slots) = slots();
    let slot = claim(&slots);
    let inherited = slot.file().try_clone().unwrap();
    drop(slot);
    assert!(slots.all_free().unwrap());
    drop(inherited);
}

#[test]
fn the_last_slot_is_given_and_then_none() {
    let (dir, slots) = slots();
    let others = File::create(dir.path().join("slots")).unwrap();
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: 0,
        l_len: (SLOTS - 1).into(),
        l_pid: 0,
    };
    fcntl(&others, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let last = claim(&slots);
    assert_eq!(last.number(), SLOTS - 1);
    assert!(slots.claim().unwrap().is_none());
    // Not by closing it: a child that another test is just starting has it, too, until its exec.
    let unlock = libc::flock {
        l_type: libc::F_UNLCK as _,
        ..lock
    };
    fcntl(&others, FcntlArg::F_OFD_SETLK(&unlock)).unwrap();
    assert_eq!(claim(&slots).number(), 0);
}

#[test]
fn the_file_of_slots_can_be_removed_twice_and_comes_back() {
    let (dir, slots) = slots();
    drop(claim(&slots));
    slots.remove().unwrap();
    slots.remove().unwrap();
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
    assert_eq!(claim(&slots).number(), 0);
}

/// The room of the epoch after one with this header.
fn room_after(room: u32, count: u32, bits: u32) -> u32 {
    let epoch = Epoch::new(room).unwrap();
    put(&epoch.map, &InodeKey::default(), &Seen { bits, count }).unwrap();
    epoch.next_room().unwrap()
}

#[test]
fn an_epoch_that_was_nearly_full_is_followed_by_a_larger_one() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let most = 256 << 10;
    let table = [
        // Room, inodes, bits, and the room of the next one.
        (FIRST_ROOM, 0, 0, FIRST_ROOM),
        (FIRST_ROOM, FIRST_ROOM / 2, 0, FIRST_ROOM),
        (FIRST_ROOM, FIRST_ROOM / 2 + 1, 0, 4 * FIRST_ROOM),
        // Whatever the count says.
        (FIRST_ROOM, 0, epoch_bits::OVERFLOW, 4 * FIRST_ROOM),
        (4 * FIRST_ROOM, FIRST_ROOM, 0, 4 * FIRST_ROOM),
        // It shrinks slowly, and not below the first.
        (4 * FIRST_ROOM, 0, 0, 2 * FIRST_ROOM),
        (4 * FIRST_ROOM, FIRST_ROOM / 4, 0, 4 * FIRST_ROOM),
        (most, most, epoch_bits::OVERFLOW, most),
    ];
    for (room, count, bits, next) in table {
        assert_eq!(
            room_after(room, count, bits),
            next,
            "{count} in {room}, {bits}"
        );
    }
}

#[test]
fn device_numbers_keep_all_their_bits() {
    for (major, minor) in [(0, 40), (8, 1), (259, 3), (0xfff, 0xf_ffff), (1, 0x1_0100)] {
        let shown = libc::makedev(major, minor);
        assert_eq!(abi::kernel_dev(shown), major << 20 | minor);
        assert_eq!(abi::user_dev(abi::kernel_dev(shown)), shown);
    }
}

#[test]
fn what_has_another_size_is_no_value() {
    let seen = Seen { bits: 3, count: 7 };
    assert_eq!(Seen::read(seen.bytes()), Some(seen));
    assert_eq!(Seen::read(&seen.bytes()[1..]), None);
    assert_eq!(Seen::read(&[0; 9]), None);
}

#[test]
fn a_program_is_of_one_kind() {
    for set in ProbeSet::ALL {
        let mut all = set.probes();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "{}", set.name());
        assert!(count > set.of_files().len());
        for name in all {
            assert!(!set.leaves_out(name), "{name}");
        }
    }
}

#[test]
fn a_set_is_known_by_its_mark_and_leaves_out_the_others() {
    for set in ProbeSet::ALL {
        assert!(set.of_files().contains(&set.mark()));
        for other in ProbeSet::ALL.into_iter().filter(|other| *other != set) {
            assert!(set.leaves_out(other.mark()));
        }
        // Those that are asked belong to all.
        for iterator in ["shared_mappings", "open_files", "registers"] {
            assert!(!set.leaves_out(iterator));
        }
    }
}

#[test]
fn an_inode_that_cannot_be_named_puts_all_in_doubt() {
    let mut dirty = Dirty::default();
    let mut key = InodeKey {
        ino: 7,
        ..InodeKey::default()
    };
    dirty.add(&key, 1);
    assert!(dirty.doubts.is_empty());
    key.strange = 1;
    dirty.add(&key, 1);
    dirty.add(&key, 1);
    assert_eq!(dirty.doubts.len(), 1);
}
