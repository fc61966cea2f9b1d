//! What goes into a comparison and what comes out of it.

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
};

use rustix::fs::FileType;

use super::delta::Delta;

/// Smaller files are read in the freeze: 4 MiB take a few milliseconds.
pub const LARGE: u64 = 4 << 20;

/// An inode that may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Candidate {
    /// The device as `stat` shows it.
    pub dev: u64,
    /// The inode number as `stat` shows it.
    pub ino: u64,
}

/// How much a comparison looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The candidates. What of them neither the index nor a changed directory explains is
    /// reported as outside. Sound as long as the candidates are complete.
    Candidates,
    /// The candidates; unexplained ones are searched among the names of the whole layer, which are
    /// listed for that (no inode is looked at). Guards against candidates that lack a directory.
    Search,
    /// Every name and every byte: the candidates are not complete.
    Everything,
}

/// What differs between the layer and the last capture of it.
#[derive(Debug)]
pub struct Comparison {
    /// One entry for each name that differs, in byte order of the paths.
    pub changes: Vec<Change>,
    /// Candidates that have no name in the layer and had none: inodes without a name, overlay's
    /// work directory, other file systems. The caller decides what they mean.
    pub outside: Vec<Candidate>,
    /// How many bytes were read to tell.
    pub bytes_read: u64,
    /// Names without an entry, in byte order, that are links of an inode of which another name has
    /// one: the names of an inode are put back together.
    pub(super) linked: Vec<(PathBuf, FileType)>,
    pub(super) delta: Delta,
}

impl Comparison {
    /// The layer equals what was captured. Says nothing about what is outside.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The files that differ and are better read before the freeze.
    pub fn large(&self) -> impl Iterator<Item = &Path> {
        let is_large = |now: Now| {
            now.size > LARGE && FileType::from_raw_mode(now.mode) == FileType::RegularFile
        };
        let large = move |change: &&Change| change.now.is_some_and(is_large);
        let large = self.changes.iter().filter(large);
        large.map(|change| plain_path(&change.path))
    }

    /// How many names differ.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Names without an entry that are to be captured nevertheless: links of an inode of which another
    /// name has one.
    pub fn linked(&self) -> impl Iterator<Item = &Path> {
        self.linked.iter().map(|(path, _)| path.as_path())
    }

    /// The names that are to be captured, and what was found there, in byte order; the layer's root is
    /// the empty path. Of a directory that was a directory it is the attributes alone: the names in it
    /// have paths of their own here. One that is new, or was something else, lists all its names, too.
    /// All names of an inode are here, or none.
    pub fn changed(&self) -> Vec<(PathBuf, FileType)> {
        let changed = self.changes.iter().filter_map(|change| {
            let kind = FileType::from_raw_mode(change.now?.mode);
            Some((plain_path(&change.path).to_owned(), kind))
        });
        let mut all: Vec<_> = changed.chain(self.linked.iter().cloned()).collect();
        all.sort_unstable_by(|(a, _), (b, _)| a.as_os_str().cmp(b.as_os_str()));
        all
    }

    /// The names that are gone, in byte order; not those below one of them, nor below what is no
    /// directory any more.
    pub fn removed(&self) -> Vec<PathBuf> {
        let gone = |change: &&Change| matches!(change.what, What::Removed | What::Kind);
        let gone: HashSet<&Path> = self.changes.iter().filter(gone).map(|c| &*c.path).collect();
        let removed = self.changes.iter().filter(|c| c.what == What::Removed);
        removed
            .filter(|change| {
                !change
                    .path
                    .parent()
                    .is_some_and(|above| gone.contains(above))
            })
            .map(|change| change.path.clone())
            .collect()
    }

    /// How many names differ in the way that `matches` picks.
    pub fn count(&self, matches: impl Fn(What) -> bool) -> usize {
        self.changes.iter().filter(|c| matches(c.what)).count()
    }
}

/// One name that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Relative to the layer; `.` is the layer's root.
    pub path: PathBuf,
    /// The gravest difference; a name has one entry only.
    pub what: What,
    /// What is there now; None if it was removed.
    pub now: Option<Now>,
}

/// What is at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Type and permission bits.
    pub mode: u32,
    /// Bytes of a regular file.
    pub size: u64,
    /// It is a directory that hides what the layers below have at its name (opaque), or shows what
    /// they have at another one (redirected).
    pub hides: bool,
}

impl Now {
    /// Whether it is a directory.
    pub fn is_dir(self) -> bool {
        FileType::from_raw_mode(self.mode) == FileType::Directory
    }
}

/// How a name differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// It was not there. Everything below a new directory has an entry of its own.
    Added,
    /// It is no longer there, nor is anything below it (with an entry each).
    Removed,
    /// It is something else: a file was made a directory, or a whiteout a file.
    Kind,
    /// A regular file's size, mtime or bytes, or a symbolic link's target. The bytes are not read
    /// if size or mtime already tell. Attributes may differ as well.
    Content,
    /// These attributes. A regular file's bytes were not read, and may differ as well.
    Attributes(Attributes),
    /// Nothing but which other names are links of the same inode.
    Links,
}

impl What {
    /// One lower-case word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Kind => "kind",
            Self::Content => "content",
            Self::Attributes(_) => "attributes",
            Self::Links => "links",
        }
    }
}

/// A set of attributes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes(u8);

impl Attributes {
    /// Permission bits, set-id bits, sticky bit.
    pub const MODE: Self = Self(1);
    /// User or group.
    pub const OWNER: Self = Self(2);
    /// The modification time, of anything but a regular file or a directory.
    pub const MTIME: Self = Self(4);
    /// Extended attributes: capabilities and ACLs, too, and what overlay keeps in them that shows.
    pub const XATTRS: Self = Self(8);
    /// A device's number.
    pub const DEVICE: Self = Self(16);

    /// Whether all of `other` are in the set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set has none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn add(&mut self, other: Self, differs: bool) {
        if differs {
            self.0 |= other.0;
        }
    }
}

impl fmt::Debug for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (Self::MODE, "mode"),
            (Self::OWNER, "owner"),
            (Self::MTIME, "mtime"),
            (Self::XATTRS, "xattrs"),
            (Self::DEVICE, "device"),
        ];
        let names = all.iter().filter(|(a, _)| self.contains(*a));
        f.debug_set().entries(names.map(|(_, name)| name)).finish()
    }
}

/// The other way round.
fn plain_path(shown: &Path) -> &Path {
    match shown == Path::new(".") {
        true => Path::new(""),
        false => shown,
    }
}

/// How the root of a layer is called in a change.
pub(super) fn shown_path(relative: &Path) -> PathBuf {
    match relative.as_os_str().is_empty() {
        true => PathBuf::from("."),
        false => relative.to_owned(),
    }
}
