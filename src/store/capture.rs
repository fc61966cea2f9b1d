//! From a sandbox's writable layer straight into a pack.
//!
//! A sandbox should stand still for as long as its small changes take, not for as long as a gigabyte
//! takes. So files can be read ahead, while it runs, *after* the kernel has begun a new list of changed
//! inodes. In the freeze what was read counts if the inode is what it was then and is not on the new
//! list ([`Pending::distrust`](super::Pending::distrust)); any other is read anew. What turns out to be
//! of no use is in the pack nevertheless, and nothing refers to it.

use std::{
    collections::HashMap,
    ffi::CStr,
    path::{Path, PathBuf},
};

use parking_lot::{ArcMutexGuard, RawMutex};
use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

use super::{
    Checkpoint, Digest, LayerChanges, StoreError, Tree,
    content::{Cut, FILE_CHUNK},
    entry::{Content, Node, TreeEntry},
    files,
    ingest::{Ingest, attributes},
    layer,
};
use crate::tree::{self, Expect, FileId, Found, TreeError, Visitor, still_the_same, wide};

/// Which part of a writable layer a capture takes.
#[derive(Debug, Clone, Copy)]
pub enum Part<'a> {
    /// All of it.
    Whole,
    /// What differs from that of an earlier checkpoint.
    Changes {
        /// The earlier one.
        base: &'a Checkpoint,
        /// What differs.
        changes: &'a LayerChanges,
    },
}

/// What a capture took.
#[derive(Debug, Default)]
pub struct Captured {
    /// How many names, the root included. Of a directory whose names did not change, only itself.
    pub names: u64,
    /// Bytes of the files among them that are not zeros.
    pub bytes: u64,
    /// What names the content of each file among them, by inode: device and number.
    pub contents: HashMap<(u64, u64), Digest>,
}

/// What is read ahead of a capture.
#[derive(Debug, Clone)]
pub enum Ahead {
    /// Every file.
    All,
    /// The files at these paths, relative to the layer.
    Files(Vec<PathBuf>),
}

/// A pack that is being filled.
pub(super) struct Filling {
    pub(super) file: Temporary,
    pub(super) ingest: Ingest,
    pub(super) ahead: ReadAhead,
    /// The root of the layer that was captured.
    pub(super) layer: Option<(Digest, TreeEntry)>,
    /// Nothing that the pack is about to refer to may go meanwhile.
    pub(super) _packs: ArcMutexGuard<RawMutex, ()>,
}

/// The file that a pack is written to until it has its name. Removed when this is dropped.
#[derive(Debug)]
pub(super) struct Temporary(pub(super) PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may have its name by now; and what stays, the next writer removes.
        let _ = files::remove(&self.0);
    }
}

/// Contents that were read before anything stood still.
#[derive(Default)]
pub(super) struct ReadAhead(HashMap<FileId, (Then, Content)>);

/// What an inode was when it was read.
#[derive(Debug, PartialEq, Eq)]
struct Then {
    size: i64,
    mtime: (i64, u64),
    ctime: (i64, u64),
}

impl Then {
    fn of(stat: &Stat) -> Self {
        Self {
            size: stat.st_size,
            mtime: (stat.st_mtime, wide(stat.st_mtime_nsec)),
            ctime: (stat.st_ctime, wide(stat.st_ctime_nsec)),
        }
    }
}

impl ReadAhead {
    /// The content of a file that is what it was.
    fn of(&self, stat: &Stat) -> Option<Content> {
        let (then, content) = self.0.get(&FileId::from(stat))?;
        (*then == Then::of(stat)).then_some(*content)
    }

    pub(super) fn distrust(&mut self, is_written: impl Fn(u64, u64) -> bool) {
        self.0.retain(|id, _| {
            let (dev, ino) = id.parts();
            !is_written(dev, ino)
        });
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// How a capture goes about it.
pub(super) struct Taking<'c> {
    pub(super) ingest: &'c mut Ingest,
    ahead: &'c ReadAhead,
    captured: Captured,
    pub(super) stop: &'c dyn Fn() -> bool,
}

impl Taking<'_> {
    /// Everything about an inode but its name and what a directory holds. `before`: what the name
    /// stood for in the checkpoint before. An error if it changes meanwhile.
    pub(super) fn entry(
        &mut self,
        found: &Found<'_>,
        before: Option<&TreeEntry>,
    ) -> Result<TreeEntry, StoreError> {
        let node = match found.kind() {
            FileType::RegularFile => Node::File(self.file(found, before)?),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(found.fd, c"", Vec::new())
                    .map_err(found.err("read the link"))?;
                Node::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Node::CharDevice(found.stat.st_rdev),
            FileType::BlockDevice => Node::BlockDevice(found.stat.st_rdev),
            FileType::Fifo => Node::Fifo,
            FileType::Socket => Node::Socket,
            kind => {
                return Err(StoreError::Unfit {
                    path: found.path.to_owned(),
                    reason: format!("it is a {kind:?}"),
                });
            }
        };
        let entry = attributes(found, node)?;
        still_the_same(found, Expect::Unchanged)?;
        Ok(entry)
    }

    fn file(
        &mut self,
        found: &Found<'_>,
        before: Option<&TreeEntry>,
    ) -> Result<Content, StoreError> {
        let content = match self.ahead.of(found.stat) {
            Some(content) => content,
            None => self
                .ingest
                .file(found, FILE_CHUNK, cut(before), self.stop)?,
        };
        let id = FileId::from(found.stat).parts();
        self.captured.contents.insert(id, content.root);
        self.captured.bytes += content.data;
        Ok(content)
    }

    /// Counts a name.
    pub(super) fn count(&mut self) {
        self.captured.names += 1;
    }
}

fn cut(before: Option<&TreeEntry>) -> Option<Cut> {
    match before?.node {
        Node::File(content) => Some(Cut::file(content)),
        _ => None,
    }
}

impl Filling {
    /// Captures the layer at `upper`. Only the last call counts.
    pub(super) fn capture(
        &mut self,
        upper: &Path,
        part: Part<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Captured, StoreError> {
        self.layer = None;
        let mut taking = Taking {
            ingest: &mut self.ingest,
            ahead: &self.ahead,
            captured: Captured::default(),
            stop,
        };
        let root = match part {
            Part::Whole => layer::whole(&mut taking, upper)?,
            Part::Changes { base, changes } => {
                let before = base.manifest.contents.upper.as_ref();
                let before = before.ok_or_else(|| StoreError::Unfit {
                    path: upper.to_owned(),
                    reason: format!("turn {} has no files to build upon", base.turn()),
                })?;
                layer::delta(&mut taking, &before.digest, upper, changes)?
            }
        };
        let captured = taking.captured;
        self.layer = Some(root);
        Ok(captured)
    }

    /// Reads files of the layer at `upper` ahead. `before`: the files of the checkpoint before. One
    /// that changes meanwhile is left to the capture, and so are inodes of which `is_written` says
    /// that they can change without a sign.
    pub(super) fn read_ahead(
        &mut self,
        upper: &Path,
        which: &Ahead,
        before: Option<Tree>,
        is_written: &dyn Fn(u64, u64) -> bool,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), StoreError> {
        let mut reader = AheadReader {
            ingest: &mut self.ingest,
            ahead: &mut self.ahead,
            before,
            prefix: upper.as_os_str().len() + 1,
            is_written,
            stop,
            failed: None,
        };
        let root = tree::open_root(upper)?;
        match which {
            Ahead::All => {
                let walked = tree::walk(root, upper, Expect::Changes, stop, &mut reader);
                if let Some(e) = reader.failed.take() {
                    return Err(e);
                }
                // What comes and goes meanwhile is the capture's affair.
                walked.or_else(|e| if is_passing(&e) { Ok(()) } else { Err(e) })?;
            }
            Ahead::Files(paths) => {
                for path in paths {
                    let shown = upper.join(path);
                    let Some((fd, stat)) = tree::reach(&root, path, &shown)? else {
                        continue;
                    };
                    reader.read(&tree::found_at(&fd, &stat, &shown))?;
                }
            }
        }
        // The freeze begins with room for what comes in it.
        self.ingest.writer.write_through()
    }
}

/// Somebody renamed or removed what was being read.
fn is_passing(e: &TreeError) -> bool {
    match e {
        TreeError::Changed { .. } => true,
        TreeError::Io { source, .. } => {
            matches!(
                *source,
                Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::LOOP
            )
        }
        _ => false,
    }
}

struct AheadReader<'r> {
    ingest: &'r mut Ingest,
    ahead: &'r mut ReadAhead,
    before: Option<Tree>,
    /// How long the part of a path is that is not the layer's own.
    prefix: usize,
    is_written: &'r dyn Fn(u64, u64) -> bool,
    stop: &'r dyn Fn() -> bool,
    failed: Option<StoreError>,
}

impl AheadReader<'_> {
    fn read(&mut self, found: &Found<'_>) -> Result<(), StoreError> {
        let id = FileId::from(found.stat);
        let (dev, ino) = id.parts();
        let is_file = found.kind() == FileType::RegularFile;
        if !is_file || self.ahead.0.contains_key(&id) || (self.is_written)(dev, ino) {
            return Ok(());
        }
        let before = self.before(found);
        let read = self
            .ingest
            .file(found, FILE_CHUNK, cut(before.as_ref()), self.stop);
        match read {
            Ok(content) => {
                if still_the_same(found, Expect::Unchanged).is_ok() {
                    self.ahead.0.insert(id, (Then::of(found.stat), content));
                }
                Ok(())
            }
            Err(StoreError::Tree(e)) if is_passing(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn before(&mut self, found: &Found<'_>) -> Option<TreeEntry> {
        use std::os::unix::ffi::OsStrExt;

        let path = found.path.as_os_str().as_bytes().get(self.prefix..)?;
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        // For the order of what is looked up alone.
        self.before.as_mut()?.lookup(path).ok()?
    }
}

impl Visitor for AheadReader<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.read(found).map_err(|e| {
            self.failed.get_or_insert(e);
            found.changed("it cannot be kept")
        })
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn mount(&mut self, _: usize, _: &CStr, _: &Path) -> Result<(), TreeError> {
        // The capture refuses it.
        Ok(())
    }
}
