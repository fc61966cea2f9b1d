//! The images of a checkpoint, as the inspector reads them.

use std::io;

use crate::{
    inspector::process::{ImageFile, Images},
    store::{Checkpoint, StoredFile},
};

/// The newest checkpoint's images, read out of the store when memory is compared.
#[derive(Debug)]
pub(super) struct StoredImages(pub(super) Checkpoint);

impl Images for StoredImages {
    fn open(&self, name: &str) -> io::Result<Box<dyn ImageFile>> {
        match self.0.image_file(name).map_err(io::Error::other)? {
            Some(file) => Ok(Box::new(Stored(file))),
            None => Err(io::Error::other(format!("the image has no {name}"))),
        }
    }
}

struct Stored(StoredFile);

impl ImageFile for Stored {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, at)
    }
}
