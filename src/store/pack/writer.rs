//! Writing a pack.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    super::{
        Digest, StoreError,
        entry::{MAX_OBJECT, kind},
        failpoint::failpoint,
        files,
    },
    format::{self, Block, Place, Trailer},
    squeeze::{Squeezed, Squeezer},
};

/// A block of contents is closed once it has so many bytes. Larger ones compress better; smaller
/// ones cost less to read for one object in them.
const CONTENT_BLOCK: usize = 128 << 10;
/// The same for trees and lists, of which a commit reads a few here and there.
const STRUCTURE_BLOCK: usize = 32 << 10;
const BUFFER: usize = 256 << 10;
/// So many bytes of closed blocks may wait to be compressed: most of what a sandbox is frozen for fits.
const WAITING: usize = 16 << 20;

/// A pack that is being written, under a name that is not its own yet.
pub struct PackWriter {
    out: BufWriter<File>,
    path: PathBuf,
    at: u64,
    blocks: Vec<Block>,
    objects: HashMap<Digest, Place>,
    /// Contents and what describes them are kept apart: whoever reads trees reads nothing else.
    content: Open,
    structure: Open,
    /// Closed blocks that are not written yet: that can be done when nothing stands still for it.
    waiting: Vec<Closed>,
    squeezer: Squeezer,
    header: [u8; format::HEADER],
}

/// A pack that is complete, and not yet durable.
#[must_use]
pub struct Written {
    pub file: File,
    /// In bytes.
    pub size: u64,
}

impl Written {
    /// Makes its contents durable. `path`: what it is called now.
    pub fn sync(&self, path: &Path) -> Result<(), StoreError> {
        failpoint("sync a pack");
        let synced = self.file.sync_data();
        synced.map_err(files::io("fdatasync", path))?;
        failpoint("a pack is synced");
        Ok(())
    }
}

/// A block that is still being filled.
#[derive(Default)]
struct Open {
    bytes: Vec<u8>,
    objects: Vec<Digest>,
}

/// A block that is full.
struct Closed {
    bytes: Arc<Vec<u8>>,
    objects: Vec<Digest>,
}

impl PackWriter {
    /// Makes the file.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        failpoint("make a pack");
        Self::into(path, files::write_new(path, b"")?)
    }

    /// Into an empty file that was made before.
    pub fn into(path: &Path, file: File) -> Result<Self, StoreError> {
        let header = format::header();
        let mut out = BufWriter::with_capacity(BUFFER, file);
        out.write_all(&header).map_err(files::io("write", path))?;
        Ok(Self {
            out,
            path: path.to_owned(),
            at: header.len() as u64,
            blocks: Vec::new(),
            objects: HashMap::new(),
            content: Open::default(),
            structure: Open::default(),
            waiting: Vec::new(),
            squeezer: Squeezer::new().map_err(files::io("compress", path))?,
            header,
        })
    }

    /// Whether the object is in this pack already.
    pub fn has(&self, digest: &Digest) -> bool {
        self.objects.contains_key(digest)
    }

    /// Adds an object that it does not have yet.
    pub fn add(&mut self, kind: u8, digest: Digest, bytes: &[u8]) -> Result<(), StoreError> {
        let length = u32::try_from(bytes.len()).ok();
        let Some(length) = length.filter(|length| *length as usize <= MAX_OBJECT) else {
            return Err(self.unfit("an object is too large"));
        };
        let (open, limit) = match kind {
            kind::CHUNK => (&mut self.content, CONTENT_BLOCK),
            _ => (&mut self.structure, STRUCTURE_BLOCK),
        };
        let place = Place {
            block: u32::MAX,
            offset: u32::try_from(open.bytes.len()).unwrap_or(u32::MAX),
            kind,
            length,
        };
        open.bytes.extend_from_slice(bytes);
        open.objects.push(digest);
        let full = open.bytes.len() >= limit;
        self.objects.insert(digest, place);
        match full {
            true => self.close_block(kind == kind::CHUNK),
            false => Ok(()),
        }
    }

    fn close_block(&mut self, is_content: bool) -> Result<(), StoreError> {
        let open = match is_content {
            true => std::mem::take(&mut self.content),
            false => std::mem::take(&mut self.structure),
        };
        if open.objects.is_empty() {
            return Ok(());
        }
        let bytes = Arc::new(open.bytes);
        self.squeezer.add(bytes.clone());
        self.waiting.push(Closed {
            bytes,
            objects: open.objects,
        });
        match self.squeezer.waiting() > WAITING {
            true => self.write_through(),
            false => Ok(()),
        }
    }

    /// Whether what is added from now on may be compressed at once, on another processor. Returns how it
    /// was before.
    pub fn compress_early(&mut self, is_early: bool) -> bool {
        self.squeezer.be_early(is_early)
    }

    /// Compresses and writes the blocks that are closed.
    pub fn write_through(&mut self) -> Result<(), StoreError> {
        let closed = std::mem::take(&mut self.waiting);
        let squeezed = self.squeezer.finish();
        let squeezed = squeezed.map_err(files::io("compress", &self.path))?;
        for (closed, squeezed) in closed.iter().zip(&squeezed) {
            self.write_block(closed, squeezed)?;
        }
        Ok(())
    }

    fn write_block(&mut self, closed: &Closed, squeezed: &Squeezed) -> Result<(), StoreError> {
        let number = u32::try_from(self.blocks.len()).map_err(|_| self.unfit("too many blocks"))?;
        let stored = squeezed.or(&closed.bytes);
        failpoint("write a block");
        self.out
            .write_all(stored)
            .map_err(files::io("write", &self.path))?;
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.blocks.push(Block {
            at: self.at,
            stored: length(stored),
            raw: length(&closed.bytes),
            check: squeezed.check,
        });
        self.at += stored.len() as u64;
        for digest in &closed.objects {
            if let Some(place) = self.objects.get_mut(digest) {
                place.block = number;
            }
        }
        Ok(())
    }

    /// Writes the rest. That it becomes durable, and its name, are the caller's affair.
    pub fn finish(mut self, manifest: Option<&[u8]>) -> Result<Written, StoreError> {
        self.close_block(true)?;
        self.close_block(false)?;
        self.write_through()?;
        // A block that could not be written is gone with its objects, which would count as there; and whoever
        // adds may have tried again since.
        if self.objects.values().any(|place| place.block == u32::MAX) {
            return Err(self.unfit("a part of it could not be written before"));
        }
        let mut table = Vec::with_capacity(self.blocks.len() * format::BLOCK_RECORD);
        for block in &self.blocks {
            block.encode(&mut table);
        }
        let index = index(&self.objects);
        let manifest_stored = match manifest {
            Some(json) => self
                .squeezer
                .bytes(json)
                .map_err(files::io("compress", &self.path))?,
            None => Vec::new(),
        };
        let trailer = Trailer {
            table_at: self.at,
            blocks: self.blocks.len() as u64,
            objects: self.objects.len() as u64,
            manifest_stored: manifest_stored.len() as u64,
            manifest_raw: manifest.map_or(0, <[u8]>::len) as u64,
            table_check: Digest::of(&table),
            index_check: Digest::of(&index),
            manifest_check: Digest::of(&manifest_stored),
        };
        let end = trailer.encode(&self.header);
        let write_error = files::io("write", &self.path);
        failpoint("write the index");
        let written = [&table, &index, &manifest_stored, &end]
            .into_iter()
            .try_for_each(|part| self.out.write_all(part));
        written.map_err(write_error)?;
        let file = self.out.into_inner().map_err(|e| e.into_error());
        let file = file.map_err(files::io("write", &self.path))?;
        Ok(Written {
            file,
            size: trailer.file_size().unwrap_or(0),
        })
    }

    fn unfit(&self, reason: &str) -> StoreError {
        StoreError::Unfit {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }
}

/// The fanout and the sorted index.
fn index(objects: &HashMap<Digest, Place>) -> Vec<u8> {
    let mut sorted: Vec<_> = objects.iter().collect();
    sorted.sort_unstable_by_key(|(digest, _)| **digest);
    let bits = format::fanout_bits(sorted.len() as u64);
    let mut out = Vec::with_capacity((4 << bits) + 4 + sorted.len() * format::INDEX_ENTRY);
    let mut before = 0u32;
    for bucket in 0..1u64 << bits {
        out.extend(before.to_le_bytes());
        let rest = sorted.get(before as usize..).unwrap_or_default();
        let here = rest
            .iter()
            .take_while(|(digest, _)| format::bucket(digest, bits) == bucket);
        before += u32::try_from(here.count()).unwrap_or(0);
    }
    out.extend(before.to_le_bytes());
    for (digest, place) in sorted {
        place.encode(digest, &mut out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pack_that_has_lost_a_block_does_not_come_to_be() {
        let dir = tempfile::tempdir().unwrap();
        for lost in [false, true] {
            let path = dir.path().join(format!("{lost}.pack"));
            let mut writer = PackWriter::create(&path).unwrap();
            let bytes = [7; CONTENT_BLOCK];
            let digest = Digest::of(&bytes);
            writer.add(kind::CHUNK, digest, &bytes).unwrap();
            if lost {
                // As a write that fails leaves it.
                writer.waiting.clear();
                writer.squeezer.finish().unwrap();
            }
            assert!(writer.has(&digest));
            assert_eq!(writer.finish(None).is_err(), lost);
        }
    }
}
