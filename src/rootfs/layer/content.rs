//! Digests of contents, in which a hole equals zeros (SPARSENESS).

use std::os::fd::{AsFd, OwnedFd};

use rustix::{fs::FileType, io::Errno};
use sha2::{Digest as _, Sha256};

use super::facts::Digest;
use crate::tree::{Found, ShownPath, TreeError, next_data};

/// Blocks of zeros are left out of a digest.
const BLOCK: usize = 128 << 10;

/// Reads contents, and counts what it read.
pub(super) struct Reader<'s> {
    pub(super) bytes: u64,
    buf: Vec<u8>,
    stop: &'s dyn Fn() -> bool,
}

impl<'s> Reader<'s> {
    pub(super) fn new(stop: &'s dyn Fn() -> bool) -> Self {
        Self {
            bytes: 0,
            buf: Vec::new(),
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
        let size = found.stat.st_size.unsigned_abs();
        let mut digest = Sha256::new();
        digest.update(size.to_le_bytes());
        if size > 0 {
            self.blocks(found, &found.open_file()?, size, &mut digest)?;
            unchanged(found)?;
        }
        Ok(digest.finalize().into())
    }

    fn blocks(
        &mut self,
        found: &Found<'_>,
        file: &OwnedFd,
        size: u64,
        digest: &mut Sha256,
    ) -> Result<(), TreeError> {
        self.buf.resize(BLOCK, 0);
        let mut at = 0;
        while at < size {
            self.check_stop(found)?;
            // One read of a small file is cheaper than asking where its data is.
            if size > BLOCK as u64 {
                match next_data(file, at, size).map_err(found.err("seek in"))? {
                    Some((start, _)) => at = start / BLOCK as u64 * BLOCK as u64,
                    None => return Ok(()),
                }
            }
            let wanted = usize::try_from(size - at).map_or(BLOCK, |left| left.min(BLOCK));
            self.fill(file, at, wanted).map_err(|e| match e {
                // Shorter than it was a moment ago.
                Errno::NODATA => found.changed("size"),
                e => found.err("read")(e),
            })?;
            let block = &self.buf[..wanted];
            if block.iter().any(|b| *b != 0) {
                digest.update(at.to_le_bytes());
                digest.update(block);
            }
            at += wanted as u64;
        }
        Ok(())
    }

    fn fill(&mut self, file: &OwnedFd, at: u64, wanted: usize) -> Result<(), Errno> {
        let mut done = 0;
        while done < wanted {
            let rest = &mut self.buf[done..wanted];
            let n = rustix::io::retry_on_intr(|| {
                rustix::io::pread(file.as_fd(), &mut *rest, at + done as u64)
            })?;
            if n == 0 {
                return Err(Errno::NODATA);
            }
            done += n;
        }
        self.bytes += wanted as u64;
        Ok(())
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
