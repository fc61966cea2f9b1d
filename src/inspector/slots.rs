//! Who has which slot.
//!
//! A slot belongs to whoever holds a lock on its byte of a file. The kernel drops the lock when its
//! holder dies, so nobody has to be asked, and nothing has to be written down.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use super::abi::SLOTS;

/// The file of slots.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    path: PathBuf,
}

/// A slot that is ours until this is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) number: u32,
    /// Holds the lock.
    pub(super) file: File,
}

impl Drop for Slot {
    /// Closing is not enough: until it executes its program, a child that is just being started has
    /// the descriptor, too, and the slot would seem taken when the last one looks.
    fn drop(&mut self) {
        if let Err(e) = set(&self.file, libc::F_UNLCK, self.number) {
            log::warn!("the inspector's slot {}: {e}", self.number);
        }
    }
}

impl Slots {
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Claims a free one; None if there is none.
    pub(super) fn claim(&self) -> io::Result<Option<Slot>> {
        // A descriptor of its own for each slot: locks of one would not exclude each other.
        let file = self.open()?;
        for number in 0..SLOTS {
            match set(&file, libc::F_WRLCK, number) {
                Ok(()) => return Ok(Some(Slot { number, file })),
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Whether nobody has this slot.
    pub(super) fn is_free(&self, number: u32) -> io::Result<bool> {
        self.none_in(number, 1)
    }

    /// Whether nobody has any slot.
    pub(super) fn all_free(&self) -> io::Result<bool> {
        self.none_in(0, SLOTS)
    }

    fn none_in(&self, from: u32, length: u32) -> io::Result<bool> {
        let file = self.open()?;
        let found = fcntl(&file, libc::F_OFD_GETLK, libc::F_WRLCK, from, length)?;
        Ok(i32::from(found.l_type) == libc::F_UNLCK)
    }

    /// Removes the file, which nobody may be about to open: under the lock, when all are free.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn open(&self) -> io::Result<File> {
        open(&self.path)
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
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
