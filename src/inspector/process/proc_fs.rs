//! Bounded reading of `/proc/PID`, by one directory descriptor per process: whoever gets the same
//! number later is not read by mistake.

use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
};

use rustix::{
    fs::{CWD, Mode, OFlags, openat, readlinkat},
    io::Errno,
};
use sha2::{Digest as _, Sha256};

/// So much of one file of /proc is read. 65,530 mappings (the kernel's default limit) with long
/// names stay below it.
const MAX_FILE: usize = 16 << 20;

/// A SHA-256.
pub(super) type Digest = [u8; 32];

/// The digest of some bytes. Not a cheaper hash: the sandbox chooses the bytes.
pub(super) fn digest(bytes: &[u8]) -> Digest {
    Sha256::digest(bytes).into()
}

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The process is no more.
    #[error("process {0} is gone")]
    Gone(i32),
    /// The sandbox has more of something than is looked at.
    #[error("more than {limit} {what}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// The kernel's text is not what it documents.
    #[error("unexpected text in {file} of process {pid}")]
    Unexpected {
        /// The process.
        pid: i32,
        /// The file below /proc/PID.
        file: String,
    },
    /// A system call failed.
    #[error("cannot read {file} of process {pid}: {source}")]
    Io {
        /// The process.
        pid: i32,
        /// The file below /proc/PID, or the call.
        file: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// An open directory `/proc/PID`.
pub(super) struct Dir {
    pub(super) pid: i32,
    fd: OwnedFd,
}

impl Dir {
    pub(super) fn open(pid: i32) -> Result<Self, ProcessError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(CWD, format!("/proc/{pid}"), flags, Mode::empty())
            .map_err(|errno| failed(pid, "", errno))?;
        Ok(Self { pid, fd })
    }

    pub(super) fn error(&self, file: &str, errno: Errno) -> ProcessError {
        failed(self.pid, file, errno)
    }

    /// A call on behalf of the process failed.
    pub(super) fn failed(&self, file: &str, source: io::Error) -> ProcessError {
        ProcessError::Io {
            pid: self.pid,
            file: file.to_owned(),
            source,
        }
    }

    pub(super) fn unexpected(&self, file: &str) -> ProcessError {
        ProcessError::Unexpected {
            pid: self.pid,
            file: file.to_owned(),
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn open_file(&self, file: &str) -> Result<OwnedFd, ProcessError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(&self.fd, file, flags, Mode::empty()).map_err(|errno| self.error(file, errno))
    }

    pub(super) fn read(&self, file: &str) -> Result<Vec<u8>, ProcessError> {
        self.read_as(file, Ends::WithNothing)
    }

    fn read_as(&self, file: &str, ends: Ends) -> Result<Vec<u8>, ProcessError> {
        let fd = self.open_file(file)?;
        read_all(&fd, ends).map_err(|error| match error {
            ReadError::Errno(errno) => self.error(file, errno),
            ReadError::TooLong => ProcessError::Limit {
                what: "bytes in a file of /proc",
                limit: MAX_FILE,
            },
        })
    }

    pub(super) fn text(&self, file: &str) -> Result<String, ProcessError> {
        Ok(String::from_utf8_lossy(&self.read(file)?).into_owned())
    }

    /// Like [`Dir::text`], of a file that the kernel writes in one piece, not in a list of them: one call
    /// less.
    pub(super) fn record(&self, file: &str) -> Result<String, ProcessError> {
        let bytes = self.read_as(file, Ends::WithRoomLeft)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Like [`Dir::text`]; `None` if this kernel has no such file.
    pub(super) fn text_if_any(&self, file: &str) -> Result<Option<String>, ProcessError> {
        self.if_any(self.text(file))
    }

    /// Like [`Dir::record`]; `None` if this kernel has no such file.
    pub(super) fn record_if_any(&self, file: &str) -> Result<Option<String>, ProcessError> {
        self.if_any(self.record(file))
    }

    fn if_any(&self, text: Result<String, ProcessError>) -> Result<Option<String>, ProcessError> {
        match text {
            Ok(text) => Ok(Some(text)),
            // ENOENT is also what a dead process gives: then its directory is empty.
            Err(ProcessError::Gone(_)) if self.lives() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn lives(&self) -> bool {
        self.open_file("stat").is_ok()
    }

    pub(super) fn link(&self, file: &str) -> Result<String, ProcessError> {
        let target = self.link_bytes(file)?;
        Ok(OsStr::from_bytes(&target).to_string_lossy().into_owned())
    }

    pub(super) fn link_bytes(&self, file: &str) -> Result<Vec<u8>, ProcessError> {
        let target = readlinkat(&self.fd, file, Vec::new());
        Ok(target
            .map_err(|errno| self.error(file, errno))?
            .into_bytes())
    }

    /// The numbers that are names in a directory, sorted; at most `limit`.
    pub(super) fn numbers(
        &self,
        directory: &str,
        what: &'static str,
        limit: usize,
    ) -> Result<Vec<i32>, ProcessError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&self.fd, directory, flags, Mode::empty())
            .map_err(|errno| self.error(directory, errno))?;
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = rustix::fs::RawDir::new(fd, buffer.spare_capacity_mut());
        let mut numbers = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|errno| self.error(directory, errno))?;
            let name = entry.file_name().to_string_lossy();
            if let Ok(number) = name.parse() {
                if numbers.len() == limit {
                    return Err(ProcessError::Limit { what, limit });
                }
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }
}

fn failed(pid: i32, file: &str, errno: Errno) -> ProcessError {
    // ESRCH: the task behind an open directory has been reaped.
    if errno == Errno::NOENT || errno == Errno::SRCH {
        return ProcessError::Gone(pid);
    }
    ProcessError::Io {
        pid,
        file: file.to_owned(),
        source: errno.into(),
    }
}

/// What a file of the reader's own /proc holds. With room for all at once: `fs::read` asks for 32 bytes
/// first, then for twice as many each time.
pub(super) fn read_own(path: &str) -> io::Result<Vec<u8>> {
    let fd = openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    read_all(&fd, Ends::WithNothing).map_err(|error| match error {
        ReadError::Errno(errno) => errno.into(),
        ReadError::TooLong => io::Error::other(format!("{path} holds too much")),
    })
}

enum ReadError {
    Errno(Errno),
    TooLong,
}

/// How the end of a file of /proc shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// In a read that returns nothing. One that returns less than was asked for may end with an entry
    /// of a list, because the next one did not fit.
    WithNothing,
    /// In a read that returns less than was asked for, too: the file is made anew for each reader, in one
    /// piece (`single_open`, `simple_read_from_buffer`).
    WithRoomLeft,
}

fn read_all(fd: &OwnedFd, ends: Ends) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::with_capacity(4096);
    loop {
        bytes.reserve(4096);
        let room = bytes.capacity() - bytes.len();
        match rustix::io::read(fd, rustix::buffer::spare_capacity(&mut bytes)) {
            Ok(0) => return Ok(bytes),
            Ok(_) if bytes.len() > MAX_FILE => return Err(ReadError::TooLong),
            Ok(read) if read < room && ends == Ends::WithRoomLeft => return Ok(bytes),
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ReadError::Errno(errno)),
        }
    }
}

/// A handle on a process that is not its number.
pub(super) fn pidfd(pid: i32) -> Result<OwnedFd, ProcessError> {
    // SAFETY: pidfd_open takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd).map_err(|errno| failed(pid, "pidfd_open", errno))
}

/// The very open file behind a descriptor of another process.
pub(super) fn duplicate(pid: i32, pidfd: &OwnedFd, fd: i32) -> Result<OwnedFd, ProcessError> {
    // SAFETY: pidfd_getfd takes three integers; both descriptors are looked up by the kernel.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(copy).map_err(|errno| match errno {
        // Closed since it was listed.
        Errno::BADF => ProcessError::Gone(pid),
        errno => failed(pid, "pidfd_getfd", errno),
    })
}

fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
