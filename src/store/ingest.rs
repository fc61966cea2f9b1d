//! From files on the disk to objects in a pack. What some pack of the sandbox has already is not
//! written again.

use std::{collections::HashSet, os::fd::OwnedFd};

use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

use super::{
    Digest, StoreError,
    content::{Cut, ListBuilder, Lookup, PutList, chunks},
    entry::{Content, Node, TreeEntry, kind},
    objects::Objects,
    pack::PackWriter,
};
use crate::tree::{Found, ShownPath, TreeError, next_data, wide};

/// Files are read in pieces of this size.
const PIECE: usize = 256 << 10;
static ZEROS: [u8; super::content::FILE_CHUNK as usize] = [0; super::content::FILE_CHUNK as usize];

/// The packs that there are, and the one that is being written.
pub(super) struct Ingest {
    pub(super) objects: Objects,
    pub(super) writer: PackWriter,
    buffer: Vec<u8>,
    /// A tree is being edited: pages that change are new ones, unless an earlier state comes back,
    /// and then they are kept twice. To look for each in all packs would cost more.
    pub(super) pages_are_new: bool,
    /// Those pages of the earlier tree that were met on the way.
    pub(super) known: HashSet<Digest>,
}

impl PutList for Ingest {
    fn put_list(&mut self, bytes: &[u8]) -> Result<Digest, StoreError> {
        self.put(kind::LIST, bytes, None)
    }
}

impl Ingest {
    pub(super) fn new(objects: Objects, writer: PackWriter) -> Self {
        Self {
            objects,
            writer,
            buffer: Vec::new(),
            pages_are_new: false,
            known: HashSet::new(),
        }
    }

    /// Keeps an object. Whatever it refers to has been kept before it, or is needed by a checkpoint
    /// that exists: so all that a pack's object refers to is there, even if nothing needed that
    /// object itself until now. `known`: an object of such a checkpoint that may be the same.
    pub(super) fn put(
        &mut self,
        kind: u8,
        bytes: &[u8],
        known: Option<Digest>,
    ) -> Result<Digest, StoreError> {
        let digest = Digest::of_object(kind, bytes);
        let is_new = self.pages_are_new && !matches!(kind, kind::CHUNK | kind::LIST);
        let there = known == Some(digest)
            || self.known.contains(&digest)
            || self.writer.has(&digest)
            || !is_new && self.objects.has(&digest);
        if !there {
            self.writer.add(kind, digest, bytes)?;
        }
        Ok(digest)
    }

    /// Everything about an inode but its name and what a directory holds. `before`: what the name
    /// stood for in the checkpoint before.
    pub(super) fn entry(
        &mut self,
        found: &Found<'_>,
        before: Option<&TreeEntry>,
    ) -> Result<TreeEntry, StoreError> {
        let stat = found.stat;
        let node = match found.kind() {
            FileType::RegularFile => {
                let before = match before.map(|entry| &entry.node) {
                    Some(Node::File(content)) => Some(Cut::file(*content)),
                    _ => None,
                };
                let chunk = super::content::FILE_CHUNK;
                Node::File(self.file(found, chunk, before)?)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(found.fd, c"", Vec::new())
                    .map_err(found.err("read the link"))?;
                Node::Symlink(target.into_bytes())
            }
            FileType::CharacterDevice => Node::CharDevice(stat.st_rdev),
            FileType::BlockDevice => Node::BlockDevice(stat.st_rdev),
            FileType::Fifo => Node::Fifo,
            FileType::Socket => Node::Socket,
            kind => {
                return Err(StoreError::Unfit {
                    path: found.path.to_owned(),
                    reason: format!("it is a {kind:?}"),
                });
            }
        };
        attributes(found, node)
    }

    /// A regular file's content.
    pub(super) fn file(
        &mut self,
        found: &Found<'_>,
        chunk: u32,
        before: Option<Cut>,
    ) -> Result<Content, StoreError> {
        let size = found.stat.st_size.unsigned_abs();
        if size == 0 {
            return Ok(Content::EMPTY);
        }
        let file = found.open_file()?;
        let mut content = Building {
            cut: Cut {
                content: Content {
                    size,
                    ..Content::EMPTY
                },
                chunk,
            },
            lists: ListBuilder::default(),
            before: before.filter(|cut| cut.chunk == chunk).map(Lookup::new),
            next: 0,
        };
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(PIECE, 0);
        let read = self.read(found, &file, &mut content, &mut buffer);
        self.buffer = buffer;
        read?;
        let Building {
            mut cut,
            mut lists,
            next,
            ..
        } = content;
        lists.push_zeros(self, chunks(size, chunk) - next)?;
        cut.content.root = lists.finish(self)?;
        Ok(cut.content)
    }

    fn read(
        &mut self,
        found: &Found<'_>,
        file: &OwnedFd,
        content: &mut Building,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let (size, chunk) = (content.cut.content.size, u64::from(content.cut.chunk));
        let dense = is_dense(found.stat);
        let mut at = 0;
        while at < size {
            let (start, end) = match dense {
                true => (at, size),
                false => match next_data(file, at, size).map_err(found.err("seek in"))? {
                    Some(data) => data,
                    None => break,
                },
            };
            let mut from = start - start % chunk;
            let end = end.next_multiple_of(chunk).min(size);
            while from < end {
                let wanted = usize::try_from(end - from).unwrap_or(PIECE).min(PIECE);
                let piece = &mut buffer[..wanted];
                fill(file, piece, from).map_err(|e| match e {
                    Errno::NODATA => found.changed("size"),
                    e => found.err("read")(e),
                })?;
                for bytes in piece.chunks(usize::try_from(chunk).unwrap_or(PIECE)) {
                    content.add(self, from / chunk, bytes)?;
                    from += bytes.len() as u64;
                }
            }
            at = end;
        }
        Ok(())
    }
}

/// A content whose chunks come in order.
struct Building {
    cut: Cut,
    lists: ListBuilder,
    before: Option<Lookup>,
    /// The chunk after the last one that came.
    next: u64,
}

impl Building {
    fn add(&mut self, ingest: &mut Ingest, number: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let zeros = *bytes == ZEROS[..bytes.len()];
        if zeros || number < self.next {
            return Ok(());
        }
        self.lists.push_zeros(ingest, number - self.next)?;
        let known = match &mut self.before {
            Some(before) => before.digest(&mut ingest.objects, number).ok(),
            None => None,
        };
        let digest = ingest.put(kind::CHUNK, bytes, known)?;
        self.lists.push(ingest, digest)?;
        self.cut.content.data += bytes.len() as u64;
        self.next = number + 1;
        Ok(())
    }
}

/// A file without holes: to ask where they are would cost more than to read it.
fn is_dense(stat: &Stat) -> bool {
    stat.st_blocks.unsigned_abs() * 512 >= stat.st_size.unsigned_abs()
}

/// Reads all of a buffer; `NODATA` if the file is shorter.
fn fill(file: &OwnedFd, mut buffer: &mut [u8], mut at: u64) -> Result<(), Errno> {
    while !buffer.is_empty() {
        let n = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, at))?;
        if n == 0 {
            return Err(Errno::NODATA);
        }
        buffer = &mut buffer[n..];
        at += n as u64;
    }
    Ok(())
}

/// The attributes of an inode around what it holds.
pub(super) fn attributes(found: &Found<'_>, node: Node) -> Result<TreeEntry, StoreError> {
    let stat = found.stat;
    let nsec = u32::try_from(wide(stat.st_mtime_nsec)).unwrap_or(0);
    Ok(TreeEntry {
        name: found.name.to_bytes().to_vec(),
        node,
        mode: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime: stat.st_mtime,
        mtime_nsec: nsec,
        xattrs: found.xattrs()?,
        link: None,
    })
}

/// What an inode with several names is known by: the digest of the first of them, in the order of a
/// walk.
pub(super) fn link_id(path: &[u8]) -> Digest {
    Digest::of(path)
}

/// A name of a staged tree that cannot be kept.
pub(super) fn unfit(path: &std::path::Path, reason: impl Into<String>) -> StoreError {
    StoreError::Unfit {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// Names of a staged inode that are still to come, by inode.
#[derive(Default)]
pub(super) struct Links {
    groups: std::collections::HashMap<crate::tree::FileId, Group>,
}

struct Group {
    id: Digest,
    entry: TreeEntry,
    left: u64,
    first: ShownPath,
}

impl Links {
    /// The entry of an inode that has been read under another name.
    pub(super) fn again(&mut self, found: &Found<'_>) -> Option<TreeEntry> {
        let id = crate::tree::FileId::from(found.stat);
        let group = self.groups.get_mut(&id)?;
        group.left = group.left.saturating_sub(1);
        let entry = TreeEntry {
            name: found.name.to_bytes().to_vec(),
            ..group.entry.clone()
        };
        if group.left == 0 {
            self.groups.remove(&id);
        }
        Some(entry)
    }

    /// Remembers an inode with several names, and gives its entry its link.
    pub(super) fn first(&mut self, found: &Found<'_>, path: &[u8], entry: &mut TreeEntry) {
        let names = wide(found.stat.st_nlink);
        if names < 2 {
            return;
        }
        let id = link_id(path);
        entry.link = Some(id);
        let group = Group {
            id,
            entry: entry.clone(),
            left: names - 1,
            first: ShownPath::new(found.path),
        };
        self.groups
            .insert(crate::tree::FileId::from(found.stat), group);
    }

    /// All names must have come: a link's digest covers them.
    pub(super) fn finish(&self) -> Result<(), StoreError> {
        match self.groups.values().min_by_key(|group| group.id) {
            None => Ok(()),
            Some(group) => Err(TreeError::Changed {
                path: group.first.clone(),
                what: "it has names that are not in the copy",
            }
            .into()),
        }
    }
}
