//! Asking a program something, which must answer soon.

use std::{
    fs::File,
    io::{self, Read, Seek},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A version or a check takes milliseconds.
const LIMIT: Duration = Duration::from_secs(10);
/// As much of an answer as is read.
const MOST: u64 = 64 << 10;

/// What a program answered.
pub(super) struct Answer {
    pub(super) status: ExitStatus,
    pub(super) out: String,
    pub(super) err: String,
}

/// Runs it to its end, and kills it if that does not come.
pub(super) fn ask(program: &Path, args: &[&str]) -> io::Result<Answer> {
    let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut command = Command::new(program);
    // It may leave a file where it is.
    command.args(args).current_dir("/").stdin(Stdio::null());
    command.stdout(out.try_clone()?).stderr(err.try_clone()?);
    let mut child = command.spawn()?;
    let status = match ended(&child, LIMIT) {
        Ok(true) => child.wait()?,
        in_vain => {
            child.kill()?;
            child.wait()?;
            in_vain?;
            return Err(io::Error::other(format!("no answer within {LIMIT:?}")));
        }
    };
    Ok(Answer {
        status,
        out: text(&mut out)?,
        err: text(&mut err)?,
    })
}

fn ended(child: &Child, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], left) {
            Err(Errno::EINTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

fn text(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_what_a_program_says_and_how_it_ends() {
        let answer = ask(
            Path::new("/bin/sh"),
            &["-c", "echo out; echo err >&2; exit 3"],
        )
        .unwrap();
        assert_eq!((answer.out.as_str(), answer.err.as_str()), ("out", "err"));
        assert_eq!(answer.status.code(), Some(3));
        assert!(ask(Path::new("/nowhere/criu"), &[]).is_err());
    }

    #[test]
    fn one_that_does_not_end_is_not_waited_for() {
        // It ends when nobody holds its stdin any more.
        let mut child = Command::new("/bin/cat")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        assert!(!ended(&child, Duration::ZERO).unwrap());
        drop(child.stdin.take());
        assert!(ended(&child, Duration::from_secs(60)).unwrap());
        child.wait().unwrap();
    }
}
