//! Making the index of a whole layer.

use std::{collections::HashMap, ffi::CStr, os::fd::AsFd, path::Path};

use rustix::io::Errno;

use super::{
    content::Reader,
    facts::{Facts, Kind, View},
    index::{Id, Layer},
};
use crate::{
    digest::Digest,
    tree::{self, Expect, Found, TreeError, Visitor, failed, wide},
};

impl Layer {
    /// The index of an upper directory, with the digests of all contents.
    ///
    /// The directory has to stand still: an error if anything in it changes meanwhile.
    pub fn read(upper: &Path, stop: &dyn Fn() -> bool) -> Result<Self, TreeError> {
        read(upper, Some(Reader::new(stop)), stop)
    }

    /// The index without contents, which is quick and can be taken while the sandbox is frozen;
    /// [`Layer::learn`] adds the digests afterwards, out of the copy. A file without a digest is
    /// never acquitted.
    pub fn outline(upper: &Path, stop: &dyn Fn() -> bool) -> Result<Self, TreeError> {
        read(upper, None, stop)
    }
}

fn read(
    upper: &Path,
    reader: Option<Reader<'_>>,
    stop: &dyn Fn() -> bool,
) -> Result<Layer, TreeError> {
    let root = tree::open_root(upper)?;
    let stat = rustix::fs::fstat(&root).map_err(failed("stat", upper))?;
    let found = Found {
        parent: None,
        name: c"",
        fd: root.as_fd(),
        stat: &stat,
        path: upper,
        depth: 0,
    };
    let mut indexer = Indexer {
        layer: Layer::new(wide(stat.st_dev), &Facts::of(&found, View::Overlay)?),
        all: vec![Id::ROOT],
        dirs: Vec::new(),
        links: HashMap::new(),
        reader,
    };
    tree::walk(root, upper, Expect::Unchanged, stop, &mut indexer)?;
    let Indexer { mut layer, all, .. } = indexer;
    layer.index(&[], all);
    layer.shrink();
    Ok(layer)
}

struct Indexer<'s> {
    layer: Layer,
    all: Vec<Id>,
    /// The way down to the directory that is walked.
    dirs: Vec<Id>,
    /// Contents of inodes with further names.
    links: HashMap<u64, Digest>,
    reader: Option<Reader<'s>>,
}

impl Indexer<'_> {
    fn add(&mut self, found: &Found<'_>, parent: Id) -> Result<Id, TreeError> {
        indexable(found, found.name, self.layer.dev)?;
        let name = found.name.to_bytes();
        self.layer.room(1, name.len(), found.path)?;
        let mut facts = Facts::of(found, View::Overlay)?;
        if facts.kind() == Kind::File {
            facts.content = self.content(found)?;
        }
        let id = self.layer.insert(parent, name, &facts);
        self.all.push(id);
        Ok(id)
    }

    fn content(&mut self, found: &Found<'_>) -> Result<Option<Digest>, TreeError> {
        let Some(reader) = &mut self.reader else {
            return Ok(None);
        };
        if found.stat.st_nlink < 2 {
            return reader.digest(found).map(Some);
        }
        let ino = wide(found.stat.st_ino);
        if let Some(known) = self.links.get(&ino) {
            return Ok(Some(*known));
        }
        let digest = reader.digest(found)?;
        self.links.insert(ino, digest);
        Ok(Some(digest))
    }
}

impl Visitor for Indexer<'_> {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        let id = match self.dirs.last() {
            Some(parent) => self.add(dir, *parent)?,
            None => Id::ROOT,
        };
        self.dirs.push(id);
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let parent = self.dirs.last().copied().unwrap_or(Id::ROOT);
        self.add(found, parent).map(drop)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.dirs.pop();
        Ok(())
    }
}

/// Inodes are told apart by number alone: a layer is one file system (a subvolume of btrfs is
/// another one, and overlay makes none). A name takes 255 bytes at most, as on any file system that
/// overlay writes to.
pub(super) fn indexable(found: &Found<'_>, name: &CStr, dev: u64) -> Result<(), TreeError> {
    if wide(found.stat.st_dev) != dev {
        return Err(found.err("index")(Errno::XDEV));
    }
    match u8::try_from(name.count_bytes()) {
        Ok(_) => Ok(()),
        Err(_) => Err(found.err("index")(Errno::NAMETOOLONG)),
    }
}
