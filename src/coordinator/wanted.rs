//! The tree that a sandbox saw at a checkpoint: its writable layer, from the store, over those of the image.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsString,
    path::{Component, Path, PathBuf},
};

use crate::{
    content::{Content, Data},
    rootfs::merged::{Kind, Links, Merged, MergedError, Node, View},
    store::{self, StoreError, Tree, TreeEntry},
};

/// Before the names of attributes in which overlay keeps what it knows.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// Those that do not show.
const BOOKS: [&[u8]; 5] = [b"origin", b"impure", b"nlink", b"uuid", b"upper"];
/// The layers below do not show in such a directory.
const OPAQUE: &[u8] = b"opaque";

/// That tree.
pub(super) struct Wanted {
    tree: Tree,
    lower: Merged,
    /// Directories on the way to what was asked for.
    known: HashMap<PathBuf, Place>,
}

/// Where the tree has a name from.
#[derive(Clone)]
enum Place {
    /// The writable layer. `covers`: the layers below do not show under it.
    Upper {
        entry: TreeEntry,
        covers: bool,
    },
    Lower,
    Nowhere,
}

impl Wanted {
    pub(super) fn new(tree: Tree, lower: Merged) -> Self {
        Self {
            tree,
            lower,
            known: HashMap::new(),
        }
    }

    /// The bytes of a regular file, of at most `limit` bytes.
    pub(super) fn data(&mut self, path: &Path, limit: u64) -> Result<Data, MergedError> {
        match self.place(path)? {
            Place::Upper { entry, .. } => match entry.node {
                store::Node::File(content) if content.data <= limit => {
                    self.tree.data(content).map_err(unreadable)
                }
                store::Node::File(_) => Err(MergedError::TooMuch {
                    limit: usize::try_from(limit).unwrap_or(usize::MAX),
                    what: "bytes",
                }),
                _ => Err(MergedError::unproven(path, "it is no file")),
            },
            Place::Lower => self.lower.data(path, limit),
            Place::Nowhere => Err(MergedError::unproven(path, "it is not there")),
        }
    }

    fn place(&mut self, path: &Path) -> Result<Place, MergedError> {
        if let Some(known) = self.known.get(path) {
            return Ok(known.clone());
        }
        let mut at = PathBuf::new();
        let root = self.tree.root().clone();
        let mut place = Place::Upper {
            covers: covers(&at, &root)?,
            entry: root,
        };
        for part in path.components() {
            let Component::Normal(name) = part else {
                return Err(MergedError::unproven(path, "an odd path"));
            };
            at.push(name);
            place = match self.known.get(&at) {
                Some(known) => known.clone(),
                None => self.below(&at, place)?,
            };
            let is_dir = matches!(&place, Place::Upper { entry, .. } if entry.dir().is_some());
            if is_dir {
                self.known.insert(at.clone(), place.clone());
            }
        }
        Ok(place)
    }

    /// What is at `at`, of which `above` is the directory.
    fn below(&mut self, at: &Path, above: Place) -> Result<Place, MergedError> {
        let Place::Upper { entry, covers: all } = above else {
            return Ok(above);
        };
        let (Some(dir), Some(name)) = (entry.dir(), at.file_name()) else {
            return Ok(Place::Nowhere);
        };
        Ok(match self.tree.child(&dir, name).map_err(unreadable)? {
            None if all => Place::Nowhere,
            None => Place::Lower,
            Some(entry) if is_whiteout(&entry) => Place::Nowhere,
            Some(entry) => Place::Upper {
                covers: covers(at, &entry)? || all,
                entry,
            },
        })
    }
}

impl View for Wanted {
    fn at(&mut self, path: &Path) -> Result<Option<Node>, MergedError> {
        match self.place(path)? {
            Place::Nowhere => Ok(None),
            Place::Lower => self.lower.at(path),
            Place::Upper { entry, .. } => node(path, entry).map(Some),
        }
    }

    fn names(&mut self, dir: &Path) -> Result<BTreeSet<OsString>, MergedError> {
        let (entry, covers) = match self.place(dir)? {
            Place::Nowhere => return Ok(BTreeSet::new()),
            Place::Lower => return self.lower.names(dir),
            Place::Upper { entry, covers } => (entry, covers),
        };
        let mut names = match covers {
            true => BTreeSet::new(),
            false => self.lower.names(dir)?,
        };
        let Some(dir) = entry.dir() else {
            return Ok(BTreeSet::new());
        };
        for entry in self.tree.entries(&dir).map_err(unreadable)? {
            match is_whiteout(&entry) {
                true => names.remove(entry.name()),
                false => names.insert(entry.name().to_owned()),
            };
        }
        Ok(names)
    }

    fn content(&mut self, file: &Path) -> Result<Content, MergedError> {
        match self.place(file)? {
            Place::Lower => self.lower.content(file),
            Place::Upper { entry, .. } => match entry.node {
                store::Node::File(content) => Ok(content),
                _ => Err(MergedError::unproven(file, "it is no file")),
            },
            Place::Nowhere => Err(MergedError::unproven(file, "it is not there")),
        }
    }
}

/// Whether an entry of a writable layer keeps what is below its name in the other layers from being seen: a
/// whiteout, whatever is no directory, or an opaque one.
pub(super) fn hides(path: &Path, entry: Option<&TreeEntry>) -> Result<bool, MergedError> {
    match entry {
        None => Ok(false),
        Some(entry) if entry.dir().is_none() => Ok(true),
        Some(entry) => covers(path, entry),
    }
}

fn is_whiteout(entry: &TreeEntry) -> bool {
    entry.node == store::Node::CharDevice(0)
}

/// Whether an entry is an opaque directory. An error if overlay shows something else there than what the entry
/// says by itself.
fn covers(path: &Path, entry: &TreeEntry) -> Result<bool, MergedError> {
    let mut opaque = false;
    for (name, value) in &entry.xattrs {
        let Some(own) = name.to_bytes().strip_prefix(OVERLAY) else {
            continue;
        };
        match own {
            OPAQUE if value == b"y" && entry.dir().is_some() => opaque = true,
            own if BOOKS.contains(&own) => {}
            _ => {
                let why = "overlay keeps more of it than its name";
                return Err(MergedError::unproven(path, why));
            }
        }
    }
    Ok(opaque)
}

fn node(path: &Path, entry: TreeEntry) -> Result<Node, MergedError> {
    covers(path, &entry)?;
    let kind = match entry.node {
        store::Node::File(content) => Kind::File(content.size),
        store::Node::Directory(_) => Kind::Dir,
        store::Node::Symlink(target) => Kind::Symlink(target),
        store::Node::CharDevice(number) => Kind::CharDevice(number),
        store::Node::BlockDevice(number) => Kind::BlockDevice(number),
        store::Node::Fifo => Kind::Fifo,
        store::Node::Socket => Kind::Socket,
    };
    let mut xattrs = entry.xattrs;
    xattrs.retain(|(name, _)| !name.to_bytes().starts_with(OVERLAY));
    Ok(Node {
        kind,
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: (entry.mtime, entry.mtime_nsec),
        xattrs,
        links: entry.link.map_or(Links::One, Links::Named),
    })
}

fn unreadable(e: StoreError) -> MergedError {
    MergedError::Unreadable(e.to_string())
}
