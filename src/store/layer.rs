//! From a writable layer to a tree: whole, or as changes to an earlier one.

use std::{
    ffi::CString,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{fs::FileType, io::Errno};

use super::{
    Digest, StoreError,
    capture::Taking,
    directory::{self, DirBuilder, edit},
    entry::{DirRef, Node, TreeEntry, kind},
    ingest::{Ingest, Links, attributes, unfit},
};
use crate::tree::{self, DirStack, Expect, FileId, Found, ShownPath, TreeError, Visitor, failed};

/// What of a writable layer differs from an earlier checkpoint. Paths are relative to the layer's
/// root (`""` or `"."` is the root itself), in byte order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerChanges {
    /// Gone, with all below them.
    pub removed: Vec<PathBuf>,
    /// What is at this path, of this kind, replaces the earlier entry; of a directory that was one
    /// before, its attributes alone. One that is new, or was something else, lists all its names, too.
    /// All names of an inode with several are here if any of them is.
    pub changed: Vec<(PathBuf, FileType)>,
}

/// So many bytes of extended attributes may a turn have changed: they are in memory until their directory
/// is done. Real ones have some dozens a file.
const MAX_XATTRS: usize = if cfg!(test) { 1 << 20 } else { 256 << 20 };

/// Keeps a tree's root.
fn put_root(ingest: &mut Ingest, mut root: TreeEntry) -> Result<(Digest, TreeEntry), StoreError> {
    root.name.clear();
    let mut bytes = Vec::new();
    let encoded = root.encode(&mut bytes);
    encoded.map_err(|reason| unfit(Path::new(""), reason))?;
    Ok((ingest.put(kind::ROOT, &bytes, None)?, root))
}

/// Keeps all of a layer.
pub(super) fn whole(
    taking: &mut Taking<'_>,
    upper: &Path,
) -> Result<(Digest, TreeEntry), StoreError> {
    let stop = taking.stop;
    let mut reader = Whole {
        taking,
        dirs: Vec::new(),
        links: Links::default(),
        root: None,
        prefix: upper.as_os_str().len() + 1,
        failed: None,
    };
    let root = tree::open_root(upper)?;
    let walked = tree::walk(root, upper, Expect::Unchanged, stop, &mut reader);
    let Whole { root, failed, .. } = reader;
    if let Some(e) = failed {
        return Err(e);
    }
    walked?;
    let root = root.ok_or_else(|| unfit(upper, "it has no root"))?;
    put_root(taking.ingest, root)
}

struct Whole<'a, 'c> {
    taking: &'a mut Taking<'c>,
    dirs: Vec<DirBuilder>,
    links: Links,
    root: Option<TreeEntry>,
    /// How long the part of a path is that is not the layer's own.
    prefix: usize,
    failed: Option<StoreError>,
}

impl Whole<'_, '_> {
    fn add(&mut self, entry: TreeEntry) -> Result<(), StoreError> {
        self.taking.count();
        match self.dirs.last_mut() {
            Some(dir) => dir.add(self.taking.ingest, &entry),
            None => {
                self.root = Some(entry);
                Ok(())
            }
        }
    }

    fn read(&mut self, found: &Found<'_>) -> Result<(), StoreError> {
        if let Some(entry) = self.links.again(found)? {
            return self.add(entry);
        }
        let mut entry = self.taking.entry(found, None)?;
        let path = found.path.as_os_str().as_bytes();
        let relative = path.get(self.prefix..).unwrap_or_default();
        self.links.first(found, relative, &mut entry);
        self.add(entry)
    }

    fn close(&mut self, dir: &Found<'_>) -> Result<(), StoreError> {
        let builder = self.dirs.pop().unwrap_or_default();
        let content = builder.finish(self.taking.ingest)?;
        self.add(attributes(dir, Node::Directory(content))?)
    }

    /// The walk ends with some error of its own; the real one is kept.
    fn told(&mut self, done: Result<(), StoreError>, found: &Found<'_>) -> Result<(), TreeError> {
        done.map_err(|e| {
            self.failed.get_or_insert(e);
            found.changed("it cannot be kept")
        })
    }
}

impl Visitor for Whole<'_, '_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.dirs.push(DirBuilder::default());
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let done = self.read(found);
        self.told(done, found)
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        let done = self.close(dir);
        self.told(done, dir)
    }
}

/// Keeps what differs from the tree `base`.
pub(super) fn delta(
    taking: &mut Taking<'_>,
    base: &Digest,
    upper: &Path,
    changes: &LayerChanges,
) -> Result<(Digest, TreeEntry), StoreError> {
    let removed = changes.removed.iter().map(|path| (path, None));
    let changed = changes
        .changed
        .iter()
        .map(|(path, kind)| (path, Some(*kind)));
    let mut all: Vec<Change<'_>> = removed
        .chain(changed)
        .map(|(path, now)| Change {
            path: normal(path),
            now,
        })
        .collect();
    // By names from the root on, as a walk would come to them; what is removed goes first.
    all.sort_by(|a, b| (a.path, a.now.is_some()).cmp(&(b.path, b.now.is_some())));
    let root = directory::read_root(&mut taking.ingest.objects, base)?;
    taking.ingest.pages_are_new = true;
    let edited = edited(taking, upper, root, &all);
    let root = edited.and_then(|root| put_root(taking.ingest, root));
    taking.ingest.pages_are_new = false;
    taking.ingest.known.clear();
    root
}

fn edited(
    taking: &mut Taking<'_>,
    upper: &Path,
    root: TreeEntry,
    all: &[Change<'_>],
) -> Result<TreeEntry, StoreError> {
    let mut editor = Editor::new(taking, upper, root)?;
    for change in all {
        editor.apply(change)?;
    }
    editor.finish()
}

struct Change<'a> {
    path: &'a Path,
    /// What is there; None if it is gone.
    now: Option<FileType>,
}

fn normal(path: &Path) -> &Path {
    path.strip_prefix(".").unwrap_or(path)
}

/// The way from the root to the directory that is being edited.
struct Editor<'a, 'c> {
    taking: &'a mut Taking<'c>,
    upper: &'a Path,
    dirs: Vec<Dir>,
    path: PathBuf,
    way: Way,
    links: Links,
    /// Bytes of extended attributes of what was edited until now.
    xattrs: usize,
}

/// A directory that is being edited.
struct Dir {
    /// Its own attributes.
    entry: TreeEntry,
    /// The names that it had.
    base: Option<DirRef>,
    edits: Vec<(Vec<u8>, Option<TreeEntry>)>,
}

impl<'a, 'c> Editor<'a, 'c> {
    fn new(
        taking: &'a mut Taking<'c>,
        upper: &'a Path,
        root: TreeEntry,
    ) -> Result<Self, StoreError> {
        let way = Way::open(upper)?;
        let base = root.dir();
        Ok(Self {
            taking,
            upper,
            dirs: vec![Dir {
                entry: root,
                base,
                edits: Vec::new(),
            }],
            path: PathBuf::new(),
            way,
            links: Links::default(),
            xattrs: 0,
        })
    }

    fn apply(&mut self, change: &Change<'_>) -> Result<(), StoreError> {
        let shown = self.upper.join(change.path);
        let normal_parts = change
            .path
            .components()
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        if !normal_parts || change.path.is_absolute() {
            return Err(unfit(&shown, "its path leads out of the layer"));
        }
        let Some(parent) = change.path.parent() else {
            return match change.now {
                None => Err(unfit(&shown, "the root cannot be removed")),
                Some(_) => self.root(),
            };
        };
        let there = self.go_to(parent)?;
        let name = change.path.file_name().unwrap_or_default();
        match change.now {
            // It went with something above it.
            None if !there => Ok(()),
            Some(_) if !there => Err(unfit(
                &shown,
                "its directory is none in the checkpoint before, and is not said to have changed",
            )),
            None => self.edit(name.as_bytes().to_vec(), None),
            Some(kind) => self.take(name.as_bytes(), kind, &shown),
        }
    }

    /// The root's own attributes.
    fn root(&mut self) -> Result<(), StoreError> {
        self.taking.count();
        let fd = self.way.top(self.upper)?;
        let stat = rustix::fs::fstat(fd).map_err(failed("stat", self.upper))?;
        let found = found_at(fd, c"", &stat, self.upper);
        let entry = attributes(&found, Node::Fifo)?;
        if let Some(dir) = self.dirs.first_mut() {
            let node = dir.entry.node.clone();
            dir.entry = TreeEntry { node, ..entry };
        }
        Ok(())
    }

    fn edit(&mut self, name: Vec<u8>, entry: Option<TreeEntry>) -> Result<(), StoreError> {
        let values = entry.iter().flat_map(|entry| &entry.xattrs);
        self.xattrs += values.map(|(_, value)| value.len()).sum::<usize>();
        if self.xattrs > MAX_XATTRS {
            let most = MAX_XATTRS >> 20;
            let reason = format!("more than {most} MiB of extended attributes were changed");
            return Err(unfit(&self.path, reason));
        }
        let Some(dir) = self.dirs.last_mut() else {
            return Ok(());
        };
        match dir.edits.last_mut() {
            // Removed, and made anew.
            Some(last) if last.0 == name => last.1 = entry,
            Some(last) if last.0 > name => {
                return Err(unfit(&self.path, "its changes are out of order"));
            }
            _ => dir.edits.push((name, entry)),
        }
        Ok(())
    }

    /// What the name is so far: as in the earlier tree, unless it has been changed.
    fn before(&mut self, name: &[u8]) -> Result<Option<TreeEntry>, StoreError> {
        let Some(dir) = self.dirs.last() else {
            return Ok(None);
        };
        match (dir.edits.last(), &dir.base) {
            (Some((last, now)), _) if last == name => Ok(now.clone()),
            (_, Some(base)) => directory::find(&mut self.taking.ingest.objects, base, name),
            (_, None) => Ok(None),
        }
    }

    fn take(&mut self, name: &[u8], kind: FileType, shown: &Path) -> Result<(), StoreError> {
        if (self.taking.stop)() {
            let path = ShownPath::new(shown);
            return Err(TreeError::Stopped { path }.into());
        }
        self.taking.count();
        let before = self.before(name)?;
        let c_name = CString::new(name).map_err(|_| unfit(shown, "its name"))?;
        let parent = self.way.top(shown)?;
        let fd = tree::look_at(parent, &c_name).map_err(|e| moved(shown, "open", e))?;
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", shown))?;
        let found = found_at(fd.as_fd(), &c_name, &stat, shown);
        if found.kind() != kind {
            return Err(found.changed("it is something else").into());
        }
        if kind == FileType::Directory {
            let entry = attributes(&found, Node::Fifo)?;
            return self.push(name, entry, before.and_then(|before| before.dir()));
        }
        let entry = match self.links.again(&found)? {
            Some(entry) => entry,
            None => {
                let mut entry = self.taking.entry(&found, before.as_ref())?;
                let relative = self.path.join(std::ffi::OsStr::from_bytes(name));
                self.links
                    .first(&found, relative.as_os_str().as_bytes(), &mut entry);
                entry
            }
        };
        self.edit(name.to_vec(), Some(entry))
    }

    /// Begins to edit a directory of the one that is edited.
    fn push(
        &mut self,
        name: &[u8],
        entry: TreeEntry,
        base: Option<DirRef>,
    ) -> Result<(), StoreError> {
        self.path.push(std::ffi::OsStr::from_bytes(name));
        self.way.push(name, &self.upper.join(&self.path))?;
        self.dirs.push(Dir {
            entry,
            base,
            edits: Vec::new(),
        });
        Ok(())
    }

    /// Makes `wanted` the directory that is edited; false if there is no such directory.
    fn go_to(&mut self, wanted: &Path) -> Result<bool, StoreError> {
        while !wanted.starts_with(&self.path) {
            self.pop()?;
        }
        let rest = wanted.strip_prefix(&self.path).unwrap_or(wanted).to_owned();
        for name in &rest {
            let name = name.as_bytes();
            let before = self.before(name)?;
            let dir = before.as_ref().and_then(TreeEntry::dir);
            let (Some(entry), Some(dir)) = (before, dir) else {
                return Ok(false);
            };
            self.push(name, entry, Some(dir))?;
        }
        Ok(true)
    }

    /// Ends a directory: its new names become the entry in the one above.
    fn pop(&mut self) -> Result<TreeEntry, StoreError> {
        let dir = self.dirs.pop();
        let Some(Dir {
            mut entry,
            base,
            edits,
        }) = dir
        else {
            return Err(unfit(&self.path, "it lies outside of the layer"));
        };
        entry.node = Node::Directory(edit(self.taking.ingest, base.as_ref(), edits)?);
        if !self.dirs.is_empty() {
            self.edit(entry.name.clone(), Some(entry.clone()))?;
            let shown = self.upper.join(&self.path);
            self.way.pop(&shown)?;
            self.path.pop();
        }
        Ok(entry)
    }

    fn finish(mut self) -> Result<TreeEntry, StoreError> {
        while self.dirs.len() > 1 {
            self.pop()?;
        }
        self.pop()
    }
}

fn found_at<'a>(
    fd: BorrowedFd<'a>,
    name: &'a std::ffi::CStr,
    stat: &'a rustix::fs::Stat,
    path: &'a Path,
) -> Found<'a> {
    Found {
        parent: None,
        name,
        fd,
        stat,
        path,
        depth: 0,
    }
}

/// What the comparison has found is not there any more.
fn moved(shown: &Path, step: &'static str, errno: Errno) -> TreeError {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE => TreeError::Changed {
            path: ShownPath::new(shown),
            what: "it was moved",
        },
        errno => failed(step, shown)(errno),
    }
}

/// The directories of the layer on the way down to the one that is being edited.
struct Way(DirStack);

impl Way {
    fn open(upper: &Path) -> Result<Self, StoreError> {
        let mut way = Self(DirStack::default());
        way.enter(tree::open_root(upper)?, upper)?;
        Ok(way)
    }

    fn enter(&mut self, dir: OwnedFd, shown: &Path) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(&dir).map_err(failed("stat", shown))?;
        self.0.push(dir, FileId::from(&stat));
        Ok(())
    }

    fn top(&self, shown: &Path) -> Result<BorrowedFd<'_>, TreeError> {
        self.0.top().map_err(failed("reach", shown))
    }

    fn push(&mut self, name: &[u8], shown: &Path) -> Result<(), StoreError> {
        let name = CString::new(name).map_err(|_| unfit(shown, "its name"))?;
        let dir = tree::look_at(self.top(shown)?, &name)
            .and_then(|dir| tree::open_dir(&dir))
            .map_err(|e| moved(shown, "enter", e))?;
        Ok(self.enter(dir, shown)?)
    }

    fn pop(&mut self, shown: &Path) -> Result<(), TreeError> {
        let left = self.0.pop().map_err(|e| moved(shown, "leave", e))?;
        drop(left);
        Ok(())
    }
}
