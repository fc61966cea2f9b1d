//! Whether this kernel marks the pages that are written to.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    sync::OnceLock,
};

use super::Page;

/// Whether the kernel marks pages that are written to (CONFIG_MEM_SOFT_DIRTY), asked once.
pub fn is_tracked() -> bool {
    static TRACKED: OnceLock<bool> = OnceLock::new();
    *TRACKED.get_or_init(|| {
        tracks_writes().unwrap_or_else(|e| {
            log::warn!("nobody can tell which pages change: {e}");
            false
        })
    })
}

/// Whether a page of our own is marked when it is written to, and not before.
pub fn tracks_writes() -> io::Result<bool> {
    let page = Page::new()?;
    let pagemap = File::open("/proc/self/pagemap")?;
    fs::write("/proc/self/clear_refs", "4")?;
    let before = page.is_soft_dirty(&pagemap)?;
    page.write();
    Ok(!before && page.is_soft_dirty(&pagemap)?)
}

impl Page {
    /// Bit 55 of its word (Documentation/admin-guide/mm/pagemap.rst).
    pub(super) fn is_soft_dirty(&self, pagemap: &File) -> io::Result<bool> {
        let mut word = [0; 8];
        let at = self.address() / self.size * size_of_val(&word);
        pagemap.read_exact_at(&mut word, at as u64)?;
        Ok(u64::from_ne_bytes(word) >> 55 & 1 == 1)
    }
}
