//! From files on the disk to objects in a pack. What some pack of the sandbox has already is not
//! written again.

use std::collections::{HashMap, HashSet};

use rustix::fs::{FileType, Stat};

use super::{
    Digest, StoreError,
    content::{Cut, Lookup},
    entry::{Content, Node, TreeEntry, kind},
    objects::Objects,
    pack::PackWriter,
};
use crate::{
    content::{Reader, Sink, content_of_bytes},
    tree::{FileId, Found, wide},
};

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
        // Nor is what a checkpoint names there if the pack that has it cannot be opened.
        let there = known == Some(digest) && self.objects.is_whole()
            || self.known.contains(&digest)
            || self.writer.has(&digest)
            || !is_new && self.objects.has(&digest);
        if !there {
            self.writer.add(kind, digest, bytes)?;
        }
        Ok(digest)
    }

    /// A regular file's content, cut into chunks of this size. `before`: what it was in the
    /// checkpoint before.
    pub(super) fn file(
        &mut self,
        found: &Found<'_>,
        chunk: u32,
        before: Option<Cut>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Content, StoreError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut parts = Parts::new(self, chunk, before);
        let content = Reader::new(&mut buffer, stop).read(found, chunk, &mut parts);
        self.buffer = buffer;
        content
    }

    /// The same of a content that is in memory.
    pub(super) fn bytes(
        &mut self,
        bytes: &[u8],
        chunk: u32,
        before: Option<Cut>,
    ) -> Result<Content, StoreError> {
        content_of_bytes(bytes, chunk, &mut Parts::new(self, chunk, before))
    }
}

/// The parts of one file's content, on their way into a pack.
pub(super) struct Parts<'i> {
    ingest: &'i mut Ingest,
    before: Option<Lookup>,
}

impl<'i> Parts<'i> {
    pub(super) fn new(ingest: &'i mut Ingest, chunk: u32, before: Option<Cut>) -> Self {
        Self {
            before: before.filter(|cut| cut.chunk == chunk).map(Lookup::new),
            ingest,
        }
    }

    /// The digest of a chunk of another content, which must be in some pack.
    pub(super) fn known(&mut self, of: &mut Lookup, number: u64) -> Result<Digest, StoreError> {
        let objects = &mut self.ingest.objects;
        let digest = of.digest(objects, number)?;
        match digest == Digest::ZEROS || objects.has(&digest) {
            true => Ok(digest),
            false => Err(objects.damaged(format!("chunk {digest} is in no pack"))),
        }
    }
}

impl Sink for Parts<'_> {
    type Error = StoreError;

    fn chunk(&mut self, number: u64, bytes: &[u8]) -> Result<Digest, StoreError> {
        let known = match &mut self.before {
            Some(before) => before.digest(&mut self.ingest.objects, number).ok(),
            None => None,
        };
        self.ingest.put(kind::CHUNK, bytes, known)
    }

    fn list(&mut self, bytes: &[u8]) -> Result<Digest, StoreError> {
        self.ingest.put(kind::LIST, bytes, None)
    }
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

/// Inodes with several names of which one has been met; without their extended attributes, of which a
/// sandbox may have made gigabytes.
#[derive(Default)]
pub(super) struct Links(HashMap<FileId, TreeEntry>);

impl Links {
    /// The entry of an inode that has been read under another name.
    pub(super) fn again(&self, found: &Found<'_>) -> Result<Option<TreeEntry>, StoreError> {
        let Some(entry) = self.0.get(&FileId::from(found.stat)) else {
            return Ok(None);
        };
        Ok(Some(TreeEntry {
            name: found.name.to_bytes().to_vec(),
            xattrs: found.xattrs()?,
            ..entry.clone()
        }))
    }

    /// Remembers an inode with several names, and gives its entry its link.
    pub(super) fn first(&mut self, found: &Found<'_>, path: &[u8], entry: &mut TreeEntry) {
        // Overlay makes many whiteouts links of one inode, which means nothing.
        if wide(found.stat.st_nlink) < 2 || is_whiteout(found.stat) {
            return;
        }
        entry.link = Some(link_id(path));
        let kept = TreeEntry {
            name: Vec::new(),
            node: entry.node.clone(),
            xattrs: Vec::new(),
            ..*entry
        };
        self.0.insert(FileId::from(found.stat), kept);
    }
}

fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::tree;

    /// A sandbox may give each of many inodes as many attributes as fit into a block.
    #[test]
    fn attributes_of_inodes_with_several_names_are_read_again_and_not_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        std::fs::hard_link(&path, dir.path().join("other")).unwrap();
        let value = vec![7; 3000];
        let none = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(&path, "user.note", &value, none).unwrap();
        let root = tree::open_root(dir.path()).unwrap();
        let mut links = Links::default();
        let mut met = Vec::new();
        for name in [c"file", c"other"] {
            let fd = tree::look_at(root.as_fd(), name).unwrap();
            let stat = rustix::fs::fstat(&fd).unwrap();
            let found = Found {
                name,
                ..tree::found_at(&fd, &stat, &path)
            };
            let entry = links.again(&found).unwrap().unwrap_or_else(|| {
                let mut entry = attributes(&found, Node::Fifo).unwrap();
                links.first(&found, b"file", &mut entry);
                entry
            });
            met.push(entry);
        }
        assert_eq!(met[1].xattrs, [(c"user.note".to_owned(), value)]);
        assert_eq!((&met[0].xattrs, met[0].link), (&met[1].xattrs, met[1].link));
        assert!(links.0.values().all(|kept| kept.xattrs.is_empty()));
    }
}
