//! The state at dump P, and what later ones are held against.

use std::{path::Path, sync::Arc};

use super::{
    descriptors::Kind,
    facts::{KernelFacts, Reason, Settings, Verdict, What},
    image::{ImageDir, Images},
    judge,
    memory::{self, Against, Marks},
    network::{self, Traffic, Watched},
    proc_fs::{Dir, ProcessError},
    snapshot::{Process, Registers, Snapshot},
    tasks,
    watches::Watches,
};

/// What the processes of a sandbox were at the last full dump P.
#[derive(Debug)]
pub struct Baseline {
    pub(super) snapshot: Snapshot,
    pub(super) watches: Watches,
    /// CRIU's images of P.
    pub(super) images: Arc<dyn Images>,
    /// Listens in the network of the first process; None if nobody could.
    pub(super) network: Option<Watched>,
    /// What each of the processes had read at P itself, in bytes; None if that is not counted.
    read: Vec<Option<u64>>,
    quiet: Option<Quiet>,
}

/// What [`Baseline::quick`] compares.
#[derive(Debug, Clone, Copy)]
struct Quiet {
    cpu: u64,
    init: i32,
    traffic: Traffic,
}

/// What [`Baseline::settle`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// Every task has blocked again, and what they did until then belongs to P.
    Yes,
    /// A task still runs: try again in a few milliseconds, or let it be.
    NotYet,
    /// Something has happened that does not belong to P; the baseline stays as it was.
    No(Vec<Reason>),
}

impl Baseline {
    /// Takes the baseline of dump P: within its freeze, **after** CRIU has done its work and pipes
    /// have been drained, so that none of that counts as a change. `pids` are all processes of the
    /// cgroup, `images` the directory with CRIU's images (read when memory is compared, not now).
    ///
    /// # Errors
    /// As [`Snapshot::take`]; also if a process runs or ends meanwhile: it was not frozen.
    pub fn take(
        pids: &[i32],
        images: &Path,
        registers: Registers<'_>,
    ) -> Result<Self, ProcessError> {
        // Before it is read. Others configure it whether or not the processes are frozen.
        let network = pids.iter().min().map(|first| Watched::begin(*first));
        let network = network.and_then(|watched| {
            let heard = |e: &ProcessError| log::info!("the network is read at each look: {e}");
            watched.inspect_err(heard).ok()
        });
        // Two rounds: watches are placed on what the first one finds. Nobody runs between them.
        let mut watches = Watches::new();
        let snapshot = Snapshot::take(pids, registers)?;
        for process in &snapshot.processes {
            for descriptor in &process.table.all {
                if matches!(descriptor.kind, Kind::Pipe | Kind::Fifo | Kind::Terminal) {
                    watches.place(process.pid, descriptor.fd);
                }
            }
        }
        if let Some(&pid) = snapshot.gone.first() {
            return Err(ProcessError::Gone(pid));
        }
        if let Some(moving) = snapshot.processes.iter().find(|p| !p.stood_still()) {
            return Err(ProcessError::Io {
                pid: moving.pid,
                file: "a frozen process".to_owned(),
                source: std::io::Error::other("it runs"),
            });
        }
        let read = |process: &Process| process.io.map(|io| io.read);
        Ok(Self {
            read: snapshot.processes.iter().map(read).collect(),
            snapshot,
            watches,
            images: Arc::new(ImageDir::new(images)),
            network,
            quiet: None,
        })
    }

    /// The images have moved.
    pub fn set_images(&mut self, images: Arc<dyn Images>) {
        self.images = images;
    }

    /// After the thaw: what ran until every task has blocked again belongs to P, if no data moved
    /// (the rules of the consistent cut, whether or not `settings` switch it on). From then on
    /// "it did not run" is held against `now`, and so is the CPU time of the consistent cut.
    ///
    /// `facts` must have been read after `now` was taken. `cpu_ns` is the cgroup's CPU time, read
    /// *before* `now` was taken; with it [`Baseline::quick`] works.
    pub fn settle(
        &mut self,
        now: Snapshot,
        facts: &KernelFacts,
        marks: Marks<'_>,
        settings: &Settings,
        cpu_ns: Option<u64>,
    ) -> Settled {
        let why = judge::settle(self, &now, facts, settings);
        if !why.is_empty() {
            return Settled::No(why);
        }
        if !now.processes.iter().all(Process::stood_still) {
            return Settled::NotYet;
        }
        let pairs = self.snapshot.processes.iter().zip(&now.processes);
        let same_memory: Vec<_> = pairs
            .map(|(old, new)| self.same_memory(old, new, marks, settings))
            .collect();
        if facts.memory_reached && same_memory.iter().any(Result::is_err) {
            let processes = self.snapshot.processes.iter().zip(same_memory);
            let changed = processes.filter_map(|(old, same)| Some((old, same.err()?)));
            return Settled::No(
                changed
                    .flat_map(|(old, what)| judge::reasons(old, vec![What::MemoryReached, what]))
                    .collect(),
            );
        }
        self.quiet = cpu_ns.and_then(|cpu| {
            let init = now.processes.first()?.pid;
            let traffic = network::traffic(&Dir::open(init).ok()?).ok()?;
            Some(Quiet { cpu, init, traffic })
        });
        let processes = self.snapshot.processes.iter_mut().zip(now.processes);
        for ((old, new), same_memory) in processes.zip(same_memory) {
            // A thaw makes interrupted system calls start again, in other registers. Those are
            // P's only if the memory is.
            let registers = same_memory.is_ok() && new.has_registers();
            // Everything else is equal, or is what the image holds: the memory.
            old.io = new.io;
            if registers {
                old.blocked.clone_from(&new.blocked);
            }
            for (task, settled) in old.tasks.iter_mut().zip(new.tasks) {
                task.progress = settled.progress;
                if registers {
                    (task.registers, task.call) = (settled.registers, settled.call);
                }
            }
            old.progress_after = new.progress_after;
        }
        self.snapshot.taken = now.taken;
        Settled::Yes
    }

    /// Whether a process has the memory of P's image now; the reason why that is not so, or not known.
    fn same_memory(
        &self,
        old: &Process,
        new: &Process,
        marks: Marks<'_>,
        settings: &Settings,
    ) -> Result<(), What> {
        if !settings.compare_memory {
            return Err(What::NotCompared("that is switched off".to_owned()));
        }
        memory::equal_memory(old, new, &self.against(marks, settings))
    }

    /// What memory is held against.
    pub(super) fn against<'a>(&'a self, marks: Marks<'a>, settings: &Settings) -> Against<'a> {
        Against {
            images: &*self.images,
            marks,
            limit: settings.compared_bytes,
        }
    }

    /// Whether the cgroup's CPU time is what it was at [`Baseline::settle`]; else [`Baseline::quick`] need
    /// not be asked.
    pub fn may_be_quick(&self, cpu_ns: u64) -> bool {
        self.quiet.is_some_and(|quiet| quiet.cpu == cpu_ns)
    }

    /// Whether nothing at all has happened: no process of the cgroup ran (`cpu_ns`, its CPU time,
    /// equals that at [`Baseline::settle`]), the kernel side saw nothing, and no packet came.
    /// `false` says nothing: then take a [`Snapshot`]. Costs two small files of /proc.
    ///
    /// A task that a timer has woken within the last tick may not be in `cpu_ns` yet (nor in what
    /// it could have done: nothing that `facts` would not show). So this is the consistent cut's
    /// answer, and `false` where `settings` switch that off.
    pub fn quick(&self, cpu_ns: u64, facts: &KernelFacts, settings: &Settings) -> bool {
        let Some(quiet) = &self.quiet else {
            return false;
        };
        let watched = |pid| facts.did.contains_key(pid);
        settings.consistent_cut
            && self.may_be_quick(cpu_ns)
            && facts.is_quiet()
            && !facts.memory_reached
            && self.snapshot.processes.iter().map(|p| &p.pid).all(watched)
            && Dir::open(quiet.init)
                .and_then(|dir| network::traffic(&dir))
                .is_ok_and(|traffic| traffic == quiet.traffic)
    }

    /// What the processes are now, as [`Snapshot::take`] tells it, with less to read: what a process of P
    /// alone changes is not asked again of those that have not run since, nor how a network is configured
    /// in which nobody has changed that.
    ///
    /// # Errors
    /// As there.
    pub fn look(&self, pids: &[i32], registers: Registers<'_>) -> Result<Snapshot, ProcessError> {
        let known = (&self.snapshot, self.network.as_ref());
        Snapshot::take_after(Some(known), pids, registers)
    }

    /// Whether P's image may stand for what the processes are `now`.
    ///
    /// `facts` must have been read after `now` was taken, and cover the time since P. The answer
    /// holds for one instant between the two; what happens later is seen by the next look, since
    /// all evidence adds up from P on. For an answer that holds *at a cut* (newer files are
    /// captured beside P), freeze first.
    pub fn verdict(
        &self,
        now: &Snapshot,
        facts: &KernelFacts,
        of_kernel: (Registers<'_>, Marks<'_>),
        settings: &Settings,
    ) -> Verdict {
        judge::verdict(self, now, facts, of_kernel, settings)
    }

    /// The first process of P that has read anything since, from whatever file, pipe or socket, by host pid
    /// and name; or whose reads are not counted. The consistent cut acquits it, as what it has read is lost
    /// with it. Where it is to live on beside older files, that is not so.
    ///
    /// # Errors
    /// If one of them is no more.
    pub fn reader(&self) -> Result<Option<(i32, &str)>, ProcessError> {
        // Not since it has settled: what it has read by then may be what the next turn wrote.
        for (process, then) in self.snapshot.processes.iter().zip(&self.read) {
            let now = tasks::io(&Dir::open(process.pid)?)?;
            if then.zip(now).is_none_or(|(then, now)| then != now.read) {
                return Ok(Some((process.pid, &process.comm)));
            }
        }
        Ok(None)
    }
}
