//! Listing names without a look at their inodes.

use std::{
    collections::HashSet,
    ffi::{CStr, CString, OsStr},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, RawDir};

use crate::tree::{self, DirStack, FileId, ShownPath, TreeError, failed, look_at};

/// The same bounds as those of a walk.
const MAX_NAMES: usize = 512 << 20;
const MAX_DEPTH: usize = 16 << 10;

/// One name as its directory tells it.
pub(super) struct Listed {
    pub(super) name: CString,
    pub(super) ino: u64,
}

/// The names of a directory in byte order.
pub(super) fn list(dir: BorrowedFd<'_>, shown: &Path) -> Result<Vec<Listed>, TreeError> {
    let mut all = Vec::new();
    let mut bytes = 0;
    each(dir, shown, |name, ino, _| {
        bytes += name.count_bytes() + size_of::<Listed>();
        all.push(Listed {
            name: name.to_owned(),
            ino,
        });
        match bytes > MAX_NAMES {
            true => Err(beyond(shown, MAX_NAMES, "bytes of names")),
            false => Ok(()),
        }
    })?;
    all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn each(
    dir: BorrowedFd<'_>,
    shown: &Path,
    mut visit: impl FnMut(&CStr, u64, FileType) -> Result<(), TreeError>,
) -> Result<(), TreeError> {
    let mut buf = [MaybeUninit::uninit(); 16 << 10];
    let mut entries = RawDir::new(dir, &mut buf);
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(failed("list", shown))?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            visit(name, entry.ino(), entry.file_type())?;
        }
    }
    Ok(())
}

fn beyond(shown: &Path, limit: usize, what: &'static str) -> TreeError {
    TreeError::Limit {
        path: ShownPath::new(shown),
        limit,
        what,
    }
}

/// The directories (relative paths) that hold names of the inodes wanted. Lists the whole tree.
pub(super) fn find(
    root: &OwnedFd,
    shown: &Path,
    wanted: &HashSet<u64>,
    stop: &dyn Fn() -> bool,
) -> Result<Vec<PathBuf>, TreeError> {
    let mut search = Search {
        wanted,
        missing: wanted.clone(),
        hits: Vec::new(),
        dirs: DirStack::default(),
        levels: Vec::new(),
        path: Vec::new(),
        shown,
    };
    search.enter(root)?;
    while let Some(todo) = search.levels.last_mut() {
        if stop() {
            return Err(TreeError::Stopped {
                path: ShownPath::new(shown),
            });
        }
        match todo.pop() {
            Some(name) => search.down(&name)?,
            None => search.up()?,
        }
    }
    Ok(search.hits)
}

struct Search<'a> {
    wanted: &'a HashSet<u64>,
    missing: HashSet<u64>,
    hits: Vec<PathBuf>,
    dirs: DirStack,
    /// Of each level the directories that were not entered yet.
    levels: Vec<Vec<CString>>,
    path: Vec<u8>,
    shown: &'a Path,
}

impl Search<'_> {
    fn enter(&mut self, dir: &OwnedFd) -> Result<(), TreeError> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(beyond(self.shown, MAX_DEPTH, "levels"));
        }
        let shown = self.shown;
        let dir = tree::open_dir(dir).map_err(failed("open a directory of", shown))?;
        let stat = rustix::fs::fstat(&dir).map_err(failed("stat a directory of", shown))?;
        let (mut below, mut hit) = (Vec::new(), false);
        each(dir.as_fd(), shown, |name, ino, kind| {
            hit |= self.wanted.contains(&ino);
            self.missing.remove(&ino);
            if matches!(kind, FileType::Directory | FileType::Unknown) {
                below.push(name.to_owned());
            }
            Ok(())
        })?;
        if hit {
            self.hits.push(PathBuf::from(OsStr::from_bytes(&self.path)));
        }
        if self.missing.is_empty() {
            below.clear();
            self.levels.iter_mut().for_each(Vec::clear);
        }
        self.dirs.push(dir, FileId::from(&stat));
        self.levels.push(below);
        Ok(())
    }

    fn down(&mut self, name: &CStr) -> Result<(), TreeError> {
        let shown = self.shown;
        let dir = self.dirs.top().map_err(failed("reach", shown))?;
        let fd = look_at(dir, name).map_err(failed("open a name of", shown))?;
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat a name of", shown))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(());
        }
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(name.to_bytes());
        self.enter(&fd)
    }

    fn up(&mut self) -> Result<(), TreeError> {
        self.levels.pop();
        self.dirs.pop().map_err(failed("leave", self.shown))?;
        let parent = self.path.iter().rposition(|b| *b == b'/').unwrap_or(0);
        self.path.truncate(parent);
        Ok(())
    }
}
