//! A file as shared words.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    slice,
    sync::atomic::AtomicU64,
};

/// A shared mapping of a file.
///
/// If the file is made shorter while it is mapped, touching what is gone kills the process with
/// SIGBUS. Who uses one for long asks for the file's size each time before; that root shortens it
/// within the microseconds after that is the one thing that is not survived.
pub(super) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: its words are atomics, and it is unmapped by its only owner.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of a file that has as many: to read, or to write as well.
    pub(super) fn of(file: &File, bytes: usize, writable: bool) -> io::Result<Self> {
        let protection = match writable {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at 0"))?;
        let words = bytes / size_of::<AtomicU64>();
        Ok(Self { start, words })
    }

    /// Those that are mapped to be read may be loaded only.
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped in `of`, aligned to a page, and used as atomics by all processes.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bytes = self.words * size_of::<AtomicU64>();
        // SAFETY: mapped in `of` with the same size, and no reference outlives self.
        unsafe { libc::munmap(self.start.as_ptr().cast(), bytes) };
    }
}
