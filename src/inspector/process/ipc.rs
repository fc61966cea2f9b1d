//! SysV IPC and the host name of a sandbox: /proc/sysvipc and uname show the reader's own namespaces.

use std::{ffi::OsStr, io, os::unix::ffi::OsStrExt};

use nix::{sched::CloneFlags, sys::utsname::uname};

use super::{
    proc_fs::{Digest, ProcessError, digest, read_own},
    traveller::{Visit, visit},
};

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

/// Asks for what a process sees.
pub(super) fn ask(pid: i32) -> Result<Visit<Ipc>, ProcessError> {
    const THERE: CloneFlags = CloneFlags::CLONE_NEWIPC.union(CloneFlags::CLONE_NEWUTS);
    visit(pid, THERE, "IPC namespace", look_around)
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
