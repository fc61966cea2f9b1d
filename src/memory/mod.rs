//! What the kernel tells of the pages of a process: which were written to, and which are there.
//!
//! Soft-dirty marks are what CRIU's incremental dumps go by. crab only ever reads them: whoever clears
//! them between two dumps of a chain loses pages (D9).

mod scan;
mod soft_dirty;

#[cfg(test)]
mod tests;

pub use scan::{dirty_bytes, scans};
pub use soft_dirty::{is_tracked, tracks_writes};

use std::{
    io,
    ptr::{self, NonNull},
};

/// A page of our own that is written to.
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
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.size) };
    }
}
