//! System calls on pipes, each with one meaning.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::fstat,
    unistd::{Gid, Uid, fchown, pipe2},
};

/// What one attempt to move bytes came to.
pub(super) enum Moved {
    /// So many bytes; never 0.
    Bytes(usize),
    /// Nothing to read, or no room to write.
    Blocked,
    /// End of file.
    End,
}

/// A pipe (read end, write end), both blocking and close-on-exec.
pub(super) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC)?)
}

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Gives a process's end to the user that runs in the container.
pub(super) fn give_to(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    if uid == 0 && gid == 0 {
        return Ok(());
    }
    Ok(fchown(
        fd,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
    )?)
}

pub(super) fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(fstat(fd)?.st_ino)
}

/// Reads once.
pub(super) fn read(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Moved> {
    loop {
        return match nix::unistd::read(fd, into) {
            Ok(0) => Ok(Moved::End),
            Ok(n) => Ok(Moved::Bytes(n)),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => Ok(Moved::Blocked),
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Writes once.
pub(super) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<Moved> {
    loop {
        return match nix::unistd::write(fd, bytes) {
            Ok(0) | Err(Errno::EAGAIN) => Ok(Moved::Blocked),
            Ok(n) => Ok(Moved::Bytes(n)),
            Err(Errno::EINTR) => continue,
            Err(errno) => Err(errno.into()),
        };
    }
}

/// Has the last reader of this write end gone?
pub(super) fn reader_gone(fd: BorrowedFd<'_>) -> bool {
    events(fd, PollFlags::empty()).contains(PollFlags::POLLERR)
}

/// Is there nothing to read, not even an end of file?
pub(super) fn silent(fd: BorrowedFd<'_>) -> bool {
    events(fd, PollFlags::POLLIN).is_empty()
}

fn events(fd: BorrowedFd<'_>, wanted: PollFlags) -> PollFlags {
    let mut polled = [PollFd::new(fd, wanted)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(_) => polled[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::empty(),
    }
}

/// How many bytes lie in the pipe; either end may be asked.
pub(super) fn queued(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is valid for the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The pipe's capacity in bytes.
pub(super) fn capacity(fd: BorrowedFd<'_>) -> io::Result<usize> {
    Ok(usize::try_from(fcntl(fd, FcntlArg::F_GETPIPE_SZ)?).unwrap_or(0))
}

/// Copies what lies in a pipe without consuming it, given its write end.
///
/// CRIU does not put buffered bytes back into an inherited pipe, so whoever restores must.
pub(super) fn peek(write_end: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let length = queued(write_end)?;
    if length == 0 {
        return Ok(Vec::new());
    }
    let path = format!("/proc/self/fd/{}", write_end.as_raw_fd());
    let reader = nix::fcntl::open(
        path.as_str(),
        OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let (copy_reader, copy_writer) = pipe()?;
    // tee(2) copies whole buffers: the copy needs as many slots as the original.
    let slots = i32::try_from(capacity(write_end)?).unwrap_or(i32::MAX);
    if fcntl(&copy_writer, FcntlArg::F_GETPIPE_SZ)? < slots {
        fcntl(&copy_writer, FcntlArg::F_SETPIPE_SZ(slots))?;
    }
    // SAFETY: tee takes two open descriptors, a length and flags; no memory.
    let copied = unsafe {
        libc::tee(
            reader.as_raw_fd(),
            copy_writer.as_raw_fd(),
            length,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    match Errno::result(copied) {
        // EAGAIN: read by the process in the meantime.
        Ok(_) | Err(Errno::EAGAIN) => {}
        Err(errno) => return Err(errno.into()),
    }
    drop(copy_writer);
    let mut bytes = Vec::new();
    File::from(copy_reader).read_to_end(&mut bytes)?;
    if bytes.len() < length && queued(write_end)? >= length {
        return Err(io::Error::other(format!(
            "only {} of {length} bytes of a pipe could be copied",
            bytes.len()
        )));
    }
    Ok(bytes)
}
