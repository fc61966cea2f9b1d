//! `binary://` targets: containerd's logger protocol.
//!
//! The logger gets stdout on descriptor 3, stderr on 4 and a pipe on 5 that it closes, or writes
//! to, when it is ready (containerd's `core/runtime/v2/logging`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{IoContext, pipes, target::LoggerUri};

/// How long a logger may take to say that it is ready.
pub(super) const READY_LIMIT: Duration = Duration::from_secs(10);
/// The logger's first descriptor beyond the standard ones.
const FIRST_FD: i32 = 3;

/// A running logger and the write ends of its two pipes.
pub(super) struct Logger {
    pub(super) pid: u32,
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

/// Starts a logger and waits until it is ready.
pub(super) fn start(
    uri: &LoggerUri,
    context: &IoContext<'_>,
    limit: Duration,
) -> io::Result<Logger> {
    let (out_reader, stdout) = pipes::pipe()?;
    let (err_reader, stderr) = pipes::pipe()?;
    let (ready, ready_writer) = pipes::pipe()?;
    pipes::set_nonblocking(stdout.as_fd())?;
    pipes::set_nonblocking(stderr.as_fd())?;

    let mut command = Command::new(&uri.path);
    command
        .args(&uri.args)
        .env_clear()
        .env("CONTAINER_ID", context.container_id)
        .env("CONTAINER_NAMESPACE", context.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let placeholders = occupy_low_fds()?;
    hand_over(&mut command, [out_reader, err_reader, ready_writer])?;
    // The command owns the logger's ends: they are closed here when the spawner drops it.
    let pid = (context.spawner)(command)?;
    drop(placeholders);
    let process = pidfd(pid);

    let said = wait_ready(&ready, limit).and_then(|wrote| match wrote || !uri.strict_ready {
        true => Ok(()),
        false => Err(io::Error::other("it ended before it was ready")),
    });
    if let Err(error) = said {
        kill(process);
        return Err(error);
    }
    Ok(Logger {
        pid,
        stdout,
        stderr,
    })
}

/// True: a byte came; false: the pipe was closed.
fn wait_ready(ready: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let mut polled = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    loop {
        match poll(&mut polled, timeout) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("not ready after {limit:?}"),
                ));
            }
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut byte = [0];
    Ok(matches!(
        pipes::read(ready.as_fd(), &mut byte)?,
        pipes::Moved::Bytes(_)
    ))
}

/// Makes `fds` the logger's descriptors 3, 4, ….
fn hand_over(command: &mut Command, fds: [OwnedFd; 3]) -> io::Result<()> {
    // Away from the numbers that are about to be overwritten.
    let mut high = Vec::with_capacity(fds.len());
    for fd in fds {
        let number = fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_FD + 16))?;
        // SAFETY: fcntl has just made this descriptor; nobody else knows its number.
        high.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    let inherit = move || {
        for (target, fd) in (FIRST_FD..).zip(&high) {
            // SAFETY: dup2 takes no memory; both numbers are this process's own.
            Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), target) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe; nothing is
    // allocated.
    unsafe { command.pre_exec(inherit) };
    Ok(())
}

/// Keeps descriptors 3 to 5 taken in this process, so that the pipe over which std's `Command`
/// reports a failed exec is not among those that the child overwrites.
fn occupy_low_fds() -> io::Result<Vec<OwnedFd>> {
    let mut held = Vec::new();
    loop {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null")?);
        if fd.as_raw_fd() >= FIRST_FD + 3 {
            return Ok(held);
        }
        held.push(fd);
    }
}

/// A handle that stays right when the shim's reaper is faster than we are.
fn pidfd(pid: u32) -> Option<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(Errno::result(fd).ok()?).ok()?;
    // SAFETY: the kernel has just made this descriptor for us.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn kill(process: Option<OwnedFd>) {
    if let Some(process) = process {
        // SAFETY: a valid pidfd, no siginfo: the kernel fills it in. Failure means: gone already.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                process.as_raw_fd(),
                libc::SIGKILL,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
}
