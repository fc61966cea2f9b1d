//! Digests of contents.

use rustix::fs::FileType;

use crate::{
    content::content_of,
    digest::Digest,
    tree::{Found, ShownPath, TreeError},
};

/// Reads contents, and counts what it read.
pub(super) struct Reader<'s> {
    /// Bytes that are not zeros.
    pub(super) bytes: u64,
    buffer: Vec<u8>,
    stop: &'s dyn Fn() -> bool,
}

impl<'s> Reader<'s> {
    pub(super) fn new(stop: &'s dyn Fn() -> bool) -> Self {
        Self {
            bytes: 0,
            buffer: Vec::new(),
            stop,
        }
    }

    pub(super) fn check_stop(&self, found: &Found<'_>) -> Result<(), TreeError> {
        match (self.stop)() {
            true => Err(TreeError::Stopped {
                path: ShownPath::new(found.path),
            }),
            false => Ok(()),
        }
    }

    /// The digest of a regular file. An error if it changes meanwhile.
    pub(super) fn digest(&mut self, found: &Found<'_>) -> Result<Digest, TreeError> {
        debug_assert_eq!(found.kind(), FileType::RegularFile);
        let content = content_of(found, &mut self.buffer, self.stop)?;
        self.bytes += content.data;
        if content.size > 0 {
            unchanged(found)?;
        }
        Ok(content.root)
    }
}

/// Nobody wrote since the inode was first looked at, as far as its times tell.
pub(super) fn unchanged(found: &Found<'_>) -> Result<(), TreeError> {
    let (then, now) = (
        found.stat,
        rustix::fs::fstat(found.fd).map_err(found.err("stat"))?,
    );
    if then.st_size != now.st_size {
        return Err(found.changed("size"));
    }
    if (then.st_ctime, then.st_ctime_nsec) != (now.st_ctime, now.st_ctime_nsec) {
        return Err(found.changed("ctime"));
    }
    Ok(())
}
