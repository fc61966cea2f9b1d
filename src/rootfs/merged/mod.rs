//! The tree that a running sandbox sees, made equal to another one while it stays mounted.
//!
//! [`plan`] compares two trees at the names that may differ, and says what to do; it touches nothing. [`Merged`]
//! is such a tree as the kernel shows it, read and edited by ordinary operations through the mount: never by its
//! writable layer, of which the kernel would go on to show what it has cached.
//!
//! What cannot be brought back like that, or cannot be proved, is an error before anything is touched.

mod edit;
mod lower;
mod plan;
mod view;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    ffi::{CString, OsString},
    path::Path,
};

pub use plan::{Depth, Plan, Step, plan};
pub use view::Merged;

use crate::{
    content::Content,
    digest::Digest,
    tree::{ShownPath, TreeError},
};

/// Why a tree cannot be made equal to another one through its mount.
#[derive(Debug, thiserror::Error)]
pub enum MergedError {
    /// The kernel said no.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// It would not be certain to be equal.
    #[error("{path}: {why}")]
    Unproven {
        /// Where.
        path: ShownPath,
        /// What is there.
        why: &'static str,
    },
    /// It is more than is worth it.
    #[error("more than {limit} {what} would have to be put back")]
    TooMuch {
        /// The bound.
        limit: usize,
        /// What is bounded.
        what: &'static str,
    },
    /// The other tree cannot be read.
    #[error("{0}")]
    Unreadable(String),
}

impl MergedError {
    /// It would not be certain to be equal at this name.
    pub fn unproven(path: &Path, why: &'static str) -> Self {
        Self::Unproven {
            path: ShownPath::new(path),
            why,
        }
    }
}

/// What is at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, set-id bits, sticky bit.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds of the modification time.
    pub mtime: (i64, u32),
    /// Extended attributes, by name; none of overlay's own.
    pub xattrs: Vec<(CString, Vec<u8>)>,
    /// Its other names.
    pub links: Links,
}

impl Node {
    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Dir
    }

    /// Whether all but the bytes of a regular file, and its other names, are equal as far as they are part of a
    /// state (`docs/state.md`).
    pub fn looks_like(&self, other: &Self) -> bool {
        let timeless = matches!(self.kind, Kind::Dir | Kind::Socket);
        self.kind == other.kind
            && (self.mode, self.uid, self.gid) == (other.mode, other.uid, other.gid)
            && (timeless || self.mtime == other.mtime)
            && self.xattrs == other.xattrs
    }
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Dir,
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device and its number.
    CharDevice(u64),
    /// A block device and its number.
    BlockDevice(u64),
    /// A FIFO.
    Fifo,
    /// A unix socket's name.
    Socket,
}

/// The names of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Links {
    /// This one alone; of a directory always.
    One,
    /// All names that say this: the digest of the path of the first one.
    Named(Digest),
    /// So many names of this inode.
    Inode {
        /// Of its file system.
        dev: u64,
        /// Its number.
        ino: u64,
        /// How many.
        names: u64,
    },
}

/// A tree to compare.
pub trait View {
    /// What is at a path relative to its root, which is empty. None if nothing is.
    fn at(&mut self, path: &Path) -> Result<Option<Node>, MergedError>;
    /// The names in a directory.
    fn names(&mut self, dir: &Path) -> Result<BTreeSet<OsString>, MergedError>;
    /// The bytes of a regular file, by their digests.
    fn content(&mut self, file: &Path) -> Result<Content, MergedError>;
}
