//! From the store back to files: all attributes, hard links, holes. Every byte is checked against
//! its digest before it is written.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{
        AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT,
        Uid, XattrFlags,
    },
    io::Errno,
};

use super::{
    Checkpoint, FileEntry, StoreError, Tree,
    content::{Cut, read_chunk},
    directory,
    entry::{Node, TreeEntry},
    files,
    links::Links,
    objects::Objects,
    reuse::Present,
};
use crate::tree::{self, DirStack, FileId, TreeError, failed, proc_path, remove_tree};

/// How the names of laid out checkpoints begin.
const LAID: &str = "laid-";

/// A checkpoint as directories, its writable layer perhaps still in the store. They are removed when this
/// is dropped.
#[derive(Debug)]
pub struct Laid {
    checkpoint: Checkpoint,
    dir: PathBuf,
    /// Locked: whoever tidies the directory around it sees that it is in use.
    _lock: OwnedFd,
}

impl Laid {
    /// CRIU's images.
    pub fn image_dir(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// `config.json` and friends.
    pub fn bundle_dir(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    /// Writes the writable layer to `dest`, which is made; files that are equal in `present`, another
    /// layer on the same file system that nobody writes to, get a second name there instead. After an
    /// error, what is at `dest` is incomplete and the caller's to remove.
    pub fn write_upper(&self, dest: &Path, present: &Path) -> Result<(), StoreError> {
        self.checkpoint.write_upper(dest, Present::open(present)?)
    }

    /// The writable layer, after [`Checkpoint::lay_out_all`]; absent if the checkpoint has none.
    pub fn upper_dir(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Removes them now.
    pub fn remove(&self) -> Result<(), StoreError> {
        Ok(remove_tree(&self.dir)?)
    }
}

impl Drop for Laid {
    fn drop(&mut self) {
        if let Err(e) = self.remove() {
            log::warn!("a laid out checkpoint stays until the next start: {e}");
        }
    }
}

/// Removes from a directory whatever nobody uses any more.
pub(super) fn tidy(dir: &Path) -> Result<(), StoreError> {
    for name in files::all_names(dir)? {
        let path = dir.join(&name);
        let in_use = name.starts_with(LAID)
            && tree::open_root(&path).is_ok_and(|dir| {
                rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_err()
            });
        if !in_use {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

impl Checkpoint {
    /// Writes image and bundle into a new directory below `scratch`, and checks that all of the writable
    /// layer can be written, too. Nothing of this is durable.
    pub fn lay_out(&self, scratch: &Path) -> Result<Laid, StoreError> {
        let laid = self.lay_out_but_files(scratch)?;
        self.check_upper()?;
        Ok(laid)
    }

    /// The same with the writable layer.
    pub fn lay_out_all(&self, scratch: &Path) -> Result<Laid, StoreError> {
        let laid = self.lay_out_but_files(scratch)?;
        if self.manifest.contents.upper.is_some() {
            self.lay_out_upper(&laid.upper_dir())?;
        }
        Ok(laid)
    }

    fn lay_out_but_files(&self, scratch: &Path) -> Result<Laid, StoreError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = scratch.join(format!("{LAID}{}-{number}", std::process::id()));
        // Of a process that had this number before.
        remove_tree(&dir)?;
        make(&dir)?;
        let lock = tree::open_root(&dir)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(failed("lock", &dir))?;
        let laid = Laid {
            checkpoint: self.clone(),
            dir,
            _lock: lock,
        };
        self.lay_out_image(&laid.image_dir())?;
        self.lay_out_bundle(&laid.bundle_dir())?;
        Ok(laid)
    }

    /// Writes CRIU's images into a directory, which is made.
    pub fn lay_out_image(&self, dest: &Path) -> Result<(), StoreError> {
        self.lay_out_files(&self.manifest.contents.image, dest)
    }

    /// Writes `config.json` and friends into a directory, which is made.
    pub fn lay_out_bundle(&self, dest: &Path) -> Result<(), StoreError> {
        self.lay_out_files(&self.manifest.contents.bundle, dest)
    }

    /// Writes the writable layer to `dest`, which is made. An error if the checkpoint has none.
    /// After an error, what is at `dest` is incomplete and the caller's to remove.
    pub fn lay_out_upper(&self, dest: &Path) -> Result<(), StoreError> {
        self.write_upper(dest, None)
    }

    fn write_upper(&self, dest: &Path, present: Option<Present>) -> Result<(), StoreError> {
        let mut objects = self.strict_objects()?;
        let upper = self.manifest.contents.upper.as_ref();
        let upper = upper.ok_or_else(|| StoreError::Unfit {
            path: dest.to_owned(),
            reason: "this checkpoint has no files".into(),
        })?;
        let root = directory::read_root(&mut objects, &upper.digest)?;
        lay_out_tree(&mut objects, root, dest, present)
    }

    fn lay_out_files(&self, list: &[FileEntry], dest: &Path) -> Result<(), StoreError> {
        let mut objects = self.strict_objects()?;
        make(dest)?;
        for entry in list {
            let path = dest.join(&entry.path);
            for dir in path.ancestors().skip(1).collect::<Vec<_>>().iter().rev() {
                if dir.starts_with(dest) && !dir.exists() {
                    make(dir)?;
                }
            }
            let file = files::write_new(&path, b"")?;
            write_content(&mut objects, &file, &entry.cut(), &path)?;
        }
        Ok(())
    }
}

impl Tree {
    /// Writes one name of the tree, with everything below it, to `dest`, where nothing may be. Names
    /// that are links of each other become so within one call.
    pub fn lay_out(&mut self, path: &Path, dest: &Path) -> Result<(), StoreError> {
        let entry = self.lookup(path)?.ok_or_else(|| StoreError::Unfit {
            path: path.to_owned(),
            reason: "the checkpoint has no such name".into(),
        })?;
        if matches!(entry.node, Node::Directory(_)) {
            return lay_out_tree(&mut self.objects, entry, dest, None);
        }
        let parent = tree::open_root(dest.parent().unwrap_or(dest))?;
        let name = dest.file_name().unwrap_or_default().as_bytes();
        let name = CString::new(name).map_err(|_| self.objects.damaged("a name"))?;
        make_inode(&mut self.objects, &entry, parent.as_fd(), &name, dest)
    }
}

fn make(dir: &Path) -> Result<(), StoreError> {
    super::dir_builder()
        .create(dir)
        .map_err(files::io("make", dir))
}

/// Writes what is not all zeros; the rest are holes.
fn write_content(
    objects: &mut Objects,
    file: &File,
    cut: &Cut,
    path: &Path,
) -> Result<(), StoreError> {
    file.set_len(cut.content.size)
        .map_err(files::io("size", path))?;
    let mut data = 0;
    cut.for_each(objects, &mut |_| true, &mut |objects, number, digest| {
        let bytes = read_chunk(objects, cut, number, digest)?;
        data += bytes.len() as u64;
        file.write_all_at(&bytes, number * u64::from(cut.chunk))
            .map_err(files::io("write", path))
    })?;
    match data == cut.content.data {
        true => Ok(()),
        false => Err(objects.damaged(format!("the lists of {path:?} hold other chunks"))),
    }
}

/// A directory that is being filled.
struct Level {
    entry: TreeEntry,
    /// What is still to be made in it; the next one is last.
    names: Vec<TreeEntry>,
}

fn lay_out_tree(
    objects: &mut Objects,
    root: TreeEntry,
    dest: &Path,
    present: Option<Present>,
) -> Result<(), StoreError> {
    make(dest)?;
    let fd = tree::open_root(dest)?;
    without_acl(&fd, dest)?;
    let mut writer = Writer {
        objects,
        dirs: DirStack::default(),
        levels: Vec::new(),
        path: dest.to_owned(),
        links: Links::beside(dest),
        present,
    };
    writer.enter(root, fd)?;
    writer.run()?;
    Ok(writer.links.finish()?)
}

/// A default ACL of the directory around it would be inherited by everything below.
fn without_acl(fd: &OwnedFd, dest: &Path) -> Result<(), TreeError> {
    for acl in [c"system.posix_acl_default", c"system.posix_acl_access"] {
        match rustix::fs::fremovexattr(fd, acl) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(failed("remove the ACL of", dest)(e)),
        }
    }
    Ok(())
}

struct Writer<'a> {
    objects: &'a mut Objects,
    dirs: DirStack,
    levels: Vec<Level>,
    path: PathBuf,
    links: Links,
    present: Option<Present>,
}

impl Writer<'_> {
    fn run(&mut self) -> Result<(), StoreError> {
        while let Some(level) = self.levels.last_mut() {
            match level.names.pop() {
                Some(entry) => {
                    self.path.push(OsStr::from_bytes(&entry.name));
                    self.make(entry)?;
                }
                None => self.leave()?,
            }
        }
        Ok(())
    }

    fn enter(&mut self, entry: TreeEntry, fd: OwnedFd) -> Result<(), StoreError> {
        let mut names = match entry.dir() {
            Some(dir) => directory::read_dir(self.objects, &dir)?,
            None => return Err(self.objects.damaged("a root that is no directory")),
        };
        names.reverse();
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", &self.path))?;
        self.dirs.push(fd, FileId::from(&stat));
        self.levels.push(Level { entry, names });
        Ok(())
    }

    fn leave(&mut self) -> Result<(), StoreError> {
        let Some(level) = self.levels.pop() else {
            return Ok(());
        };
        let fd = self.dirs.pop().map_err(failed("leave", &self.path))?;
        set_attributes(&level.entry, fd.as_fd(), &self.path)?;
        if !self.levels.is_empty() {
            if let Some(present) = &mut self.present {
                present.leave(&self.path)?;
            }
            self.path.pop();
        }
        Ok(())
    }

    fn make(&mut self, entry: TreeEntry) -> Result<(), StoreError> {
        let name = CString::new(entry.name.clone())
            .map_err(|_| self.objects.damaged("a name with a zero byte"))?;
        let parent = self.dirs.top().map_err(failed("reach", &self.path))?;
        if matches!(entry.node, Node::Directory(_)) {
            let fd = rustix::fs::mkdirat(parent, &name, Mode::RWXU)
                .and_then(|()| tree::look_at(parent, &name))
                .and_then(|fd| tree::open_dir(&fd))
                .map_err(failed("make", &self.path))?;
            if let Some(present) = &mut self.present {
                present.enter(&name, &self.path)?;
            }
            return self.enter(entry, fd);
        }
        let linked = match (&entry.link, &mut self.present) {
            (Some(link), _) => self.links.link(&link.hex(), parent, &name, &self.path)?,
            (None, Some(present)) => present.link(&entry, parent, &name, &self.path)?,
            (None, None) => false,
        };
        if !linked {
            make_inode(self.objects, &entry, parent, &name, &self.path)?;
            if let Some(link) = &entry.link {
                self.links
                    .remember(&link.hex(), parent, &name, &self.path)?;
            }
        }
        self.path.pop();
        Ok(())
    }
}

fn make_inode(
    objects: &mut Objects,
    entry: &TreeEntry,
    parent: BorrowedFd<'_>,
    name: &CString,
    path: &Path,
) -> Result<(), StoreError> {
    let err = || failed("make", path);
    let (kind, number) = match &entry.node {
        Node::File(content) => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let fd = rustix::fs::openat(parent, name, flags, mode).map_err(err())?;
            let file = File::from(fd);
            write_content(objects, &file, &Cut::file(*content), path)?;
            return Ok(set_attributes(entry, file.as_fd(), path)?);
        }
        Node::Symlink(target) => {
            rustix::fs::symlinkat(OsStr::from_bytes(target), parent, name).map_err(err())?;
            return Ok(set_attributes_at(entry, parent, name, path)?);
        }
        Node::CharDevice(number) => (FileType::CharacterDevice, *number),
        Node::BlockDevice(number) => (FileType::BlockDevice, *number),
        Node::Fifo => (FileType::Fifo, 0),
        Node::Socket => (FileType::Socket, 0),
        Node::Directory(_) => return Err(objects.damaged("a directory with several names")),
    };
    rustix::fs::mknodat(parent, name, kind, Mode::RUSR, number).map_err(err())?;
    Ok(set_attributes_at(entry, parent, name, path)?)
}

/// Owner first, since a change of owner takes set-id bits and capabilities away; the mode before
/// an ACL, whose mask a later chmod would change; the times last.
fn set_attributes(entry: &TreeEntry, fd: BorrowedFd<'_>, path: &Path) -> Result<(), TreeError> {
    let (uid, gid, mode, times) = plain(entry);
    rustix::fs::fchown(fd, uid, gid).map_err(failed("set the owner of", path))?;
    rustix::fs::fchmod(fd, mode).map_err(failed("set the mode of", path))?;
    for (name, value) in &entry.xattrs {
        rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty())
            .map_err(failed("set an extended attribute of", path))?;
    }
    rustix::fs::futimens(fd, &times).map_err(failed("set the times of", path))
}

/// The same for what cannot be opened: symbolic links, fifos, sockets, devices.
fn set_attributes_at(
    entry: &TreeEntry,
    parent: BorrowedFd<'_>,
    name: &CString,
    path: &Path,
) -> Result<(), TreeError> {
    let (uid, gid, mode, times) = plain(entry);
    let no_follow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(parent, name, uid, gid, no_follow)
        .map_err(failed("set the owner of", path))?;
    if !matches!(entry.node, Node::Symlink(_)) {
        rustix::fs::chmodat(parent, name, mode, AtFlags::empty())
            .map_err(failed("set the mode of", path))?;
    }
    if !entry.xattrs.is_empty() {
        let fd = tree::look_at(parent, name).map_err(failed("open", path))?;
        for (name, value) in &entry.xattrs {
            rustix::fs::setxattr(proc_path(fd.as_fd()), name, value, XattrFlags::empty())
                .map_err(failed("set an extended attribute of", path))?;
        }
    }
    rustix::fs::utimensat(parent, name, &times, no_follow).map_err(failed("set the times of", path))
}

fn plain(entry: &TreeEntry) -> (Option<Uid>, Option<Gid>, Mode, Timestamps) {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT as _,
        },
        last_modification: Timespec {
            tv_sec: entry.mtime,
            tv_nsec: entry.mtime_nsec.into(),
        },
    };
    (
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
        Mode::from_raw_mode(entry.mode.into()),
        times,
    )
}
