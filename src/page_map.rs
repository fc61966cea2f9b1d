//! CRIU's index of the pages of one memory: which there are, and in which dump.
//!
//! `pagemap-ID.img` (ID: of a process, its pid within the sandbox) is two 32-bit magic numbers, then messages, each behind its 32-bit length (all
//! little-endian): one `pagemap_head`, then `pagemap_entry`s (CRIU's `images/pagemap.proto`). The pages of
//! those entries that are present follow each other in `pages-N.img`; those of the others are in the dump
//! that this one builds upon, at the same address of the index of the same name.

use protobuf::{CodedInputStream, CodedOutputStream};

/// 4 KiB on x86-64, which is all that crab supports.
pub(crate) const PAGE: u64 = 4096;

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// An entry's flags.
const IN_PARENT: u64 = 1;
const LAZY: u64 = 2;
const PRESENT: u64 = 4;
/// Of a `pagemap_entry`.
mod field {
    pub const ADDRESS: u32 = 1;
    /// CRIU 4.2 writes both numbers of pages, the older one as 0.
    pub const COMPATIBLE_PAGES: u32 = 2;
    pub const IN_PARENT: u32 = 3;
    pub const FLAGS: u32 = 4;
    pub const PAGES: u32 = 5;
}

/// Pages that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    pub(crate) pages: u64,
    /// The first one's place in the file of pages; none if they are in the dump before.
    pub(crate) first: Option<u64>,
    /// As they were written.
    compatible_pages: Option<u64>,
    long_pages: Option<u64>,
    lazy: u64,
}

impl Entry {
    pub(crate) fn end(&self) -> u64 {
        self.address.saturating_add(self.pages.saturating_mul(PAGE))
    }
}

/// The index.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PageMap {
    /// N of `pages-N.img`.
    pub(crate) file: u32,
    /// By address.
    pub(crate) entries: Vec<Entry>,
}

impl PageMap {
    /// None if it is not understood.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        let mut word = || {
            let (head, tail) = rest.split_first_chunk::<4>()?;
            rest = tail;
            Some(u32::from_le_bytes(*head))
        };
        if (word()?, word()?) != (COMMON_MAGIC, PAGEMAP_MAGIC) {
            return None;
        }
        let mut file = None;
        let mut entries: Vec<Entry> = Vec::new();
        let mut present = 0u64;
        while !rest.is_empty() {
            let (length, tail) = rest.split_first_chunk::<4>()?;
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            let (message, tail) = tail.split_at_checked(length)?;
            rest = tail;
            if file.is_none() {
                file = Some(head(message)?);
                continue;
            }
            let entry = entry(message, present)?;
            let is_ordered = entries
                .last()
                .is_none_or(|last| last.end() <= entry.address);
            if !is_ordered || entry.end() == u64::MAX {
                return None;
            }
            if entry.first.is_some() {
                present = present.checked_add(entry.pages)?;
            }
            entries.push(entry);
        }
        Some(Self {
            file: file?,
            entries,
        })
    }

    /// The one that a page is in.
    pub(crate) fn at(&self, address: u64) -> Option<&Entry> {
        let after = self.entries.partition_point(|e| e.address <= address);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        (address < entry.end()).then_some(entry)
    }

    /// Whether a page is in this dump or in one before.
    pub(crate) fn has(&self, address: u64) -> bool {
        self.at(address).is_some()
    }

    /// Whether all pages are in this dump.
    pub(crate) fn is_whole(&self) -> bool {
        self.entries.iter().all(|entry| entry.first.is_some())
    }

    /// How many pages there are, wherever.
    pub(crate) fn pages(&self) -> u64 {
        let pages = self.entries.iter().map(|entry| entry.pages);
        pages.fold(0, u64::saturating_add)
    }

    pub(crate) fn pages_name(&self) -> String {
        format!("pages-{}.img", self.file)
    }

    /// The index of the same pages if all of them are present.
    pub(crate) fn whole(&self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.extend(COMMON_MAGIC.to_le_bytes());
        bytes.extend(PAGEMAP_MAGIC.to_le_bytes());
        put(&mut bytes, &[(1, Some(self.file.into()))])?;
        for entry in &self.entries {
            let fields = [
                (field::ADDRESS, Some(entry.address)),
                (field::COMPATIBLE_PAGES, entry.compatible_pages),
                (field::FLAGS, Some(PRESENT | entry.lazy)),
                (field::PAGES, entry.long_pages),
            ];
            put(&mut bytes, &fields)?;
        }
        Some(bytes)
    }
}

/// Adds a message of varints.
fn put(bytes: &mut Vec<u8>, fields: &[(u32, Option<u64>)]) -> Option<()> {
    let mut message = Vec::new();
    {
        let mut stream = CodedOutputStream::vec(&mut message);
        for (field, value) in fields {
            if let Some(value) = value {
                stream.write_uint64(*field, *value).ok()?;
            }
        }
        stream.flush().ok()?;
    }
    bytes.extend(u32::try_from(message.len()).ok()?.to_le_bytes());
    bytes.extend(message);
    Some(())
}

/// `pagemap_head { required uint32 pages_id = 1; }`
fn head(message: &[u8]) -> Option<u32> {
    let mut id = None;
    each_field(message, |field, value| {
        if field == 1 {
            id = u32::try_from(value).ok();
        }
    })?;
    id
}

/// `pagemap_entry { required uint64 vaddr = 1; optional uint32 compat_nr_pages = 2;
/// optional bool in_parent = 3; optional uint32 flags = 4; optional uint64 nr_pages = 5; }`
fn entry(message: &[u8], present: u64) -> Option<Entry> {
    let (mut address, mut long_pages, mut compatible_pages) = (None, None, None);
    let (mut flags, mut in_parent, mut unknown) = (None, false, false);
    each_field(message, |field, value| match field {
        field::ADDRESS => address = Some(value),
        field::COMPATIBLE_PAGES => compatible_pages = Some(value),
        field::IN_PARENT => in_parent = value != 0,
        field::FLAGS => flags = Some(value),
        field::PAGES => long_pages = Some(value),
        // A later CRIU may say something there that changes what a page is.
        _ => unknown = true,
    })?;
    let flags = flags.unwrap_or(if in_parent { IN_PARENT } else { PRESENT });
    let lazy = flags & LAZY;
    let is_present = match flags & !LAZY {
        PRESENT => true,
        IN_PARENT => false,
        _ => return None,
    };
    let pages = long_pages.or(compatible_pages).filter(|pages| *pages > 0)?;
    let address = address.filter(|address| address % PAGE == 0)?;
    (!unknown).then_some(Entry {
        address,
        pages,
        first: is_present.then_some(present),
        compatible_pages,
        long_pages,
        lazy,
    })
}

/// All fields of these messages are varints.
fn each_field(message: &[u8], mut f: impl FnMut(u32, u64)) -> Option<()> {
    let mut stream = CodedInputStream::from_bytes(message);
    while let Some(tag) = stream.read_raw_tag_or_eof().ok()? {
        let (field, wire) = (tag >> 3, tag & 7);
        if wire != 0 {
            return None;
        }
        f(field, stream.read_raw_varint64().ok()?);
    }
    Some(())
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// What CRIU 4.2 would write of runs of pages: address, how many, whether they are in this dump.
    pub fn page_map(file: u32, runs: &[(u64, u64, bool)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(COMMON_MAGIC.to_le_bytes());
        bytes.extend(PAGEMAP_MAGIC.to_le_bytes());
        put(&mut bytes, &[(1, Some(file.into()))]).unwrap();
        for (address, pages, here) in runs {
            let flags = if *here { PRESENT } else { IN_PARENT };
            let fields = [
                (field::ADDRESS, Some(*address)),
                (field::COMPATIBLE_PAGES, Some(0)),
                (field::FLAGS, Some(flags)),
                (field::PAGES, Some(*pages)),
            ];
            put(&mut bytes, &fields).unwrap();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::page_map, *};

    #[test]
    fn pages_are_found_in_the_order_of_the_file() {
        let runs = [(0x1000, 2, true), (0x3000, 5, false), (0x9000, 1, true)];
        let map = PageMap::parse(&page_map(7, &runs)).unwrap();
        assert_eq!((map.file, map.pages(), map.is_whole()), (7, 8, false));
        let first = |address| map.at(address).map(|entry| entry.first);
        assert_eq!(first(0), None);
        assert_eq!(first(0x2000), Some(Some(0)));
        assert_eq!(first(0x7000), Some(None));
        assert_eq!(first(0x8000), None);
        assert_eq!(first(0x9000), Some(Some(2)));
        let whole = PageMap::parse(&map.whole().unwrap()).unwrap();
        assert!(whole.is_whole());
        assert_eq!(whole.at(0x9000).unwrap().first, Some(7));
    }

    #[test]
    fn an_index_that_is_not_understood_is_refused() {
        let make = |fields: &[(u32, u64)]| {
            let mut bytes = page_map(1, &[]);
            let fields: Vec<_> = fields.iter().map(|(f, v)| (*f, Some(*v))).collect();
            put(&mut bytes, &fields).unwrap();
            PageMap::parse(&bytes)
        };
        assert!(make(&[(1, 0x1000), (2, 1)]).unwrap().is_whole());
        assert!(!make(&[(1, 0x1000), (2, 1), (3, 1)]).unwrap().is_whole());
        assert!(make(&[(1, 0x1000), (2, 1), (4, 6)]).unwrap().is_whole());
        for (what, fields) in [
            ("nowhere", &[(1, 0x1000), (2, 1), (4, 2)][..]),
            ("in both", &[(1, 0x1000), (2, 1), (4, 5)]),
            ("a field of a later version", &[(1, 0x1000), (2, 1), (9, 0)]),
            ("no address", &[(2, 1)]),
            ("no pages", &[(1, 0x1000)]),
            ("zero pages", &[(1, 0x1000), (2, 0)]),
            ("not aligned", &[(1, 0x1001), (2, 1)]),
            ("overflow", &[(1, 0x1000), (5, u64::MAX)]),
        ] {
            assert_eq!(make(fields), None, "{what}");
        }
        let disorder = page_map(1, &[(0x1000, 2, true), (0x2000, 1, true)]);
        assert_eq!(PageMap::parse(&disorder), None);
        let good = page_map(1, &[(0x1000, 1, true)]);
        assert!(PageMap::parse(&good).is_some());
        assert_eq!(PageMap::parse(&good[..good.len() - 1]), None);
        assert_eq!(PageMap::parse(&[b"\0", &good[1..]].concat()), None);
    }
}
