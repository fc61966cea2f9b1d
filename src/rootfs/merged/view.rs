//! A mounted tree, looked at.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

use super::{Kind, Links, MergedError, Node, View};
use crate::{
    content::{Content, Data, FILE_CHUNK, content_of, fill},
    tree::{self, TreeError, failed, found_at, next_data, proc_path, wide},
};

/// A directory with more names is left to others.
const MAX_NAMES: usize = 32 << 10;

/// A mounted tree.
#[derive(Debug)]
pub struct Merged {
    pub(super) root: OwnedFd,
    /// For messages.
    pub(super) path: PathBuf,
    buffer: Vec<u8>,
}

impl Merged {
    /// What is mounted at a path of the host.
    pub fn open(path: &Path) -> Result<Self, TreeError> {
        Ok(Self::of(tree::open_root(path)?, path.to_owned()))
    }

    pub(super) fn of(root: OwnedFd, path: PathBuf) -> Self {
        Self {
            root,
            path,
            buffer: Vec::new(),
        }
    }

    pub(super) fn shown(&self, relative: &Path) -> PathBuf {
        self.path.join(relative)
    }

    pub(super) fn reach(&self, path: &Path) -> Result<Option<(OwnedFd, Stat)>, TreeError> {
        tree::reach(&self.root, path, &self.shown(path))
    }

    fn file(&self, path: &Path) -> Result<(OwnedFd, Stat), TreeError> {
        let found = self.reach(path)?;
        let file = found
            .filter(|(_, stat)| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
        file.ok_or_else(|| failed("read", &self.shown(path))(Errno::NOENT))
    }

    /// The bytes of a regular file, of at most `limit` bytes that are no hole.
    pub fn data(&self, path: &Path, limit: u64) -> Result<Data, MergedError> {
        let (fd, stat) = self.file(path)?;
        let shown = self.shown(path);
        let found = found_at(&fd, &stat, &shown);
        let file = fs::File::from(found.open_file()?);
        let size = stat.st_size.unsigned_abs();
        let mut data = Data {
            size,
            pieces: Vec::new(),
        };
        let handle = OwnedFd::from(file);
        let (mut at, mut taken) = (0, 0);
        while let Some((start, end)) =
            next_data(&handle, at, size).map_err(failed("seek in", &shown))?
        {
            at = start;
            while at < end {
                let length = (end - at).min(u64::from(FILE_CHUNK));
                taken += length;
                if taken > limit {
                    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
                    let what = "bytes";
                    return Err(MergedError::TooMuch { limit, what });
                }
                let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                fill(&handle, &mut bytes, at).map_err(failed("read", &shown))?;
                data.pieces.push((at, bytes));
                at += length;
            }
            if at >= size {
                break;
            }
        }
        Ok(data)
    }
}

impl View for Merged {
    fn at(&mut self, path: &Path) -> Result<Option<Node>, MergedError> {
        let Some((fd, stat)) = self.reach(path)? else {
            return Ok(None);
        };
        let shown = self.shown(path);
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File(stat.st_size.unsigned_abs()),
            FileType::Directory => Kind::Dir,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&fd, c"", Vec::new());
                Kind::Symlink(
                    target
                        .map_err(failed("read the link", &shown))?
                        .into_bytes(),
                )
            }
            FileType::CharacterDevice => Kind::CharDevice(wide(stat.st_rdev)),
            FileType::BlockDevice => Kind::BlockDevice(wide(stat.st_rdev)),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            _ => return Err(MergedError::unproven(path, "an inode of an unknown kind")),
        };
        let xattrs = tree::xattrs(fd.as_fd());
        let names = wide(stat.st_nlink);
        let links = match kind == Kind::Dir || names == 1 {
            true => Links::One,
            false => Links::Inode {
                dev: wide(stat.st_dev),
                ino: wide(stat.st_ino),
                names,
            },
        };
        Ok(Some(Node {
            kind,
            mode: (stat.st_mode & 0o7777) as u16,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: (
                stat.st_mtime,
                u32::try_from(wide(stat.st_mtime_nsec)).unwrap_or(u32::MAX),
            ),
            xattrs: xattrs.map_err(failed("read the extended attributes of", &shown))?,
            links,
        }))
    }

    fn names(&mut self, dir: &Path) -> Result<BTreeSet<OsString>, MergedError> {
        let mut names = BTreeSet::new();
        let Some((fd, stat)) = self.reach(dir)? else {
            return Ok(names);
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(names);
        }
        let shown = self.shown(dir);
        let listed = |e: std::io::Error| {
            let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
            failed("list", &shown)(errno)
        };
        let fd = tree::open_dir(&fd).map_err(failed("open", &shown))?;
        for entry in fs::read_dir(proc_path(fd.as_fd())).map_err(listed)? {
            if names.len() >= MAX_NAMES {
                let (limit, what) = (MAX_NAMES, "names in a directory");
                return Err(MergedError::TooMuch { limit, what });
            }
            names.insert(entry.map_err(listed)?.file_name());
        }
        Ok(names)
    }

    fn content(&mut self, path: &Path) -> Result<Content, MergedError> {
        let (fd, stat) = self.file(path)?;
        let shown = self.shown(path);
        let found = found_at(&fd, &stat, &shown);
        Ok(content_of(&found, &mut self.buffer, &|| false)?)
    }
}
