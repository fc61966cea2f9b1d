//! SysV IPC and the host name of a sandbox.
//!
//! /proc/sysvipc and uname show the reader's own namespaces, so somebody has to go there: one thread of
//! the shim, which returns after each question. No other may: what it started would belong to the sandbox's
//! namespaces, and CRIU would take those for the host's.

use std::{
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::utsname::uname,
};
use parking_lot::Mutex;

use super::proc_fs::{Digest, ProcessError, digest, pidfd, read_own};

/// SysV semaphores of one namespace whose values are read.
const MAX_SEMAPHORES: usize = 4096;

/// One IPC namespace, with the host name of the same process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ipc {
    pub(super) names: Digest,
    pub(super) state: Digest,
    /// There are semaphores or message queues: messages may pass through them without a trace.
    pub(super) has_queues: bool,
    pub(super) has_memory: bool,
}

/// A process whose namespaces are looked at, and who wants to know.
struct Question {
    process: OwnedFd,
    answer: Sender<io::Result<Ipc>>,
}

/// A question that is on its way.
pub(super) struct Asked {
    pid: i32,
    answer: Receiver<io::Result<Ipc>>,
}

/// The thread, if it was needed before. It ends if it cannot return from a sandbox; then the next one
/// begins.
static TRAVELLER: Mutex<Option<Sender<Question>>> = Mutex::new(None);

/// Asks for what a process sees.
pub(super) fn ask(pid: i32) -> Result<Asked, ProcessError> {
    let (sender, answer) = channel();
    let mut question = Question {
        process: pidfd(pid)?,
        answer: sender,
    };
    let mut traveller = TRAVELLER.lock();
    if let Some(thread) = &*traveller {
        match thread.send(question) {
            Ok(()) => return Ok(Asked { pid, answer }),
            Err(unsent) => question = unsent.0,
        }
    }
    let thread = begin().map_err(|source| failed(pid, source))?;
    let lost = |_| failed(pid, io::Error::other("the thread died"));
    thread.send(question).map_err(lost)?;
    *traveller = Some(thread);
    Ok(Asked { pid, answer })
}

impl Asked {
    /// Waits for it.
    pub(super) fn answer(self) -> Result<Ipc, ProcessError> {
        let died = |_| Err(io::Error::other("the thread died"));
        let answer = self.answer.recv().unwrap_or_else(died);
        answer.map_err(|source| failed(self.pid, source))
    }
}

fn failed(pid: i32, source: io::Error) -> ProcessError {
    ProcessError::Io {
        pid,
        file: "IPC namespace".to_owned(),
        source,
    }
}

fn begin() -> io::Result<Sender<Question>> {
    // Where the thread comes from, as this process's first one is there.
    let home = pidfd(nix::unistd::getpid().as_raw()).map_err(io::Error::other)?;
    let (sender, questions) = channel();
    thread::Builder::new()
        .name("crab-ipc".to_owned())
        .spawn(move || travel(&home, &questions))?;
    Ok(sender)
}

fn travel(home: &OwnedFd, questions: &Receiver<Question>) {
    const THERE: CloneFlags = CloneFlags::CLONE_NEWIPC.union(CloneFlags::CLONE_NEWUTS);
    for Question { process, answer } in questions {
        let found = setns(&process, THERE)
            .map_err(io::Error::from)
            .and_then(|()| look_around());
        let back = setns(home, THERE);
        // Whoever asked may have given up.
        drop(answer.send(found));
        if let Err(e) = back {
            return log::error!("cannot return from a sandbox's IPC namespace: {e}");
        }
    }
}

fn look_around() -> io::Result<Ipc> {
    let system = uname()?;
    let names = [system.nodename(), system.domainname()].join(OsStr::new("\n"));
    let (memory, semaphores, messages) = (table("shm")?, table("sem")?, table("msg")?);
    let memory = without_residency(&memory);
    let entries = |text: &str| text.lines().count() > 1;
    let has_queues = entries(&semaphores) || entries(&messages);
    let has_memory = entries(&memory);
    let values = semaphore_values(&semaphores)?;
    Ok(Ipc {
        names: digest(names.as_bytes()),
        state: digest(format!("{memory}{semaphores}{messages}{values:?}").as_bytes()),
        has_queues,
        has_memory,
    })
}

/// One of the lists of SysV IPC. What cannot be read is no empty list: nobody would look for messages.
fn table(name: &str) -> io::Result<String> {
    match read_own(&format!("/proc/sysvipc/{name}")) {
        // A kernel without SysV IPC.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(e) => Err(e),
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
    }
}

/// The last two columns tell how much of a segment is in memory or swapped.
fn without_residency(table: &str) -> String {
    table.lines().fold(String::new(), |text, line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        text + &fields[..fields.len().saturating_sub(2)].join(" ") + "\n"
    })
}

/// The values of all semaphores of the calling thread's namespace, each with who used it last.
/// One by one: GETALL writes as many as the set has by then, whatever room there is.
fn semaphore_values(table: &str) -> io::Result<Vec<[i32; 2]>> {
    let mut all = Vec::new();
    for line in table.lines().skip(1) {
        // key semid perms nsems …
        let mut fields = line.split_whitespace().skip(1);
        let id = fields.next().and_then(|field| field.parse::<i32>().ok());
        let count = fields.nth(1).and_then(|field| field.parse::<usize>().ok());
        let (Some(id), Some(count)) = (id, count) else {
            return Err(io::Error::other("unexpected text in /proc/sysvipc/sem"));
        };
        if all.len() + count > MAX_SEMAPHORES {
            return Err(io::Error::other("too many SysV semaphores"));
        }
        for index in 0..count {
            let index = i32::try_from(index).unwrap_or(i32::MAX);
            // SAFETY: both take no pointer.
            all.push(
                [libc::GETVAL, libc::GETPID].map(|what| unsafe { libc::semctl(id, index, what) }),
            );
        }
    }
    Ok(all)
}
