//! What belongs to the sandbox as a whole: mounts, SysV IPC, host name, network.

use std::collections::BTreeSet;

use super::{
    ipc::{self, Ipc},
    network::{self, Network, Watched},
    proc_fs::{Digest, Dir, ProcessError, digest},
    traveller::Visit,
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

/// An earlier world, and who has been listening since before it was read.
pub(super) type Known<'a> = (&'a World, Option<&'a Watched>);

/// Reads it through the processes of the set, one for each namespace.
pub(super) fn read(
    processes: &[(Dir, &Homes)],
    known: Option<Known<'_>>,
) -> Result<World, ProcessError> {
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
    let asked: Vec<(String, Visit<Ipc>)> = asked.collect::<Result<_, ProcessError>>()?;
    let mut world = World::default();
    for (name, dir) in mounts {
        world.mounts.push((name, digest(&dir.read("mountinfo")?)));
    }
    for (name, dir) in networks {
        let configuration = known.and_then(|(known, watched)| {
            watched.filter(|its| its.is_unchanged(&name))?;
            let (_, network) = known.network.iter().find(|its| its.0 == name)?;
            Some(network.configuration)
        });
        let network = network::read(dir, configuration)?;
        world.network.push((name, network));
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
