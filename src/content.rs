//! What names the content of a file: a tree of digests over chunks of one size.
//!
//! What is all zeros has the digest of zeros at every level, be it a hole or written. The shape follows
//! from the size alone, so equal contents have equal digests, whoever reads them: the index of a
//! writable layer to compare with, the store to keep.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::{
    digest::Digest,
    tree::{Found, ShownPath, TreeError, next_data, wide},
};

/// The kinds of objects that contents are made of, part of each one's digest: a piece of a file.
pub(crate) const CHUNK: u8 = 1;
/// Digests of chunks, or of such lists.
pub(crate) const LIST: u8 = 2;
/// A file's chunks. One of 64 KiB costs 32 bytes of list; a byte that changes costs 64 KiB before
/// compression.
pub(crate) const FILE_CHUNK: u32 = 64 << 10;
/// How many digests a list has.
pub(crate) const FANOUT: usize = 256;
/// Files are read in pieces of this size.
const PIECE: usize = 256 << 10;

static ZEROS: [u8; FILE_CHUNK as usize] = [0; FILE_CHUNK as usize];

/// A file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Content {
    /// In bytes.
    pub size: u64,
    /// Of these, how many are in chunks that are not all zeros.
    pub data: u64,
    /// Of its chunk or list. All zeros if there is nothing but zeros in it.
    pub root: Digest,
}

impl Content {
    /// No bytes.
    pub(crate) const EMPTY: Self = Self {
        size: 0,
        data: 0,
        root: Digest::ZEROS,
    };
}

/// How many chunks a size takes.
pub(crate) fn chunks(size: u64, chunk: u32) -> u64 {
    size.div_ceil(chunk.into())
}

/// How many levels of lists stand above so many chunks.
pub(crate) fn height(chunks: u64) -> u32 {
    let mut height = 0;
    let mut reach = 1u64;
    while reach < chunks {
        reach = reach.saturating_mul(FANOUT as u64);
        height += 1;
    }
    height
}

/// How many chunks a list of this level spans, at most; level 0 is a chunk.
pub(crate) fn span(level: u32) -> u64 {
    (FANOUT as u64).saturating_pow(level)
}

/// Where the parts of a content go, and what names them.
pub(crate) trait Sink {
    type Error: From<TreeError>;

    /// A chunk that is not all zeros. They come in order.
    fn chunk(&mut self, number: u64, bytes: &[u8]) -> Result<Digest, Self::Error>;

    /// A list of digests that is not all zeros.
    fn list(&mut self, bytes: &[u8]) -> Result<Digest, Self::Error>;
}

/// Names the parts of a content and keeps none.
struct Summing;

impl Sink for Summing {
    type Error = TreeError;

    fn chunk(&mut self, _: u64, bytes: &[u8]) -> Result<Digest, TreeError> {
        Ok(Digest::of_object(CHUNK, bytes))
    }

    fn list(&mut self, bytes: &[u8]) -> Result<Digest, TreeError> {
        Ok(Digest::of_object(LIST, bytes))
    }
}

/// The content of a regular file, cut as files are in the store.
pub(crate) fn content_of(
    found: &Found<'_>,
    buffer: &mut Vec<u8>,
    stop: &dyn Fn() -> bool,
) -> Result<Content, TreeError> {
    Reader::new(buffer, stop).read(found, FILE_CHUNK, &mut Summing)
}

/// The content of a file that is in memory.
pub(crate) fn content_of_bytes<S: Sink>(
    bytes: &[u8],
    chunk: u32,
    sink: &mut S,
) -> Result<Content, S::Error> {
    let mut building = Building::default();
    for (number, bytes) in (0..).zip(bytes.chunks(chunk as usize)) {
        building.add(number, bytes, sink)?;
    }
    building.finish(bytes.len() as u64, chunk, sink)
}

/// Reads regular files.
pub(crate) struct Reader<'s> {
    buffer: &'s mut Vec<u8>,
    /// Asked before each piece.
    stop: &'s dyn Fn() -> bool,
}

impl<'s> Reader<'s> {
    /// `buffer`: anything; it is made as large as need be, which for small files is not much: each new
    /// page of memory costs as much as a read of it.
    pub(crate) fn new(buffer: &'s mut Vec<u8>, stop: &'s dyn Fn() -> bool) -> Self {
        Self { buffer, stop }
    }

    /// The content of a regular file as it was looked at; an error if it is shorter now.
    pub(crate) fn read<S: Sink>(
        &mut self,
        found: &Found<'_>,
        chunk: u32,
        sink: &mut S,
    ) -> Result<Content, S::Error> {
        let size = found.stat.st_size.unsigned_abs();
        if size == 0 {
            return Ok(Content::EMPTY);
        }
        let file = found.open_file()?;
        let mut building = Building::default();
        let mut at = 0;
        while at < size {
            let Some((start, end)) = stretch(found, &file, at)? else {
                break;
            };
            let from = start - start % u64::from(chunk);
            let end = end.next_multiple_of(chunk.into()).min(size);
            self.stretch(found, &file, (from, end), chunk, &mut building, sink)?;
            at = end;
        }
        building.finish(size, chunk, sink)
    }

    fn stretch<S: Sink>(
        &mut self,
        found: &Found<'_>,
        file: &OwnedFd,
        (mut from, end): (u64, u64),
        chunk: u32,
        building: &mut Building,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        while from < end {
            if (self.stop)() {
                let path = ShownPath::new(found.path);
                return Err(TreeError::Stopped { path }.into());
            }
            let wanted = usize::try_from(end - from).unwrap_or(PIECE).min(PIECE);
            if self.buffer.len() < wanted {
                self.buffer.resize(wanted, 0);
            }
            let piece = &mut self.buffer[..wanted];
            fill(file, piece, from).map_err(|e| match e {
                Errno::NODATA => found.changed("size"),
                e => found.err("read")(e),
            })?;
            for bytes in piece.chunks(chunk as usize) {
                building.add(from / u64::from(chunk), bytes, sink)?;
                from += bytes.len() as u64;
            }
        }
        Ok(())
    }
}

/// The next stretch that may hold data. In a file without holes that is the rest: to ask where they
/// are would cost more than to read it.
fn stretch(found: &Found<'_>, file: &OwnedFd, at: u64) -> Result<Option<(u64, u64)>, TreeError> {
    let size = found.stat.st_size.unsigned_abs();
    let is_dense = wide(found.stat.st_blocks.unsigned_abs()).saturating_mul(512) >= size;
    match is_dense {
        true => Ok(Some((at, size))),
        false => next_data(file, at, size).map_err(found.err("seek in")),
    }
}

/// Reads all of a buffer; `NODATA` if the file is shorter.
pub(crate) fn fill(file: &OwnedFd, mut buffer: &mut [u8], mut at: u64) -> Result<(), Errno> {
    while !buffer.is_empty() {
        let n = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, at))?;
        if n == 0 {
            return Err(Errno::NODATA);
        }
        buffer = &mut buffer[n..];
        at += n as u64;
    }
    Ok(())
}

/// A content whose chunks come in order.
#[derive(Default)]
pub(crate) struct Building {
    lists: Lists,
    data: u64,
    /// The chunk after the last one that came.
    next: u64,
}

impl Building {
    /// A chunk. Those that are zeros may be left out.
    pub(crate) fn add<S: Sink>(
        &mut self,
        number: u64,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<(), S::Error> {
        // Two stretches of data may be in one chunk, which then came with the first.
        if *bytes == ZEROS[..bytes.len()] || number < self.next {
            return Ok(());
        }
        self.lists.push_zeros(sink, number - self.next)?;
        let digest = sink.chunk(number, bytes)?;
        self.lists.push(sink, digest)?;
        self.data += bytes.len() as u64;
        self.next = number + 1;
        Ok(())
    }

    /// A chunk of so many bytes that whoever keeps them has already.
    pub(crate) fn add_known<S: Sink>(
        &mut self,
        number: u64,
        digest: Digest,
        bytes: u64,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        if digest == Digest::ZEROS || number < self.next {
            return Ok(());
        }
        self.lists.push_zeros(sink, number - self.next)?;
        self.lists.push(sink, digest)?;
        self.data += bytes;
        self.next = number + 1;
        Ok(())
    }

    /// That of a file of so many bytes: chunks that did not come are zeros.
    pub(crate) fn finish<S: Sink>(
        mut self,
        size: u64,
        chunk: u32,
        sink: &mut S,
    ) -> Result<Content, S::Error> {
        self.lists
            .push_zeros(sink, chunks(size, chunk) - self.next)?;
        Ok(Content {
            size,
            data: self.data,
            root: self.lists.finish(sink)?,
        })
    }
}

/// The lists above chunks that come in order.
#[derive(Default)]
struct Lists {
    levels: Vec<Vec<Digest>>,
    chunks: u64,
}

impl Lists {
    fn push<S: Sink>(&mut self, sink: &mut S, digest: Digest) -> Result<(), S::Error> {
        self.chunks += 1;
        self.push_at(sink, 0, digest)
    }

    /// So many chunks of zeros, in steps as large as the shape allows.
    fn push_zeros<S: Sink>(&mut self, sink: &mut S, mut count: u64) -> Result<(), S::Error> {
        self.chunks += count;
        while count > 0 {
            let mut level = 0;
            let empty = |level: u32| self.levels.get(level as usize).is_none_or(Vec::is_empty);
            while empty(level) && span(level + 1) <= count {
                level += 1;
            }
            self.push_at(sink, level as usize, Digest::ZEROS)?;
            count -= span(level);
        }
        Ok(())
    }

    fn push_at<S: Sink>(
        &mut self,
        sink: &mut S,
        mut level: usize,
        mut digest: Digest,
    ) -> Result<(), S::Error> {
        loop {
            if self.levels.len() <= level {
                self.levels.resize_with(level + 1, Vec::new);
            }
            let list = &mut self.levels[level];
            list.push(digest);
            if list.len() < FANOUT {
                return Ok(());
            }
            digest = close(sink, list)?;
            level += 1;
        }
    }

    /// The digest that stands for all of them.
    fn finish<S: Sink>(mut self, sink: &mut S) -> Result<Digest, S::Error> {
        let height = height(self.chunks) as usize;
        for level in 0..height {
            let list = match self.levels.get_mut(level) {
                Some(list) if !list.is_empty() => list,
                _ => continue,
            };
            let digest = close(sink, list)?;
            self.push_at(sink, level + 1, digest)?;
        }
        let top = self.levels.get(height).and_then(|list| list.first());
        Ok(top.copied().unwrap_or(Digest::ZEROS))
    }
}

fn close<S: Sink>(sink: &mut S, list: &mut Vec<Digest>) -> Result<Digest, S::Error> {
    let digest = match list.iter().all(|digest| *digest == Digest::ZEROS) {
        true => Digest::ZEROS,
        false => {
            let bytes: Vec<u8> = list.iter().flat_map(|digest| *digest.bytes()).collect();
            sink.list(&bytes)?
        }
    };
    list.clear();
    Ok(digest)
}

/// A content in memory; what is in no piece is zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Data {
    /// In bytes.
    pub size: u64,
    /// Where each piece begins, and its bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
}
