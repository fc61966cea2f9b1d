//! Visiting everything in a tree.

use std::{
    ffi::{CStr, CString, OsStr},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{FileType, RawDir, SeekFrom, Stat},
    io::Errno,
};

use super::{DirStack, FileId, Found, ShownPath, TreeError, failed, look_at, open_dir};

/// Deeper trees are refused, except by `remove_tree`. Linux has no limit of its own; tools cope
/// with a few thousand levels, and the kernel's own work grows with the square (0.4 ms for one
/// `rmdir` 10,000 levels deep).
const MAX_DEPTH: usize = 16 << 10;
/// Bound on the memory for names that were listed and not yet visited.
const MAX_PENDING_NAMES: usize = 512 << 20;
/// So many names of a directory are listed before they are removed, and it is listed again.
const REMOVED_AT_ONCE: usize = 64 << 10;

/// What to do at each inode. Names of one directory come in byte order.
pub(crate) trait Visitor {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError>;
    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError>;
    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError>;

    /// Another file system is mounted at a name. The walk never enters it.
    fn mount(&mut self, _depth: usize, _name: &CStr, path: &Path) -> Result<(), TreeError> {
        Err(failed("open", path)(Errno::XDEV))
    }
}

/// Whether an inode may differ when the visitor is done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Size, mtime and ctime have to be what they were.
    Unchanged,
    /// Something may write into the tree; it is only looked at.
    Changes,
    /// The visitor removes what it visits. Nothing is too large or too deep for that.
    Removal,
}

struct Level {
    name: CString,
    stat: Stat,
    /// In reverse order: the next one is last.
    names: Vec<CString>,
    /// Not all names were listed.
    more: bool,
}

/// Visits everything below `root`, parents first on `enter`, last on `leave`.
pub(crate) fn walk(
    root: OwnedFd,
    shown: &Path,
    expect: Expect,
    stop: &dyn Fn() -> bool,
    visitor: &mut dyn Visitor,
) -> Result<(), TreeError> {
    Walk {
        dirs: DirStack::default(),
        levels: Vec::new(),
        path: shown.as_os_str().as_bytes().to_vec(),
        pending: 0,
        expect,
        visitor,
    }
    .run(root, stop)
}

struct Walk<'v> {
    dirs: DirStack,
    levels: Vec<Level>,
    path: Vec<u8>,
    pending: usize,
    expect: Expect,
    visitor: &'v mut dyn Visitor,
}

impl Walk<'_> {
    fn run(mut self, root: OwnedFd, stop: &dyn Fn() -> bool) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(&root).map_err(failed("stat", self.shown()))?;
        self.enter(root, CString::default(), stat)?;
        while let Some(level) = self.levels.last_mut() {
            if stop() {
                return Err(TreeError::Stopped {
                    path: ShownPath::new(self.shown()),
                });
            }
            let Some(name) = level.names.pop() else {
                match level.more {
                    true => self.list_again()?,
                    false => self.leave()?,
                }
                continue;
            };
            self.pending -= cost(&name);
            self.path.push(b'/');
            self.path.extend_from_slice(name.as_bytes());
            self.step(name)?;
        }
        Ok(())
    }

    fn shown(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.path))
    }

    fn step(&mut self, name: CString) -> Result<(), TreeError> {
        let parent = self.dirs.top().map_err(failed("reach", self.shown()))?;
        let fd = match look_at(parent, &name) {
            Err(Errno::XDEV) => {
                let path = Path::new(OsStr::from_bytes(&self.path));
                self.visitor.mount(self.levels.len(), &name, path)?;
                self.ascend(&name);
                return Ok(());
            }
            fd => fd.map_err(failed("open", self.shown()))?,
        };
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", self.shown()))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let dir = open_dir(&fd).map_err(failed("open", self.shown()))?;
            return self.enter(dir, name, stat);
        }
        let found = Found {
            parent: Some(parent),
            name: &name,
            fd: fd.as_fd(),
            stat: &stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        self.visitor.other(&found)?;
        still_the_same(&found, self.expect)?;
        self.ascend(&name);
        Ok(())
    }

    fn enter(&mut self, dir: OwnedFd, name: CString, stat: Stat) -> Result<(), TreeError> {
        if self.levels.len() >= MAX_DEPTH && self.expect != Expect::Removal {
            return Err(self.beyond(MAX_DEPTH, "levels"));
        }
        let parent = match self.levels.len() {
            0 => None,
            _ => Some(self.dirs.top().map_err(failed("reach", self.shown()))?),
        };
        let found = Found {
            parent,
            name: &name,
            fd: dir.as_fd(),
            stat: &stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        self.visitor.enter(&found)?;
        let (names, more) = self.list(dir.as_fd())?;
        self.pending += names.iter().map(|n| cost(n)).sum::<usize>();
        self.dirs.push(dir, FileId::from(&stat));
        self.levels.push(Level {
            name,
            stat,
            names,
            more,
        });
        Ok(())
    }

    fn list_again(&mut self) -> Result<(), TreeError> {
        let dir = self.dirs.top().map_err(failed("reach", self.shown()))?;
        rustix::fs::seek(dir, SeekFrom::Start(0)).map_err(failed("list", self.shown()))?;
        let (names, more) = self.list(dir)?;
        self.pending += names.iter().map(|n| cost(n)).sum::<usize>();
        if let Some(level) = self.levels.last_mut() {
            level.names = names;
            level.more = more;
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), TreeError> {
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let dir = self.dirs.pop().map_err(|e| match e {
            Errno::STALE => TreeError::Changed {
                path: ShownPath::new(self.shown()),
                what: "it was moved",
            },
            source => failed("leave", self.shown())(source),
        })?;
        let found = Found {
            parent: self.dirs.top().ok(),
            name: &level.name,
            fd: dir.as_fd(),
            stat: &level.stat,
            path: Path::new(OsStr::from_bytes(&self.path)),
            depth: self.levels.len(),
        };
        still_the_same(&found, self.expect)?;
        self.visitor.leave(&found)?;
        self.ascend(&level.name);
        Ok(())
    }

    fn ascend(&mut self, name: &CStr) {
        let shorter = self.path.len().saturating_sub(name.count_bytes() + 1);
        self.path.truncate(shorter);
    }

    fn beyond(&self, limit: usize, what: &'static str) -> TreeError {
        TreeError::Limit {
            path: ShownPath::new(self.shown()),
            limit,
            what,
        }
    }

    /// The names of a directory, the last in byte order first, and whether there are more.
    fn list(&self, dir: BorrowedFd<'_>) -> Result<(Vec<CString>, bool), TreeError> {
        let mut buf = [MaybeUninit::uninit(); 16 << 10];
        let mut entries = RawDir::new(dir, &mut buf);
        let mut names = Vec::new();
        let mut pending = self.pending;
        let mut more = false;
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(failed("list", self.shown()))?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if self.expect == Expect::Removal && names.len() >= REMOVED_AT_ONCE {
                more = true;
                break;
            }
            pending += cost(name);
            if pending > MAX_PENDING_NAMES && self.expect != Expect::Removal {
                return Err(self.beyond(MAX_PENDING_NAMES, "bytes of names"));
            }
            names.push(name.to_owned());
        }
        names.sort_unstable_by(|a, b| b.cmp(a));
        Ok((names, more))
    }
}

/// What a listed name takes of memory: itself, its terminator, a fat pointer.
fn cost(name: &CStr) -> usize {
    name.count_bytes() + 1 + size_of::<CString>()
}

/// Nobody wrote since the inode was first looked at, as far as it shows.
pub(crate) fn still_the_same(found: &Found<'_>, expect: Expect) -> Result<(), TreeError> {
    if expect != Expect::Unchanged {
        return Ok(());
    }
    let (then, now) = (
        found.stat,
        rustix::fs::fstat(found.fd).map_err(found.err("stat"))?,
    );
    if then.st_size != now.st_size {
        return Err(found.changed("size"));
    }
    if (then.st_mtime, then.st_mtime_nsec) != (now.st_mtime, now.st_mtime_nsec) {
        return Err(found.changed("mtime"));
    }
    if (then.st_ctime, then.st_ctime_nsec) != (now.st_ctime, now.st_ctime_nsec) {
        return Err(found.changed("ctime"));
    }
    Ok(())
}
