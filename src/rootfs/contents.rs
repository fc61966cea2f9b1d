//! Copying the bytes of a file, and leaving out its holes.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::tree::{Found, ShownPath, TreeError, next_data};

/// Between two of these the caller's wish to stop is looked at.
const CHUNK: u64 = 16 << 20;
/// One read of a file without holes that fits is cheaper than asking where its data is.
const SMALL: usize = 64 << 10;

/// Copies contents.
pub(super) struct Contents<'s> {
    buf: Vec<u8>,
    stop: &'s dyn Fn() -> bool,
}

impl<'s> Contents<'s> {
    pub(super) fn new(stop: &'s dyn Fn() -> bool) -> Self {
        Self {
            buf: vec![0; SMALL],
            stop,
        }
    }

    /// Copies the data between the holes and returns how much that was.
    pub(super) fn copy(&mut self, found: &Found<'_>, copy: &OwnedFd) -> Result<u64, TreeError> {
        let source = &found.open_file()?;
        let size = found.stat.st_size.unsigned_abs();
        if size == 0 {
            return Ok(0);
        }
        let dense = found.stat.st_blocks.unsigned_abs() * 512 >= size;
        if dense && size <= SMALL as u64 {
            return self.plain(found, source, copy, 0, size);
        }
        rustix::fs::ftruncate(copy, size).map_err(found.err("size the copy of"))?;
        let (mut at, mut copied) = (0, 0);
        while at < size {
            let (start, end) = match next_data(source, at, size).map_err(found.err("seek in"))? {
                Some(range) => range,
                None => break,
            };
            let mut from = start;
            while from < end {
                if (self.stop)() {
                    return Err(TreeError::Stopped {
                        path: ShownPath::new(found.path),
                    });
                }
                let to = end.min(from + CHUNK);
                self.range(found, source, copy, from, to)?;
                from = to;
            }
            copied += end - start;
            at = end;
        }
        Ok(copied)
    }

    fn range(
        &mut self,
        found: &Found<'_>,
        source: &OwnedFd,
        copy: &OwnedFd,
        mut from: u64,
        to: u64,
    ) -> Result<(), TreeError> {
        while from < to {
            let (mut read_at, mut write_at) = (from, from);
            let wanted = usize::try_from(to - from).unwrap_or(usize::MAX);
            let done = rustix::io::retry_on_intr(|| {
                rustix::fs::copy_file_range(
                    source,
                    Some(&mut read_at),
                    copy,
                    Some(&mut write_at),
                    wanted,
                )
            });
            match done {
                Ok(0) => return Err(found.changed("size")),
                Ok(n) => from += n as u64,
                Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                    self.plain(found, source, copy, from, to)?;
                    return Ok(());
                }
                Err(e) => return Err(found.err("copy the content of")(e)),
            }
        }
        Ok(())
    }

    fn plain(
        &mut self,
        found: &Found<'_>,
        source: &OwnedFd,
        copy: &OwnedFd,
        from: u64,
        to: u64,
    ) -> Result<u64, TreeError> {
        let mut at = from;
        while at < to {
            let wanted = usize::try_from(to - at).map_or(SMALL, |left| left.min(SMALL));
            let n = rustix::io::retry_on_intr(|| {
                rustix::io::pread(source, &mut self.buf[..wanted], at)
            })
            .map_err(found.err("read"))?;
            if n == 0 {
                return Err(found.changed("size"));
            }
            let mut data = &self.buf[..n];
            while !data.is_empty() {
                let n = rustix::io::retry_on_intr(|| rustix::io::pwrite(copy, data, at))
                    .map_err(found.err("write the copy of"))?;
                data = &data[n..];
                at += n as u64;
            }
        }
        Ok(to - from)
    }
}
