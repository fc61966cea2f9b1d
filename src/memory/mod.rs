//! What the kernel tells of the pages of a process: which were written to, and which are there.
//!
//! Soft-dirty marks are what CRIU's incremental dumps go by. crab only ever reads them: whoever clears
//! them between two dumps of a chain loses pages (D9).

mod scan;
mod soft_dirty;

#[cfg(test)]
mod tests;

pub use scan::{Region, dirty_bytes, pages_in, scans};
pub use soft_dirty::{is_tracked, tracks_writes};

use std::{
    fs, io,
    ptr::{self, NonNull},
};

/// How many bytes of memory a process has that are in no file: about what a dump of it would have.
///
/// # Errors
/// When the process is gone.
pub fn own_bytes(pid: i32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let bytes = status.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_own = matches!(name, "RssAnon" | "RssShmem" | "VmSwap");
        let kib = value.trim().strip_suffix(" kB").filter(|_| is_own)?;
        Some(kib.parse::<u64>().ok()?.saturating_mul(1024))
    });
    Ok(bytes.fold(0, u64::saturating_add))
}

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
