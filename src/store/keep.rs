//! Files of crab's own making, on their way into a pack.

use std::{collections::BTreeMap, path::Path};

use rustix::fs::FileType;

use super::{
    FileEntry, StoreError, chain,
    content::{Cut, FILE_CHUNK, PAGE_CHUNK},
    ingest::Ingest,
};
use crate::tree::{self, Expect, Found, TreeError, Visitor};

/// Keeps all files below a directory of crab's own making. `before`: those of the checkpoint before.
/// `but_pages`: what is about pages is left, and the indexes of them are listed.
pub(super) fn keep_files(
    ingest: &mut Ingest,
    dir: &Path,
    before: &[FileEntry],
    but_pages: bool,
) -> Result<(Vec<FileEntry>, Vec<String>), StoreError> {
    let mut keeper = Keeper {
        ingest,
        root: dir,
        before,
        but_pages,
        maps: Vec::new(),
        list: Vec::new(),
        failed: None,
    };
    let root = tree::open_root(dir)?;
    let walked = tree::walk(root, dir, Expect::Unchanged, &|| false, &mut keeper);
    match keeper.failed {
        Some(error) => Err(error),
        None => {
            walked?;
            Ok((keeper.list, keeper.maps))
        }
    }
}

struct Keeper<'a> {
    ingest: &'a mut Ingest,
    root: &'a Path,
    before: &'a [FileEntry],
    but_pages: bool,
    maps: Vec<String>,
    list: Vec<FileEntry>,
    failed: Option<StoreError>,
}

impl Keeper<'_> {
    fn keep(&mut self, found: &Found<'_>) -> Result<(), StoreError> {
        let path = found.path.strip_prefix(self.root).ok();
        let name = path.and_then(Path::to_str).unwrap_or_default();
        if self.but_pages && (name == chain::LINK || chain::is_about_pages(name)) {
            self.maps
                .extend(chain::is_map(name).then(|| name.to_owned()));
            return Ok(());
        }
        let (FileType::RegularFile, Some(path)) = (found.kind(), path.and_then(Path::to_str))
        else {
            // CRIU's `parent` link is one: a checkpoint must not depend on another (D8).
            return Err(StoreError::Unfit {
                path: found.path.to_owned(),
                reason: match found.kind() {
                    FileType::RegularFile => "its name is not UTF-8".into(),
                    kind => format!("it is a {kind:?}, not a regular file"),
                },
            });
        };
        let chunk = chunk_of(path);
        let before = cut_of(self.before, path);
        let content = self.ingest.file(found, chunk, before, &|| false)?;
        self.list.push(entry(path, Cut { content, chunk }));
        Ok(())
    }
}

/// Keeps files that are in memory. `before`: those of the checkpoint before.
pub(super) fn keep_bytes(
    ingest: &mut Ingest,
    files: &BTreeMap<String, Vec<u8>>,
    before: &[FileEntry],
) -> Result<Vec<FileEntry>, StoreError> {
    let keep = |(name, bytes): (&String, &Vec<u8>)| {
        let chunk = chunk_of(name);
        let content = ingest.bytes(bytes, chunk, cut_of(before, name))?;
        Ok(entry(name, Cut { content, chunk }))
    };
    files.iter().map(keep).collect()
}

/// What a file was in the checkpoint before.
pub(super) fn cut_of(before: &[FileEntry], path: &str) -> Option<Cut> {
    let before = before.iter().find(|file| file.path == path);
    before.map(FileEntry::cut)
}

pub(super) fn entry(path: &str, cut: Cut) -> FileEntry {
    FileEntry {
        path: path.to_owned(),
        size: cut.content.size,
        data: cut.content.data,
        chunk: cut.chunk,
        digest: cut.content.root,
    }
}

/// CRIU's files of pages are cut into pages.
pub(super) fn chunk_of(path: &str) -> u32 {
    match path.starts_with("pages-") {
        true => PAGE_CHUNK,
        false => FILE_CHUNK,
    }
}

impl Visitor for Keeper<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.keep(found).map_err(|e| {
            self.failed.get_or_insert(e);
            found.changed("it cannot be kept")
        })
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}
