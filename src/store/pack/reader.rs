//! Reading a pack.

use std::{
    cell::OnceCell,
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::{
    super::{
        Digest, StoreError,
        codec::{Bad, Input},
        files,
        manifest::MAX_MANIFEST,
    },
    format::{self, Block, FORMAT, Place, Trailer},
};

/// A search in the file costs about as much as this many bytes of an index that is read, and checked. When
/// as much as that of the whole index has been spent on searches, it is read into memory.
const SEARCH: u64 = 4 << 10;
/// An index that is no larger is read at once.
const SMALL_INDEX: u64 = 16 << 10;
/// No larger one stays in memory while nobody uses the pack: one of a thousand objects.
const KEPT_INDEX: usize = 64 << 10;

/// What a file is, as far as it shows from outside: whoever writes to it, or puts another one into its
/// place, changes this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    inode: (u64, u64),
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            inode: (meta.dev(), meta.ino()),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// Of the file at a path; None if there is none.
    pub fn at(path: &Path) -> Option<Self> {
        let meta = std::fs::symlink_metadata(path).ok()?;
        Some(Self::of(&meta))
    }
}

/// A pack, open to be read. Its header and trailer are sound; everything else is checked when it
/// is read.
#[derive(Debug)]
pub struct Pack {
    /// Open while somebody uses it.
    file: OnceCell<File>,
    path: PathBuf,
    trailer: Trailer,
    stamp: Stamp,
    table: OnceCell<Vec<Block>>,
    /// Fanout and index, as they are in the file.
    index: Option<Vec<u8>>,
    searches: u64,
}

fn open(path: &Path) -> Result<(File, Metadata), StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(files::io("open", path))?;
    let meta = file.metadata().map_err(files::io("stat", path))?;
    Ok((file, meta))
}

impl Pack {
    /// Opens it. An error of kind `NotFound` if it isn't there.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let (file, meta) = open(path)?;
        let damaged = |reason: &str| StoreError::Damaged {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let size = meta.len();
        if !meta.is_file() {
            return Err(damaged("it is no regular file"));
        }
        let mut header = [0; format::HEADER];
        let mut trailer = [0; format::TRAILER];
        let shortest = (header.len() + trailer.len()) as u64;
        if size < header.len() as u64 {
            return Err(damaged("it is cut short"));
        }
        file.read_exact_at(&mut header, 0)
            .map_err(files::io("read", path))?;
        check_header(&header, path)?;
        if size < shortest {
            return Err(damaged("it is cut short"));
        }
        file.read_exact_at(&mut trailer, size - format::TRAILER as u64)
            .map_err(files::io("read", path))?;
        let trailer = Trailer::decode(&header, &trailer).map_err(damaged)?;
        if trailer.file_size() != Some(size) {
            return Err(damaged("its size is another one than it says"));
        }
        Ok(Self {
            file: OnceCell::from(file),
            path: path.to_owned(),
            trailer,
            stamp: Stamp::of(&meta),
            table: OnceCell::new(),
            index: None,
            searches: 0,
        })
    }

    /// Reads the pack at `path`, all of it: whether every byte is as it was written.
    ///
    /// # Errors
    /// If it cannot be read, or isn't there.
    pub fn is_whole(path: &Path) -> Result<bool, StoreError> {
        let read = || {
            let mut pack = Self::open(path)?;
            pack.manifest()?;
            pack.check()?;
            (0..pack.blocks()).try_for_each(|number| {
                let number = u32::try_from(number).unwrap_or(u32::MAX);
                pack.block(number).map(drop)
            })
        };
        match read() {
            Ok(()) => Ok(true),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Where it was when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.stamp.size
    }

    /// The file that it is.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Closes it, and keeps what is known of it for whoever needs it next: [`Pack::is_fresh`] says whether
    /// that still holds. Returns how many bytes of memory it takes; None if it is not worth keeping.
    pub fn shelve(&mut self) -> Option<usize> {
        self.file.take();
        self.searches = 0;
        let kept = self.index.as_ref().map_or(0, Vec::len);
        let table = self.table.get().map_or(0, Vec::len) * size_of::<Block>();
        (kept <= KEPT_INDEX && table <= KEPT_INDEX).then_some(size_of::<Self>() + kept + table)
    }

    /// Whether its file is still there as it was when it was opened.
    pub fn is_fresh(&self) -> bool {
        Stamp::at(&self.path) == Some(self.stamp)
    }

    fn file(&self) -> Result<&File, StoreError> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let (file, meta) = open(&self.path)?;
        match Stamp::of(&meta) == self.stamp {
            true => Ok(self.file.get_or_init(|| file)),
            false => Err(self.damaged("it has become another one meanwhile")),
        }
    }

    fn damaged(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Damaged {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    fn bad(&self) -> impl Fn(Bad) -> StoreError + '_ {
        |reason| self.damaged(reason)
    }

    fn read(&self, at: u64, count: u64) -> Result<Vec<u8>, StoreError> {
        // Lengths come from a trailer that adds up to the file's own size.
        let within = at.checked_add(count).is_some_and(|end| end <= self.size());
        let count = usize::try_from(count).ok().filter(|_| within);
        let mut bytes = vec![0; count.ok_or_else(|| self.damaged("it ends too soon"))?];
        match self.file()?.read_exact_at(&mut bytes, at) {
            Ok(()) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.damaged("it has become shorter"))
            }
            Err(e) => Err(files::io("read", &self.path)(e)),
        }
    }

    /// The manifest, as it was written; None in a pack without one.
    pub fn manifest(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let trailer = &self.trailer;
        if trailer.manifest_stored == 0 {
            return Ok(None);
        }
        if trailer.manifest_stored > MAX_MANIFEST || trailer.manifest_raw > MAX_MANIFEST {
            return Err(self.damaged(format!("its manifest is larger than {MAX_MANIFEST} bytes")));
        }
        let stored = self.read(
            trailer.manifest_at().unwrap_or(u64::MAX),
            trailer.manifest_stored,
        )?;
        if Digest::of(&stored) != trailer.manifest_check {
            return Err(self.damaged("the checksum of its manifest is another one"));
        }
        self.decompress(&stored, trailer.manifest_raw).map(Some)
    }

    fn decompress(&self, stored: &[u8], raw: u64) -> Result<Vec<u8>, StoreError> {
        let raw = usize::try_from(raw).map_err(|_| self.damaged("a length"))?;
        let bytes = zstd::bulk::decompress(stored, raw)
            .map_err(|e| self.damaged(format!("it cannot be decompressed: {e}")))?;
        match bytes.len() == raw {
            true => Ok(bytes),
            false => Err(self.damaged("it decompresses to another length")),
        }
    }

    fn table(&self) -> Result<&[Block], StoreError> {
        if let Some(table) = self.table.get() {
            return Ok(table);
        }
        let size = self.trailer.blocks * format::BLOCK_RECORD as u64;
        let bytes = self.read(self.trailer.table_at, size)?;
        if Digest::of(&bytes) != self.trailer.table_check {
            return Err(self.damaged("the checksum of its table of blocks is another one"));
        }
        let mut input = Input(&bytes);
        let mut table = Vec::with_capacity(bytes.len() / format::BLOCK_RECORD);
        let mut end = format::HEADER as u64;
        while !input.is_empty() {
            let block = Block::decode(&mut input).map_err(self.bad())?;
            if block.at != end {
                return Err(self.damaged("there is something between its blocks"));
            }
            end += u64::from(block.stored);
            table.push(block);
        }
        if end != self.trailer.table_at {
            return Err(self.damaged("there is something behind its blocks"));
        }
        Ok(self.table.get_or_init(|| table))
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u64 {
        self.trailer.blocks
    }

    /// One block, decompressed; its checksum is right.
    pub fn block(&self, number: u32) -> Result<Vec<u8>, StoreError> {
        let block = self.table()?.get(number as usize).copied();
        let block = block.ok_or_else(|| self.damaged("an object is in no block"))?;
        let stored = self.read(block.at, block.stored.into())?;
        if Block::check_of(&stored) != block.check {
            return Err(self.damaged(format!("the checksum of block {number} is another one")));
        }
        match block.stored == block.raw {
            true => Ok(stored),
            false => self.decompress(&stored, block.raw.into()),
        }
    }

    /// Where an object is. Searches in the file at first, without a look at the index's checksum.
    pub fn find(&mut self, digest: &Digest) -> Result<Option<Place>, StoreError> {
        if self.index.is_none() {
            self.searches += 1;
            let size = self.trailer.objects * format::INDEX_ENTRY as u64;
            if size > SMALL_INDEX && self.searches <= size / SEARCH {
                return self.find_in_file(digest);
            }
        }
        let bits = format::fanout_bits(self.trailer.objects);
        let bucket = format::bucket(digest, bits);
        let fanout = self.trailer.fanout_size();
        let index = self.index()?;
        let at = |n: u64| usize::try_from(n * 4).ok();
        let bounds = at(bucket).and_then(|at| index.get(at..at + 8));
        let (from, to) = range(bounds.unwrap_or_default());
        let slice = |n: u32| usize::try_from(fanout + u64::from(n) * 44).ok();
        let entries = match (slice(from), slice(to)) {
            (Some(from), Some(to)) => index.get(from..to).unwrap_or_default(),
            _ => &[],
        };
        Ok(search(entries, digest))
    }

    fn find_in_file(&self, digest: &Digest) -> Result<Option<Place>, StoreError> {
        let trailer = &self.trailer;
        let bits = format::fanout_bits(trailer.objects);
        let bucket = format::bucket(digest, bits);
        let (Some(fanout), Some(index)) = (trailer.fanout_at(), trailer.index_at()) else {
            return Ok(None);
        };
        let (from, to) = range(&self.read(fanout + bucket * 4, 8)?);
        if from > to || u64::from(to) > trailer.objects {
            return Err(self.damaged("its fanout is out of order"));
        }
        let size = format::INDEX_ENTRY as u64;
        let entries = self.read(index + u64::from(from) * size, u64::from(to - from) * size)?;
        Ok(search(&entries, digest))
    }

    fn index(&mut self) -> Result<&[u8], StoreError> {
        let index = match self.index.take() {
            Some(index) => index,
            None => self.read_index()?,
        };
        Ok(self.index.insert(index))
    }

    fn read_index(&self) -> Result<Vec<u8>, StoreError> {
        let trailer = &self.trailer;
        let at = trailer.fanout_at().unwrap_or(u64::MAX);
        let size = trailer.fanout_size() + trailer.objects * format::INDEX_ENTRY as u64;
        let bytes = self.read(at, size)?;
        match Digest::of(&bytes) == trailer.index_check {
            true => Ok(bytes),
            false => Err(self.damaged("the checksum of its index is another one")),
        }
    }

    /// Reads table and index and checks all that can be without the blocks.
    pub fn check(&mut self) -> Result<(), StoreError> {
        self.table()?;
        self.index().map(drop)
    }

    /// All objects, by digest.
    pub fn objects(&mut self) -> Result<Vec<(Digest, Place)>, StoreError> {
        let fanout = usize::try_from(self.trailer.fanout_size()).unwrap_or(usize::MAX);
        let index = self.index()?;
        let mut input = Input(index.get(fanout..).unwrap_or_default());
        let mut all = Vec::with_capacity(input.0.len() / format::INDEX_ENTRY);
        while !input.is_empty() {
            match Place::decode(&mut input) {
                Ok(object) => all.push(object),
                Err(reason) => return Err(self.damaged(reason)),
            }
        }
        let ordered = all.windows(2).all(|pair| pair[0].0 < pair[1].0);
        match ordered {
            true => Ok(all),
            false => Err(self.damaged("its index is out of order")),
        }
    }
}

fn check_header(header: &[u8], path: &Path) -> Result<(), StoreError> {
    let damaged = |reason: &str| StoreError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let mut input = Input(header);
    if input.bytes(format::MAGIC.len()).map_err(damaged)? != format::MAGIC {
        return Err(damaged("it does not begin like a pack"));
    }
    let found = input.u32().map_err(damaged)?;
    if found > FORMAT {
        return Err(StoreError::Newer {
            path: path.to_owned(),
            found: found.into(),
            known: FORMAT,
        });
    }
    match (found, input.u32()) {
        (FORMAT, Ok(0)) => Ok(()),
        _ => Err(damaged("its header is out of order")),
    }
}

fn range(bounds: &[u8]) -> (u32, u32) {
    let mut input = Input(bounds);
    (input.u32().unwrap_or(0), input.u32().unwrap_or(0))
}

/// A digest among sorted index entries.
fn search(entries: &[u8], digest: &Digest) -> Option<Place> {
    let size = format::INDEX_ENTRY;
    let (mut low, mut high) = (0, entries.len() / size);
    while low < high {
        let middle = low + (high - low) / 2;
        let mut input = Input(entries.get(middle * size..)?);
        let (found, place) = Place::decode(&mut input).ok()?;
        match found.cmp(digest) {
            std::cmp::Ordering::Equal => return Some(place),
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    None
}
