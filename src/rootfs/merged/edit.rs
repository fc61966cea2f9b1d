//! A mounted tree, edited.

use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT,
        Uid, XattrFlags,
    },
    io::Errno,
};

use super::{Kind, Merged, Node, Plan, Step};
use crate::{
    content::Data,
    tree::{self, TreeError, failed, proc_path},
};

impl Merged {
    /// Does all of a plan. `contents`: of each file that it needs. After an error the tree is neither what it was
    /// nor what it was to be.
    pub fn apply(&self, plan: &Plan, contents: &HashMap<PathBuf, Data>) -> Result<(), TreeError> {
        for step in &plan.steps {
            let at = Place::of(self, step.path())?;
            match step {
                Step::Remove { is_dir, .. } => at.remove(*is_dir)?,
                Step::Make { path, node } => at.make(node, contents.get(path))?,
                Step::Rewrite { path, node } => at.rewrite(node, contents.get(path))?,
                Step::Attributes { node, .. } => at.set_attributes(node)?,
                Step::Link { to, .. } => at.link(&Place::of(self, to)?)?,
            }
        }
        plan.times
            .iter()
            .try_for_each(|(path, mtime)| self.set_time(path, *mtime))
    }

    fn set_time(&self, path: &Path, mtime: (i64, u32)) -> Result<(), TreeError> {
        let shown = self.shown(path);
        let found = self.reach(path)?;
        let (fd, _) = found.ok_or_else(|| failed("reach", &shown)(Errno::NOENT))?;
        set_time(&fd, mtime).map_err(failed("set the times of", &shown))
    }
}

/// A name in a directory.
struct Place {
    dir: OwnedFd,
    name: CString,
    shown: PathBuf,
}

impl Place {
    fn of(merged: &Merged, path: &Path) -> Result<Self, TreeError> {
        let shown = merged.shown(path);
        let (above, name) = match (path.parent(), path.file_name()) {
            (Some(above), Some(name)) => (above, name),
            // The root.
            _ => (path, OsStr::new(".")),
        };
        let dir = merged.reach(above)?;
        let (dir, _) = dir.ok_or_else(|| failed("reach", &shown)(Errno::NOENT))?;
        let name = CString::new(name.as_bytes());
        let name = name.map_err(|_| failed("reach", &shown)(Errno::INVAL))?;
        Ok(Self { dir, name, shown })
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> TreeError {
        failed(step, &self.shown)
    }

    fn remove(&self, is_dir: bool) -> Result<(), TreeError> {
        let flags = match is_dir {
            true => AtFlags::REMOVEDIR,
            false => AtFlags::empty(),
        };
        rustix::fs::unlinkat(&self.dir, &self.name, flags).map_err(self.failed("remove"))
    }

    fn link(&self, to: &Self) -> Result<(), TreeError> {
        rustix::fs::linkat(&to.dir, &to.name, &self.dir, &self.name, AtFlags::empty())
            .map_err(self.failed("link"))
    }

    fn make(&self, node: &Node, data: Option<&Data>) -> Result<(), TreeError> {
        let (dir, name) = (&self.dir, &self.name);
        let kind = match &node.kind {
            Kind::File(_) => {
                let flags = OFlags::CREATE | OFlags::EXCL;
                self.write(flags, data)?;
                return self.set_attributes(node);
            }
            Kind::Dir => rustix::fs::mkdirat(dir, name, Mode::RWXU),
            Kind::Symlink(target) => rustix::fs::symlinkat(OsStr::from_bytes(target), dir, name),
            Kind::CharDevice(number) => mknod(dir, name, FileType::CharacterDevice, *number),
            Kind::BlockDevice(number) => mknod(dir, name, FileType::BlockDevice, *number),
            Kind::Fifo => mknod(dir, name, FileType::Fifo, 0),
            Kind::Socket => mknod(dir, name, FileType::Socket, 0),
        };
        kind.map_err(self.failed("make"))?;
        self.set_attributes(node)
    }

    fn rewrite(&self, node: &Node, data: Option<&Data>) -> Result<(), TreeError> {
        self.write(OFlags::empty(), data)?;
        self.set_attributes(node)
    }

    fn write(&self, flags: OFlags, data: Option<&Data>) -> Result<(), TreeError> {
        let flags = flags | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let within = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let mode = match flags.contains(OFlags::CREATE) {
            true => Mode::RUSR | Mode::WUSR,
            false => Mode::empty(),
        };
        let fd = rustix::fs::openat2(&self.dir, &self.name, flags, mode, within);
        let file = File::from(fd.map_err(self.failed("open"))?);
        let failed = |e: std::io::Error| {
            let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
            self.failed("write")(errno)
        };
        match data {
            None => file.set_len(0),
            Some(data) if is_dense(data) => fill(&file, data),
            Some(data) => {
                // Not by way of no bytes at all: at the end of a file that was emptied ext4 waits for the disk.
                let emptied = file.write_all_at(&[0], 0).and_then(|()| file.set_len(1));
                emptied.and_then(|()| fill(&file, data))
            }
        }
        .map_err(failed)
    }

    /// Each change costs the file system a transaction, so what is as it should be is left alone. Owner first, since a
    /// change of owner takes set-id bits and capabilities away; ACLs that it has from its
    /// directory go before the mode, since they would change it; the mode before an ACL of its own; the times last.
    fn set_attributes(&self, node: &Node) -> Result<(), TreeError> {
        let fd = match self.name.to_bytes() == b"." {
            true => self.dir.try_clone().map_err(|_| Errno::MFILE),
            false => tree::look_at(self.dir.as_fd(), &self.name),
        };
        let fd = fd.map_err(self.failed("open"))?;
        let path = proc_path(fd.as_fd());
        let there = tree::xattrs(fd.as_fd()).map_err(self.failed("read the attributes of"))?;
        for (name, _) in &there {
            if !node.xattrs.iter().any(|(wanted, _)| wanted == name) {
                rustix::fs::removexattr(&path, name)
                    .map_err(self.failed("change attributes of"))?;
            }
        }
        let stat = rustix::fs::fstat(&fd).map_err(self.failed("stat"))?;
        let is_its = (stat.st_uid, stat.st_gid) == (node.uid, node.gid);
        if !is_its {
            let owner = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
            rustix::fs::chownat(&fd, c"", Some(owner.0), Some(owner.1), AtFlags::EMPTY_PATH)
                .map_err(self.failed("set the owner of"))?;
        }
        let has_mode = is_its && (stat.st_mode & 0o7777) as u16 == node.mode;
        if !has_mode && !matches!(node.kind, Kind::Symlink(_)) {
            let mode = Mode::from_raw_mode(node.mode.into());
            rustix::fs::chmodat(CWD, &path, mode, AtFlags::empty())
                .map_err(self.failed("set the mode of"))?;
        }
        for (name, value) in &node.xattrs {
            rustix::fs::setxattr(&path, name, value, XattrFlags::empty())
                .map_err(self.failed("set an extended attribute of"))?;
        }
        set_time(&fd, node.mtime).map_err(self.failed("set the times of"))
    }
}

/// Whether no byte of it is left out.
fn is_dense(data: &Data) -> bool {
    let mut end = 0;
    for (at, bytes) in &data.pieces {
        if *at != end {
            return false;
        }
        end += bytes.len() as u64;
    }
    end == data.size
}

/// Writes all pieces of a file that has zeros, or what is written over, everywhere else.
fn fill(file: &File, data: &Data) -> std::io::Result<()> {
    if file.metadata()?.len() != data.size {
        file.set_len(data.size)?;
    }
    let mut pieces = data.pieces.iter();
    pieces.try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))
}

fn mknod(dir: impl AsFd, name: &CString, kind: FileType, number: u64) -> Result<(), Errno> {
    let dir: BorrowedFd<'_> = dir.as_fd();
    rustix::fs::mknodat(dir, name, kind, Mode::RUSR, number)
}

fn set_time(fd: &OwnedFd, mtime: (i64, u32)) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT as _,
        },
        last_modification: Timespec {
            tv_sec: mtime.0,
            tv_nsec: mtime.1.into(),
        },
    };
    rustix::fs::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)
}
