//! What the kernel tells of the pages of a process, tried on one of our own.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    ptr::{self, NonNull},
};

use super::{Check, Verdict};

pub(super) fn checks() -> Vec<Check> {
    vec![soft_dirty(), pagemap_scan()]
}

fn soft_dirty() -> Check {
    let check = Check::new(
        "soft_dirty",
        "soft-dirty pages",
        "each dump writes all memory of the processes, and none of it before they stand still",
    );
    match tracks_writes() {
        Ok(true) => check.is(Verdict::Ok, "yes"),
        Ok(false) => check.is(Verdict::Missing, "no CONFIG_MEM_SOFT_DIRTY"),
        Err(e) => check.is(Verdict::Missing, e.to_string()),
    }
}

fn pagemap_scan() -> Check {
    let check = Check::new(
        "pagemap_scan",
        "PAGEMAP_SCAN",
        "CRIU reads the state of every page by itself: large dumps take longer",
    );
    check.tried("yes", scan().map_err(|e| e.to_string()))
}

/// One page that is written to.
struct Page {
    at: NonNull<u8>,
    size: usize,
}

impl Page {
    fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let size = usize::try_from(size).map_err(io::Error::other)?;
        // SAFETY: a new mapping.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let page = Self { at, size };
        page.write();
        Ok(page)
    }

    fn write(&self) {
        // SAFETY: within the mapping, which is ours alone.
        unsafe { self.at.as_ptr().write_volatile(1) };
    }

    fn address(&self) -> usize {
        self.at.as_ptr().addr()
    }

    /// Bit 55 of its word (Documentation/admin-guide/mm/pagemap.rst).
    fn is_soft_dirty(&self, pagemap: &File) -> io::Result<bool> {
        let mut word = [0; 8];
        let at = self.address() / self.size * size_of_val(&word);
        pagemap.read_exact_at(&mut word, at as u64)?;
        Ok(u64::from_ne_bytes(word) >> 55 & 1 == 1)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
    }
}

/// Whether a page is marked when it is written to, and not before.
fn tracks_writes() -> io::Result<bool> {
    let page = Page::new()?;
    let pagemap = File::open("/proc/self/pagemap")?;
    fs::write("/proc/self/clear_refs", "4")?;
    let before = page.is_soft_dirty(&pagemap)?;
    page.write();
    Ok(!before && page.is_soft_dirty(&pagemap)?)
}

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

/// `struct page_region`.
#[repr(C)]
#[derive(Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_PRESENT: u64 = 1 << 3;

nix::ioctl_readwrite!(pagemap_scan_ioctl, b'f', 16, Scan);

/// Asks for our page, which is there.
fn scan() -> io::Result<()> {
    let page = Page::new()?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut found = Region::default();
    let mut question = Scan {
        size: size_of::<Scan>() as u64,
        start: page.address() as u64,
        end: (page.address() + page.size) as u64,
        vec: (&raw mut found).addr() as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_PRESENT,
        ..Default::default()
    };
    // SAFETY: the structure that the call wants, with room for one region behind `vec`.
    let regions = unsafe { pagemap_scan_ioctl(pagemap.as_raw_fd(), &raw mut question) };
    match regions.map_err(io::Error::from)? {
        1 if found.start == question.start => Ok(()),
        _ => Err(io::Error::other("it does not find a page that is there")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_our_own_is_asked_about_and_nothing_else() {
        // What the kernel has is no matter of ours; that it is asked in the right way is.
        let page = Page::new().unwrap();
        assert_eq!(page.address() % page.size, 0);
        page.is_soft_dirty(&File::open("/proc/self/pagemap").unwrap())
            .unwrap();
        assert_eq!(size_of::<Scan>(), 96);
        match scan() {
            Ok(()) => {}
            Err(e) => assert!(matches!(e.raw_os_error(), Some(libc::ENOTTY)), "{e}"),
        }
    }
}
