//! What belongs to the sandbox as a whole: mounts, SysV IPC, host name, network.

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    thread::{self, JoinHandle},
};

use nix::sched::{CloneFlags, setns};

use super::proc_fs::{Digest, Dir, ProcessError, digest, pidfd, read_own};

/// Namespaces of one kind that are looked at.
const MAX_NAMESPACES: usize = 64;
/// SysV semaphores of one namespace whose values are read.
const MAX_SEMAPHORES: usize = 4096;

/// A digest of each, and a few facts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct World {
    pub(super) mounts: Vec<(String, Digest)>,
    pub(super) ipc: Vec<(String, Ipc)>,
    pub(super) network: Vec<(String, Network)>,
}

/// One IPC namespace, with the host name of the same process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ipc {
    names: Digest,
    pub(super) state: Digest,
    /// There are semaphores or message queues: messages may pass through them without a trace.
    pub(super) has_queues: bool,
    pub(super) has_memory: bool,
}

/// One network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) configuration: Digest,
    pub(super) traffic: Traffic,
}

/// What the network stack of a namespace counted; all only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Traffic {
    /// TCP connections that somebody made to a listener here.
    pub(super) passive: u64,
    /// TCP segments and UDP datagrams, in and out.
    packets: [u64; 4],
}

/// Reads it through the processes of the set, one for each namespace.
pub(super) fn read(dirs: &[Dir]) -> Result<World, ProcessError> {
    let mut seen = BTreeSet::new();
    let mut of = |kind: &str| -> Result<Vec<(String, &Dir)>, ProcessError> {
        let mut all = Vec::new();
        for dir in dirs {
            let name = dir.link(&format!("ns/{kind}"))?;
            if seen.insert(name.clone()) {
                all.push((name, dir));
            }
            if seen.len() > MAX_NAMESPACES {
                return Err(ProcessError::Limit {
                    what: "namespaces",
                    limit: MAX_NAMESPACES,
                });
            }
        }
        // The order of the processes means nothing.
        all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    };
    let (mounts, ipc, networks) = (of("mnt")?, of("ipc")?, of("net")?);
    // Those threads start while this one reads.
    let asked = ipc
        .into_iter()
        .map(|(name, dir)| Ok((name, AskedIpc::of(dir.pid)?)));
    let asked: Vec<_> = asked.collect::<Result<_, ProcessError>>()?;
    let mut world = World::default();
    for (name, dir) in mounts {
        world.mounts.push((name, digest(&dir.read("mountinfo")?)));
    }
    for (name, dir) in networks {
        world.network.push((name, network(dir)?));
    }
    for (name, asked) in asked {
        world.ipc.push((name, asked.answer()?));
    }
    Ok(world)
}

impl World {
    /// What differs in what belongs to a state.
    pub(super) fn differences(&self, now: &Self) -> Vec<&'static str> {
        let mut all = Vec::new();
        if self.mounts != now.mounts {
            all.push("mounts changed");
        }
        if !same(&self.ipc, &now.ipc, |a, b| a.names == b.names) {
            all.push("host name changed");
        }
        if !same(&self.ipc, &now.ipc, |a, b| a.state == b.state) {
            all.push("SysV IPC changed");
        }
        let configured = |a: &Network, b: &Network| a.configuration == b.configuration;
        if !same(&self.network, &now.network, configured) {
            all.push("network interfaces or routes changed");
        }
        all
    }

    /// Whether nobody made a TCP connection to a listener of the sandbox.
    pub(super) fn no_connection(&self, now: &Self) -> bool {
        let passive = |a: &Network, b: &Network| a.traffic.passive == b.traffic.passive;
        same(&self.network, &now.network, passive)
    }

    pub(super) fn has_queues(&self) -> bool {
        self.ipc.iter().any(|(_, ipc)| ipc.has_queues)
    }

    pub(super) fn has_memory(&self) -> bool {
        self.ipc.iter().any(|(_, ipc)| ipc.has_memory)
    }
}

fn same<T>(before: &[(String, T)], now: &[(String, T)], equal: impl Fn(&T, &T) -> bool) -> bool {
    before.len() == now.len()
        && before
            .iter()
            .zip(now)
            .all(|(a, b)| a.0 == b.0 && equal(&a.1, &b.1))
}

fn network(dir: &Dir) -> Result<Network, ProcessError> {
    let mut text = String::new();
    for file in ["net/route", "net/if_inet6", "net/fib_trie"] {
        text += &dir.text_if_any(file)?.unwrap_or_default();
    }
    // Names alone: the numbers behind them count packets.
    for line in dir.text_if_any("net/dev")?.unwrap_or_default().lines() {
        text += line.split(':').next().unwrap_or_default();
        text.push('\n');
    }
    Ok(Network {
        configuration: digest(text.as_bytes()),
        traffic: traffic(dir)?,
    })
}

/// The counters of the network namespace of a process.
pub(super) fn traffic(dir: &Dir) -> Result<Traffic, ProcessError> {
    let snmp = dir.text_if_any("net/snmp")?.unwrap_or_default();
    let field = |protocol: &str, name: &str| {
        let mut lines = snmp.lines().filter(|line| line.starts_with(protocol));
        let (names, values) = (lines.next()?, lines.next()?);
        let column = names.split(' ').position(|field| field == name)?;
        values.split(' ').nth(column)?.parse().ok()
    };
    let number = |protocol, name| field(protocol, name).unwrap_or(0);
    Ok(Traffic {
        passive: number("Tcp:", "PassiveOpens"),
        packets: [
            number("Tcp:", "InSegs"),
            number("Tcp:", "OutSegs"),
            number("Udp:", "InDatagrams"),
            number("Udp:", "OutDatagrams"),
        ],
    })
}

/// /proc/sysvipc and the host name show the reader's own namespaces: a thread goes there for it.
struct AskedIpc {
    pid: i32,
    thread: JoinHandle<std::io::Result<Ipc>>,
}

impl AskedIpc {
    fn of(pid: i32) -> Result<Self, ProcessError> {
        let handle = pidfd(pid)?;
        let thread = thread::Builder::new()
            .name("crab-ipc".to_owned())
            .spawn(move || ipc_inside(&handle));
        match thread {
            Ok(thread) => Ok(Self { pid, thread }),
            Err(source) => Err(Self::failed(pid, source)),
        }
    }

    fn answer(self) -> Result<Ipc, ProcessError> {
        let died = |_| Err(std::io::Error::other("the thread died"));
        let answer = self.thread.join().unwrap_or_else(died);
        answer.map_err(|source| Self::failed(self.pid, source))
    }

    fn failed(pid: i32, source: std::io::Error) -> ProcessError {
        ProcessError::Io {
            pid,
            file: "IPC namespace".to_owned(),
            source,
        }
    }
}

fn ipc_inside(handle: &OwnedFd) -> std::io::Result<Ipc> {
    setns(handle, CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
    let names =
        ["hostname", "domainname"].map(|name| read_own(&format!("/proc/sys/kernel/{name}")));
    let mut name = Vec::new();
    for part in names {
        name.extend(part?);
    }
    let (memory, semaphores, messages) = (table("shm")?, table("sem")?, table("msg")?);
    let memory = without_residency(&memory);
    let entries = |text: &str| text.lines().count() > 1;
    let has_queues = entries(&semaphores) || entries(&messages);
    let has_memory = entries(&memory);
    let values = semaphore_values(&semaphores)?;
    Ok(Ipc {
        names: digest(&name),
        state: digest(format!("{memory}{semaphores}{messages}{values:?}").as_bytes()),
        has_queues,
        has_memory,
    })
}

/// One of the lists of SysV IPC. What cannot be read is no empty list: nobody would look for messages.
fn table(name: &str) -> std::io::Result<String> {
    match read_own(&format!("/proc/sysvipc/{name}")) {
        // A kernel without SysV IPC.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
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
fn semaphore_values(table: &str) -> std::io::Result<Vec<[i32; 2]>> {
    let mut all = Vec::new();
    for line in table.lines().skip(1) {
        // key semid perms nsems …
        let mut fields = line.split_whitespace().skip(1);
        let id = fields.next().and_then(|field| field.parse::<i32>().ok());
        let count = fields.nth(1).and_then(|field| field.parse::<usize>().ok());
        let (Some(id), Some(count)) = (id, count) else {
            return Err(std::io::Error::other(
                "unexpected text in /proc/sysvipc/sem",
            ));
        };
        if all.len() + count > MAX_SEMAPHORES {
            return Err(std::io::Error::other("too many SysV semaphores"));
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
