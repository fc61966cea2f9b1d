//! What a runtime's process is made to be between fork and exec.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// Lets the child inherit descriptors under the numbers they have here.
///
/// Choosing other numbers could hit a descriptor that the standard library needs between fork and
/// exec; these numbers are ours already.
pub(super) fn inherit(command: &mut Command, fds: Vec<OwnedFd>) {
    // SAFETY: the closure runs between fork and exec and calls fcntl alone, which is
    // async-signal-safe. It owns the descriptors, so they are open when it runs.
    unsafe {
        command.pre_exec(move || {
            for fd in &fds {
                if libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}

/// Has the child killed when the thread that starts it ends, which waits for it.
///
/// A runtime that outlives its shim would go on making a container of which nobody knows: the
/// clean-up after the shim's death finds nothing yet.
pub(super) fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: the closure runs between fork and exec and calls prctl and getppid alone, which are
    // async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(io::Error::last_os_error());
            }
            // It may have died before it could be asked for.
            match libc::getppid() == parent as libc::pid_t {
                true => Ok(()),
                false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            }
        });
    }
}

/// Starts the child with an `oom_score_adj` of 0.
///
/// CRIU restores a task's own value unless it is 0 (`prepare_proc_misc`): such a task would keep
/// the shim's, which is higher by one than containerd's.
pub(super) fn neutral_oom_score(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec and calls open, write and close alone, which
    // are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
            if fd >= 0 {
                // Not critical: a value that may not be written is left as it is.
                libc::write(fd, c"0".as_ptr().cast(), 1);
                libc::close(fd);
            }
            Ok(())
        });
    }
}

/// Starts the child without transparent huge pages, and all that it starts: a written byte would make two
/// megabytes of memory count as changed (64.5 MiB instead of 1.8 in a dump of which 2 % had changed).
/// Memory stays so across exec and restore.
pub(super) fn without_huge_pages(command: &mut Command) {
    // SAFETY: the closure runs between fork and exec and calls prctl alone, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            match libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) {
                // EINVAL: a kernel without them.
                0 => Ok(()),
                _ => match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
                    e => Err(e),
                },
            }
        });
    }
}
