//! Walking trees that a hostile sandbox has made.
//!
//! Every step is one `openat2` of one name below an open directory, and may neither follow a
//! symbolic link nor cross a mount. An inode is looked at (`O_PATH`, `fstat`) before it is opened,
//! so that no fifo blocks and no device is touched. The walk keeps its own stack: deep trees cost
//! memory in proportion to their depth, and a bounded number of descriptors.
//!
//! This module knows nothing of overlays or checkpoints; the store walks its trees with it too.

use std::{
    cell::Cell,
    ffi::{CStr, CString, OsStr},
    fmt,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Stat},
    io::Errno,
};

/// Deeper trees are refused, except by `remove_tree`. Linux has no limit of its own; tools cope
/// with a few thousand levels, and the kernel's own work grows with the square (0.4 ms for one
/// `rmdir` 10,000 levels deep).
const MAX_DEPTH: usize = 16 << 10;
/// How often the kernel is asked again for a path that a race has disturbed.
const OPEN_TRIES: u32 = 1000;
/// How many levels of a deep tree are kept open; the others are reopened through `..`.
const OPEN_LEVELS: usize = 64;
/// Bound on the memory for names that were listed and not yet visited.
const MAX_PENDING_NAMES: usize = 512 << 20;
/// So many names of a directory are listed before they are removed, and it is listed again.
const REMOVED_AT_ONCE: usize = 64 << 10;
/// How much of a path is shown in an error.
const SHOWN_PATH: usize = 512;
/// The kernel's bound for one value and for one list (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A step of a walk that failed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A system call failed.
    #[error("cannot {step} {path}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Where, escaped and shortened.
        path: ShownPath,
        /// The kernel's answer.
        source: Errno,
    },
    /// Something wrote into the tree during the walk.
    #[error("{path} changed while it was read ({what})")]
    Changed {
        /// Where, escaped and shortened.
        path: ShownPath,
        /// Which attribute gave it away.
        what: &'static str,
    },
    /// The tree is larger than what is accepted from a sandbox.
    #[error("{path}: the tree exceeds the limit of {limit} {what}")]
    Limit {
        /// Where, escaped and shortened.
        path: ShownPath,
        /// The bound.
        limit: usize,
        /// What is bounded.
        what: &'static str,
    },
    /// The caller asked for an end.
    #[error("stopped on request at {path}")]
    Stopped {
        /// Where, escaped and shortened.
        path: ShownPath,
    },
}

/// A path as errors show it: quoted, control characters escaped, its middle left out if long.
#[derive(Clone, PartialEq, Eq)]
pub struct ShownPath(String);

impl ShownPath {
    pub(crate) fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        if bytes.len() <= SHOWN_PATH {
            return Self(format!("{path:?}"));
        }
        let (head, tail) = (
            &bytes[..SHOWN_PATH / 2],
            &bytes[bytes.len() - SHOWN_PATH / 2..],
        );
        Self(format!(
            "{:?}…{:?}",
            OsStr::from_bytes(head),
            OsStr::from_bytes(tail)
        ))
    }
}

impl fmt::Display for ShownPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ShownPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Makes a [`TreeError::Io`] out of a kernel error, and costs nothing where there is none.
pub(crate) fn failed(step: &'static str, path: &Path) -> impl FnOnce(Errno) -> TreeError {
    move |source| TreeError::Io {
        step,
        path: ShownPath::new(path),
        source,
    }
}

/// Fields of `struct stat` have other widths on other architectures.
pub(crate) fn wide(field: impl Into<u64>) -> u64 {
    field.into()
}

/// Which inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    dev: u64,
    ino: u64,
}

impl FileId {
    /// Device and number.
    pub(crate) fn parts(self) -> (u64, u64) {
        (self.dev, self.ino)
    }
}

impl From<&Stat> for FileId {
    fn from(stat: &Stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }
}

/// The way from a tree's root down to one directory, of which the deepest levels are open.
#[derive(Default)]
pub(crate) struct DirStack {
    slots: Vec<(Option<OwnedFd>, FileId)>,
}

impl DirStack {
    pub(crate) fn push(&mut self, dir: OwnedFd, id: FileId) {
        self.slots.push((Some(dir), id));
        if let Some(beyond) = self.slots.len().checked_sub(OPEN_LEVELS + 1) {
            self.slots[beyond].0 = None;
        }
    }

    /// The deepest directory.
    pub(crate) fn top(&self) -> Result<BorrowedFd<'_>, Errno> {
        let top = self.slots.last().and_then(|(fd, _)| fd.as_ref());
        top.map(AsFd::as_fd).ok_or(Errno::BADF)
    }

    /// Leaves the deepest directory and returns it. Its parent is opened again if need be, and has
    /// to be the directory that the walk came through: `ESTALE` if somebody moved it meanwhile.
    pub(crate) fn pop(&mut self) -> Result<OwnedFd, Errno> {
        let (dir, _) = self.slots.pop().ok_or(Errno::BADF)?;
        let dir = dir.ok_or(Errno::BADF)?;
        if let Some((closed @ None, id)) = self.slots.last_mut() {
            let up = rustix::fs::openat(&dir, c"..", DIRECTORY, Mode::empty())?;
            if FileId::from(&rustix::fs::fstat(&up)?) != *id {
                return Err(Errno::STALE);
            }
            *closed = Some(up);
        }
        Ok(dir)
    }
}

/// One inode that a walk has come to.
pub(crate) struct Found<'a> {
    /// The directory that holds it; none for the root.
    pub(crate) parent: Option<BorrowedFd<'a>>,
    /// Its name there; empty for the root.
    pub(crate) name: &'a CStr,
    /// Readable for a directory, `O_PATH` for everything else.
    pub(crate) fd: BorrowedFd<'a>,
    /// Its attributes when the walk first came to it.
    pub(crate) stat: &'a Stat,
    /// Its path, for messages.
    pub(crate) path: &'a Path,
    /// 0 for the root.
    pub(crate) depth: usize,
}

impl Found<'_> {
    pub(crate) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    pub(crate) fn err(&self, step: &'static str) -> impl FnOnce(Errno) -> TreeError {
        failed(step, self.path)
    }

    /// Opens a regular file for reading: the inode that was looked at, whatever its name says now.
    pub(crate) fn open_file(&self) -> Result<OwnedFd, TreeError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let path = proc_path(self.fd);
        rustix::fs::openat(CWD, &path, flags | OFlags::NOATIME, Mode::empty())
            .or_else(|e| match e {
                Errno::PERM => rustix::fs::openat(CWD, &path, flags, Mode::empty()),
                e => Err(e),
            })
            .map_err(self.err("open"))
    }

    pub(crate) fn xattrs(&self) -> Result<Vec<(CString, Vec<u8>)>, TreeError> {
        xattrs(self.fd).map_err(self.err("read the extended attributes of"))
    }

    pub(crate) fn changed(&self, what: &'static str) -> TreeError {
        TreeError::Changed {
            path: ShownPath::new(self.path),
            what,
        }
    }
}

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

/// Opens a tree's root. The path itself is the host's and may lead through links.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd, TreeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
        .and_then(|fd| open_dir(&fd))
        .map_err(failed("open", path))
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

/// Opens one name below a directory without acting on what it names.
pub(crate) fn look_at(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    open_within(
        dir,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV,
    )
}

/// `openat2`, again if the kernel says so: any mount or rename on the host may disturb its check
/// that a path stays within (openat2(2), EAGAIN).
pub(crate) fn open_within(
    dir: BorrowedFd<'_>,
    path: impl rustix::path::Arg + Copy,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let mut tries = 0;
    loop {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if tries < OPEN_TRIES => tries += 1,
            opened => return opened,
        }
    }
}

/// Opens for reading the directory that an `O_PATH` descriptor stands for.
pub(crate) fn open_dir(path_fd: &OwnedFd) -> Result<OwnedFd, Errno> {
    let open = |flags| rustix::fs::openat(path_fd, c".", flags, Mode::empty());
    open(DIRECTORY | OFlags::NOATIME).or_else(|e| match e {
        Errno::PERM => open(DIRECTORY),
        e => Err(e),
    })
}

/// A path that leads to an open inode itself, `O_PATH` or not, symbolic link or not.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// All extended attributes of an inode, by name.
pub(crate) fn xattrs(fd: BorrowedFd<'_>) -> Result<Vec<(CString, Vec<u8>)>, Errno> {
    // Through /proc, since the kernel refuses `f*xattr` on O_PATH descriptors.
    let path = proc_path(fd);
    let list = match grow(|buf| rustix::fs::listxattr(&path, buf)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    let mut all = list
        .split_inclusive(|b| *b == 0)
        .filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        .map(|name| {
            let value = grow(|buf| rustix::fs::getxattr(&path, name, buf))?;
            Ok((name.to_owned(), value))
        })
        .collect::<Result<Vec<_>, Errno>>()?;
    all.sort_unstable();
    Ok(all)
}

fn grow(read: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut small = [0; 512];
    match read(&mut small) {
        Ok(n) => Ok(small[..n].to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; XATTR_MAX];
            let n = read(&mut large)?;
            large.truncate(n);
            Ok(large)
        }
        Err(e) => Err(e),
    }
}

/// Removes a tree, or a file; that nothing is there is fine. Stops at mounts.
pub fn remove_tree(path: &Path) -> Result<(), TreeError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed("remove", path)(Errno::INVAL));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let name = CString::new(name.as_bytes()).map_err(|_| failed("remove", path)(Errno::INVAL))?;
    let dir = match open_root(parent) {
        Err(TreeError::Io {
            source: Errno::NOENT,
            ..
        }) => return Ok(()),
        dir => dir?,
    };
    let fd = match look_at(dir.as_fd(), &name) {
        Err(Errno::NOENT) => return Ok(()),
        fd => fd.map_err(failed("open", path))?,
    };
    let stat = rustix::fs::fstat(&fd).map_err(failed("stat", path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return rustix::fs::unlinkat(&dir, &name, AtFlags::empty()).map_err(failed("remove", path));
    }
    let root = open_dir(&fd).map_err(failed("open", path))?;
    walk(root, path, Expect::Removal, &|| false, &mut Remover)?;
    rustix::fs::unlinkat(&dir, &name, AtFlags::REMOVEDIR).map_err(failed("remove", path))
}

struct Remover;

impl Visitor for Remover {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        unlink(found, AtFlags::empty())
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        unlink(dir, AtFlags::REMOVEDIR)
    }
}

fn unlink(found: &Found<'_>, flags: AtFlags) -> Result<(), TreeError> {
    match found.parent {
        Some(parent) => {
            rustix::fs::unlinkat(parent, found.name, flags).map_err(found.err("remove"))
        }
        None => Ok(()),
    }
}

/// Up to so many inodes are fsynced one by one, more by one `syncfs`.
///
/// Medians on ext4, 2 busy cores, one by one / with the writing of all started first / `syncfs`:
/// 5 files of 4 KB 8 / 10 / 14 ms, 25 of 10 KB 26 / 13 / 10 ms, 100 of 4 KB 196 / 95 / 41 ms, 1,000
/// of 4 KB 1,874 / 1,148 / 31 ms; for 200 MB in 4 files there is no difference. The price: `syncfs`
/// waits for what others have written to the same filesystem, too.
const FEW: u64 = 8;

/// Makes what is written after its creation durable.
#[derive(Debug)]
pub(crate) struct Durably {
    /// Open before the writing starts: the kernel reports an error of earlier background writing
    /// once to each descriptor that was open then.
    filesystem: OwnedFd,
}

impl Durably {
    /// `place` is a directory on the filesystem that will be written to.
    pub(crate) fn at(place: &Path) -> Result<Self, TreeError> {
        let filesystem = open_root(place)?;
        Ok(Self { filesystem })
    }

    /// Writes a tree to the disk: data, inodes, directories.
    pub(crate) fn sync(&self, path: &Path) -> Result<(), TreeError> {
        let seen = Cell::new(0);
        let root = open_root(path)?;
        let counted = walk(
            root,
            path,
            Expect::Changes,
            &|| seen.get() > FEW,
            &mut Counter(&seen),
        );
        if let Err(TreeError::Stopped { .. }) = counted {
            return rustix::fs::syncfs(&self.filesystem).map_err(failed("sync", path));
        }
        counted?;
        let root = open_root(path)?;
        walk(root, path, Expect::Changes, &|| false, &mut Syncer)
    }
}

struct Counter<'a>(&'a Cell<u64>);

impl Visitor for Counter<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }

    fn other(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

pub(super) struct Syncer;

impl Visitor for Syncer {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        if found.kind() == FileType::RegularFile {
            let file = found.open_file()?;
            rustix::fs::fsync(&file).map_err(found.err("fsync"))?;
        }
        Ok(())
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        rustix::fs::fsync(dir.fd).map_err(dir.err("fsync"))
    }
}

/// The next stretch of data at or after `at`, none if only a hole is left.
pub(crate) fn next_data(file: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => start,
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        // A filesystem that doesn't know where its holes are.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(e) => return Err(e),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
    Ok(Some((start, end.max(start + 1))))
}
