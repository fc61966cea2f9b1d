//! Copying what has changed of a writable layer, and nothing else.

use std::{
    ffi::{CString, OsStr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

use super::{
    CaptureStats, Prestaged,
    copy::Copier,
    layer::{Comparison, Staged},
};
use crate::tree::{
    self, DirStack, Expect, FileId, Found, ShownPath, TreeError, Visitor, failed, still_the_same,
};

/// What makes a layer out of the one that it was: paths relative to its root (empty: the root
/// itself), in byte order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerChanges {
    /// Gone, with all that was below them.
    pub removed: Vec<PathBuf>,
    /// Those of which there is a copy. It takes the place of what was at its path. Of a directory that was
    /// a directory it is the attributes alone: the names in it have paths of their own here. One that is
    /// new, or was something else, lists all its names, too. All names of an inode are here, or none.
    pub staged: Vec<PathBuf>,
}

/// Copies to `dest`, which is made or is an empty directory, what differs by `comparison` in the layer
/// at `upper`, below directories that merely lead there. Large files are taken from `prestaged` as far
/// as they are there.
///
/// The rules are those of [`capture`](super::capture): nothing may write meanwhile, and what is noticed
/// of it is an error.
pub fn capture_changes(
    upper: &Path,
    dest: &Path,
    comparison: &Comparison,
    prestaged: &mut Prestaged,
    stop: &dyn Fn() -> bool,
) -> Result<(LayerChanges, CaptureStats), TreeError> {
    let mut staged = comparison.staged();
    // Parents before their children, and what is below one directory together.
    staged.sort_unstable_by(|a, b| a.path.cmp(b.path));
    let mut stager = Stager::begin(upper, dest, prestaged, stop)?;
    for one in &staged {
        stager.stage(one)?;
    }
    let stats = stager.finish()?;
    let mut changes = LayerChanges {
        removed: comparison.removed(),
        staged: staged.into_iter().map(|one| one.path.to_owned()).collect(),
    };
    let bytes = |a: &PathBuf, b: &PathBuf| a.as_os_str().cmp(b.as_os_str());
    changes.removed.sort_unstable_by(bytes);
    changes.staged.sort_unstable_by(bytes);
    Ok((changes, stats))
}

/// A directory on the way down to what is copied.
struct Level {
    name: CString,
    stat: Stat,
    /// It is copied itself, and does not merely lead there.
    staged: bool,
}

struct Stager<'s> {
    copier: Copier<'s>,
    source: DirStack,
    levels: Vec<Level>,
    /// Where it is, for messages.
    path: Vec<u8>,
    stop: &'s dyn Fn() -> bool,
}

impl<'s> Stager<'s> {
    fn begin(
        upper: &Path,
        dest: &Path,
        prestaged: &'s mut Prestaged,
        stop: &'s dyn Fn() -> bool,
    ) -> Result<Self, TreeError> {
        let root = tree::open_root(upper)?;
        let stat = rustix::fs::fstat(&root).map_err(failed("stat", upper))?;
        let mut stager = Self {
            copier: Copier::into(dest, prestaged, stop)?,
            source: DirStack::default(),
            levels: Vec::new(),
            path: upper.as_os_str().as_bytes().to_vec(),
            stop,
        };
        stager.enter(root, CString::default(), stat, false)?;
        Ok(stager)
    }

    fn stage(&mut self, one: &Staged<'_>) -> Result<(), TreeError> {
        let names: Vec<&OsStr> = one.path.components().map(Component::as_os_str).collect();
        let Some((last, above)) = names.split_last() else {
            // Its copy has been made; the attributes come when it is left.
            if let Some(root) = self.levels.first_mut() {
                root.staged = true;
            }
            return Ok(());
        };
        let below = self.levels.iter().skip(1).zip(above);
        let common = below
            .take_while(|(level, name)| level.name.as_bytes() == name.as_bytes())
            .count();
        while self.levels.len() > common + 1 {
            self.leave()?;
        }
        for name in &above[common..] {
            self.step(name, None)?;
        }
        self.step(last, Some(one.kind))
    }

    /// Copies a name of the directory that it is in, or (without a kind) merely enters it.
    fn step(&mut self, name: &OsStr, kind: Option<FileType>) -> Result<(), TreeError> {
        self.path.push(b'/');
        self.path.extend_from_slice(name.as_bytes());
        if (self.stop)() {
            return Err(TreeError::Stopped {
                path: ShownPath::new(self.shown()),
            });
        }
        let invalid = |_| failed("open", self.shown())(Errno::INVAL);
        let name = CString::new(name.as_bytes()).map_err(invalid)?;
        let parent = self.source.top().map_err(failed("reach", self.shown()))?;
        let fd = tree::look_at(parent, &name).map_err(|e| self.moved("open", e))?;
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", self.shown()))?;
        let now = FileType::from_raw_mode(stat.st_mode);
        if now != kind.unwrap_or(FileType::Directory) {
            return Err(self.moved("enter", Errno::NOTDIR));
        }
        if now == FileType::Directory {
            let dir = tree::open_dir(&fd).map_err(failed("open", self.shown()))?;
            return self.enter(dir, name, stat, kind.is_some());
        }
        let found = Found {
            parent: Some(parent),
            name: &name,
            fd: fd.as_fd(),
            stat: &stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        self.copier.other(&found)?;
        still_the_same(&found, Expect::Unchanged)?;
        self.ascend(name.count_bytes());
        Ok(())
    }

    fn enter(
        &mut self,
        dir: OwnedFd,
        name: CString,
        stat: Stat,
        staged: bool,
    ) -> Result<(), TreeError> {
        let found = Found {
            parent: None,
            name: &name,
            fd: dir.as_fd(),
            stat: &stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        self.copier.enter(&found)?;
        self.source.push(dir, FileId::from(&stat));
        self.levels.push(Level { name, stat, staged });
        Ok(())
    }

    fn leave(&mut self) -> Result<(), TreeError> {
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let dir = self.source.pop().map_err(|e| self.moved("leave", e))?;
        let found = Found {
            parent: None,
            name: &level.name,
            fd: dir.as_fd(),
            stat: &level.stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        if level.staged {
            still_the_same(&found, Expect::Unchanged)?;
            self.copier.leave(&found)?;
        } else {
            self.copier.passed(&found)?;
        }
        self.ascend(level.name.count_bytes());
        Ok(())
    }

    fn finish(mut self) -> Result<CaptureStats, TreeError> {
        while !self.levels.is_empty() {
            self.leave()?;
        }
        self.copier.finish()
    }

    /// What the comparison has found is not there any more.
    fn moved(&self, step: &'static str, errno: Errno) -> TreeError {
        match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE => TreeError::Changed {
                path: ShownPath::new(self.shown()),
                what: "it was moved",
            },
            errno => failed(step, self.shown())(errno),
        }
    }

    fn shown(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.path))
    }

    fn ascend(&mut self, name: usize) {
        let shorter = self.path.len().saturating_sub(name + 1);
        self.path.truncate(shorter);
    }
}
