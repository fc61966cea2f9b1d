//! Contents of files: chunks of one size, named by lists of digests, and lists of lists.
//!
//! What is all zeros has the digest of zeros at every level and is not kept. The shape follows from
//! the size alone, so equal contents have equal digests.

use super::{
    Digest, StoreError,
    entry::{Content, kind},
    objects::Objects,
};

/// A file's chunks. One of 64 KiB costs 32 bytes of list; a byte that changes costs 64 KiB before
/// compression.
pub(super) const FILE_CHUNK: u32 = 64 << 10;
/// The chunks of memory: pages, since that is what changes, moves and repeats.
pub(super) const PAGE_CHUNK: u32 = 4 << 10;
/// How many digests a list has.
const FANOUT: usize = 256;

/// How many chunks a size takes.
pub(super) fn chunks(size: u64, chunk: u32) -> u64 {
    size.div_ceil(chunk.into())
}

/// How many levels of lists stand above so many chunks.
fn height(chunks: u64) -> u32 {
    let mut height = 0;
    let mut reach = 1u64;
    while reach < chunks {
        reach = reach.saturating_mul(FANOUT as u64);
        height += 1;
    }
    height
}

/// How many chunks a list of this level spans, at most; level 0 is a chunk.
fn span(level: u32) -> u64 {
    (FANOUT as u64).saturating_pow(level)
}

/// Where lists go that are complete.
pub(super) trait PutList {
    fn put_list(&mut self, bytes: &[u8]) -> Result<Digest, StoreError>;
}

/// Builds the lists above chunks that come in order.
#[derive(Default)]
pub(super) struct ListBuilder {
    levels: Vec<Vec<Digest>>,
    chunks: u64,
}

impl ListBuilder {
    pub(super) fn push(
        &mut self,
        sink: &mut impl PutList,
        digest: Digest,
    ) -> Result<(), StoreError> {
        self.chunks += 1;
        self.push_at(sink, 0, digest)
    }

    /// So many chunks of zeros, in steps as large as the shape allows.
    pub(super) fn push_zeros(
        &mut self,
        sink: &mut impl PutList,
        mut count: u64,
    ) -> Result<(), StoreError> {
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

    fn push_at(
        &mut self,
        sink: &mut impl PutList,
        mut level: usize,
        mut digest: Digest,
    ) -> Result<(), StoreError> {
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
    pub(super) fn finish(mut self, sink: &mut impl PutList) -> Result<Digest, StoreError> {
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

fn close(sink: &mut impl PutList, list: &mut Vec<Digest>) -> Result<Digest, StoreError> {
    let digest = match list.iter().all(|digest| *digest == Digest::ZEROS) {
        true => Digest::ZEROS,
        false => {
            let bytes: Vec<u8> = list.iter().flat_map(|digest| *digest.bytes()).collect();
            sink.put_list(&bytes)?
        }
    };
    list.clear();
    Ok(digest)
}

/// A content in the store, and how it is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) content: Content,
    pub(super) chunk: u32,
}

impl Cut {
    pub(super) fn file(content: Content) -> Self {
        Self {
            content,
            chunk: FILE_CHUNK,
        }
    }

    pub(super) fn chunks(&self) -> u64 {
        chunks(self.content.size, self.chunk)
    }

    /// How long a chunk is: the last one may be shorter.
    pub(super) fn chunk_size(&self, number: u64) -> u64 {
        let from = number.saturating_mul(self.chunk.into());
        let left = self.content.size.saturating_sub(from);
        left.min(self.chunk.into())
    }

    /// The digests of the part of a list's chunks, of which `first` is the first.
    fn list(
        &self,
        objects: &mut Objects,
        digest: &Digest,
        level: u32,
        first: u64,
    ) -> Result<Vec<Digest>, StoreError> {
        let bytes = objects.expect(kind::LIST, digest)?;
        self.parse_list(&bytes, level, first)
            .ok_or_else(|| objects.damaged(format!("list {digest} has another length")))
    }

    fn parse_list(&self, bytes: &[u8], level: u32, first: u64) -> Option<Vec<Digest>> {
        let left = self.chunks().checked_sub(first)?;
        let wanted = left.div_ceil(span(level - 1)).min(FANOUT as u64);
        if bytes.len() as u64 != wanted * Digest::SIZE as u64 {
            return None;
        }
        let digests = bytes.chunks_exact(Digest::SIZE);
        let digest = |bytes: &[u8]| bytes.try_into().ok().map(Digest::from_bytes);
        digests.map(digest).collect()
    }

    /// Calls `each` with the number and digest of each chunk that is not all zeros, in order.
    /// `enter` says of each list whether to look into it.
    pub(super) fn for_each(
        &self,
        objects: &mut Objects,
        enter: &mut dyn FnMut(&Digest) -> bool,
        each: &mut dyn FnMut(&mut Objects, u64, &Digest) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let top = height(self.chunks());
        // What is still to visit: level, first chunk, digest. The next one is last.
        let mut todo = vec![(top, 0, self.content.root)];
        while let Some((level, first, digest)) = todo.pop() {
            if digest == Digest::ZEROS || self.content.size == 0 {
                continue;
            }
            if level == 0 {
                each(objects, first, &digest)?;
                continue;
            }
            if !enter(&digest) {
                continue;
            }
            let list = self.list(objects, &digest, level, first)?;
            let step = span(level - 1);
            let numbered = (0u64..).zip(list);
            let mut below: Vec<_> = numbered
                .map(|(n, digest)| (level - 1, first + n * step, digest))
                .collect();
            below.reverse();
            todo.extend(below);
        }
        Ok(())
    }
}

/// Digests of chunks by number, one list ahead.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) cut: Cut,
    /// The list of the lowest level that was read last, and its first chunk.
    list: Option<(u64, Vec<Digest>)>,
}

impl Lookup {
    pub(super) fn new(cut: Cut) -> Self {
        Self { cut, list: None }
    }

    /// The digest of a chunk; that of zeros beyond the end.
    pub(super) fn digest(
        &mut self,
        objects: &mut Objects,
        number: u64,
    ) -> Result<Digest, StoreError> {
        let cut = self.cut;
        if number >= cut.chunks() {
            return Ok(Digest::ZEROS);
        }
        let lowest = number - number % FANOUT as u64;
        if let Some((first, list)) = &self.list
            && *first == lowest
        {
            let at = usize::try_from(number - lowest).unwrap_or(usize::MAX);
            return Ok(list.get(at).copied().unwrap_or(Digest::ZEROS));
        }
        let mut digest = cut.content.root;
        let (mut level, mut first) = (height(cut.chunks()), 0);
        while level > 0 && digest != Digest::ZEROS {
            let list = cut.list(objects, &digest, level, first)?;
            let step = span(level - 1);
            let at = (number - first) / step;
            let at_index = usize::try_from(at).unwrap_or(usize::MAX);
            digest = list.get(at_index).copied().unwrap_or(Digest::ZEROS);
            if level == 1 {
                self.list = Some((first, list));
            }
            first += at * step;
            level -= 1;
        }
        Ok(digest)
    }
}

/// Reads one chunk and checks its length.
pub(super) fn read_chunk(
    objects: &mut Objects,
    cut: &Cut,
    number: u64,
    digest: &Digest,
) -> Result<Vec<u8>, StoreError> {
    let bytes = objects.expect(kind::CHUNK, digest)?;
    match bytes.len() as u64 == cut.chunk_size(number) {
        true => Ok(bytes),
        false => Err(objects.damaged(format!("chunk {digest} has another length"))),
    }
}
