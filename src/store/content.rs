//! Contents of files that are in the store.

use super::{Digest, StoreError, entry::kind, objects::Objects};
pub(super) use crate::content::FILE_CHUNK;
use crate::content::{Content, FANOUT, chunks, height, span};

/// The chunks of memory: pages, since that is what changes, moves and repeats.
pub(super) const PAGE_CHUNK: u32 = 4 << 10;

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
