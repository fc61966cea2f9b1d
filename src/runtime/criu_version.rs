//! The `criu` that a dump or a restore finds first, which answers for CRIU when it is asked for its version.
//!
//! runc asks before each, of a CRIU that it starts for that alone: 9 ms of a dump that takes 90. So
//! the shim asks once, as runc would, and keeps the answer for as long as the program is the same. On
//! PATH this very program is called criu, as it is [called tar](super::empty_tar): it gives that answer
//! to that question, and is CRIU for anything else.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{self, Read},
    os::{
        fd::AsRawFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use parking_lot::Mutex;

use super::{Ended, Spawner, behind, empty_tar, on_path, prepare::inherit};

const CRIU: &str = "criu";
/// The request `VERSION` of CRIU's RPC (`images/rpc.proto`), as runc's library for it writes it.
const QUESTION: [u8; 2] = [8, 10];
/// How the answer to it begins: `VERSION`, success.
const ANSWER: [u8; 4] = [8, 10, 16, 1];
/// An answer has a few dozen bytes.
const MAX_ANSWER: usize = 4096;
/// Where it is kept below a HOME of CRIU.
const FILE: &str = "criu-version";
/// Asking takes milliseconds.
const LIMIT: Duration = Duration::from_secs(10);

/// The program, what it was, and its answer.
static KNOWN: Mutex<Option<(PathBuf, Identity, Vec<u8>)>> = Mutex::new(None);

/// What changes with a program that is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    inode: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(program: &Path) -> Option<Self> {
        let its = fs::metadata(program).ok()?;
        Some(Self {
            inode: (its.dev(), its.ino()),
            size: its.size(),
            changed: (its.ctime(), its.ctime_nsec()),
        })
    }
}

/// Has `criu` answered for below a HOME of CRIU; if it cannot be, CRIU answers itself.
pub(super) fn install(home: &Path, spawner: &dyn Spawner) -> io::Result<()> {
    let Some(answer) = program().and_then(|program| known(&program, spawner)) else {
        return empty_tar::unlink(home, CRIU);
    };
    fs::write(home.join(FILE), answer)?;
    empty_tar::link(home, CRIU)
}

/// The CRIU that this process finds: the first on PATH.
pub fn program() -> Option<PathBuf> {
    on_path(Path::new(CRIU))
}

fn known(program: &Path, spawner: &dyn Spawner) -> Option<Vec<u8>> {
    let identity = Identity::of(program)?;
    let mut known = KNOWN.lock();
    if let Some((of, its, answer)) = &*known
        && (of.as_path(), its) == (program, &identity)
    {
        return Some(answer.clone());
    }
    let answer = ask(program, spawner)
        .inspect_err(|e| log::info!("{} is asked by runc itself: {e}", program.display()))
        .ok()?;
    *known = Some((program.to_owned(), identity, answer.clone()));
    Some(answer)
}

/// Asks a CRIU for its version.
fn ask(program: &Path, spawner: &dyn Spawner) -> io::Result<Vec<u8>> {
    let kind = SockType::SeqPacket;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags)?;
    // CRIU waits for its question.
    rustix::io::ioctl_fionbio(&theirs, false)?;
    send(ours.as_raw_fd(), &QUESTION, MsgFlags::empty())?;
    let mut command = Command::new(program);
    command.arg("swrk").arg(theirs.as_raw_fd().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::null());
    inherit(&mut command, vec![theirs]);
    match spawner.run(command, LIMIT)? {
        Ended::Exited(0) => {}
        ended => return Err(io::Error::other(format!("it has {ended:?}"))),
    }
    let mut answer = vec![0; MAX_ANSWER];
    let length = recv(ours.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    answer.truncate(length);
    match answer.starts_with(&ANSWER) {
        true => Ok(answer),
        false => Err(io::Error::other(format!("it answers {answer:?}"))),
    }
}

/// Whether this program was called by the name of criu.
pub fn is_called() -> bool {
    let name = env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(CRIU)))
}

/// Does what CRIU does.
///
/// # Errors
/// When there is no other CRIU, or the answer cannot be sent.
pub fn main() -> io::Result<()> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let socket = match &args[..] {
        [mode, socket] if mode == "swrk" => socket.to_str().and_then(|fd| fd.parse().ok()),
        _ => None,
    };
    if let (Some(socket), Some(home)) = (socket, env::var_os("HOME"))
        && answer(socket, Path::new(&home))?
    {
        return Ok(());
    }
    // It finds our tar by the same PATH.
    let criu = behind(1, Path::new(CRIU)).ok_or(io::ErrorKind::NotFound)?;
    Err(Command::new(criu).args(args).exec())
}

/// Answers, if it is the version that is asked for. Any other question stays in the socket.
fn answer(socket: i32, home: &Path) -> io::Result<bool> {
    let mut question = [0; QUESTION.len() + 1];
    let asked = recv(socket, &mut question, MsgFlags::MSG_PEEK)?;
    if question.get(..asked) != Some(&QUESTION) {
        return Ok(false);
    }
    let mut answer = Vec::new();
    let Ok(file) = fs::File::open(home.join(FILE)) else {
        return Ok(false);
    };
    file.take(MAX_ANSWER as u64).read_to_end(&mut answer)?;
    recv(socket, &mut question, MsgFlags::empty())?;
    send(socket, &answer, MsgFlags::MSG_NOSIGNAL)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::{fd::OwnedFd, unix::fs::PermissionsExt};

    use super::*;

    struct Directly;

    impl Spawner for Directly {
        fn run(&self, mut command: Command, _: Duration) -> io::Result<Ended> {
            Ok(Ended::Exited(command.status()?.code().unwrap_or(-1)))
        }

        fn run_unless(
            &self,
            command: Command,
            limit: Duration,
            _: &dyn Fn() -> bool,
        ) -> io::Result<Ended> {
            self.run(command, limit)
        }
    }

    /// A CRIU that answers `answer` to the question of runc, and counts how often it is asked.
    fn criu(dir: &Path, answer: &[u8]) -> PathBuf {
        let program = dir.join(CRIU);
        let text = format!(
            "#!/usr/bin/env python3\nimport socket, sys\n\
             open({:?}, 'a').write('x')\n\
             s = socket.socket(fileno=int(sys.argv[2]))\n\
             assert sys.argv[1] == 'swrk' and s.recv(100) == bytes([8, 10])\n\
             s.send(bytes({answer:?}))\n",
            dir.join("asked"),
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        program
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = SockType::SeqPacket;
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn criu_is_asked_once_and_again_when_it_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = ([8, 10, 16, 1, 7], [8, 10, 16, 1, 9]);
        let program = criu(dir.path(), &first);
        assert_eq!(known(&program, &Directly).unwrap(), first);
        assert_eq!(known(&program, &Directly).unwrap(), first);
        assert_eq!(fs::read(dir.path().join("asked")).unwrap(), b"x");
        fs::remove_file(&program).unwrap();
        let program = criu(dir.path(), &second);
        assert_eq!(known(&program, &Directly).unwrap(), second);
        // One that fails, or says something else, is not answered for.
        for answer in [&[8, 10, 16, 0][..], &[8, 1, 16, 1], &[]] {
            assert!(
                ask(&criu(dir.path(), answer), &Directly).is_err(),
                "{answer:?}"
            );
        }
        assert!(known(Path::new("/bin/false"), &Directly).is_none());
    }

    #[test]
    fn the_question_is_answered_and_any_other_is_left_for_criu() {
        let home = tempfile::tempdir().unwrap();
        let (asking, asked) = pair();
        let ask = |question: &[u8]| {
            send(asking.as_raw_fd(), question, MsgFlags::empty()).unwrap();
            answer(asked.as_raw_fd(), home.path()).unwrap()
        };
        let mut got = [0; 100];
        let mut left = |at: &OwnedFd| {
            let length = recv(at.as_raw_fd(), &mut got, MsgFlags::MSG_DONTWAIT).ok()?;
            Some(got[..length].to_vec())
        };
        assert!(!ask(&QUESTION), "no answer is known");
        assert_eq!(left(&asked).unwrap(), QUESTION);
        fs::write(home.path().join(FILE), [8, 10, 16, 1, 42]).unwrap();
        for other in [&[8, 1][..], &[8, 10, 24, 1], &[8]] {
            assert!(!ask(other));
            assert_eq!(left(&asked).unwrap(), other);
            assert_eq!(left(&asking), None);
        }
        assert!(ask(&QUESTION));
        assert_eq!(left(&asking).unwrap(), [8, 10, 16, 1, 42]);
        assert_eq!(left(&asked), None);
    }
}
