//! One number for a small tree: a tmpfs of the sandbox.

use std::{
    collections::HashMap,
    ffi::CStr,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};

use super::{
    content::Reader,
    facts::{Facts, View},
};
use crate::digest::Digest;
use crate::tree::{self, Expect, Found, ShownPath, TreeError, Visitor, failed, wide};

/// The state of a tmpfs, by the definition in `docs/state.md`: its names, attributes, contents, and
/// links. Mounts on it are named, not entered. Files without a name are not part of it: they belong
/// to the processes that hold them open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(Digest);

/// Up to what size a tree is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of content; holes do not count.
    pub bytes: u64,
    /// Names, the root included.
    pub entries: usize,
}

impl Fingerprint {
    /// The fingerprint of what is mounted at `mount_point` in the tree `root`; none if it is above
    /// the limits.
    ///
    /// `root` is a path of the host (`/proc/PID/root`). `mount_point` is the sandbox's, as mountinfo
    /// has it: it is followed below `root`, through no link. `dev` is the file system expected
    /// there (as `stat` shows it); another one, mounted over it, is an error. The tree has to
    /// stand still.
    pub fn of(
        root: &Path,
        mount_point: &Path,
        dev: u64,
        limits: Limits,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Self>, TreeError> {
        let mut printer = Printer {
            digest: blake3::Hasher::new(),
            reader: Reader::new(stop),
            links: HashMap::new(),
            left: limits,
            beyond: false,
        };
        match walk(root, mount_point, dev, stop, &mut printer) {
            Err(TreeError::Stopped { .. }) if printer.beyond => Ok(None),
            Err(e) => Err(e),
            Ok(()) => Ok(Some(Self(Digest::from_bytes(
                printer.digest.finalize().into(),
            )))),
        }
    }
}

/// Whether a tmpfs holds a regular file, or so many names (`entries`) that this is as good as certain.
/// The other arguments are those of [`Fingerprint::of`].
pub fn holds_files(
    root: &Path,
    mount_point: &Path,
    dev: u64,
    entries: usize,
    stop: &dyn Fn() -> bool,
) -> Result<bool, TreeError> {
    let mut search = Search {
        left: entries,
        found: false,
    };
    match walk(root, mount_point, dev, stop, &mut search) {
        Err(TreeError::Stopped { .. }) if search.found => Ok(true),
        Err(e) => Err(e),
        Ok(()) => Ok(false),
    }
}

/// Walks through what is mounted at `mount_point`; see [`Fingerprint::of`].
fn walk(
    root: &Path,
    mount_point: &Path,
    dev: u64,
    stop: &dyn Fn() -> bool,
    visitor: &mut impl Visitor,
) -> Result<(), TreeError> {
    let shown = root.join(mount_point.strip_prefix("/").unwrap_or(mount_point));
    let dir = open_mount(root, mount_point).map_err(failed("open", &shown))?;
    let stat = rustix::fs::fstat(&dir).map_err(failed("stat", &shown))?;
    if wide(stat.st_dev) != dev {
        return Err(TreeError::Changed {
            path: ShownPath::new(&shown),
            what: "another file system is mounted there",
        });
    }
    tree::walk(dir, &shown, Expect::Unchanged, stop, visitor)
}

/// Ends the walk at the first file.
struct Search {
    left: usize,
    found: bool,
}

impl Search {
    fn look(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.found = self.left == 0 || found.kind() == FileType::RegularFile;
        self.left = self.left.saturating_sub(1);
        match self.found {
            // That is no error.
            true => Err(TreeError::Stopped {
                path: ShownPath::new(found.path),
            }),
            false => Ok(()),
        }
    }
}

impl Visitor for Search {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        self.look(dir)
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.look(found)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    /// What is mounted on it is not in it.
    fn mount(&mut self, _: usize, _: &CStr, _: &Path) -> Result<(), TreeError> {
        Ok(())
    }
}

fn open_mount(root: &Path, mount_point: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let fd = tree::open_within(root.as_fd(), mount_point, flags, resolve)?;
    tree::open_dir(&fd)
}

struct Printer<'s> {
    digest: blake3::Hasher,
    reader: Reader<'s>,
    /// In which order inodes with several names were met.
    links: HashMap<u64, u64>,
    left: Limits,
    beyond: bool,
}

impl Printer<'_> {
    fn add(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.name(found.depth, found.name, found.path)?;
        let kind = found.kind();
        if kind != FileType::Directory && found.stat.st_nlink > 1 && self.link(found.stat) {
            return Ok(());
        }
        let mut facts = Facts::of(found, View::Tmpfs)?;
        if kind == FileType::RegularFile {
            self.take_bytes(found)?;
            facts.content = Some(self.reader.digest(found)?);
        }
        let Facts {
            ino: _,
            size,
            mtime,
            uid,
            gid,
            mode,
            content,
            xattrs,
        } = facts;
        self.digest.update(&[0]);
        self.digest.update(&size.to_le_bytes());
        self.digest.update(&mtime.0.to_le_bytes());
        self.digest.update(&uid.to_le_bytes());
        self.digest.update(&gid.to_le_bytes());
        self.digest.update(&mode.to_le_bytes());
        for part in [content, xattrs] {
            self.digest.update(&[u8::from(part.is_some())]);
            self.digest.update(part.unwrap_or(Digest::ZEROS).bytes());
        }
        Ok(())
    }

    fn name(&mut self, depth: usize, name: &CStr, path: &Path) -> Result<(), TreeError> {
        match self.left.entries.checked_sub(1) {
            Some(left) => self.left.entries = left,
            None => return Err(self.too_large(path)),
        }
        self.digest.update(&(depth as u64).to_le_bytes());
        self.digest
            .update(&(name.count_bytes() as u64).to_le_bytes());
        self.digest.update(name.to_bytes());
        Ok(())
    }

    /// Notes which inode met before this is, if it is one.
    fn link(&mut self, stat: &Stat) -> bool {
        let next = self.links.len() as u64;
        let first = *self.links.entry(wide(stat.st_ino)).or_insert(next);
        if first == next {
            return false;
        }
        self.digest.update(&[1]);
        self.digest.update(&first.to_le_bytes());
        true
    }

    fn take_bytes(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let stored = wide(found.stat.st_blocks.unsigned_abs()).saturating_mul(512);
        let bytes = found.stat.st_size.unsigned_abs().min(stored);
        match self.left.bytes.checked_sub(bytes) {
            Some(left) => self.left.bytes = left,
            None => return Err(self.too_large(found.path)),
        }
        Ok(())
    }

    /// The walk ends; that is no error.
    fn too_large(&mut self, path: &Path) -> TreeError {
        self.beyond = true;
        TreeError::Stopped {
            path: ShownPath::new(path),
        }
    }
}

impl Visitor for Printer<'_> {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        self.add(dir)
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.add(found)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn mount(&mut self, depth: usize, name: &CStr, path: &Path) -> Result<(), TreeError> {
        self.name(depth, name, path)?;
        self.digest.update(&[2]);
        Ok(())
    }
}
