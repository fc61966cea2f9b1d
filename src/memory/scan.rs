//! PAGEMAP_SCAN: ranges of pages that are in some state, without a look at each page from here.

use std::{fs::File, io, ops::Range, os::fd::AsRawFd};

use super::Page;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
pub struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Pages that follow each other and are in one state (`struct page_region`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Region {
    /// The address of the first one.
    pub start: u64,
    /// And that behind the last one.
    pub end: u64,
    categories: u64,
}

impl Region {
    /// They are the process's own, and not those of a file.
    pub fn is_own(&self) -> bool {
        self.categories & PAGE_IS_FILE == 0
    }

    /// They are the process's own, and have what they had when marks were cleared. Of huge pages that is not
    /// said, and a page of zeros may have come in the place of another one.
    pub fn is_unwritten(&self) -> bool {
        let doubts = PAGE_IS_SOFT_DIRTY | PAGE_IS_PFNZERO | PAGE_IS_HUGE;
        self.is_own() && self.categories & doubts == 0
    }
}

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;
const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
/// The end of what a process of x86-64 can map without asking for five levels of page tables.
const ADDRESSES: u64 = (1 << 47) - 4096;
/// Regions that are told at once.
const REGIONS: usize = 512;

nix::ioctl_readwrite!(pagemap_scan_ioctl, b'f', 16, Scan);

/// How many bytes of its own memory a process has written to since marks were last cleared: about
/// what an incremental dump of it would have. Reads the marks, and leaves them.
///
/// # Errors
/// When the process is gone, or the kernel is older than 6.7 and does not know the call.
pub fn dirty_bytes(pid: i32) -> io::Result<u64> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let question = Scan {
        end: ADDRESSES,
        // Not those of a file: they are in it, and in no dump.
        category_inverted: PAGE_IS_FILE,
        category_mask: PAGE_IS_SOFT_DIRTY | PAGE_IS_FILE,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_SOFT_DIRTY,
        ..Default::default()
    };
    let mut bytes = 0u64;
    each_region(&pagemap, question, |region| {
        bytes = bytes.saturating_add(region.end.saturating_sub(region.start));
        Ok(())
    })?;
    Ok(bytes)
}

/// Adds to `found` the pages of a part of a process's memory that are there, by address. Reads the marks, and
/// leaves them.
///
/// # Errors
/// When the process is gone, the kernel does not know the call, or there would be more than `most` regions.
pub fn pages_in(
    pagemap: &File,
    part: Range<u64>,
    found: &mut Vec<Region>,
    most: usize,
) -> io::Result<()> {
    let question = Scan {
        start: part.start,
        end: part.end,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_SOFT_DIRTY | PAGE_IS_FILE | PAGE_IS_PFNZERO | PAGE_IS_HUGE,
        ..Default::default()
    };
    each_region(pagemap, question, |region| {
        if found.len() >= most {
            return Err(io::Error::other("its pages are in too many states"));
        }
        found.push(*region);
        Ok(())
    })
}

/// Asks until all is answered.
fn each_region(
    pagemap: &File,
    mut question: Scan,
    mut each: impl FnMut(&Region) -> io::Result<()>,
) -> io::Result<()> {
    let mut found = [Region::default(); REGIONS];
    question.size = size_of::<Scan>() as u64;
    while question.start < question.end {
        ask(pagemap, &mut question, &mut found)?
            .iter()
            .try_for_each(&mut each)?;
        // Where the walk stopped, which is further each time.
        if question.walk_end <= question.start {
            return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
        }
        question.start = question.walk_end;
    }
    Ok(())
}

/// Whether the kernel knows the call: asks for a page of our own, which is there.
pub fn scans() -> io::Result<()> {
    let page = Page::new()?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut found = [Region::default()];
    let mut question = Scan {
        size: size_of::<Scan>() as u64,
        start: page.address() as u64,
        end: (page.address() + page.size) as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..Default::default()
    };
    let start = question.start;
    match ask(&pagemap, &mut question, &mut found)? {
        [only] if only.start == start => Ok(()),
        _ => Err(io::Error::other("it does not find a page that is there")),
    }
}

/// One call, and the regions that it found.
fn ask<'f>(
    pagemap: &File,
    question: &mut Scan,
    found: &'f mut [Region],
) -> io::Result<&'f [Region]> {
    question.vec = found.as_mut_ptr().addr() as u64;
    question.vec_len = found.len() as u64;
    // SAFETY: the structure that the call wants, with room for as many regions behind `vec` as it says.
    let regions = unsafe { pagemap_scan_ioctl(pagemap.as_raw_fd(), question) }?;
    let regions = usize::try_from(regions).unwrap_or(0);
    Ok(found.get(..regions).unwrap_or_default())
}
