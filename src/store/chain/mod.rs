//! The images of a dump that builds upon others, made whole.
//!
//! An incremental dump has the pages that were written to since the dump before, and says of the others that
//! they are in that one. In the store nothing builds upon anything: what is kept is the image that a full
//! dump would have been. Pages of the turn's own dumps are read from their files. Those of the last
//! checkpoint's are not read at all: they have a digest there, and that is what a checkpoint is made of.

mod stack;

use std::path::{Path, PathBuf};

use super::{
    FileEntry, StoreError,
    content::{Cut, PAGE_CHUNK},
    files,
    ingest::{Ingest, Parts},
    keep::{chunk_of, cut_of, entry},
};
use crate::{
    content::Building,
    page_map::{PAGE, PageMap},
};
use stack::{Layer, Piece, Source};

/// CRIU's link to the dump that one builds upon.
pub(super) const LINK: &str = "parent";
/// A larger index is not read: it has some fifteen bytes for each run of pages.
const MAX_MAP: u64 = 256 << 20;

/// What a dump builds upon.
pub(super) struct Upon<'a> {
    /// The turn's own pre-dumps, the newest first.
    pub(super) pre_dumps: &'a [PathBuf],
    /// The images of the last checkpoint.
    pub(super) last: Option<&'a [FileEntry]>,
}

impl Upon<'_> {
    pub(super) fn is_nothing(&self) -> bool {
        self.pre_dumps.is_empty() && self.last.is_none()
    }
}

/// An index that was made whole: its name, and what it is now.
#[derive(Debug)]
pub(super) struct WholeMap {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
    /// Its file of pages, and how large that is.
    pub(super) pages: String,
    pub(super) size: u64,
}

/// Whether a file of an image tells of pages, or holds some.
pub(super) fn is_about_pages(name: &str) -> bool {
    is_map(name) || name.starts_with("pages-")
}

pub(super) fn is_map(name: &str) -> bool {
    name.starts_with("pagemap-")
}

/// Keeps the indexes of these names of the image at `dir`, and their pages, wherever they are. `before`:
/// the files of the checkpoint before.
pub(super) fn keep(
    ingest: &mut Ingest,
    dir: &Path,
    names: &[String],
    upon: &Upon<'_>,
    before: &[FileEntry],
) -> Result<(Vec<FileEntry>, Vec<WholeMap>), StoreError> {
    let mut layers = vec![Layer::of_dir(dir)];
    layers.extend(upon.pre_dumps.iter().map(|dir| Layer::of_dir(dir)));
    layers.extend(upon.last.map(Layer::stored));
    let (mut kept, mut maps) = (Vec::new(), Vec::new());
    for name in names {
        let unfit = |reason: &str| StoreError::Unfit {
            path: dir.join(name),
            reason: reason.to_owned(),
        };
        let bytes = files::read(&dir.join(name), MAX_MAP)?;
        let map = bytes.and_then(|bytes| PageMap::parse(&bytes));
        let map = map.ok_or_else(|| unfit("it is no index of pages that crab understands"))?;
        for layer in &mut layers {
            layer.open(&mut ingest.objects, name)?;
        }
        let pages = map.pages_name();
        let content = all_pages(ingest, &map, &mut layers, cut_of(before, &pages), &unfit)?;
        let cut = Cut {
            content,
            chunk: PAGE_CHUNK,
        };
        kept.push(entry(&pages, cut));
        let bytes = map
            .whole()
            .ok_or_else(|| unfit("it cannot be written anew"))?;
        let chunk = chunk_of(name);
        let content = ingest.bytes(&bytes, chunk, cut_of(before, name))?;
        kept.push(entry(name, Cut { content, chunk }));
        maps.push(WholeMap {
            name: name.clone(),
            bytes,
            pages,
            size: content_size(&map),
        });
    }
    Ok((kept, maps))
}

fn content_size(map: &PageMap) -> u64 {
    map.pages().saturating_mul(PAGE)
}

/// The content of a file with all pages of an index.
fn all_pages(
    ingest: &mut Ingest,
    map: &PageMap,
    layers: &mut [Layer<'_>],
    before: Option<Cut>,
    unfit: &dyn Fn(&str) -> StoreError,
) -> Result<crate::content::Content, StoreError> {
    let mut parts = Parts::new(ingest, PAGE_CHUNK, before);
    let mut building = Building::default();
    let mut number = 0;
    for entry in &map.entries {
        let mut address = entry.address;
        while address < entry.end() {
            let left = (entry.end() - address) / PAGE;
            let Some(piece) = stack::find(layers, address, left) else {
                return Err(unfit(&format!(
                    "its page {address:#x} is said to be in the dump before, which has none there"
                )));
            };
            let layer = layers.get_mut(piece.layer);
            let source = layer
                .and_then(Layer::source)
                .ok_or_else(|| unfit("no pages"))?;
            add(&mut building, &mut parts, number, &piece, source)?;
            number += piece.pages;
            address += piece.pages * PAGE;
        }
    }
    building.finish(content_size(map), PAGE_CHUNK, &mut parts)
}

/// Adds pages that follow each other, from wherever they are.
fn add(
    building: &mut Building,
    parts: &mut Parts<'_>,
    number: u64,
    piece: &Piece,
    source: &mut Source,
) -> Result<(), StoreError> {
    match source {
        Source::File(file) => {
            file.each_page(piece, |nth, page| building.add(number + nth, page, parts))
        }
        Source::Stored(lookup) => {
            for nth in 0..piece.pages {
                let digest = parts.known(lookup, piece.first + nth)?;
                building.add_known(number + nth, digest, PAGE, parts)?;
            }
            Ok(())
        }
    }
}
