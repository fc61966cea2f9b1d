//! A look that need not be repeated: nothing has happened since.
//!
//! A turn of files alone is looked at twice: to see that no dump is needed, and again in the moment of the
//! cut. Where no process ran in the first look, and none has until the second, the second would read the same
//! of each again.

use super::{
    baseline::Baseline,
    network::{self, Traffic},
    proc_fs::Dir,
    snapshot::{Process, Snapshot},
    stillness::Stillness,
};

/// Processes of which none ran while they were looked at.
#[derive(Debug)]
pub struct Rest {
    threads: Stillness,
    init: i32,
    traffic: Traffic,
}

impl Baseline {
    /// None if a process ran, came or went while the snapshot was taken, or nobody could tell whether
    /// anything has happened since: there are several networks, events were lost, or somebody has written
    /// to a pipe or a terminal, which is told once.
    pub fn at_rest(&self, now: &Snapshot) -> Option<Rest> {
        let [(_, network)] = &now.world.network[..] else {
            return None;
        };
        let still = now.gone.is_empty() && now.processes.iter().all(Process::stood_still);
        let threads = now.processes.iter().flat_map(|process| {
            let tasks = process.tasks.iter();
            tasks.map(|task| (process.pid, task.tid, task.progress))
        });
        if self.watches.count() != Some(0) {
            return None;
        }
        Some(Rest {
            threads: still.then(|| Stillness::new(threads))?,
            init: now.processes.first()?.pid,
            traffic: network.traffic,
        })
    }

    /// Whether all that was looked at is still so, as far as it shows in `now`, how far the threads have
    /// come by now, in what came through the network, and in what was written to pipes and terminals.
    pub fn still_rests(&self, rest: &Rest, now: &Stillness) -> bool {
        rest.threads == *now
            && self.watches.count() == Some(0)
            && Dir::open(rest.init)
                .and_then(|dir| network::traffic(&dir))
                .is_ok_and(|traffic| traffic == rest.traffic)
    }
}
