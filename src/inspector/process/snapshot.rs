//! What the processes of a sandbox are at one moment, as far as a look needs it.

use std::time::Instant;

use super::{
    descriptors::{self, MAX_DESCRIPTORS, Table},
    maps::{self, Maps},
    network::Watched,
    proc_fs::{Dir, ProcessError},
    tasks::{self, Attributes, Io, Own, Progress, Task},
    world::{self, World},
};

/// Processes of one sandbox.
pub const MAX_PROCESSES: usize = 4096;
/// Threads of all of them.
pub const MAX_TASKS: usize = 16 << 10;

/// Supplies a digest of all registers of a thread (host tid); `None` if it cannot be read. BPF's
/// task iterator can; user space without stopping the thread sees only stack pointer, program
/// counter and the arguments of the system call.
pub type Registers<'a> = &'a dyn Fn(i32) -> Option<u64>;

/// For hosts where nobody can: (b) then acquits nobody.
pub fn no_registers(_tid: i32) -> Option<u64> {
    None
}

/// One process.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// In the sandbox's own pid namespace.
    pub(super) inner_pid: i32,
    pub(super) comm: String,
    pub(super) tasks: Vec<Task>,
    /// Read again after everything else.
    pub(super) progress_after: Vec<Progress>,
    pub(super) attributes: Attributes,
    pub(super) own: Own,
    /// See [`tasks::blocked`]; memory and registers alone do not tell.
    pub(super) blocked: Option<String>,
    pub(super) io: Option<Io>,
    pub(super) maps: Maps,
    pub(super) table: Table,
}

/// All processes of a sandbox, read once.
///
/// Taken of frozen processes it is their state. Taken of running ones, each process is read by
/// itself; [`Baseline::verdict`](super::Baseline::verdict) says what that is worth.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Sorted by pid.
    pub(super) processes: Vec<Process>,
    /// In the list of processes, and gone when looked at.
    pub(super) gone: Vec<i32>,
    pub(super) world: World,
    pub(super) taken: Instant,
}

impl Snapshot {
    /// Reads the processes `pids` (host pids, `cgroup.procs`; all of them).
    ///
    /// # Errors
    /// Where there is more than the limits allow, or /proc cannot be read: nothing is known then,
    /// and the caller counts the sandbox as changed. A process that has ended is no error.
    pub fn take(pids: &[i32], registers: Registers<'_>) -> Result<Self, ProcessError> {
        Self::take_after(None, pids, registers)
    }

    /// As [`Snapshot::take`]. What a process alone changes, by running, is taken over from an earlier
    /// snapshot for those that have not run since; and how the network is configured, if who has been
    /// listening since before that has heard of no change.
    pub(super) fn take_after(
        earlier: Option<(&Self, Option<&Watched>)>,
        pids: &[i32],
        registers: Registers<'_>,
    ) -> Result<Self, ProcessError> {
        if pids.len() > MAX_PROCESSES {
            return Err(ProcessError::Limit {
                what: "processes",
                limit: MAX_PROCESSES,
            });
        }
        let taken = Instant::now();
        let mut pids = pids.to_vec();
        pids.sort_unstable();
        pids.dedup();
        let (mut processes, mut dirs, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        let (mut threads, mut descriptors) = (MAX_TASKS, MAX_DESCRIPTORS);
        for pid in pids {
            let known = earlier.and_then(|(earlier, _)| earlier.find(pid));
            let read = Dir::open(pid).and_then(|dir| {
                let left = descriptors;
                let mut process = Process::read(&dir, registers, &mut descriptors, known)?;
                if known.is_some() && !process.stood_still() {
                    descriptors = left;
                    process = Process::read(&dir, registers, &mut descriptors, None)?;
                }
                Ok((dir, process))
            });
            let (dir, process) = match read {
                Ok(pair) => pair,
                Err(ProcessError::Gone(pid)) => {
                    gone.push(pid);
                    continue;
                }
                Err(error) => return Err(error),
            };
            threads = threads
                .checked_sub(process.tasks.len())
                .ok_or(ProcessError::Limit {
                    what: "threads",
                    limit: MAX_TASKS,
                })?;
            processes.push(process);
            dirs.push(dir);
        }
        let homes = processes.iter().map(|process| &process.own.homes);
        let members: Vec<_> = dirs.into_iter().zip(homes).collect();
        let known = earlier.map(|(earlier, watched)| (&earlier.world, watched));
        let world = world::read(&members, known)?;
        Ok(Self {
            processes,
            gone,
            world,
            taken,
        })
    }

    pub(super) fn find(&self, pid: i32) -> Option<&Process> {
        let place = self.processes.binary_search_by_key(&pid, |p| p.pid).ok()?;
        self.processes.get(place)
    }
}

impl Process {
    fn read(
        dir: &Dir,
        registers: Registers<'_>,
        descriptors_left: &mut usize,
        earlier: Option<&Self>,
    ) -> Result<Self, ProcessError> {
        // To be confirmed by the progress after all has been read.
        let unmoved = earlier.and_then(|earlier| {
            let tasks = tasks::read_unmoved(dir, &earlier.tasks, registers)?;
            Some((earlier, tasks))
        });
        let (earlier, (tasks, stat)) = match unmoved {
            Some((earlier, tasks)) => (Some(earlier), tasks),
            None => (None, tasks::read(dir, registers)?),
        };
        let own = match earlier {
            Some(earlier) => earlier.own.clone(),
            None => Own::read(dir)?,
        };
        let (attributes, status) = tasks::attributes(dir, &stat, &own)?;
        let inner_pid = tasks::inner_pid(&status).ok_or_else(|| dir.unexpected("status"))?;
        let table = descriptors::read(dir, descriptors_left)?;
        let maps = maps::read(dir)?;
        // After the queues: what was read from them is in one of the two.
        let io = match earlier {
            Some(earlier) => earlier.io,
            None => tasks::io(dir)?,
        };
        let progress_after = progress(dir, &tasks)?;
        Ok(Self {
            pid: dir.pid,
            inner_pid,
            comm: stat.comm,
            tasks,
            progress_after,
            attributes,
            own,
            blocked: tasks::blocked(&status).map(str::to_owned),
            io,
            maps,
            table,
        })
    }

    /// Whether none of its threads ran while it was read, and none runs now.
    pub(super) fn stood_still(&self) -> bool {
        let before = self.tasks.iter().map(|task| &task.progress);
        self.tasks.iter().all(|task| task.state != b'R') && before.eq(&self.progress_after)
    }

    /// Whether (b) can be tried.
    pub(super) fn has_registers(&self) -> bool {
        self.tasks.iter().all(|task| task.registers.is_some())
    }

    /// CPU time of its present threads, as of the end of the reading.
    pub(super) fn ran(&self) -> u64 {
        self.progress_after
            .iter()
            .fold(0, |sum, progress| sum.saturating_add(progress.ran))
    }
}

/// How far the threads are by now.
pub(super) fn progress(dir: &Dir, tasks: &[Task]) -> Result<Vec<Progress>, ProcessError> {
    tasks
        .iter()
        .map(|task| tasks::progress(dir, task.tid))
        .collect()
}
