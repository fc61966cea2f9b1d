//! What of an inode is part of a state (docs/state.md).

use rustix::fs::FileType;

use super::changes::{Attributes, What};
use crate::{
    digest::Digest,
    tree::{Found, TreeError, wide},
};

/// What a tree is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// An upper directory: whiteouts, and xattrs in which overlay keeps its books.
    Overlay,
    /// A tmpfs: mtimes count by the second (TMPFS_MTIME).
    Tmpfs,
}

/// Overlay's books (OVERLAY_XATTRS): which lower inode this was, that a directory holds such ones,
/// link counts, the file system's id, the way back from the index. None of them shows in what the
/// sandbox sees. All its others do: opaque, whiteout, redirect, metacopy, protattr. Those with
/// `user.` in front show as they are in a mount without `userxattr`, and count.
const BOOKKEEPING: [&[u8]; 5] = [b"origin", b"impure", b"nlink", b"uuid", b"upper"];

/// A kind of inode, as the sandbox sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Dir,
    Symlink,
    /// The character device 0/0. Nothing of it shows but that a name is hidden; overlay makes
    /// many of them links of one inode.
    Whiteout,
    /// Devices, fifos, sockets.
    Other(FileType),
}

impl Kind {
    /// Whether it matters which names are links of one inode.
    pub(super) fn links_count(self) -> bool {
        !matches!(self, Self::Dir | Self::Whiteout)
    }
}

/// An inode: its number, and what is part of a state. What isn't is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) ino: u64,
    /// Bytes of a regular file; number of a device.
    pub(super) size: u64,
    /// Seconds and nanoseconds; not of directories, sockets, whiteouts.
    pub(super) mtime: (i64, u32),
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Type and permission bits.
    pub(super) mode: u16,
    /// Of a file's bytes or a link's target. None if a file was not read.
    pub(super) content: Option<Digest>,
    /// None if there are none that count.
    pub(super) xattrs: Option<Digest>,
}

/// What can be said of two inodes before any file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Differs(What),
    /// All but the bytes of a regular file are equal.
    ReadIt,
    Equal,
}

impl Facts {
    /// All but the content of a regular file.
    pub(super) fn of(found: &Found<'_>, view: View) -> Result<Self, TreeError> {
        let stat = found.stat;
        let kind = found.kind();
        let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        let mut facts = Self {
            ino: wide(stat.st_ino),
            size: match kind {
                FileType::RegularFile => stat.st_size.unsigned_abs(),
                _ if device => wide(stat.st_rdev),
                _ => 0,
            },
            mtime: match kind {
                FileType::Directory | FileType::Socket => (0, 0),
                _ if view == View::Tmpfs => (stat.st_mtime, 0),
                _ => (
                    stat.st_mtime,
                    u32::try_from(wide(stat.st_mtime_nsec)).unwrap_or(u32::MAX),
                ),
            },
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: (stat.st_mode & 0xffff) as u16,
            content: None,
            xattrs: None,
        };
        if view == View::Overlay && facts.kind() == Kind::Whiteout {
            return Ok(Self::whiteout(facts.ino));
        }
        facts.xattrs = xattrs(found, view)?;
        if kind == FileType::Symlink {
            let target = rustix::fs::readlinkat(found.fd, c"", Vec::new())
                .map_err(found.err("read the link"))?;
            facts.content = Some(Digest::of(target.as_bytes()));
        }
        Ok(facts)
    }

    fn whiteout(ino: u64) -> Self {
        Self {
            ino,
            size: 0,
            mtime: (0, 0),
            uid: 0,
            gid: 0,
            mode: (FileType::CharacterDevice.as_raw_mode() & 0xffff) as u16,
            content: None,
            xattrs: None,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        kind(self.mode, self.size)
    }

    /// Compares with what was there before.
    pub(super) fn verdict(&self, old: &Self) -> Verdict {
        if self.kind() != old.kind() {
            return Verdict::Differs(What::Kind);
        }
        let file = self.kind() == Kind::File;
        let content = match self.kind() {
            Kind::File => (self.size, self.mtime) != (old.size, old.mtime),
            Kind::Symlink => self.content != old.content,
            _ => false,
        };
        if content {
            return Verdict::Differs(What::Content);
        }
        let mut which = Attributes::default();
        which.add(Attributes::MODE, self.mode != old.mode);
        which.add(
            Attributes::OWNER,
            (self.uid, self.gid) != (old.uid, old.gid),
        );
        which.add(Attributes::MTIME, self.mtime != old.mtime);
        which.add(Attributes::XATTRS, self.xattrs != old.xattrs);
        which.add(Attributes::DEVICE, self.size != old.size);
        if !which.is_empty() {
            return Verdict::Differs(What::Attributes(which));
        }
        match file {
            true => Verdict::ReadIt,
            false => Verdict::Equal,
        }
    }
}

/// `size` is the device's number if it is one.
pub(super) fn kind(mode: u16, size: u64) -> Kind {
    match FileType::from_raw_mode(u32::from(mode)) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice if size == 0 => Kind::Whiteout,
        other => Kind::Other(other),
    }
}

fn xattrs(found: &Found<'_>, view: View) -> Result<Option<Digest>, TreeError> {
    let mut all = found.xattrs()?;
    all.retain(|(name, _)| {
        let books = name.to_bytes().strip_prefix(b"trusted.overlay.");
        view != View::Overlay || !books.is_some_and(|name| BOOKKEEPING.contains(&name))
    });
    if all.is_empty() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    for (name, value) in all {
        for part in [name.to_bytes(), &value] {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        }
    }
    Ok(Some(Digest::of(&bytes)))
}
