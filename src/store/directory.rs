//! Directories: from entries to pages and nodes, and back.

use super::{
    Digest, StoreError,
    entry::{
        DirRef, MAX_HEIGHT, MAX_OBJECT, PageRef, TreeEntry, decode_leaf, decode_node, decode_root,
        kind,
    },
    ingest::Ingest,
    objects::Objects,
};

/// A page is closed behind a name whose digest begins with so many zero bits, so after 128 names
/// on average, wherever they lie: one name more or less changes one page.
const BOUNDARY_MASK: u8 = 0x7f;
/// Or behind so many entries,
const MAX_ENTRIES: usize = 512;
/// or bytes, for names that were chosen to have no boundaries.
const MAX_BYTES: usize = 64 << 10;

/// The root's entry of a tree.
pub(super) fn read_root(objects: &mut Objects, root: &Digest) -> Result<TreeEntry, StoreError> {
    let bytes = objects.expect(kind::ROOT, root)?;
    decode_root(&bytes).map_err(|reason| bad(objects, root, reason))
}

fn bad(objects: &Objects, digest: &Digest, reason: &str) -> StoreError {
    objects.damaged(format!("object {digest}: {reason}"))
}

/// What a directory's object is.
pub(super) enum Page {
    Leaf(Vec<TreeEntry>),
    Node(u8, Vec<PageRef>),
}

/// Reads a page or node. `below`: the level that refers to it, which is one more than its own.
pub(super) fn read_page(
    objects: &mut Objects,
    digest: &Digest,
    below: Option<u8>,
) -> Result<Page, StoreError> {
    let (found, bytes) = objects.get(digest)?;
    let page = match (found, below) {
        (kind::LEAF, None | Some(0)) => decode_leaf(&bytes).map(Page::Leaf),
        (kind::NODE, _) => decode_node(&bytes).map(|(level, refs)| Page::Node(level, refs)),
        _ => Err("it is no part of a directory"),
    };
    let page = page.map_err(|reason| bad(objects, digest, reason))?;
    match (&page, below) {
        // Levels fall by one: no circle, and no tree deeper than its first level says.
        (Page::Node(level, _), Some(below)) if level + 1 != below => {
            Err(bad(objects, digest, "its level"))
        }
        _ => Ok(page),
    }
}

/// A directory's pages in order.
pub(super) fn read_pages(objects: &mut Objects, dir: &DirRef) -> Result<Vec<PageRef>, StoreError> {
    read_all_pages(objects, dir, &mut |_| {})
}

/// The same; `node` gets the digest of each node above them.
fn read_all_pages(
    objects: &mut Objects,
    dir: &DirRef,
    node: &mut dyn FnMut(Digest),
) -> Result<Vec<PageRef>, StoreError> {
    let mut pages = Vec::new();
    let whole = PageRef {
        first: Vec::new(),
        dir: *dir,
    };
    let mut todo = vec![(whole, None)];
    while let Some((page, below)) = todo.pop() {
        if below != Some(0)
            && let Page::Node(level, refs) = read_page(objects, &page.dir.root, below)?
        {
            node(page.dir.root);
            todo.extend(refs.into_iter().rev().map(|below| (below, Some(level))));
            continue;
        }
        // Also what keeps nodes that repeat from becoming more pages than any memory holds.
        if pages
            .last()
            .is_some_and(|last: &PageRef| last.first >= page.first)
        {
            return Err(bad(objects, &dir.root, "the order of its pages"));
        }
        pages.push(page);
    }
    Ok(pages)
}

/// The entries of one page.
pub(super) fn read_leaf(
    objects: &mut Objects,
    page: &Digest,
) -> Result<Vec<TreeEntry>, StoreError> {
    match read_page(objects, page, Some(0))? {
        Page::Leaf(entries) => Ok(entries),
        Page::Node(..) => Err(bad(objects, page, "its level")),
    }
}

/// All entries of a directory, in byte order of their names.
pub(super) fn read_dir(objects: &mut Objects, dir: &DirRef) -> Result<Vec<TreeEntry>, StoreError> {
    let mut entries: Vec<TreeEntry> = Vec::new();
    for page in read_pages(objects, dir)? {
        let more = read_leaf(objects, &page.dir.root)?;
        if let (Some(last), Some(first)) = (entries.last(), more.first())
            && last.name >= first.name
        {
            return Err(bad(objects, &dir.root, "the order of its pages"));
        }
        entries.extend(more);
    }
    Ok(entries)
}

/// One name of a directory.
pub(super) fn find(
    objects: &mut Objects,
    dir: &DirRef,
    name: &[u8],
) -> Result<Option<TreeEntry>, StoreError> {
    let (mut digest, mut below) = (dir.root, None);
    loop {
        match read_page(objects, &digest, below)? {
            Page::Leaf(entries) => {
                let found = entries.binary_search_by(|entry| entry.name.as_slice().cmp(name));
                return Ok(found.ok().and_then(|at| entries.into_iter().nth(at)));
            }
            Page::Node(level, refs) => {
                let after = refs.partition_point(|page| page.first.as_slice() <= name);
                let Some(page) = after.checked_sub(1).and_then(|at| refs.get(at)) else {
                    return Ok(None);
                };
                (digest, below) = (page.dir.root, Some(level));
            }
        }
    }
}

/// Builds a directory from entries that come in order.
#[derive(Default)]
pub(super) struct DirBuilder {
    pages: Vec<PageRef>,
    page: Building,
}

/// A page or node that is being filled.
#[derive(Default)]
struct Building {
    first: Vec<u8>,
    bytes: Vec<u8>,
    count: usize,
    entries: u64,
    data: u64,
}

impl Building {
    fn add(&mut self, name: &[u8], entries: u64, data: u64) {
        if self.count == 0 {
            self.first = name.to_vec();
        }
        self.count += 1;
        self.entries = self.entries.saturating_add(entries);
        self.data = self.data.saturating_add(data);
    }

    fn close(self, root: Digest) -> PageRef {
        PageRef {
            first: self.first,
            dir: DirRef {
                root,
                entries: self.entries,
                data: self.data,
            },
        }
    }
}

impl DirBuilder {
    pub(super) fn add(&mut self, ingest: &mut Ingest, entry: &TreeEntry) -> Result<(), StoreError> {
        let page = &mut self.page;
        let before = page.bytes.len();
        let encoded = entry.encode(&mut page.bytes);
        encoded.map_err(|reason| unfit(entry, reason))?;
        let size = page.bytes.len() - before;
        if size > MAX_OBJECT / 2 {
            return Err(unfit(entry, "it has too many extended attributes"));
        }
        page.add(&entry.name, entry.entries(), entry.data());
        let boundary = Digest::of(&entry.name).bytes()[0] & BOUNDARY_MASK == 0;
        if boundary || page.count >= MAX_ENTRIES || page.bytes.len() >= MAX_BYTES {
            self.close_page(ingest)?;
        }
        Ok(())
    }

    /// No page is open: whatever comes next begins one.
    fn is_at_boundary(&self) -> bool {
        self.page.count == 0
    }

    fn close_page(&mut self, ingest: &mut Ingest) -> Result<(), StoreError> {
        let page = std::mem::take(&mut self.page);
        // At most MAX_ENTRIES.
        let count = u16::try_from(page.count).unwrap_or(u16::MAX);
        let bytes = [&count.to_le_bytes()[..], &page.bytes].concat();
        let root = ingest.put(kind::LEAF, &bytes, None)?;
        self.pages.push(page.close(root));
        Ok(())
    }

    pub(super) fn finish(mut self, ingest: &mut Ingest) -> Result<DirRef, StoreError> {
        if !self.is_at_boundary() || self.pages.is_empty() {
            self.close_page(ingest)?;
        }
        let mut pages = self.pages;
        let mut level = 0;
        while pages.len() > 1 {
            pages = nodes(ingest, &pages, level)?;
            level += 1;
            if level >= MAX_HEIGHT && pages.len() > 1 {
                // Names and times can be chosen so; what is behind the first page would be lost.
                return Err(ingest.objects.damaged("a directory is too deep"));
            }
        }
        let top = pages.first().map(|page| page.dir);
        top.ok_or_else(|| ingest.objects.damaged("a directory without a page"))
    }
}

/// One level above `pages`.
fn nodes(ingest: &mut Ingest, pages: &[PageRef], level: u8) -> Result<Vec<PageRef>, StoreError> {
    let mut above = Vec::new();
    let mut node = Building::default();
    for (n, page) in pages.iter().enumerate() {
        if node.count == 0 {
            node.bytes.push(level);
        }
        let encoded = page.encode(&mut node.bytes);
        encoded.map_err(|reason| ingest.objects.damaged(reason))?;
        node.add(&page.first, page.dir.entries, page.dir.data);
        let boundary = page.dir.root.bytes()[0] & BOUNDARY_MASK == 0;
        // At least two, so that each level is smaller than the one below it.
        let full = node.count >= MAX_ENTRIES || boundary && node.count > 1;
        if full || n + 1 == pages.len() {
            let node = std::mem::take(&mut node);
            let root = ingest.put(kind::NODE, &node.bytes, None)?;
            above.push(node.close(root));
        }
    }
    Ok(above)
}

fn unfit(entry: &TreeEntry, reason: &str) -> StoreError {
    StoreError::Unfit {
        path: entry.name().into(),
        reason: reason.to_owned(),
    }
}

/// The directory that `base` becomes when the names of `edits`, in byte order, get these entries,
/// or go.
pub(super) fn edit(
    ingest: &mut Ingest,
    base: Option<&DirRef>,
    edits: Vec<(Vec<u8>, Option<TreeEntry>)>,
) -> Result<DirRef, StoreError> {
    let pages = match base {
        Some(dir) if edits.is_empty() => return Ok(*dir),
        Some(dir) => {
            let Ingest { objects, known, .. } = &mut *ingest;
            read_all_pages(objects, dir, &mut |node| {
                known.insert(node);
            })?
        }
        None => Vec::new(),
    };
    let digests = pages.iter().map(|page| page.dir.root);
    ingest.known.extend(digests);
    let mut builder = DirBuilder::default();
    let mut edits = edits.into_iter().peekable();
    for (n, page) in pages.iter().enumerate() {
        // The last page takes whatever comes behind it, and the first one what comes before.
        let next = pages.get(n + 1).map(|next| next.first.as_slice());
        let touched = edits
            .peek()
            .is_some_and(|(name, _)| next.is_none_or(|next| name.as_slice() < next));
        if !touched && builder.is_at_boundary() {
            builder.pages.push(page.clone());
            continue;
        }
        for entry in read_leaf(&mut ingest.objects, &page.dir.root)? {
            while let Some((_, new)) = edits.next_if(|(name, _)| *name < entry.name) {
                add(ingest, &mut builder, new)?;
            }
            match edits.next_if(|(name, _)| *name == entry.name) {
                Some((_, new)) => add(ingest, &mut builder, new)?,
                None => builder.add(ingest, &entry)?,
            }
        }
        while let Some((_, new)) =
            edits.next_if(|(name, _)| next.is_none_or(|next| name.as_slice() < next))
        {
            add(ingest, &mut builder, new)?;
        }
    }
    for (_, new) in edits {
        add(ingest, &mut builder, new)?;
    }
    builder.finish(ingest)
}

fn add(
    ingest: &mut Ingest,
    builder: &mut DirBuilder,
    new: Option<TreeEntry>,
) -> Result<(), StoreError> {
    match new {
        Some(entry) => builder.add(ingest, &entry),
        None => Ok(()),
    }
}
