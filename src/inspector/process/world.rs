//! What belongs to the sandbox as a whole: mounts, SysV IPC, host name, network.

use std::collections::BTreeSet;

use super::{
    ipc::{self, Asked, Ipc},
    proc_fs::{Digest, Dir, ProcessError, digest},
};

/// Namespaces of one kind that are looked at.
const MAX_NAMESPACES: usize = 64;

/// A digest of each, and a few facts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct World {
    pub(super) mounts: Vec<(String, Digest)>,
    pub(super) ipc: Vec<(String, Ipc)>,
    pub(super) network: Vec<(String, Network)>,
}

/// The namespaces of a process that the world is made of: what the links in /proc/PID/ns name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Homes {
    pub(super) mounts: String,
    pub(super) ipc: String,
    pub(super) network: String,
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
pub(super) fn read(processes: &[(Dir, &Homes)]) -> Result<World, ProcessError> {
    let mut seen = BTreeSet::new();
    let mut of = |kind: fn(&Homes) -> &String| -> Result<Vec<(String, &Dir)>, ProcessError> {
        let mut all = Vec::new();
        for (dir, homes) in processes {
            let name = kind(homes).clone();
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
    let (mounts, ipc, networks) = (
        of(|homes| &homes.mounts)?,
        of(|homes| &homes.ipc)?,
        of(|homes| &homes.network)?,
    );
    // Another thread goes there while this one reads.
    let asked = ipc
        .into_iter()
        .map(|(name, dir)| Ok((name, ipc::ask(dir.pid)?)));
    let asked: Vec<(String, Asked)> = asked.collect::<Result<_, ProcessError>>()?;
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
    let snmp = dir.record_if_any("net/snmp")?.unwrap_or_default();
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
