//! Who has which slot.
//!
//! A slot belongs to whoever holds a lock on its byte of a file. The kernel drops the lock when its
//! holder dies, so nobody has to be asked, and nothing has to be written down.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
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
    _file: File,
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
            match fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, number, 1) {
                Ok(_) => {
                    return Ok(Some(Slot {
                        number,
                        _file: file,
                    }));
                }
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Whether nobody has this slot.
    pub(super) fn is_free(&self, number: u32) -> io::Result<bool> {
        let file = self.open()?;
        fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, number, 1)
    }

    /// Whether nobody has any slot.
    pub(super) fn all_free(&self) -> io::Result<bool> {
        let file = self.open()?;
        fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, 0, SLOTS)
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

/// True: the lock is taken, or nobody holds it.
fn fcntl(fd: RawFd, command: i32, from: u32, length: u32) -> io::Result<bool> {
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: from.into(),
        l_len: length.into(),
        l_pid: 0,
    };
    // SAFETY: the structure that these commands take.
    if unsafe { libc::fcntl(fd, command, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(command == libc::F_OFD_SETLK || lock.l_type == libc::F_UNLCK as i16)
}
