//! The words that members share: a header, the bucket, a status for each slot, a record for each.
//!
//! Each word but the bucket has one writer, the slot's member (and whoever finds that member dead, or
//! passes it, by compare-and-swap of its status). A record is written before the status that announces
//! it. Whatever a reader finds must make sense to it: nothing here is trusted.

use std::{
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

use super::{bucket::Bucket, mapping::Mapping, status::Status};

/// Slots of a host.
pub const SLOTS: u32 = 4096;
/// "crab-eng", little endian.
pub(super) const MAGIC: u64 = 0x676e_652d_6261_7263;
/// Of the format: part of the file's name, too, so that two of them never mix.
pub const VERSION: u32 = 1;

/// A page for what there is once.
const HEADER: usize = 512;
const BUCKET: usize = 8;
/// Words of a record: four cache lines.
const RECORD: usize = 32;
/// The last of them hold the member's name.
const NAME: usize = 16;
/// How long a name may be; longer ones are cut.
pub(super) const NAME_BYTES: usize = (RECORD - NAME) * 8;

/// A number in a slot's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    /// Bytes that it asks for, and, once granted, that it has been charged.
    Tokens = 0,
    /// Bytes that it captures, or has captured.
    Staged = 1,
    /// Microseconds for which its present phase counts.
    Lease = 2,
    Pid = 4,
    /// Its own limits.
    Rate = 5,
    Burst = 6,
    Dumps = 7,
    Undrained = 8,
    /// Counted over all members that the slot has had.
    Grants = 9,
    Granted = 10,
    Written = 11,
    WaitedMicros = 12,
    /// Grants without tokens, after a wait that was too long.
    Forced = 13,
}
/// Its first half is what the member sleeps on.
const BELL: usize = 3;

enum Words {
    Heap(Box<[AtomicU64]>),
    Mapped(Mapping),
}

/// The words, wherever they lie.
pub struct Table {
    words: Words,
    slots: u32,
}

impl Table {
    /// Bytes of a table in a file.
    pub(super) const BYTES: usize = words(SLOTS) * 8;

    /// One that no other process sees.
    pub fn on_heap(slots: u32) -> Self {
        let zeroes = std::iter::repeat_with(|| AtomicU64::new(0));
        Self {
            words: Words::Heap(zeroes.take(words(slots)).collect()),
            slots,
        }
    }

    /// One in a file of [`Table::BYTES`].
    pub(super) fn mapped(mapping: Mapping) -> Self {
        Self {
            words: Words::Mapped(mapping),
            slots: SLOTS,
        }
    }

    /// How many members there may be.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The first words of the file, which say what it is.
    pub(super) fn header(boot: u128) -> [u64; 4] {
        let what = u64::from(VERSION) << 32 | u64::from(SLOTS);
        [MAGIC, what, boot as u64, (boot >> 64) as u64]
    }

    /// Whether the file says that it is what we take it for.
    pub(super) fn has_header(&self, boot: u128) -> bool {
        let wanted = Self::header(boot);
        let mut found = wanted.iter().zip(self.words());
        found.all(|(wanted, found)| found.load(SeqCst) == *wanted)
    }

    /// The bucket.
    pub fn bucket(&self) -> Bucket {
        Bucket::from_word(self.words()[BUCKET].load(SeqCst))
    }

    /// Changes the bucket, if nobody else has since it was read.
    pub fn swap_bucket(&self, from: Bucket, to: Bucket) -> bool {
        self.words()[BUCKET]
            .compare_exchange(from.word(), to.word(), SeqCst, SeqCst)
            .is_ok()
    }

    /// What a slot's member does.
    pub fn status(&self, slot: u32) -> Status {
        Status::from_word(self.statuses()[slot as usize].load(SeqCst))
    }

    /// Every slot whose member does something.
    pub(super) fn busy(&self) -> impl Iterator<Item = (u32, Status)> {
        self.statuses()
            .iter()
            .zip(0..)
            .map(|(word, slot)| (slot, word.load(SeqCst)))
            .filter(|(_, word)| *word != 0)
            .map(|(slot, word)| (slot, Status::from_word(word)))
    }

    /// Says what a slot's member does; for itself alone.
    pub(super) fn set_status(&self, slot: u32, status: Status) {
        self.statuses()[slot as usize].store(status.word(), SeqCst);
    }

    /// Changes it, if it is what it is taken for.
    pub(super) fn swap_status(&self, slot: u32, from: Status, to: Status) -> bool {
        self.statuses()[slot as usize]
            .compare_exchange(from.word(), to.word(), SeqCst, SeqCst)
            .is_ok()
    }

    pub(super) fn get(&self, slot: u32, field: Field) -> u64 {
        self.record(slot)[field as usize].load(SeqCst)
    }

    pub(super) fn set(&self, slot: u32, field: Field, value: u64) {
        self.record(slot)[field as usize].store(value, SeqCst);
    }

    /// Of a counter; there is but one writer.
    pub(super) fn add(&self, slot: u32, field: Field, more: u64) {
        self.set(slot, field, self.get(slot, field).wrapping_add(more));
    }

    pub(super) fn set_name(&self, slot: u32, name: &str) {
        let mut bytes = [0; NAME_BYTES];
        for (to, from) in bytes.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        let chunks = bytes.as_chunks::<8>().0;
        for (word, chunk) in self.record(slot)[NAME..].iter().zip(chunks) {
            word.store(u64::from_le_bytes(*chunk), SeqCst);
        }
    }

    pub(super) fn name(&self, slot: u32) -> String {
        let words = &self.record(slot)[NAME..];
        let bytes: Vec<u8> = words
            .iter()
            .flat_map(|word| word.load(SeqCst).to_le_bytes())
            .take_while(|byte| *byte != 0)
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What a slot's member sleeps on.
    pub(super) fn bell(&self, slot: u32) -> &AtomicU32 {
        let word = NonNull::from(&self.record(slot)[BELL]).cast::<u32>();
        // SAFETY: half of a word that lives as long as self, is aligned for it, and is never used as
        // a whole.
        unsafe { AtomicU32::from_ptr(word.as_ptr()) }
    }

    fn statuses(&self) -> &[AtomicU64] {
        &self.words()[HEADER..][..self.slots as usize]
    }

    fn record(&self, slot: u32) -> &[AtomicU64] {
        let first = HEADER + self.slots as usize + slot as usize * RECORD;
        &self.words()[first..][..RECORD]
    }

    fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Heap(words) => words,
            Words::Mapped(mapping) => mapping.words(),
        }
    }
}

const fn words(slots: u32) -> usize {
    HEADER + slots as usize * (1 + RECORD)
}
