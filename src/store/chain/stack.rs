//! Dumps that build upon each other, and where in them a page is.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::MAX_MAP;
use crate::{
    page_map::{PAGE, PageMap},
    store::{
        FileEntry, StoreError,
        content::{Cut, Lookup, read_chunk},
        files,
        keep::cut_of,
        objects::Objects,
    },
};

/// Pages that are read at once.
const AT_ONCE: u64 = 64;

/// One dump.
pub(super) struct Layer<'a> {
    place: Place<'a>,
    /// The index that was opened last, and its pages.
    open: Option<(PageMap, Source)>,
}

enum Place<'a> {
    Dir(&'a Path),
    Stored(&'a [FileEntry]),
}

/// Where the pages of an index are.
pub(super) enum Source {
    File(PagesFile),
    Stored(Lookup),
}

/// CRIU's file of pages, opened when the first of them is read: of pages that are all in the dump before
/// there need be none.
pub(super) struct PagesFile {
    path: PathBuf,
    file: Option<File>,
}

/// Pages that follow each other in one layer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) layer: usize,
    /// The first one's place in that layer's file.
    pub(super) first: u64,
    pub(super) pages: u64,
}

impl<'a> Layer<'a> {
    pub(super) fn of_dir(dir: &'a Path) -> Self {
        Self {
            place: Place::Dir(dir),
            open: None,
        }
    }

    pub(super) fn stored(image: &'a [FileEntry]) -> Self {
        Self {
            place: Place::Stored(image),
            open: None,
        }
    }

    /// Opens an index, if this dump has one of that name.
    pub(super) fn open(&mut self, objects: &mut Objects, name: &str) -> Result<(), StoreError> {
        self.open = match self.place {
            Place::Dir(dir) => open_file(dir, name)?,
            Place::Stored(image) => open_stored(objects, image, name)?,
        };
        Ok(())
    }

    pub(super) fn source(&mut self) -> Option<&mut Source> {
        self.open.as_mut().map(|(_, source)| source)
    }
}

fn open_file(dir: &Path, name: &str) -> Result<Option<(PageMap, Source)>, StoreError> {
    let path = dir.join(name);
    let Some(bytes) = files::read(&path, MAX_MAP)? else {
        return Ok(None);
    };
    let map = PageMap::parse(&bytes).ok_or_else(|| StoreError::Unfit {
        path,
        reason: "it is no index of pages that crab understands".into(),
    })?;
    let path = dir.join(map.pages_name());
    Ok(Some((map, Source::File(PagesFile { path, file: None }))))
}

fn open_stored(
    objects: &mut Objects,
    image: &[FileEntry],
    name: &str,
) -> Result<Option<(PageMap, Source)>, StoreError> {
    let Some(cut) = cut_of(image, name) else {
        return Ok(None);
    };
    let map = PageMap::parse(&read(objects, &cut)?);
    let map = map.filter(PageMap::is_whole);
    let map = map.ok_or_else(|| objects.damaged(format!("{name} is no index of pages")))?;
    let pages = cut_of(image, &map.pages_name());
    let pages = pages.ok_or_else(|| objects.damaged(format!("the pages of {name} are missing")))?;
    Ok(Some((map, Source::Stored(Lookup::new(pages)))))
}

/// All bytes of a small file in the store.
fn read(objects: &mut Objects, cut: &Cut) -> Result<Vec<u8>, StoreError> {
    let size = cut.content.size;
    if size > MAX_MAP {
        return Err(objects.damaged(format!("an index of pages has {size} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    cut.for_each(objects, &mut |_| true, &mut |objects, number, digest| {
        let chunk = read_chunk(objects, cut, number, digest)?;
        let at = usize::try_from(number * u64::from(cut.chunk)).unwrap_or(usize::MAX);
        if let Some(place) = bytes
            .get_mut(at..)
            .and_then(|rest| rest.get_mut(..chunk.len()))
        {
            place.copy_from_slice(&chunk);
        }
        Ok(())
    })?;
    Ok(bytes)
}

impl PagesFile {
    pub(super) fn each_page(
        &mut self,
        piece: &Piece,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut buffer = vec![0; usize::try_from(AT_ONCE * PAGE).unwrap_or(0)];
        let file = match self.file.take() {
            Some(file) => file,
            None => File::open(&self.path).map_err(files::io("open", &self.path))?,
        };
        let file = self.file.insert(file);
        let mut nth = 0;
        while nth < piece.pages {
            let count = AT_ONCE.min(piece.pages - nth);
            let wanted = buffer.get_mut(..usize::try_from(count * PAGE).unwrap_or(0));
            let wanted = wanted.unwrap_or_default();
            file.read_exact_at(wanted, (piece.first + nth) * PAGE)
                .map_err(files::io("read", &self.path))?;
            for page in wanted.chunks_exact(usize::try_from(PAGE).unwrap_or(1)) {
                each(nth, page)?;
                nth += 1;
            }
        }
        Ok(())
    }
}

/// Where the first of so many pages is, and how many of them are there.
pub(super) fn find(layers: &[Layer<'_>], address: u64, mut pages: u64) -> Option<Piece> {
    for (layer, it) in layers.iter().enumerate() {
        let (map, _) = it.open.as_ref()?;
        let entry = map.at(address)?;
        pages = pages.min((entry.end() - address) / PAGE);
        if let Some(first) = entry.first {
            let first = first + (address - entry.address) / PAGE;
            return Some(Piece {
                layer,
                first,
                pages,
            });
        }
    }
    None
}
