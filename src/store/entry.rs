//! What a tree holds: entries, and the objects that directories are made of.
//!
//! A directory is a sorted sequence of entries, cut into pages (`LEAF`) where the names say so, so
//! that one entry more or less changes one page. Several pages hang below nodes (`NODE`).

use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;

use super::{
    Digest,
    codec::{Bad, Input, put_short},
};
pub use crate::content::Content;

/// The kinds of objects, part of each one's digest.
pub(super) mod kind {
    pub(in crate::store) use crate::content::{CHUNK, LIST};

    /// A page of a directory: entries.
    pub const LEAF: u8 = 3;
    /// References to pages, or to such nodes.
    pub const NODE: u8 = 4;
    /// The root's own entry, with an empty name.
    pub const ROOT: u8 = 5;
}

/// No object is larger. Only the one entry of a page may come near it, by its extended attributes.
pub(super) const MAX_OBJECT: usize = 2 << 20;
/// As many levels of lists or nodes are followed; none that is written comes near it.
pub(super) const MAX_HEIGHT: u8 = 16;

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeEntry {
    /// Its name; empty for the root.
    pub name: Vec<u8>,
    /// What is there.
    pub node: Node,
    /// Permission bits, set-id bits, sticky bit.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds of the modification time.
    pub mtime: i64,
    /// And its nanoseconds.
    pub mtime_nsec: u32,
    /// All extended attributes, by name.
    pub xattrs: Vec<(CString, Vec<u8>)>,
    /// Set if the inode has further names in the tree: the same for all of them.
    pub link: Option<Digest>,
}

/// What a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A regular file.
    File(Content),
    /// A directory.
    Directory(DirRef),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A character device and its number; 0 is overlay's whiteout.
    CharDevice(u64),
    /// A block device and its number.
    BlockDevice(u64),
    /// A FIFO.
    Fifo,
    /// A unix socket's name.
    Socket,
}

/// A directory's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirRef {
    /// Of its page or node.
    pub root: Digest,
    /// How many names there are in it and all below it.
    pub entries: u64,
    /// The sum of their files' data; a file with several names counts with each.
    pub data: u64,
}

impl TreeEntry {
    /// Its name.
    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }

    /// Of everything about it: two names with equal digests stand for equal things.
    pub fn digest(&self) -> Digest {
        let mut bytes = Vec::new();
        // An entry that does not fit is refused when it is put into a page.
        let _ = self.encode(&mut bytes);
        Digest::of(&bytes)
    }

    /// The same but for what is in a directory and when that last changed (`docs/state.md`: no
    /// part of a state).
    pub fn same_attributes(&self, other: &Self) -> bool {
        let same_node = match (&self.node, &other.node) {
            (Node::Directory(_), Node::Directory(_)) => true,
            (a, b) => a == b && (self.mtime, self.mtime_nsec) == (other.mtime, other.mtime_nsec),
        };
        same_node
            && (self.mode, self.uid, self.gid) == (other.mode, other.uid, other.gid)
            && self.xattrs == other.xattrs
            && self.link == other.link
    }

    /// The directory's names, if it is one.
    pub fn dir(&self) -> Option<DirRef> {
        match self.node {
            Node::Directory(dir) => Some(dir),
            _ => None,
        }
    }

    pub(super) fn data(&self) -> u64 {
        match &self.node {
            Node::File(content) => content.data,
            Node::Directory(dir) => dir.data,
            _ => 0,
        }
    }

    /// How many names it stands for, itself included.
    pub(super) fn entries(&self) -> u64 {
        1 + self.dir().map_or(0, |dir| dir.entries)
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Bad> {
        let (code, payload) = match &self.node {
            Node::File(content) => (1, Payload::Content(*content)),
            Node::Directory(dir) => (2, Payload::Dir(*dir)),
            Node::Symlink(target) => (3, Payload::Bytes(target)),
            Node::CharDevice(number) => (4, Payload::Number(*number)),
            Node::BlockDevice(number) => (5, Payload::Number(*number)),
            Node::Fifo => (6, Payload::None),
            Node::Socket => (7, Payload::None),
        };
        out.push(code);
        out.push(self.link.is_some().into());
        if self.name.len() > 255 || !put_short(out, &self.name) {
            return Err("its name is too long");
        }
        out.extend(self.mode.to_le_bytes());
        out.extend(self.uid.to_le_bytes());
        out.extend(self.gid.to_le_bytes());
        out.extend(self.mtime.to_le_bytes());
        out.extend(self.mtime_nsec.to_le_bytes());
        let count = u16::try_from(self.xattrs.len()).map_err(|_| "too many extended attributes")?;
        out.extend(count.to_le_bytes());
        for (name, value) in &self.xattrs {
            let length = u32::try_from(value.len()).map_err(|_| "an extended attribute")?;
            if !put_short(out, name.as_bytes()) {
                return Err("the name of an extended attribute is too long");
            }
            out.extend(length.to_le_bytes());
            out.extend(value);
        }
        if let Some(link) = &self.link {
            out.extend(link.bytes());
        }
        match payload {
            Payload::Content(content) => {
                out.extend(content.size.to_le_bytes());
                out.extend(content.data.to_le_bytes());
                out.extend(content.root.bytes());
            }
            Payload::Dir(dir) => {
                out.extend(dir.entries.to_le_bytes());
                out.extend(dir.data.to_le_bytes());
                out.extend(dir.root.bytes());
            }
            Payload::Bytes(bytes) => {
                if !put_short(out, bytes) {
                    return Err("its target is too long");
                }
            }
            Payload::Number(number) => out.extend(number.to_le_bytes()),
            Payload::None => {}
        }
        Ok(())
    }

    fn decode(input: &mut Input<'_>, is_root: bool) -> Result<Self, Bad> {
        let code = input.u8()?;
        let linked = match input.u8()? {
            0 => false,
            1 => true,
            _ => return Err("an entry's flags"),
        };
        let name = input.short()?;
        if name_is_bad(name, is_root) {
            return Err("an entry's name");
        }
        let mode = input.u16()?;
        let (uid, gid) = (input.u32()?, input.u32()?);
        let (mtime, mtime_nsec) = (input.i64()?, input.u32()?);
        if mode > 0o7777 || mtime_nsec >= 1_000_000_000 {
            return Err("an entry's mode or time");
        }
        let xattrs = decode_xattrs(input)?;
        let link = match linked {
            true => Some(input.digest()?),
            false => None,
        };
        let node = match code {
            1 => Node::File(decode_content(input)?),
            2 => Node::Directory(decode_dir(input)?),
            3 => Node::Symlink(input.short()?.to_vec()),
            4 => Node::CharDevice(input.u64()?),
            5 => Node::BlockDevice(input.u64()?),
            6 => Node::Fifo,
            7 => Node::Socket,
            _ => return Err("an entry's kind"),
        };
        let target_is_bad =
            |target: &Vec<u8>| target.is_empty() || target.contains(&0) || target.len() > 4095;
        if matches!(&node, Node::Symlink(target) if target_is_bad(target)) {
            return Err("a symbolic link's target");
        }
        if linked && matches!(node, Node::Directory(_)) {
            return Err("a directory with several names");
        }
        Ok(Self {
            name: name.to_vec(),
            node,
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
            xattrs,
            link,
        })
    }
}

enum Payload<'a> {
    Content(Content),
    Dir(DirRef),
    Bytes(&'a [u8]),
    Number(u64),
    None,
}

fn name_is_bad(name: &[u8], is_root: bool) -> bool {
    match is_root {
        true => !name.is_empty(),
        false => {
            name.is_empty()
                || name.len() > 255
                || name == b"."
                || name == b".."
                || name.iter().any(|b| matches!(b, 0 | b'/'))
        }
    }
}

fn decode_xattrs(input: &mut Input<'_>) -> Result<Vec<(CString, Vec<u8>)>, Bad> {
    let count = input.u16()?;
    let mut xattrs: Vec<(CString, Vec<u8>)> = Vec::new();
    for _ in 0..count {
        let name = CString::new(input.short()?).map_err(|_| "an extended attribute's name")?;
        let length = usize::try_from(input.u32()?).map_err(|_| "an extended attribute")?;
        let value = input.bytes(length)?;
        if name.is_empty() || xattrs.last().is_some_and(|(last, _)| *last >= name) {
            return Err("the order of extended attributes");
        }
        xattrs.push((name, value.to_vec()));
    }
    Ok(xattrs)
}

fn decode_content(input: &mut Input<'_>) -> Result<Content, Bad> {
    let (size, data) = (input.u64()?, input.u64()?);
    let root = input.digest()?;
    let consistent = data <= size && (root == Digest::ZEROS) == (data == 0);
    match consistent && i64::try_from(size).is_ok() {
        true => Ok(Content { size, data, root }),
        false => Err("a file's size"),
    }
}

fn decode_dir(input: &mut Input<'_>) -> Result<DirRef, Bad> {
    let (entries, data) = (input.u64()?, input.u64()?);
    let root = input.digest()?;
    match root == Digest::ZEROS {
        true => Err("a directory's digest"),
        false => Ok(DirRef {
            root,
            entries,
            data,
        }),
    }
}

/// A page: how many entries, then these, in byte order of their names.
pub(super) fn decode_leaf(bytes: &[u8]) -> Result<Vec<TreeEntry>, Bad> {
    let mut input = Input(bytes);
    let count = input.u16()?;
    let mut entries: Vec<TreeEntry> = Vec::new();
    for _ in 0..count {
        let entry = TreeEntry::decode(&mut input, false)?;
        if entries.last().is_some_and(|last| last.name >= entry.name) {
            return Err("the order of names");
        }
        entries.push(entry);
    }
    input.end()?;
    Ok(entries)
}

/// The root's entry: a directory.
pub(super) fn decode_root(bytes: &[u8]) -> Result<TreeEntry, Bad> {
    let mut input = Input(bytes);
    let entry = TreeEntry::decode(&mut input, true)?;
    input.end()?;
    match entry.node {
        Node::Directory(_) => Ok(entry),
        _ => Err("a root that is no directory"),
    }
}

/// A page or node as the level above sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PageRef {
    /// The first name in it.
    pub(super) first: Vec<u8>,
    pub(super) dir: DirRef,
}

impl PageRef {
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Bad> {
        if !put_short(out, &self.first) {
            return Err("its name is too long");
        }
        out.extend(self.dir.entries.to_le_bytes());
        out.extend(self.dir.data.to_le_bytes());
        out.extend(self.dir.root.bytes());
        Ok(())
    }
}

/// A node: the level of what it refers to (0 for pages), then the references.
pub(super) fn decode_node(bytes: &[u8]) -> Result<(u8, Vec<PageRef>), Bad> {
    let mut input = Input(bytes);
    let level = input.u8()?;
    if level >= MAX_HEIGHT {
        return Err("a node's level");
    }
    let mut refs: Vec<PageRef> = Vec::new();
    while !input.is_empty() {
        let first = input.short()?;
        if name_is_bad(first, false) {
            return Err("a node's name");
        }
        let dir = decode_dir(&mut input)?;
        if refs.last().is_some_and(|last| *last.first >= *first) {
            return Err("the order of pages");
        }
        refs.push(PageRef {
            first: first.to_vec(),
            dir,
        });
    }
    match refs.is_empty() {
        true => Err("an empty node"),
        false => Ok((level, refs)),
    }
}
