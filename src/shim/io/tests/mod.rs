//! The tests play both sides: containerd's client, and the process with its three descriptors.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};

use super::*;

mod checkpoint;
mod orphans;
mod streams;
mod targets;
mod terminal;

/// No test waits longer than this for anything.
const LIMIT: Duration = Duration::from_secs(20);

struct Bed {
    dir: tempfile::TempDir,
    pump: Arc<Pump>,
}

impl Bed {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            pump: Pump::new().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn open_for(
        &self,
        config: &StdioConfig,
        orphan: Option<SinkHandle>,
    ) -> Result<ProcessIo, IoError> {
        ProcessIo::open(&self.pump, config, &context(orphan))
    }

    fn open(&self, stdin: &str, stdout: &str, stderr: &str) -> ProcessIo {
        self.open_for(&config(stdin, stdout, stderr), None).unwrap()
    }
}

impl Drop for Bed {
    /// Whatever a test did, nothing may be left open in the pump.
    fn drop(&mut self) {
        if !thread::panicking() {
            wait_for("the pump to be empty", || self.pump.lock().is_empty());
        }
    }
}

fn spawn(mut command: Command) -> io::Result<u32> {
    command.spawn().map(|child| child.id())
}

fn context(orphan: Option<SinkHandle>) -> IoContext<'static> {
    IoContext {
        namespace: "ns",
        container_id: "c1",
        uid: 0,
        gid: 0,
        spawner: &spawn,
        orphan,
    }
}

fn config(stdin: &str, stdout: &str, stderr: &str) -> StdioConfig {
    StdioConfig {
        terminal: false,
        stdin: stdin.to_owned(),
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
    }
}

/// The process's side: what a spawned process would have as 0, 1 and 2.
struct Process {
    stdin: File,
    stdout: File,
    stderr: File,
}

fn start(io: &ProcessIo) -> Process {
    let [stdin, stdout, stderr] = io.take_child_fds().unwrap();
    io.start().unwrap();
    Process {
        stdin: stdin.into(),
        stdout: stdout.into(),
        stderr: stderr.into(),
    }
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The client's reading end, as containerd's client opens it.
fn client_reader(path: impl AsRef<Path>) -> File {
    (OpenOptions::new().read(true))
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .unwrap()
}

fn client_writer(path: impl AsRef<Path>) -> File {
    OpenOptions::new().write(true).open(path).unwrap()
}

fn wait_event(fd: impl AsFd, events: PollFlags, what: &str) -> PollFlags {
    let mut polled = [PollFd::new(fd.as_fd(), events)];
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    let count = poll(&mut polled, limit).unwrap();
    assert_eq!(count, 1, "timed out waiting for {what}");
    polled[0].revents().unwrap()
}

fn has_event(fd: impl AsFd, events: PollFlags) -> bool {
    let mut polled = [PollFd::new(fd.as_fd(), events)];
    poll(&mut polled, PollTimeout::ZERO).unwrap() == 1
}

/// Exactly so many bytes, or a failure.
fn read_exactly(file: &File, n: usize) -> Vec<u8> {
    let mut bytes = vec![0; n];
    let mut got = 0;
    while got < n {
        wait_event(file, PollFlags::POLLIN, "bytes");
        match (&*file).read(&mut bytes[got..]) {
            Ok(0) => panic!("end of file after {got} of {n} bytes"),
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error} after {got} of {n} bytes"),
        }
    }
    bytes
}

/// Everything up to the end of file.
fn read_to_end(file: &File) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        wait_event(file, PollFlags::POLLIN, "end of file");
        match (&*file).read(&mut chunk) {
            Ok(0) => return all,
            Ok(n) => all.extend_from_slice(&chunk[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Is this end open, with nothing to read?
fn open_and_empty(file: &File) -> bool {
    !has_event(file, PollFlags::POLLIN)
}

/// Bytes of which no stretch looks like another.
fn noise(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(n + 8);
    while bytes.len() < n {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        bytes.extend_from_slice(&(state >> 24).to_le_bytes()[..5]);
    }
    bytes.truncate(n);
    bytes
}

/// A pty whose ends are never inherited by another test's logger, as openpty's would be.
fn pty() -> (OwnedFd, File) {
    use nix::{fcntl::OFlag, pty};
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = pty::posix_openpt(flags).unwrap();
    pty::grantpt(&master).unwrap();
    pty::unlockpt(&master).unwrap();
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(pty::ptsname_r(&master).unwrap())
        .unwrap();
    (master.into(), slave)
}

/// Writes in the background, as a process would.
fn write_all(mut file: File, bytes: Vec<u8>) -> thread::JoinHandle<File> {
    thread::spawn(move || {
        file.write_all(&bytes).unwrap();
        file
    })
}

/// What a thread came to, which must end in time.
fn joined<T>(thread: thread::JoinHandle<T>) -> T {
    wait_for("a thread", || thread.is_finished());
    thread.join().unwrap()
}

/// Bytes that lie in a pipe.
fn queued(fd: impl AsFd) -> usize {
    pipes::queued(fd.as_fd()).unwrap()
}

fn nonblocking(file: &File) {
    pipes::set_nonblocking(file.as_fd()).unwrap();
}

/// Writes until the pipe takes no more for good: the FIFO, the shim's buffer and the pipe are full.
fn write_until_stuck(bed: &Bed, file: &File, fifo: &str) -> Vec<u8> {
    nonblocking(file);
    let fifo = (OpenOptions::new().read(true).write(true))
        .custom_flags(libc::O_NONBLOCK)
        .open(fifo)
        .unwrap();
    let bytes = noise(1 << 20, 7);
    let mut sent = 0;
    wait_for("everything to be full", || {
        match (&*file).write(&bytes[sent..]) {
            Ok(n) => {
                sent += n;
                assert!(sent < bytes.len(), "the stream has no bound");
                false
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let core = bed.pump.lock();
                let is_full = core.flows.values().any(|flow| flow.buffer.room() == 0);
                // Asked with the pump at rest: nobody can move a byte in between.
                is_full
                    && !has_event(&fifo, PollFlags::POLLOUT)
                    && !has_event(file, PollFlags::POLLOUT)
            }
            Err(error) => panic!("{error}"),
        }
    });
    bytes[..sent].to_vec()
}

/// The pump must sleep now: hardly a turn of its loop in a while.
fn assert_asleep(pump: &Pump) {
    let before = pump.turns();
    thread::sleep(Duration::from_millis(300));
    let turns = pump.turns() - before;
    assert!(turns < 10, "{turns} turns in 300 ms");
}
