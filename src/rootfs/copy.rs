//! An exact copy of a writable layer.
//!
//! What is copied: type, content with its holes, mode, owner, atime and mtime in nanoseconds, all
//! extended attributes (overlay's own, capabilities, ACLs), device numbers (a whiteout is the
//! character device 0/0), and which names are links of one inode. What is not: ctime and birth
//! time, inode numbers, and the flags of `chattr`.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, OsString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::contents::Contents;
use crate::tree::{
    self, DirStack, Expect, FileId, Found, TreeError, Visitor, failed, proc_path, remove_tree,
};

/// What a capture met, and copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CaptureStats {
    /// Regular files; each inode once.
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Whiteouts, fifos, sockets and devices.
    pub specials: u64,
    /// Further names of inodes already counted.
    pub hard_links: u64,
    /// Bytes of content; holes are not counted.
    pub bytes: u64,
}

impl CaptureStats {
    /// All names.
    pub fn entries(&self) -> u64 {
        self.files + self.directories + self.symlinks + self.specials + self.hard_links
    }
}

/// Copies the tree at `upper` to `dest`, which is made, or is an empty directory.
///
/// Nothing is fsynced. If anything in `upper` changes meanwhile, the copy fails; after any error,
/// what is at `dest` is incomplete and the caller's to remove. `stop` is asked before each name
/// and every 16 MiB.
pub fn capture(
    upper: &Path,
    dest: &Path,
    stop: &dyn Fn() -> bool,
) -> Result<CaptureStats, TreeError> {
    let source = tree::open_root(upper)?;
    let mut copier = Copier::into(dest, stop)?;
    tree::walk(source, upper, Expect::Unchanged, stop, &mut copier)?;
    copier.finish()
}

fn make_root(dest: &Path) -> Result<OwnedFd, TreeError> {
    match rustix::fs::mkdirat(CWD, dest, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(e) => return Err(failed("make", dest)(e)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, dest, flags, Mode::empty()).map_err(failed("open", dest))?;
    let mut entries = rustix::fs::Dir::read_from(&root).map_err(failed("list", dest))?;
    let full = entries.any(|e| e.map_or(true, |e| e.file_name() != c"." && e.file_name() != c".."));
    if full {
        return Err(failed("copy into", dest)(Errno::NOTEMPTY));
    }
    // A default ACL of the directory around it would be inherited by everything in the copy.
    for acl in [c"system.posix_acl_default", c"system.posix_acl_access"] {
        match rustix::fs::fremovexattr(&root, acl) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(failed("remove the ACL of", dest)(e)),
        }
    }
    Ok(root)
}

/// Makes copies of what it visits.
struct Copier<'s> {
    dest: DirStack,
    /// The destination's root, until the walk enters the source's.
    root: Option<OwnedFd>,
    links: Links,
    stats: CaptureStats,
    contents: Contents<'s>,
}

impl Visitor for Copier<'_> {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        let copy = match self.root.take() {
            Some(root) => root,
            None => self.make_dir(dir).map_err(dir.err("copy"))?,
        };
        let stat = rustix::fs::fstat(&copy).map_err(dir.err("copy"))?;
        self.dest.push(copy, FileId::from(&stat));
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let parent = self.dest.top().map_err(found.err("copy"))?;
        // Overlay makes many whiteouts links of one inode, which means nothing.
        let linked = found.stat.st_nlink > 1 && !is_whiteout(found.stat);
        if linked && self.links.link(found, parent)? {
            self.stats.hard_links += 1;
            return Ok(());
        }
        match found.kind() {
            FileType::RegularFile => self.file(found)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(found.fd, c"", Vec::new())
                    .map_err(found.err("read the link"))?;
                rustix::fs::symlinkat(&target, parent, found.name).map_err(found.err("copy"))?;
                set_attributes_at(found, parent)?;
                self.stats.symlinks += 1;
            }
            kind => {
                rustix::fs::mknodat(parent, found.name, kind, Mode::RUSR, found.stat.st_rdev)
                    .map_err(found.err("copy"))?;
                set_attributes_at(found, parent)?;
                self.stats.specials += 1;
            }
        }
        if linked {
            let parent = self.dest.top().map_err(found.err("copy"))?;
            self.links.remember(found, parent)?;
        }
        Ok(())
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        let copy = self.dest.pop().map_err(dir.err("copy"))?;
        set_attributes(dir, copy.as_fd())?;
        self.stats.directories += 1;
        Ok(())
    }
}

impl<'s> Copier<'s> {
    /// `dest` is made, or is an empty directory.
    fn into(dest: &Path, stop: &'s dyn Fn() -> bool) -> Result<Self, TreeError> {
        Ok(Self {
            dest: DirStack::default(),
            root: Some(make_root(dest)?),
            links: Links::beside(dest),
            stats: CaptureStats::default(),
            contents: Contents::new(stop),
        })
    }

    fn finish(mut self) -> Result<CaptureStats, TreeError> {
        self.links.finish()?;
        Ok(self.stats)
    }

    fn make_dir(&self, dir: &Found<'_>) -> Result<OwnedFd, Errno> {
        let parent = self.dest.top()?;
        rustix::fs::mkdirat(parent, dir.name, Mode::RWXU)?;
        tree::open_dir(&tree::look_at(parent, dir.name)?)
    }

    fn file(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let parent = self.dest.top().map_err(found.err("copy"))?;
        let copy = new_file(parent, found.name).map_err(found.err("copy"))?;
        self.stats.bytes += self.contents.copy(found, &copy)?;
        set_attributes(found, copy.as_fd())?;
        self.stats.files += 1;
        Ok(())
    }
}

/// Makes a file for a copy.
fn new_file(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Owner first, since a change of owner takes set-id bits and capabilities away; the mode before
/// an ACL, whose mask a later chmod would change; the times last.
fn set_attributes(found: &Found<'_>, copy: BorrowedFd<'_>) -> Result<(), TreeError> {
    let stat = found.stat;
    rustix::fs::fchown(copy, Some(uid(stat)), Some(gid(stat)))
        .map_err(found.err("set the owner of"))?;
    rustix::fs::fchmod(copy, mode(stat)).map_err(found.err("set the mode of"))?;
    for (name, value) in found.xattrs()? {
        rustix::fs::fsetxattr(copy, &name, &value, XattrFlags::empty())
            .map_err(found.err("set an extended attribute of the copy of"))?;
    }
    rustix::fs::futimens(copy, &times(stat)).map_err(found.err("set the times of"))
}

/// Gives a directory's owner, mode and extended attributes to another.
pub(super) fn copy_attributes(from: &Path, to: &Path) -> Result<(), TreeError> {
    let (source, copy) = (tree::open_root(from)?, tree::open_root(to)?);
    let stat = rustix::fs::fstat(&source).map_err(failed("stat", from))?;
    let found = Found {
        parent: None,
        name: c"",
        fd: source.as_fd(),
        stat: &stat,
        path: from,
        depth: 0,
    };
    set_attributes(&found, copy.as_fd())
}

/// The same for what cannot be opened: symbolic links, fifos, sockets, devices.
fn set_attributes_at(found: &Found<'_>, parent: BorrowedFd<'_>) -> Result<(), TreeError> {
    let (stat, name) = (found.stat, found.name);
    let no_follow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(parent, name, Some(uid(stat)), Some(gid(stat)), no_follow)
        .map_err(found.err("set the owner of"))?;
    if found.kind() != FileType::Symlink {
        rustix::fs::chmodat(parent, name, mode(stat), AtFlags::empty())
            .map_err(found.err("set the mode of"))?;
    }
    let xattrs = found.xattrs()?;
    if !xattrs.is_empty() {
        let copy = tree::look_at(parent, name).map_err(found.err("copy"))?;
        for (name, value) in xattrs {
            rustix::fs::setxattr(proc_path(copy.as_fd()), &name, &value, XattrFlags::empty())
                .map_err(found.err("set an extended attribute of the copy of"))?;
        }
    }
    rustix::fs::utimensat(parent, name, &times(stat), no_follow)
        .map_err(found.err("set the times of"))
}

fn uid(stat: &Stat) -> Uid {
    Uid::from_raw(stat.st_uid)
}

fn gid(stat: &Stat) -> Gid {
    Gid::from_raw(stat.st_gid)
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    let time = |secs, nanos| Timespec {
        tv_sec: secs,
        tv_nsec: nanos,
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec as _),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec as _),
    }
}

/// Inodes with several names. Each copy gets a further name in a directory beside the
/// destination while names of it may still come: a path to the first name could be longer than
/// the kernel takes, and descriptors are few.
struct Links {
    path: PathBuf,
    dir: Option<OwnedFd>,
    /// What is still to come of an inode, and its name in `dir`.
    seen: HashMap<FileId, (u64, CString)>,
    next: u64,
}

impl Links {
    fn beside(dest: &Path) -> Self {
        let mut name = OsString::from(super::LEFTOVER);
        name.push("links-");
        name.push(dest.file_name().unwrap_or_default());
        Self {
            path: dest.with_file_name(name),
            dir: None,
            seen: HashMap::new(),
            next: 0,
        }
    }

    /// Gives an inode that was copied before its further name; false if this is its first.
    fn link(&mut self, found: &Found<'_>, parent: BorrowedFd<'_>) -> Result<bool, TreeError> {
        let id = FileId::from(found.stat);
        let (Some((left, kept)), Some(dir)) = (self.seen.get_mut(&id), &self.dir) else {
            return Ok(false);
        };
        *left = left.saturating_sub(1);
        let last = *left == 0;
        let made = if last {
            // A rename, so that the copy never has one link more than the filesystem's limit.
            rustix::fs::renameat(dir, kept.as_c_str(), parent, found.name)
        } else {
            rustix::fs::linkat(dir, kept.as_c_str(), parent, found.name, AtFlags::empty())
        };
        made.map_err(found.err("link the copy of"))?;
        if last {
            self.seen.remove(&id);
        }
        Ok(true)
    }

    fn remember(&mut self, found: &Found<'_>, parent: BorrowedFd<'_>) -> Result<(), TreeError> {
        if self.dir.is_none() {
            remove_tree(&self.path)?;
            rustix::fs::mkdirat(CWD, &self.path, Mode::RWXU).map_err(failed("make", &self.path))?;
            self.dir = Some(tree::open_root(&self.path)?);
        }
        let Some(dir) = &self.dir else { return Ok(()) };
        let kept = CString::new(self.next.to_string()).unwrap_or_default();
        self.next += 1;
        rustix::fs::linkat(parent, found.name, dir, kept.as_c_str(), AtFlags::empty())
            .map_err(found.err("link the copy of"))?;
        let left = tree::wide(found.stat.st_nlink) - 1;
        self.seen.insert(FileId::from(found.stat), (left, kept));
        Ok(())
    }

    fn finish(&mut self) -> Result<(), TreeError> {
        match self.dir.take() {
            Some(_) => remove_tree(&self.path),
            None => Ok(()),
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // Only after an error, of which the caller is told; the next put_back removes it too.
        let _ = self.finish();
    }
}
