//! Compressing blocks, on several processors where there is much to compress.

use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    thread::{self, JoinHandle},
};

use parking_lot::{Condvar, Mutex};
use zstd::bulk::Compressor;

use super::format::Block;

/// Of zstd: memory changes between two checkpoints faster than a better level would pay.
const LEVEL: i32 = 1;
/// To begin a thread pays from so many bytes for it on.
const SHARE: usize = 1 << 20;
/// No more threads than this, ours included: a host has other work.
const MOST: usize = 4;

/// A block as it is written.
pub(super) struct Squeezed {
    /// None if it would be no smaller: it is kept as it is.
    compressed: Option<Vec<u8>>,
    /// The checksum of what is written.
    pub(super) check: [u8; 16],
}

impl Squeezed {
    /// What is written for a block of these bytes.
    pub(super) fn or<'a>(&'a self, raw: &'a [u8]) -> &'a [u8] {
        self.compressed.as_deref().unwrap_or(raw)
    }
}

/// Blocks that wait, and those that are done.
#[derive(Default)]
struct Work {
    waiting: VecDeque<(usize, Arc<Vec<u8>>)>,
    /// By number; None until it is done.
    done: Vec<Option<io::Result<Squeezed>>>,
    /// No more will come.
    is_over: bool,
}

#[derive(Default)]
struct Queue {
    work: Mutex<Work>,
    changed: Condvar,
}

impl Queue {
    /// Does what waits. `to_its_end`: and what still comes, until no more will.
    fn work(&self, compressor: &mut Compressor<'_>, to_its_end: bool) {
        let mut work = self.work.lock();
        loop {
            if let Some((number, raw)) = work.waiting.pop_front() {
                drop(work);
                let squeezed = squeeze(compressor, &raw);
                work = self.work.lock();
                if let Some(done) = work.done.get_mut(number) {
                    *done = Some(squeezed);
                }
            } else if to_its_end && !work.is_over {
                self.changed.wait(&mut work);
            } else {
                return;
            }
        }
    }

    fn end(&self) {
        self.work.lock().is_over = true;
        self.changed.notify_all();
    }
}

fn squeeze(compressor: &mut Compressor<'_>, raw: &[u8]) -> io::Result<Squeezed> {
    let compressed = Some(compressor.compress(raw)?);
    let compressed = compressed.filter(|compressed| compressed.len() < raw.len());
    let check = Block::check_of(compressed.as_deref().unwrap_or(raw));
    Ok(Squeezed { compressed, check })
}

/// Compresses blocks in the order in which they were added, when [`Squeezer::finish`] is called, or
/// before.
pub(super) struct Squeezer {
    compressor: Compressor<'static>,
    queue: Arc<Queue>,
    helpers: Vec<JoinHandle<()>>,
    /// How many may work, with whoever calls.
    most: usize,
    /// Bytes that were added.
    bytes: usize,
    is_early: bool,
}

impl Squeezer {
    pub(super) fn new() -> io::Result<Self> {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self::of(processors.min(MOST))
    }

    fn of(most: usize) -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(LEVEL)?,
            queue: Arc::default(),
            helpers: Vec::new(),
            most,
            bytes: 0,
            is_early: false,
        })
    }

    /// Whether what is added from now on may be compressed at once, beside whoever adds it. Returns how it
    /// was before.
    pub(super) fn be_early(&mut self, is_early: bool) -> bool {
        std::mem::replace(&mut self.is_early, is_early)
    }

    /// How many bytes were added since the last [`Squeezer::finish`].
    pub(super) fn waiting(&self) -> usize {
        self.bytes
    }

    /// Adds a block.
    pub(super) fn add(&mut self, raw: Arc<Vec<u8>>) {
        self.bytes += raw.len();
        {
            let mut work = self.queue.work.lock();
            let number = work.done.len();
            work.done.push(None);
            work.waiting.push_back((number, raw));
        }
        self.queue.changed.notify_one();
        if self.is_early {
            self.get_help();
        }
    }

    /// Begins as many threads as pay. One that cannot begin, or has no memory, leaves its share to the others.
    fn get_help(&mut self) {
        let wanted = (self.bytes / SHARE).min(self.most.saturating_sub(1));
        while self.helpers.len() < wanted {
            let queue = self.queue.clone();
            let help = move || {
                if let Ok(mut compressor) = Compressor::new(LEVEL) {
                    queue.work(&mut compressor, true);
                }
            };
            match thread::Builder::new().name("squeeze".into()).spawn(help) {
                Ok(helper) => self.helpers.push(helper),
                Err(_) => return,
            }
        }
    }

    /// Each block that was added since the last time, in this order.
    pub(super) fn finish(&mut self) -> io::Result<Vec<Squeezed>> {
        self.get_help();
        self.queue.end();
        self.queue.work(&mut self.compressor, false);
        self.dismiss();
        self.bytes = 0;
        let done = std::mem::take(&mut *self.queue.work.lock()).done;
        let missing = || Err(io::Error::other("a block was left out"));
        done.into_iter()
            .map(|done| done.unwrap_or_else(missing))
            .collect()
    }

    /// Compresses something else.
    pub(super) fn bytes(&mut self, raw: &[u8]) -> io::Result<Vec<u8>> {
        self.compressor.compress(raw)
    }

    /// Waits until nobody else works.
    fn dismiss(&mut self) {
        for helper in self.helpers.drain(..) {
            // Of one that has panicked a block is missing, which is an error.
            let _ = helper.join();
        }
    }
}

impl Drop for Squeezer {
    fn drop(&mut self) {
        self.queue.work.lock().waiting.clear();
        self.queue.end();
        self.dismiss();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOISE: usize = 80_000;

    /// Blocks that compress well, badly and not at all; more than three threads pay for.
    fn blocks() -> Vec<Vec<u8>> {
        let noise = |seed: u32, length: usize| {
            let mut state = seed | 1;
            let mut next = move || {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as u8
            };
            (0..length).map(|_| next()).collect::<Vec<u8>>()
        };
        (0..100u32)
            .map(|number| match number % 3 {
                0 => vec![number as u8; 1000 + number as usize],
                1 => noise(number, NOISE),
                _ => noise(number, 100).repeat(500 + number as usize),
            })
            .collect()
    }

    fn squeezed(blocks: &[Arc<Vec<u8>>], most: usize, is_early: bool) -> Vec<Squeezed> {
        let mut squeezer = Squeezer::of(most).unwrap();
        squeezer.be_early(is_early);
        // What was compressed before has nothing to do with it.
        squeezer.add(Arc::new(vec![1; 10]));
        assert_eq!(squeezer.finish().unwrap().len(), 1);
        for block in blocks {
            squeezer.add(block.clone());
        }
        assert_eq!(squeezer.helpers.len(), if is_early { most - 1 } else { 0 });
        let done = squeezer.finish().unwrap();
        assert_eq!((squeezer.helpers.len(), squeezer.waiting()), (0, 0));
        done
    }

    #[test]
    fn every_block_is_its_own_in_order_whoever_works_at_them_and_when() {
        let blocks: Vec<_> = blocks().into_iter().map(Arc::new).collect();
        let alone = squeezed(&blocks, 1, false);
        for (most, is_early) in [(1, true), (2, false), (2, true), (4, false), (4, true)] {
            let shared = squeezed(&blocks, most, is_early);
            assert_eq!(shared.len(), blocks.len());
            for ((raw, alone), shared) in blocks.iter().zip(&alone).zip(&shared) {
                assert_eq!(alone.or(raw), shared.or(raw));
                assert_eq!(alone.check, shared.check);
            }
        }
        for (raw, alone) in blocks.iter().zip(&alone) {
            assert_eq!(alone.check, Block::check_of(alone.or(raw)));
            match &alone.compressed {
                Some(bytes) => {
                    assert!(bytes.len() < raw.len());
                    assert_eq!(zstd::bulk::decompress(bytes, raw.len()).unwrap(), **raw);
                }
                None => assert_eq!(raw.len(), NOISE),
            }
        }
    }

    #[test]
    fn whoever_gives_up_waits_for_no_block_but_those_that_are_begun() {
        let mut squeezer = Squeezer::of(2).unwrap();
        squeezer.be_early(true);
        for block in blocks() {
            squeezer.add(Arc::new(block));
        }
        let queue = squeezer.queue.clone();
        drop(squeezer);
        // Nobody else has it any more.
        assert_eq!(Arc::strong_count(&queue), 1);
        assert!(queue.work.lock().waiting.is_empty());
    }
}
