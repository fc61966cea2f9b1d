//! Reading one file of a checkpoint without laying it out.

use std::io;

use super::{
    Checkpoint, StoreError,
    content::{Lookup, read_chunk},
    objects::Objects,
};

/// A file of a checkpoint's image or bundle, open to be read.
#[derive(Debug)]
pub struct StoredFile {
    objects: Objects,
    lookup: Lookup,
    /// The chunk that was read last.
    chunk: Option<(u64, Vec<u8>)>,
}

impl Checkpoint {
    /// Opens a file of CRIU's images; None if there is no such file.
    pub fn image_file(&self, name: &str) -> Result<Option<StoredFile>, StoreError> {
        let mut files = self.manifest.contents.image.iter();
        let Some(file) = files.find(|file| file.path == name) else {
            return Ok(None);
        };
        Ok(Some(StoredFile {
            objects: self.objects()?,
            lookup: Lookup::new(file.cut()),
            chunk: None,
        }))
    }
}

impl StoredFile {
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.lookup.cut.content.size
    }

    /// Reads all of a buffer from some place on. What is read has its digest.
    pub fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let size = u64::from(self.lookup.cut.chunk);
        let (mut at, mut rest) = (at, buffer);
        while !rest.is_empty() {
            let (number, offset) = (at / size, usize::try_from(at % size).unwrap_or(0));
            let bytes = self.chunk(number).map_err(io::Error::other)?;
            let bytes = bytes.get(offset..).unwrap_or_default();
            let count = bytes.len().min(rest.len());
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&bytes[..count]);
            rest = later;
            at += count as u64;
        }
        Ok(())
    }

    fn chunk(&mut self, number: u64) -> Result<&[u8], StoreError> {
        let cached = self.chunk.take().filter(|(cached, _)| *cached == number);
        let chunk = match cached {
            Some(chunk) => chunk,
            None => (number, self.read_chunk(number)?),
        };
        Ok(&self.chunk.insert(chunk).1)
    }

    fn read_chunk(&mut self, number: u64) -> Result<Vec<u8>, StoreError> {
        let cut = self.lookup.cut;
        match self.lookup.digest(&mut self.objects, number)? {
            super::Digest::ZEROS => {
                let size = usize::try_from(cut.chunk_size(number)).unwrap_or(0);
                Ok(vec![0; size])
            }
            digest => read_chunk(&mut self.objects, &cut, number, &digest),
        }
    }
}
