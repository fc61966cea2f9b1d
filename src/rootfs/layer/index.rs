//! The index itself: for each name a record of 88 bytes, and the name in an arena.
//!
//! It lives in the shim, so it is kept small: children are lists through the records, and inodes
//! are found by a sorted array of record numbers. Names of removed records stay in the arena until
//! they are half of it.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use super::facts::{self, Facts, Kind};
use crate::{
    digest::Digest,
    tree::{ShownPath, TreeError},
};

/// Number of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(u32);

impl Id {
    /// The layer's root directory.
    pub(super) const ROOT: Self = Self(0);
    const NONE: Self = Self(u32::MAX);

    fn some(self) -> Option<Self> {
        (self != Self::NONE).then_some(self)
    }

    fn at(self) -> usize {
        self.0 as usize
    }
}

const HAS_CONTENT: u8 = 1;
const HAS_XATTRS: u8 = 2;
/// Unused, to be used again.
const FREE: u8 = 4;
/// Garbage among the names that is not worth a new arena.
const GARBAGE: usize = 64 << 10;

#[derive(Debug, Clone)]
struct Record {
    ino: u64,
    size: u64,
    seconds: i64,
    content: Digest,
    nanos: u32,
    uid: u32,
    gid: u32,
    /// Where its name begins.
    name: u32,
    parent: Id,
    sibling: Id,
    child: Id,
    mode: u16,
    name_len: u8,
    flags: u8,
}

/// The index of a writable layer as it was at its last capture.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(super) dev: u64,
    /// Changes with each [`Layer::apply`].
    pub(super) generation: u64,
    records: Vec<Record>,
    names: Vec<u8>,
    /// Bytes of `names` that no record uses.
    garbage: usize,
    /// Records in order of inode and then number.
    by_ino: Vec<Id>,
    /// Few inodes have any.
    xattrs: BTreeMap<Id, Digest>,
    free: Vec<Id>,
    /// All files without a digest are among these, so that nobody has to look for them among all records.
    unread: Vec<Id>,
}

impl Layer {
    pub(super) fn new(dev: u64, root: &Facts) -> Self {
        let mut layer = Self {
            dev,
            generation: 0,
            records: Vec::new(),
            names: Vec::new(),
            garbage: 0,
            by_ino: Vec::new(),
            xattrs: BTreeMap::new(),
            free: Vec::new(),
            unread: Vec::new(),
        };
        layer.put(Id::NONE, b"", root);
        layer
    }

    /// How many names the layer holds; its root counts as one.
    pub fn entries(&self) -> usize {
        self.records.len() - self.free.len()
    }

    /// Bytes of memory that the index takes, names included.
    pub fn memory(&self) -> usize {
        // A node of the map holds 11 keys and values, and is half full at least.
        const XATTRS: usize = (size_of::<Id>() + size_of::<Digest>()) * 2;
        size_of::<Self>()
            + self.records.capacity() * size_of::<Record>()
            + self.names.capacity()
            + (self.by_ino.capacity() + self.free.capacity() + self.unread.capacity())
                * size_of::<Id>()
            + self.xattrs.len() * XATTRS
    }

    /// The device of the file system that it is on, as `stat` shows it.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// Whether so many more records and bytes of names can be numbered.
    pub(super) fn room(&self, records: usize, names: usize, at: &Path) -> Result<(), TreeError> {
        let limit = u32::MAX as usize - 1;
        let what = match () {
            () if self.entries() + records > limit => "names",
            () if self.names.len() - self.garbage + names > limit => "bytes of names",
            () => return Ok(()),
        };
        Err(TreeError::Limit {
            path: ShownPath::new(at),
            limit,
            what,
        })
    }

    pub(super) fn facts(&self, id: Id) -> Facts {
        let record = &self.records[id.at()];
        Facts {
            ino: record.ino,
            size: record.size,
            mtime: (record.seconds, record.nanos),
            uid: record.uid,
            gid: record.gid,
            mode: record.mode,
            content: self.content(id),
            xattrs: match record.flags & HAS_XATTRS {
                0 => None,
                _ => self.xattrs.get(&id).copied(),
            },
        }
    }

    pub(super) fn ino(&self, id: Id) -> u64 {
        self.records[id.at()].ino
    }

    pub(super) fn kind(&self, id: Id) -> Kind {
        let record = &self.records[id.at()];
        facts::kind(record.mode, record.size)
    }

    pub(super) fn content(&self, id: Id) -> Option<Digest> {
        let record = &self.records[id.at()];
        (record.flags & HAS_CONTENT != 0).then_some(record.content)
    }

    /// All records in use.
    pub(super) fn ids(&self) -> impl Iterator<Item = Id> + '_ {
        let used =
            |(at, record): (usize, &Record)| (record.flags & FREE == 0).then_some(Id(at as u32));
        self.records.iter().enumerate().filter_map(used)
    }

    pub(super) fn name(&self, id: Id) -> &[u8] {
        let record = &self.records[id.at()];
        let start = record.name as usize;
        &self.names[start..start + usize::from(record.name_len)]
    }

    pub(super) fn parent(&self, id: Id) -> Option<Id> {
        self.records[id.at()].parent.some()
    }

    /// In no particular order.
    pub(super) fn children(&self, id: Id) -> impl Iterator<Item = Id> + '_ {
        let first = self.records[id.at()].child.some();
        std::iter::successors(first, |id| self.records[id.at()].sibling.some())
    }

    /// All records, parents before their children.
    pub(super) fn below(&self, id: Id) -> impl Iterator<Item = Id> + '_ {
        let mut todo = vec![id];
        std::iter::from_fn(move || {
            let id = todo.pop()?;
            todo.extend(self.children(id));
            Some(id)
        })
    }

    pub(super) fn depth(&self, id: Id) -> usize {
        std::iter::successors(self.parent(id), |id| self.parent(*id)).count()
    }

    /// Relative to the layer; empty for its root.
    pub(super) fn path(&self, id: Id) -> PathBuf {
        let mut up: Vec<_> = std::iter::successors(Some(id), |id| self.parent(*id)).collect();
        up.pop();
        let names: Vec<&[u8]> = up.iter().rev().map(|id| self.name(*id)).collect();
        PathBuf::from(OsStr::from_bytes(&names.join(&b'/')))
    }

    /// The names that an inode had.
    pub(super) fn named(&self, ino: u64) -> &[Id] {
        let start = self.by_ino.partition_point(|id| self.ino(*id) < ino);
        let rest = &self.by_ino[start..];
        let end = rest.partition_point(|id| self.ino(*id) == ino);
        &rest[..end]
    }

    pub(super) fn child(&self, dir: Id, name: &[u8]) -> Option<Id> {
        self.children(dir).find(|id| self.name(*id) == name)
    }

    /// A new record below `parent`. It is not found by inode before [`Layer::index`].
    pub(super) fn insert(&mut self, parent: Id, name: &[u8], facts: &Facts) -> Id {
        let id = self.put(parent, name, facts);
        let dir = &mut self.records[parent.at()];
        let sibling = std::mem::replace(&mut dir.child, id);
        self.records[id.at()].sibling = sibling;
        id
    }

    fn put(&mut self, parent: Id, name: &[u8], facts: &Facts) -> Id {
        let record = Record {
            ino: 0,
            size: 0,
            seconds: 0,
            content: Digest::ZEROS,
            nanos: 0,
            uid: 0,
            gid: 0,
            // The limits were looked at before (`room`), and a name has 255 bytes at most.
            name: self.names.len() as u32,
            parent,
            sibling: Id::NONE,
            child: Id::NONE,
            mode: 0,
            name_len: name.len() as u8,
            flags: 0,
        };
        grow(&mut self.names, name.len());
        self.names.extend_from_slice(name);
        let id = match self.free.pop() {
            Some(id) => {
                self.records[id.at()] = record;
                id
            }
            None => {
                grow(&mut self.records, 1);
                self.records.push(record);
                Id((self.records.len() - 1) as u32)
            }
        };
        self.set(id, facts);
        id
    }

    /// Replaces what is known of an inode. Its number in [`Layer::index`] is the caller's to keep.
    pub(super) fn set(&mut self, id: Id, facts: &Facts) {
        let record = &mut self.records[id.at()];
        record.ino = facts.ino;
        record.size = facts.size;
        (record.seconds, record.nanos) = facts.mtime;
        (record.uid, record.gid, record.mode) = (facts.uid, facts.gid, facts.mode);
        record.content = facts.content.unwrap_or(Digest::ZEROS);
        record.flags = 0;
        match facts.content {
            Some(_) => record.flags |= HAS_CONTENT,
            None if facts.kind() == Kind::File => self.unread.push(id),
            None => {}
        }
        match facts.xattrs {
            Some(digest) => {
                record.flags |= HAS_XATTRS;
                self.xattrs.insert(id, digest);
            }
            None => {
                self.xattrs.remove(&id);
            }
        }
    }

    pub(super) fn set_content(&mut self, id: Id, content: Digest) {
        let record = &mut self.records[id.at()];
        record.content = content;
        record.flags |= HAS_CONTENT;
    }

    /// Frees records that `dead` says are dead, whose parents are given. Takes each list once.
    pub(super) fn unlink(&mut self, parents: &[Id], dead: &dyn Fn(Id) -> bool) {
        for parent in parents {
            let kept: Vec<Id> = self.children(*parent).filter(|id| !dead(*id)).collect();
            let mut next = Id::NONE;
            for id in kept.into_iter().rev() {
                self.records[id.at()].sibling = next;
                next = id;
            }
            self.records[parent.at()].child = next;
        }
    }

    pub(super) fn release(&mut self, id: Id) {
        let record = &mut self.records[id.at()];
        record.flags = FREE;
        self.garbage += usize::from(record.name_len);
        self.xattrs.remove(&id);
        self.free.push(id);
    }

    /// Where records stand in the order of inodes.
    pub(super) fn positions(&self, ids: impl Iterator<Item = Id>) -> Vec<usize> {
        let mut found: Vec<_> = ids
            .filter_map(|id| {
                let key = (self.ino(id), id);
                self.by_ino
                    .binary_search_by_key(&key, |id| (self.ino(*id), *id))
                    .ok()
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// Files without a digest: to be put back by [`Layer::keep_unread`] if they still have none.
    pub(super) fn take_unread(&mut self) -> Vec<Id> {
        let mut unread = std::mem::take(&mut self.unread);
        unread.sort_unstable();
        unread.dedup();
        unread.retain(|id| self.is_unread(*id));
        unread
    }

    pub(super) fn keep_unread(&mut self, mut left: Vec<Id>) {
        left.shrink_to_fit();
        self.unread = left;
    }

    /// Whether a record is that of a file without a digest.
    pub(super) fn is_unread(&self, id: Id) -> bool {
        let record = &self.records[id.at()];
        record.flags & (FREE | HAS_CONTENT) == 0 && self.kind(id) == Kind::File
    }

    /// Takes what stands at `gone` (ascending) out of the order of inodes and puts `new` in. In place: most
    /// turns change no inode at all, and few of many.
    pub(super) fn index(&mut self, gone: &[usize], mut new: Vec<Id>) {
        self.close_gaps(gone);
        new.sort_unstable_by_key(|id| (self.ino(*id), *id));
        grow(&mut self.by_ino, new.len());
        // From the end: each is put behind all that it does not come before, which moves up once.
        let mut end = self.by_ino.len();
        self.by_ino.resize(end + new.len(), Id::NONE);
        for (before, id) in new.into_iter().enumerate().rev() {
            let key = (self.ino(id), id);
            let at = self.by_ino[..end].partition_point(|id| (self.ino(*id), *id) < key);
            self.by_ino.copy_within(at..end, at + before + 1);
            self.by_ino[at + before] = id;
            end = at;
        }
    }

    fn close_gaps(&mut self, gone: &[usize]) {
        let ends = gone.iter().skip(1).copied().chain([self.by_ino.len()]);
        let mut to = gone.first().copied().unwrap_or(self.by_ino.len());
        for (at, end) in gone.iter().zip(ends) {
            self.by_ino.copy_within(at + 1..end, to);
            to += end - at - 1;
        }
        self.by_ino.truncate(to);
    }

    /// Drops names that nobody uses, once they are many.
    pub(super) fn tidy(&mut self) {
        if self.garbage >= GARBAGE.max(self.names.len() / 2) {
            self.compact();
        }
    }

    /// Makes sure that so many more bytes of names can be numbered, if [`Layer::room`] said so.
    pub(super) fn make_room(&mut self, names: usize) {
        if self.names.len() + names > u32::MAX as usize {
            self.compact();
        }
    }

    fn compact(&mut self) {
        let mut names = Vec::with_capacity(self.names.len() - self.garbage);
        for record in self.records.iter_mut().filter(|r| r.flags & FREE == 0) {
            let start = record.name as usize;
            let end = start + usize::from(record.name_len);
            record.name = names.len() as u32;
            names.extend_from_slice(&self.names[start..end]);
        }
        self.names = names;
        self.garbage = 0;
    }

    /// Gives back what the vectors have in reserve.
    pub(super) fn shrink(&mut self) {
        self.records.shrink_to_fit();
        self.names.shrink_to_fit();
        self.by_ino.shrink_to_fit();
        self.unread.shrink_to_fit();
    }
}

/// Makes room for more, an eighth in reserve instead of the half that a vector takes.
fn grow<T>(vec: &mut Vec<T>, more: usize) {
    if vec.len() + more > vec.capacity() {
        vec.reserve_exact(more.max(vec.len() / 8).max(64));
    }
}
