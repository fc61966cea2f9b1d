//! The image of a dump, as far as it is compared with: which pages it holds of one process, and where.
//!
//! `pages-N.img` holds the pages that the index of a process names, one after the other.

use std::{
    fmt::Debug,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::page_map::PageMap;
pub(super) use crate::page_map::{Entry, PAGE};

/// A pagemap larger than this is not looked at: it has an entry of some ten bytes for each run of
/// pages, and what is compared is bounded anyway.
const MAX_PAGEMAP: u64 = 4 << 20;

/// Where the images of a dump are.
pub trait Images: Debug + Send + Sync {
    /// Opens one of its files.
    fn open(&self, name: &str) -> io::Result<Box<dyn ImageFile>>;
}

/// One file of a dump.
pub trait ImageFile {
    /// In bytes.
    fn size(&self) -> u64;
    /// Reads all of a buffer from some place on.
    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

/// Images in the directory into which CRIU has written them.
#[derive(Debug)]
pub struct ImageDir(PathBuf);

impl ImageDir {
    /// Reads nothing yet.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl Images for ImageDir {
    fn open(&self, name: &str) -> io::Result<Box<dyn ImageFile>> {
        let file = File::open(self.0.join(name))?;
        let size = file.metadata()?.len();
        Ok(Box::new(PlainFile { file, size }))
    }
}

struct PlainFile {
    file: File,
    size: u64,
}

impl ImageFile for PlainFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }
}

/// The pages of one process.
#[derive(Debug)]
pub(super) struct Pages(PageMap);

impl Pages {
    /// Reads the index.
    pub(super) fn open(images: &dyn Images, inner_pid: i32) -> io::Result<Self> {
        let mut index = images.open(&format!("pagemap-{inner_pid}.img"))?;
        let size = index.size();
        if size > MAX_PAGEMAP {
            return Err(io::Error::other(format!("its page map has {size} bytes")));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        index.read_exact_at(&mut bytes, 0)?;
        Self::parse(&bytes)
    }

    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let map = PageMap::parse(bytes).ok_or_else(|| {
            let why = "its page map is not understood";
            io::Error::new(io::ErrorKind::InvalidData, why)
        })?;
        match map.is_whole() {
            true => Ok(Self(map)),
            false => Err(io::Error::other("its pages are not all in this image")),
        }
    }

    /// Runs of pages by address, which is how they lie in the file of pages.
    pub(super) fn runs(&self) -> &[Entry] {
        &self.0.entries
    }

    /// The file of pages.
    pub(super) fn file(&self, images: &dyn Images) -> io::Result<Box<dyn ImageFile>> {
        let file = images.open(&self.0.pages_name())?;
        if file.size() < self.bytes() {
            return Err(io::Error::other("its file of pages is too short"));
        }
        Ok(file)
    }

    /// How much memory the image holds.
    pub(super) fn bytes(&self) -> u64 {
        self.0.pages().saturating_mul(PAGE)
    }

    /// Whether a page is in the image.
    pub(super) fn has(&self, address: u64) -> bool {
        self.0.has(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_map::testing::page_map;

    #[test]
    fn an_index_tells_which_pages_are_there() {
        let pages = Pages::parse(&page_map(7, &[(0x1000, 2, true), (0x8000, 1, true)])).unwrap();
        assert_eq!(pages.bytes(), 3 * PAGE);
        let there: Vec<u64> = (0..10).filter(|page| pages.has(page * PAGE)).collect();
        assert_eq!(there, [1, 2, 8]);
        assert_eq!(pages.0.pages_name(), "pages-7.img");
    }

    #[test]
    fn an_image_of_which_pages_are_elsewhere_is_none_to_compare_with() {
        let parse = |runs: &[_]| Pages::parse(&page_map(1, runs)).map(drop);
        assert!(parse(&[(0x1000, 1, true)]).is_ok());
        assert!(parse(&[(0x1000, 1, true), (0x2000, 1, false)]).is_err());
        assert!(Pages::parse(b"no index").is_err());
    }
}
