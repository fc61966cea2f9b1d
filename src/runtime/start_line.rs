//! CRIU at the starting line: started, and no process touched yet.
//!
//! runc's start, its look at CRIU's version and CRIU's own start take longer than the dump of a small
//! sandbox. CRIU runs an action script before it dumps (`pre-dump`). Ours is this very program: it connects
//! to a socket and waits for one byte, so that the sandbox need not stand still before. If whoever has
//! drawn the line dies or changes its mind, the connection ends without it, and CRIU gives up.

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            fs::{PermissionsExt, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The word on the command line that means [`wait_at`].
pub const WORD: &str = "wait-for-cut";
const SOCKET: &str = "line";
const SCRIPT: &str = "wait";
const GO: u8 = b'g';
/// What CRIU runs at its later stages, while the sandbox stands still: it starts sooner than a shell.
const NOTHING: &str = "/bin/true";
/// How soon it is noticed that CRIU has ended instead, in milliseconds.
const STEP: u8 = 10;

/// Where one CRIU after another may wait.
pub struct StartLine {
    listener: UnixListener,
    script: PathBuf,
}

/// A CRIU that waits. It fails if this is dropped.
pub struct Waiting(UnixStream);

impl StartLine {
    /// Makes the socket in a directory of its own.
    pub fn draw(dir: &Path) -> io::Result<Self> {
        make_room(&dir.join(SOCKET))?;
        let at = fs::File::open(dir)?;
        let listener = UnixListener::bind(address(&at))?;
        let script = dir.join(SCRIPT);
        Ok(Self { listener, script })
    }

    /// Makes the script: before each start of a CRIU.
    pub fn arm(&self) -> io::Result<()> {
        let dir = self.script.parent().unwrap_or(Path::new("/"));
        let text = format!(
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = pre-dump ] || exit 0\nexec '{}' {WORD} '{}'\n",
            super::own_program().display(),
            dir.display(),
        );
        let new = self.new_script()?;
        fs::write(&new, text)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o700))?;
        fs::rename(new, &self.script)
    }

    /// Puts a program that does nothing in the place of the script, which a shell has read by now.
    fn disarm(&self) -> io::Result<()> {
        if !Path::new(NOTHING).exists() {
            return Ok(());
        }
        let new = self.new_script()?;
        symlink(NOTHING, &new)?;
        fs::rename(new, &self.script)
    }

    /// A name for what is to take the script's place. A link that a shim has left there as it died must
    /// not be written through.
    fn new_script(&self) -> io::Result<PathBuf> {
        let new = self.script.with_extension("new");
        make_room(&new)?;
        Ok(new)
    }

    /// What CRIU is to run.
    pub fn script(&self) -> &Path {
        &self.script
    }

    /// Returns when a CRIU waits; None if `has_ended` says that there is none any more.
    pub fn wait(&self, has_ended: impl Fn() -> bool) -> io::Result<Option<Waiting>> {
        loop {
            // Asked before the look: it may have come and gone in between.
            let ended = has_ended();
            let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            let step = PollTimeout::from(if ended { 0 } else { STEP });
            match poll(&mut fds, step) {
                Ok(0) if ended => return Ok(None),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => {
                    let (waiting, _) = self.listener.accept()?;
                    self.disarm()?;
                    return Ok(Some(Waiting(waiting)));
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Waiting {
    /// Lets it dump.
    pub fn go(mut self) -> io::Result<()> {
        self.0.write_all(&[GO])
    }
}

/// The script's part: waits at the line in `dir`, and returns when CRIU may go on.
///
/// # Errors
/// When it must not, or the line is gone.
pub fn wait_at(dir: &Path) -> io::Result<()> {
    let at = fs::File::open(dir)?;
    let mut told = [0];
    UnixStream::connect(address(&at))?.read_exact(&mut told)?;
    match told {
        [GO] => Ok(()),
        other => Err(io::Error::other(format!("told {other:?}"))),
    }
}

/// What is not there need not be removed.
fn make_room(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The line's socket. An address is limited to 107 bytes, which a path is not.
fn address(dir: &fs::File) -> String {
    format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// A directory, and the line in it.
    fn line() -> (tempfile::TempDir, StartLine) {
        // Longer than the address of a socket may be.
        let dir = tempfile::Builder::new().prefix(&"x".repeat(200)).tempdir();
        let dir = dir.unwrap();
        // One that is left from the time before is no hindrance.
        StartLine::draw(dir.path()).unwrap();
        let line = StartLine::draw(dir.path()).unwrap();
        (dir, line)
    }

    #[test]
    fn who_waits_goes_on_when_told_and_fails_otherwise() {
        let (dir, line) = line();
        for go in [true, false] {
            thread::scope(|scope| {
                let runner = scope.spawn(|| wait_at(dir.path()));
                line.arm().unwrap();
                assert!(fs::read_to_string(line.script()).unwrap().contains(WORD));
                let waiting = line.wait(|| false).unwrap().unwrap();
                assert_eq!(fs::read_link(line.script()).unwrap(), Path::new(NOTHING));
                assert!(!runner.is_finished());
                match go {
                    true => waiting.go().unwrap(),
                    false => drop(waiting),
                }
                assert_eq!(runner.join().unwrap().is_ok(), go);
            });
        }
    }

    #[test]
    fn what_a_dead_shim_has_left_is_not_written_through() {
        let (dir, line) = line();
        let other = dir.path().join("other");
        fs::write(&other, "its own").unwrap();
        symlink(&other, line.script().with_extension("new")).unwrap();
        line.arm().unwrap();
        assert_eq!(fs::read_to_string(other).unwrap(), "its own");
    }

    #[test]
    fn who_ends_instead_is_not_waited_for() {
        let (_dir, line) = line();
        assert!(line.wait(|| true).unwrap().is_none());
    }

    #[test]
    fn without_the_line_nobody_goes_on() {
        let (dir, line) = line();
        drop(line);
        assert!(wait_at(dir.path()).is_err());
    }
}
