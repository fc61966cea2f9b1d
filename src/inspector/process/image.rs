//! Which pages a CRIU image holds of one process, and where.
//!
//! `pagemap-PID.img` is two 32-bit magic numbers, then messages, each behind its 32-bit length (all
//! little-endian): one `pagemap_head`, then `pagemap_entry`s (CRIU's `images/pagemap.proto`; the
//! magic numbers are in its `include/magic.h`). `pages-N.img` holds the pages of the entries that
//! are present, one after the other. PID is the one within the sandbox.

use std::{
    fmt::Debug,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use protobuf::CodedInputStream;

/// 4 KiB on x86-64, which is all that crab supports.
pub(super) const PAGE: u64 = 4096;

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// What an entry's flags may be: `PE_PRESENT`, with `PE_LAZY` (it could be restored later) or
/// without. Not `PE_PARENT`: such a page is in an older image.
const PRESENT: [u64; 2] = [4, 4 | 2];
/// A pagemap larger than this is not looked at: it has an entry of some ten bytes for each run of
/// pages, and what is compared is bounded anyway.
const MAX_PAGEMAP: u64 = 4 << 20;

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) address: u64,
    pub(super) pages: u64,
}

impl Run {
    pub(super) fn end(&self) -> u64 {
        self.address.saturating_add(self.pages.saturating_mul(PAGE))
    }
}

/// Where the images of a dump are.
pub trait Images: Debug + Send + Sync {
    /// Opens one of its files.
    fn open(&self, name: &str) -> io::Result<Box<dyn ImageFile>>;
}

/// One file of a dump.
pub trait ImageFile {
    /// In bytes.
    fn size(&self) -> u64;
    /// Reads all of a buffer from some place on.
    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

/// Images in the directory into which CRIU has written them.
#[derive(Debug)]
pub struct ImageDir(PathBuf);

impl ImageDir {
    /// Reads nothing yet.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl Images for ImageDir {
    fn open(&self, name: &str) -> io::Result<Box<dyn ImageFile>> {
        let file = File::open(self.0.join(name))?;
        let size = file.metadata()?.len();
        Ok(Box::new(PlainFile { file, size }))
    }
}

struct PlainFile {
    file: File,
    size: u64,
}

impl ImageFile for PlainFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, at)
    }
}

/// The pages of one process.
#[derive(Debug)]
pub(super) struct Pages {
    /// By address, as in the file of pages.
    pub(super) runs: Vec<Run>,
    file: String,
}

impl Pages {
    /// Reads the index.
    pub(super) fn open(images: &dyn Images, inner_pid: i32) -> io::Result<Self> {
        let mut index = images.open(&format!("pagemap-{inner_pid}.img"))?;
        let size = index.size();
        if size > MAX_PAGEMAP {
            return Err(io::Error::other(format!("its page map has {size} bytes")));
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        index.read_exact_at(&mut bytes, 0)?;
        let (id, runs) = parse(&bytes)?;
        let file = format!("pages-{id}.img");
        Ok(Self { runs, file })
    }

    /// The file of pages.
    pub(super) fn file(&self, images: &dyn Images) -> io::Result<Box<dyn ImageFile>> {
        let file = images.open(&self.file)?;
        if file.size() < self.bytes() {
            return Err(io::Error::other("its file of pages is too short"));
        }
        Ok(file)
    }

    /// How much memory the image holds.
    pub(super) fn bytes(&self) -> u64 {
        let pages = self.runs.iter().map(|run| run.pages);
        pages.fold(0, u64::saturating_add).saturating_mul(PAGE)
    }

    /// Whether a page is in the image.
    pub(super) fn has(&self, address: u64) -> bool {
        let after = self.runs.partition_point(|run| run.address <= address);
        let run = after.checked_sub(1).and_then(|place| self.runs.get(place));
        run.is_some_and(|run| address < run.end())
    }
}

fn parse(bytes: &[u8]) -> io::Result<(u32, Vec<Run>)> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("page map: {what}"));
    let mut rest = bytes;
    let mut number = || {
        let (head, tail) = rest.split_first_chunk::<4>()?;
        rest = tail;
        Some(u32::from_le_bytes(*head))
    };
    if (number(), number()) != (Some(COMMON_MAGIC), Some(PAGEMAP_MAGIC)) {
        return Err(bad("magic number"));
    }
    let mut id = None;
    let mut runs: Vec<Run> = Vec::new();
    while !rest.is_empty() {
        let (length, tail) = rest.split_first_chunk::<4>().ok_or_else(|| bad("length"))?;
        let length = u32::from_le_bytes(*length) as usize;
        let (message, tail) = tail.split_at_checked(length).ok_or_else(|| bad("length"))?;
        rest = tail;
        if id.is_none() {
            id = Some(head(message)?);
            continue;
        }
        let run = entry(message)?;
        let ordered = runs.last().is_none_or(|last| last.end() <= run.address);
        if !ordered || run.pages == 0 || run.address % PAGE != 0 || run.end() == u64::MAX {
            return Err(bad("order"));
        }
        runs.push(run);
    }
    Ok((id.ok_or_else(|| bad("no head"))?, runs))
}

/// `pagemap_head { required uint32 pages_id = 1; }`
fn head(message: &[u8]) -> io::Result<u32> {
    let mut id = None;
    each_field(message, |field, value| {
        if field == 1 {
            id = u32::try_from(value).ok();
        }
    })?;
    id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "page map: no pages_id"))
}

/// `pagemap_entry { required uint64 vaddr = 1; optional uint32 compat_nr_pages = 2;
/// optional bool in_parent = 3; optional uint32 flags = 4; optional uint64 nr_pages = 5; }`
fn entry(message: &[u8]) -> io::Result<Run> {
    let (mut address, mut pages, mut compatible_pages) = (None, None, None);
    let mut elsewhere = false;
    each_field(message, |field, value| match field {
        1 => address = Some(value),
        // CRIU 4.2 writes both, the older one as 0.
        2 => compatible_pages = Some(value),
        5 => pages = Some(value),
        3 => elsewhere |= value != 0,
        4 => elsewhere |= !PRESENT.contains(&value),
        // A later CRIU may say something there that changes what a page is.
        _ => elsewhere = true,
    })?;
    match (address, pages.or(compatible_pages)) {
        _ if elsewhere => Err(io::Error::other("its pages are not all in this image")),
        (Some(address), Some(pages)) => Ok(Run { address, pages }),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "page map: entry",
        )),
    }
}

/// All fields of these messages are varints.
fn each_field(message: &[u8], mut f: impl FnMut(u32, u64)) -> io::Result<()> {
    let mut stream = CodedInputStream::from_bytes(message);
    while let Some(tag) = stream.read_raw_tag_or_eof().map_err(io::Error::from)? {
        let (field, wire) = (tag >> 3, tag & 7);
        if wire != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "page map: wire type",
            ));
        }
        f(field, stream.read_raw_varint64().map_err(io::Error::from)?);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod testing {
    use protobuf::CodedOutputStream;

    use super::{COMMON_MAGIC, PAGEMAP_MAGIC};

    /// What CRIU would write.
    pub(in super::super) fn pagemap(id: u32, entries: &[&[(u32, u64)]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(COMMON_MAGIC.to_le_bytes());
        bytes.extend(PAGEMAP_MAGIC.to_le_bytes());
        let head: &[(u32, u64)] = &[(1, u64::from(id))];
        for fields in std::iter::once(&head).chain(entries) {
            let mut message = Vec::new();
            {
                let mut stream = CodedOutputStream::vec(&mut message);
                for &(field, value) in *fields {
                    stream.write_uint64(field, value).unwrap();
                }
                stream.flush().unwrap();
            }
            bytes.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            bytes.extend(message);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::pagemap, *};

    #[test]
    fn an_index_tells_which_pages_are_there() {
        let bytes = pagemap(
            7,
            &[
                &[(1, 0x1000), (2, 2), (4, 4)],
                &[(1, 0x8000), (2, 0), (4, 6), (5, 1)],
            ],
        );
        let (id, runs) = parse(&bytes).unwrap();
        assert_eq!(id, 7);
        let pages = Pages {
            runs,
            file: String::new(),
        };
        assert_eq!(pages.bytes(), 3 * PAGE);
        let there: Vec<u64> = (0..10).filter(|page| pages.has(page * PAGE)).collect();
        assert_eq!(there, [1, 2, 8]);
    }

    #[test]
    fn an_index_that_is_not_understood_is_refused() {
        type Entries = &'static [&'static [(u32, u64)]];
        let table: &[(&str, Entries)] = &[
            ("in the parent", &[&[(1, 0x1000), (2, 1), (3, 1)]]),
            ("flag parent", &[&[(1, 0x1000), (2, 1), (4, 5)]]),
            ("not present, lazy", &[&[(1, 0x1000), (2, 1), (4, 2)]]),
            (
                "a field of a later version",
                &[&[(1, 0x1000), (2, 1), (9, 0)]],
            ),
            ("no address", &[&[(2, 1)]]),
            ("no pages", &[&[(1, 0x1000)]]),
            ("zero pages", &[&[(1, 0x1000), (2, 0)]]),
            ("not aligned", &[&[(1, 0x1001), (2, 1)]]),
            ("overflow", &[&[(1, 0x1000), (5, u64::MAX)]]),
            (
                "disorder",
                &[&[(1, 0x2000), (2, 1)], &[(1, 0x1000), (2, 1)]],
            ),
            ("overlap", &[&[(1, 0x1000), (2, 2)], &[(1, 0x2000), (2, 1)]]),
        ];
        for (what, entries) in table {
            assert!(parse(&pagemap(1, entries)).is_err(), "{what}");
        }
        let good = pagemap(1, &[&[(1, 0x1000), (2, 1)]]);
        assert!(parse(&good).is_ok());
        for length in 0..good.len() {
            let cut = parse(&good[..length]);
            assert!(
                cut.is_err() || cut.is_ok_and(|(_, runs)| runs.is_empty()),
                "{length}"
            );
        }
        assert!(parse(&[b"\0", &good[1..]].concat()).is_err());
    }
}
