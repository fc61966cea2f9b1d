//! Threads and what does not change unless somebody changes it: who they are, how long they ran.

use super::{
    proc_fs::{Digest, Dir, ProcessError, digest},
    world::Homes,
};

/// Threads of one process.
const MAX_THREADS: usize = 4096;

/// How far a thread has come: both only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    /// Nanoseconds on a CPU.
    pub(super) ran: u64,
    /// How often it was given one.
    pub(super) turns: u64,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) tid: i32,
    /// In ticks since boot.
    pub(super) start: u64,
    /// The letter of /proc/PID/stat. `R` may be running on another CPU at this moment, with time
    /// that is not counted yet.
    pub(super) state: u8,
    pub(super) progress: Progress,
    /// nice, real-time priority, policy.
    pub(super) scheduling: [i64; 3],
    /// Its children, zombies included; `None` where the kernel does not list them.
    pub(super) children: Option<String>,
    /// /proc/PID/syscall: number, arguments, stack pointer, program counter. Read with the registers.
    pub(super) call: Option<String>,
    /// Supplied by the caller: a digest of all registers.
    pub(super) registers: Option<u64>,
}

/// What [`Task`]s a process has, and the whole [`Stat`] of the first one, whose process it is.
pub(super) type Tasks = (Vec<Task>, Stat);

/// Reads them.
pub(super) fn read(
    dir: &Dir,
    registers: &dyn Fn(i32) -> Option<u64>,
) -> Result<Tasks, ProcessError> {
    let tids = dir.numbers("task", "threads of a process", MAX_THREADS)?;
    let tids = tids.into_iter().map(|tid| Ok((tid, progress(dir, tid)?)));
    read_all(dir, tids, registers)
}

/// Reads them, if they are those of `earlier`, and none of these has run since: threads are made by the
/// others of the process alone, so they need not be listed. None: read them all.
pub(super) fn read_unmoved(
    dir: &Dir,
    earlier: &[Task],
    registers: &dyn Fn(i32) -> Option<u64>,
) -> Option<Tasks> {
    let unmoved = |task: &Task| progress(dir, task.tid).ok() == Some(task.progress);
    if !earlier.iter().all(unmoved) {
        return None;
    }
    let tids = earlier.iter().map(|task| Ok((task.tid, task.progress)));
    // One that has ended is found missing by whoever lists them.
    let (tasks, leader) = read_all(dir, tids, registers).ok()?;
    let start = |task: &Task| task.start;
    let are_same = tasks.iter().map(start).eq(earlier.iter().map(start));
    are_same.then_some((tasks, leader))
}

fn read_all(
    dir: &Dir,
    tids: impl Iterator<Item = Result<(i32, Progress), ProcessError>>,
    registers: &dyn Fn(i32) -> Option<u64>,
) -> Result<Tasks, ProcessError> {
    let (mut tasks, mut leader) = (Vec::new(), None);
    for its in tids {
        let (tid, progress) = its?;
        let (task, stat) = read_one(dir, tid, progress, registers)?;
        tasks.push(task);
        if tid == dir.pid {
            leader = Some(stat);
        }
    }
    // It stays until the last of the others has ended.
    let leader = leader.ok_or(ProcessError::Gone(dir.pid))?;
    Ok((tasks, leader))
}

/// `progress` was read before, and so before the state: a task that is woken in between shows itself
/// running, or has slept again and shows in the next reading.
fn read_one(
    dir: &Dir,
    tid: i32,
    progress: Progress,
    registers: &dyn Fn(i32) -> Option<u64>,
) -> Result<(Task, Stat), ProcessError> {
    let file = format!("task/{tid}/stat");
    let stat = Stat::parse(&dir.record(&file)?).ok_or_else(|| dir.unexpected(&file))?;
    let registers = registers(tid);
    // Says nothing without them.
    let call = match registers {
        Some(_) => dir.record_if_any(&format!("task/{tid}/syscall"))?,
        None => None,
    };
    let task = Task {
        tid,
        start: stat.start,
        state: stat.state,
        progress,
        scheduling: stat.scheduling,
        children: dir.text_if_any(&format!("task/{tid}/children"))?,
        call,
        registers,
    };
    Ok((task, stat))
}

/// How far one thread has come.
pub(super) fn progress(dir: &Dir, tid: i32) -> Result<Progress, ProcessError> {
    let file = format!("task/{tid}/schedstat");
    let text = dir.record(&file)?;
    let numbers: Vec<u64> = text.split_whitespace().flat_map(str::parse).collect();
    match numbers[..] {
        // A thread that has run at least once; zeros mean a kernel that does not count.
        [ran, _waited, turns] if turns > 0 => Ok(Progress { ran, turns }),
        _ => Err(dir.unexpected(&file)),
    }
}

/// The fields of /proc/PID/stat that are used.
pub(super) struct Stat {
    pub(super) comm: String,
    pub(super) state: u8,
    /// Parent, group, session, terminal, its foreground group.
    pub(super) family: [i64; 5],
    start: u64,
    scheduling: [i64; 3],
}

impl Stat {
    pub(super) fn parse(text: &str) -> Option<Self> {
        // The name may hold spaces and parentheses: it ends at the last one.
        let (head, tail) = text.rsplit_once(')')?;
        let (_, comm) = head.split_once('(')?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        // Field n of `man 5 proc_pid_stat` is fields[n - 3].
        let number = |n: usize| fields.get(n - 3)?.parse::<i64>().ok();
        Some(Self {
            comm: comm.to_owned(),
            state: *fields.first()?.as_bytes().first()?,
            family: [number(4)?, number(5)?, number(6)?, number(7)?, number(8)?],
            start: u64::try_from(number(22)?).ok()?,
            scheduling: [number(19)?, number(40)?, number(41)?],
        })
    }
}

/// The lines of /proc/PID/status that are part of a state (docs/state.md), but for the mask of blocked
/// signals: see [`blocked`]. CPUs and memory nodes
/// are there because an exec can change them for another process.
const STATUS: &[&str] = &[
    "Umask",
    "Tgid",
    "NStgid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "SigPnd",
    "ShdPnd",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Cpus_allowed",
    "Mems_allowed",
    "CoreDumping",
];

/// What namespaces a process is in.
const NAMESPACES: &[&str] = &[
    "ipc",
    "mnt",
    "net",
    "pid",
    "pid_for_children",
    "time",
    "time_for_children",
    "user",
    "uts",
    "cgroup",
];

/// What others can set for a process, and it for itself: kind and digest.
pub(super) type Attributes = Vec<(&'static str, Digest)>;

/// What a process is in, which it alone changes, by running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Own {
    /// Of the names of all its namespaces.
    namespaces: Digest,
    pub(super) homes: Homes,
}

impl Own {
    pub(super) fn read(dir: &Dir) -> Result<Self, ProcessError> {
        let mut namespaces = String::new();
        for name in NAMESPACES {
            namespaces += &link_or_none(dir, &format!("ns/{name}"))?;
            namespaces.push('\n');
        }
        let home = |kind| {
            let at = NAMESPACES.iter().position(|name| *name == kind);
            let name = at.and_then(|at| namespaces.lines().nth(at));
            // None is what a dead process has.
            let name = name.filter(|name| !name.is_empty());
            Ok(name.ok_or(ProcessError::Gone(dir.pid))?.to_owned())
        };
        Ok(Self {
            homes: Homes {
                mounts: home("mnt")?,
                ipc: home("ipc")?,
                network: home("net")?,
            },
            namespaces: digest(namespaces.as_bytes()),
        })
    }
}

/// Reads the [`Attributes`]. Also returns the status text, for the pid in the sandbox.
pub(super) fn attributes(
    dir: &Dir,
    stat: &Stat,
    own: &Own,
) -> Result<(Attributes, String), ProcessError> {
    let status = dir.record("status")?;
    let kept: String = status
        .lines()
        .filter(|line| {
            line.split(':')
                .next()
                .is_some_and(|key| STATUS.contains(&key))
        })
        .fold(String::new(), |text, line| text + line + "\n");
    let mut links = String::new();
    for name in ["cwd", "root", "exe"] {
        links += &link_or_none(dir, name)?;
        links.push('\n');
    }
    let optional = |file| Ok(dir.record_if_any(file)?.unwrap_or_default());
    let texts: [(&'static str, String); 6] = [
        ("credentials, masks or tracer", kept),
        (
            "parent, group, session or terminal",
            format!("{:?}", stat.family),
        ),
        ("working directory, root or program", links),
        ("limits", optional("limits")?),
        ("oom_score_adj", optional("oom_score_adj")?),
        ("cgroup", optional("cgroup")?),
    ];
    let digests = texts.map(|(kind, text)| (kind, digest(text.as_bytes())));
    let mut all = digests.to_vec();
    all.push(("namespaces", own.namespaces));
    Ok((all, status))
}

/// Where a link points; empty if there is none (a kernel thread's program, an old kernel's
/// namespace).
fn link_or_none(dir: &Dir, name: &str) -> Result<String, ProcessError> {
    match dir.link(name) {
        Err(ProcessError::Gone(_)) => Ok(String::new()),
        result => result,
    }
}

/// The blocked signals of the first thread. Only it itself sets them, by running. While it waits in
/// sigsuspend, ppoll or the like these are the call's own, and in a freeze after a dump those to which
/// the call will return, so that they change with a thaw (nginx).
pub(super) fn blocked(status: &str) -> Option<&str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .map(str::trim)
}

/// The pid within the innermost namespace: images are named by it.
pub(super) fn inner_pid(status: &str) -> Option<i32> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

/// /proc/PID/io: what read and write calls moved, all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Io {
    /// Bytes.
    pub(super) read: u64,
    /// Bytes and calls.
    pub(super) written: [u64; 2],
}

/// Reads it; `None` where the kernel does not count.
pub(super) fn io(dir: &Dir) -> Result<Option<Io>, ProcessError> {
    let Some(text) = dir.record_if_any("io")? else {
        return Ok(None);
    };
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    let counters = || {
        Some(Io {
            read: field("rchar:")?,
            written: [field("wchar:")?, field("syscw:")?],
        })
    };
    Ok(counters())
}
