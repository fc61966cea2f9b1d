//! Slots that processes claim, and that death gives back.
//!
//! A slot belongs to whoever holds a lock on its byte of a file. The kernel drops the lock when its
//! holder dies, so nobody has to be asked, and nothing has to be written down.

use std::{fs::File, io, os::fd::AsRawFd};

/// A slot that is ours until this is dropped.
#[derive(Debug)]
pub struct SlotLock {
    number: u32,
    /// Holds the lock.
    file: File,
}

impl SlotLock {
    /// Claims the first of `numbers` that nobody has; gives the file back if there is none.
    ///
    /// `file` has to be opened for this slot alone: locks of one open file do not exclude each other.
    pub fn claim(
        file: File,
        numbers: impl IntoIterator<Item = u32>,
    ) -> io::Result<Result<Self, File>> {
        for number in numbers {
            match set(&file, libc::F_WRLCK, number) {
                Ok(()) => return Ok(Ok(Self { number, file })),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Err(file))
    }

    /// Which slot.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The file with the slots.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for SlotLock {
    /// Closing is not enough: until it executes its program, a child that is just being started has
    /// the descriptor, too, and the slot would seem taken when the last one looks.
    fn drop(&mut self) {
        if let Err(e) = set(&self.file, libc::F_UNLCK, self.number) {
            log::warn!("slot {}: {e}", self.number);
        }
    }
}

/// Whether nobody has any of these slots (`count` 0: of all from the first on), but for a claim through this very open file.
pub fn are_free(file: &File, first: u32, count: u32) -> io::Result<bool> {
    let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, first, count)?;
    Ok(i32::from(found.l_type) == libc::F_UNLCK)
}

fn set(file: &File, kind: i32, number: u32) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, kind, number, 1).map(drop)
}

/// The lock that was asked for, or, of F_OFD_GETLK, the one in its way.
fn fcntl(file: &File, command: i32, kind: i32, from: u32, length: u32) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as _,
        l_whence: libc::SEEK_SET as _,
        l_start: from.into(),
        l_len: length.into(),
        l_pid: 0,
    };
    // SAFETY: the structure that these commands take.
    if unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock)
}
