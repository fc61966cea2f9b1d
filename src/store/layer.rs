//! From a staged copy of a writable layer to a tree: whole, or as changes to an earlier one.

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
    directory::{self, DirBuilder, edit},
    entry::{DirRef, Node, TreeEntry, kind},
    ingest::{Ingest, Links, attributes, unfit},
};
use crate::tree::{self, DirStack, Expect, FileId, Found, TreeError, Visitor, failed};

/// What of a writable layer differs from an earlier checkpoint. Paths are relative to the layer's
/// root (`""` or `"."` is the root itself), in byte order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerChanges {
    /// Gone, with all below them.
    pub removed: Vec<PathBuf>,
    /// The staged copy has something at this path that replaces the earlier entry; of a directory
    /// that was one before, its attributes alone. All names of an inode with several are here if
    /// any of them is.
    pub staged: Vec<PathBuf>,
}

/// Keeps a tree's root.
fn put_root(ingest: &mut Ingest, mut root: TreeEntry) -> Result<(Digest, TreeEntry), StoreError> {
    root.name.clear();
    let mut bytes = Vec::new();
    let encoded = root.encode(&mut bytes);
    encoded.map_err(|reason| unfit(Path::new(""), reason))?;
    Ok((ingest.put(kind::ROOT, &bytes, None)?, root))
}

/// Keeps all of a staged layer.
pub(super) fn whole(ingest: &mut Ingest, upper: &Path) -> Result<(Digest, TreeEntry), StoreError> {
    let mut reader = Whole {
        ingest,
        dirs: Vec::new(),
        links: Links::default(),
        root: None,
        prefix: upper.as_os_str().len() + 1,
        failed: None,
    };
    let root = tree::open_root(upper)?;
    let walked = tree::walk(root, upper, Expect::Unchanged, &|| false, &mut reader);
    let Whole {
        links,
        root,
        failed,
        ..
    } = reader;
    if let Some(e) = failed {
        return Err(e);
    }
    walked?;
    links.finish()?;
    let root = root.ok_or_else(|| unfit(upper, "it has no root"))?;
    put_root(ingest, root)
}

struct Whole<'a> {
    ingest: &'a mut Ingest,
    dirs: Vec<DirBuilder>,
    links: Links,
    root: Option<TreeEntry>,
    /// How long the part of a path is that is not the layer's own.
    prefix: usize,
    failed: Option<StoreError>,
}

impl Whole<'_> {
    fn add(&mut self, entry: TreeEntry) -> Result<(), StoreError> {
        match self.dirs.last_mut() {
            Some(dir) => dir.add(self.ingest, &entry),
            None => {
                self.root = Some(entry);
                Ok(())
            }
        }
    }

    fn read(&mut self, found: &Found<'_>) -> Result<(), StoreError> {
        if let Some(entry) = self.links.again(found) {
            return self.add(entry);
        }
        let mut entry = self.ingest.entry(found, None)?;
        let path = found.path.as_os_str().as_bytes();
        let relative = path.get(self.prefix..).unwrap_or_default();
        self.links.first(found, relative, &mut entry);
        self.add(entry)
    }

    fn close(&mut self, dir: &Found<'_>) -> Result<(), StoreError> {
        let builder = self.dirs.pop().unwrap_or_default();
        let content = builder.finish(self.ingest)?;
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

impl Visitor for Whole<'_> {
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
    ingest: &mut Ingest,
    base: &Digest,
    upper: &Path,
    changes: &LayerChanges,
) -> Result<(Digest, TreeEntry), StoreError> {
    let mut all: Vec<Change<'_>> = Vec::new();
    for (paths, is_removed) in [(&changes.removed, true), (&changes.staged, false)] {
        all.extend(paths.iter().map(|path| Change {
            path: normal(path),
            is_removed,
        }));
    }
    // By names from the root on, as a walk would come to them; what is removed goes first.
    all.sort_by(|a, b| (a.path, !a.is_removed).cmp(&(b.path, !b.is_removed)));
    let root = directory::read_root(&mut ingest.objects, base)?;
    ingest.pages_are_new = true;
    let mut editor = Editor::new(ingest, upper, root)?;
    for change in &all {
        editor.apply(change)?;
    }
    let root = editor.finish()?;
    let root = put_root(ingest, root);
    ingest.pages_are_new = false;
    ingest.known.clear();
    root
}

struct Change<'a> {
    path: &'a Path,
    is_removed: bool,
}

fn normal(path: &Path) -> &Path {
    path.strip_prefix(".").unwrap_or(path)
}

/// The way from the root to the directory that is being edited.
struct Editor<'a> {
    ingest: &'a mut Ingest,
    upper: &'a Path,
    dirs: Vec<Dir>,
    path: PathBuf,
    staged: Staged,
    links: Links,
}

/// A directory that is being edited.
struct Dir {
    /// Its own attributes.
    entry: TreeEntry,
    /// The names that it had.
    base: Option<DirRef>,
    edits: Vec<(Vec<u8>, Option<TreeEntry>)>,
}

impl<'a> Editor<'a> {
    fn new(ingest: &'a mut Ingest, upper: &'a Path, root: TreeEntry) -> Result<Self, StoreError> {
        let staged = Staged::open(upper)?;
        let base = root.dir();
        Ok(Self {
            ingest,
            upper,
            dirs: vec![Dir {
                entry: root,
                base,
                edits: Vec::new(),
            }],
            path: PathBuf::new(),
            staged,
            links: Links::default(),
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
            return match change.is_removed {
                true => Err(unfit(&shown, "the root cannot be removed")),
                false => self.root(),
            };
        };
        let there = self.go_to(parent)?;
        let name = change.path.file_name().unwrap_or_default();
        match change.is_removed {
            // It went with something above it.
            true if !there => Ok(()),
            false if !there => Err(unfit(
                &shown,
                "its directory is none in the checkpoint before, and is not staged",
            )),
            true => self.edit(name.as_bytes().to_vec(), None),
            false => self.stage(name.as_bytes(), &shown),
        }
    }

    /// The root's own attributes.
    fn root(&mut self) -> Result<(), StoreError> {
        let fd = self.staged.top(self.upper)?;
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
        let Some(dir) = self.dirs.last_mut() else {
            return Ok(());
        };
        match dir.edits.last_mut() {
            // Removed, and staged anew.
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
            (_, Some(base)) => directory::find(&mut self.ingest.objects, base, name),
            (_, None) => Ok(None),
        }
    }

    fn stage(&mut self, name: &[u8], shown: &Path) -> Result<(), StoreError> {
        let before = self.before(name)?;
        let c_name = CString::new(name).map_err(|_| unfit(shown, "its name"))?;
        let parent = self.staged.top(shown)?;
        let fd = tree::look_at(parent, &c_name).map_err(failed("open", shown))?;
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", shown))?;
        let found = found_at(fd.as_fd(), &c_name, &stat, shown);
        if found.kind() == FileType::Directory {
            let entry = attributes(&found, Node::Fifo)?;
            return self.push(name, entry, before.and_then(|before| before.dir()));
        }
        let entry = match self.links.again(&found) {
            Some(entry) => entry,
            None => {
                let mut entry = self.ingest.entry(&found, before.as_ref())?;
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
        self.staged.push(name, &self.upper.join(&self.path))?;
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
        entry.node = Node::Directory(edit(self.ingest, base.as_ref(), edits)?);
        if !self.dirs.is_empty() {
            self.edit(entry.name.clone(), Some(entry.clone()))?;
            let shown = self.upper.join(&self.path);
            self.staged.pop(&shown)?;
            self.path.pop();
        }
        Ok(entry)
    }

    fn finish(mut self) -> Result<TreeEntry, StoreError> {
        while self.dirs.len() > 1 {
            self.pop()?;
        }
        self.links.finish()?;
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

/// The staged copy along the way. It need not have directories below which nothing is staged.
struct Staged {
    dirs: DirStack,
    /// How many of the deepest levels are not there.
    absent: usize,
    /// There is no staged copy at all.
    is_empty: bool,
}

impl Staged {
    fn open(upper: &Path) -> Result<Self, StoreError> {
        let mut staged = Self {
            dirs: DirStack::default(),
            absent: 0,
            is_empty: false,
        };
        match tree::open_root(upper) {
            Ok(root) => staged.enter(root, upper)?,
            Err(TreeError::Io {
                source: Errno::NOENT,
                ..
            }) => staged.is_empty = true,
            Err(e) => return Err(e.into()),
        }
        Ok(staged)
    }

    fn enter(&mut self, dir: OwnedFd, shown: &Path) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(&dir).map_err(failed("stat", shown))?;
        self.dirs.push(dir, FileId::from(&stat));
        Ok(())
    }

    fn top(&self, shown: &Path) -> Result<BorrowedFd<'_>, StoreError> {
        match self.absent > 0 || self.is_empty {
            true => Err(unfit(shown, "it is named as staged, and is not there")),
            false => Ok(self.dirs.top().map_err(failed("reach", shown))?),
        }
    }

    fn push(&mut self, name: &[u8], shown: &Path) -> Result<(), StoreError> {
        if self.absent > 0 || self.is_empty {
            self.absent += 1;
            return Ok(());
        }
        let name = CString::new(name).map_err(|_| unfit(shown, "its name"))?;
        let top = self.dirs.top().map_err(failed("reach", shown))?;
        let dir = match tree::look_at(top, &name) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => {
                self.absent = 1;
                return Ok(());
            }
            Err(e) => return Err(failed("open", shown)(e).into()),
        };
        match tree::open_dir(&dir) {
            Ok(dir) => Ok(self.enter(dir, shown)?),
            Err(e) => Err(failed("open", shown)(e).into()),
        }
    }

    fn pop(&mut self, shown: &Path) -> Result<(), StoreError> {
        match self.absent {
            0 => {
                self.dirs.pop().map_err(failed("leave", shown))?;
            }
            _ => self.absent -= 1,
        }
        Ok(())
    }
}
