//! The rules (a), (b) and (c); argued in the module's documentation.

use std::time::Duration;

use super::{
    baseline::Baseline,
    descriptors::{Descriptor, Kind},
    facts::{Acquittal, KernelFacts, Others, Reason, Settings, Verdict, What},
    memory::{self, Marks},
    snapshot::{Process, Registers, Snapshot},
    tasks::Progress,
};

/// Everything that is held against the processes of one look.
struct Look<'a> {
    baseline: &'a Baseline,
    now: &'a Snapshot,
    facts: &'a KernelFacts,
    settings: &'a Settings,
    registers: Registers<'a>,
    marks: Marks<'a>,
    connected: bool,
}

pub(super) fn verdict(
    baseline: &Baseline,
    now: &Snapshot,
    facts: &KernelFacts,
    (registers, marks): (Registers<'_>, Marks<'_>),
    settings: &Settings,
) -> Verdict {
    let look = Look::new(baseline, now, facts, (registers, marks), settings);
    let mut why = look.set();
    let mut by = Vec::new();
    for (before, after) in look.pairs() {
        match look.acquit(before, after) {
            Ok(rule) => by.push((before.pid, before.comm.clone(), rule)),
            Err(whats) => why.extend(reasons(before, whats)),
        }
    }
    if why.is_empty() {
        Verdict::Unchanged { by }
    } else {
        Verdict::Changed { why }
    }
}

/// What speaks against counting what ran since the thaw as part of P, but for the doubts: with these,
/// the memory has to be compared, too.
pub(super) fn settle(
    baseline: &Baseline,
    now: &Snapshot,
    facts: &KernelFacts,
    settings: &Settings,
) -> Vec<Reason> {
    let nothing: (Registers<'_>, Marks<'_>) = (&super::no_registers, &memory::no_marks);
    let look = Look::new(baseline, now, facts, nothing, settings);
    let mut why = look.set();
    for (before, after) in look.pairs() {
        let mut whats = look.seen(before, after);
        if whats.is_empty() && !not_run(before, after) {
            whats = look.cut(before, after);
        }
        why.extend(reasons(before, whats));
    }
    why
}

pub(super) fn reasons(process: &Process, whats: Vec<What>) -> impl Iterator<Item = Reason> {
    let (pid, comm) = (process.pid, process.comm.clone());
    whats.into_iter().map(move |what| Reason {
        pid,
        comm: comm.clone(),
        what,
    })
}

impl<'a> Look<'a> {
    fn new(
        baseline: &'a Baseline,
        now: &'a Snapshot,
        facts: &'a KernelFacts,
        (registers, marks): (Registers<'a>, Marks<'a>),
        settings: &'a Settings,
    ) -> Self {
        Self {
            baseline,
            now,
            facts,
            settings,
            registers,
            marks,
            connected: !baseline.snapshot.world.no_connection(&now.world),
        }
    }

    /// The processes that were there and still are.
    fn pairs(&self) -> impl Iterator<Item = (&'a Process, &'a Process)> {
        let now = self.now;
        let before = self.baseline.snapshot.processes.iter();
        before
            .filter_map(move |process| Some((process, now.find(process.pid)?)))
            .filter(|(before, after)| same_process(before, after))
    }

    /// What concerns the set as a whole.
    fn set(&self) -> Vec<Reason> {
        let before = &self.baseline.snapshot;
        let mut why = Vec::new();
        let mut note = |pid, comm: &str, what| {
            why.push(Reason {
                pid,
                comm: comm.to_owned(),
                what,
            });
        };
        for what in before.world.differences(&self.now.world) {
            note(0, "", What::Sandbox(what));
        }
        if self.facts.others.contains(Others::MEMORY)
            && (before.world.has_memory() || self.now.world.has_memory())
        {
            note(
                0,
                "",
                What::Sandbox("an exec used shared memory, and there is SysV memory"),
            );
        }
        for process in &before.processes {
            match self.now.find(process.pid) {
                Some(after) if same_process(process, after) => {}
                _ => note(process.pid, &process.comm, What::Gone),
            }
        }
        for process in &self.now.processes {
            match before.find(process.pid) {
                Some(known) if same_process(known, process) => {}
                _ => note(process.pid, &process.comm, What::Created),
            }
        }
        for &pid in &self.now.gone {
            if before.find(pid).is_none() {
                note(pid, "", What::Created);
            }
        }
        why
    }

    fn acquit(&self, before: &Process, after: &Process) -> Result<Acquittal, Vec<What>> {
        let seen = self.seen(before, after);
        if !seen.is_empty() {
            return Err(seen);
        }
        let mut why = self.doubts();
        if why.is_empty() {
            if not_run(before, after) {
                return Ok(Acquittal::NotRun);
            }
            if self.settings.consistent_cut {
                why = self.cut(before, after);
                if why.is_empty() {
                    return Ok(Acquittal::ConsistentCut);
                }
            } else {
                why.push(What::Ran(used(before, after)));
            }
        }
        if self.settings.compare_memory {
            let against = self.baseline.against(self.marks, self.settings);
            match memory::equal(before, after, &against, self.registers) {
                Ok(()) => return Ok(Acquittal::Equal),
                Err(what) => why.push(what),
            }
        }
        Err(why)
    }

    /// What no rule forgives.
    fn seen(&self, before: &Process, after: &Process) -> Vec<What> {
        let mut whats = Vec::new();
        match self.facts.did.get(&before.pid) {
            None => whats.push(What::NotWatched),
            Some(did) => whats.extend(did.names().into_iter().map(What::Did)),
        }
        let threads = |process: &Process| -> Vec<_> {
            process
                .tasks
                .iter()
                .map(|task| (task.tid, task.start))
                .collect()
        };
        if threads(before) != threads(after) {
            whats.push(What::Threads);
        }
        let pairs = || before.tasks.iter().zip(&after.tasks);
        if pairs().any(|(a, b)| a.children != b.children) {
            whats.push(What::Children);
        }
        if pairs().any(|(a, b)| a.scheduling != b.scheduling) {
            whats.push(What::Attribute("scheduling"));
        }
        let stopped = |state: u8| matches!(state, b'T' | b't' | b'Z' | b'X');
        if pairs().any(|(_, b)| stopped(b.state)) != pairs().any(|(a, _)| stopped(a.state)) {
            whats.push(What::Attribute("state (stopped or dead)"));
        }
        for ((kind, a), (_, b)) in before.attributes.iter().zip(&after.attributes) {
            if a != b {
                whats.push(What::Attribute(kind));
            }
        }
        if before.maps.filled_by_kernel || after.maps.filled_by_kernel {
            whats.push(What::FilledByKernel);
        }
        whats.extend(self.seen_in_table(before, after));
        whats
    }

    fn seen_in_table(&self, before: &Process, after: &Process) -> Option<What> {
        if let Some(descriptor) = before.table.difference(&after.table) {
            return Some(descriptor.into());
        }
        if let Some(descriptor) = after
            .table
            .all
            .iter()
            .find(|one| self.hides(before.pid, one))
        {
            return Some(descriptor.into());
        }
        let deleted = |process: &Process| {
            process.maps.deleted || process.table.all.iter().any(|one| one.deleted)
        };
        if self.facts.orphans_touched && (deleted(before) || deleted(after)) {
            return Some(What::DeletedFile);
        }
        let shares = |process: &Process| process.maps.shares_memory || memfd(process);
        if self.facts.others.contains(Others::SHM) && (shares(before) || shares(after)) {
            return Some(What::SharedMemory);
        }
        None
    }

    /// Whether the queue may hold something else though its numbers are equal.
    fn hides(&self, pid: i32, descriptor: &Descriptor) -> bool {
        match descriptor.kind {
            // Of some sockets only the first message shows. Who of the set sent it is changed
            // itself, but an exec is not looked at.
            Kind::Socket => !descriptor.queue.exact && self.facts.others.contains(Others::SOCK),
            // What is written reaches the other end's queue later, by a worker of the kernel.
            Kind::Terminal => {
                !descriptor.queue.exact || self.baseline.watches.moved(pid, descriptor.fd)
            }
            // Bytes may have been taken out, and as many put in.
            Kind::Pipe | Kind::Fifo => {
                descriptor.readable
                    && descriptor.queue.amounts.iter().any(|&bytes| bytes != 0)
                    && self.baseline.watches.moved(pid, descriptor.fd)
            }
            _ => false,
        }
    }

    /// Why even a process that has not run may have other memory.
    fn doubts(&self) -> Vec<What> {
        if self.facts.memory_reached {
            vec![What::MemoryReached]
        } else {
            Vec::new()
        }
    }

    /// (c): what is in the way of the consistent cut for a process that ran.
    fn cut(&self, before: &Process, after: &Process) -> Vec<What> {
        let mut whats = Vec::new();
        let limit = self
            .settings
            .cpu_limit(self.now.taken - self.baseline.snapshot.taken);
        let used = used(before, after);
        if used > limit {
            whats.push(What::Ran(used));
        }
        if before.maps.writes_file || after.maps.writes_file {
            whats.push(What::SharedFile);
        }
        if self.now.world.has_queues() || self.baseline.snapshot.world.has_queues() {
            whats.push(What::MayHaveRead("SysV semaphores or message queues"));
        }
        if self.connected && after.table.of_kind(Kind::Socket).is_some() {
            whats.push(What::Connected);
        }
        if self.facts.client_bytes != 0 {
            whats.push(What::MayHaveRead("the client"));
        }
        match (before.io, after.io) {
            (Some(a), Some(b)) => {
                if a.written != b.written {
                    whats.push(What::Wrote);
                }
                // Bytes, not calls: a thaw makes an interrupted read() start again (measured), and
                // a call that returned nothing took nothing.
                if a.read != b.read {
                    whats.extend(self.read(after));
                }
            }
            _ => whats.push(What::NoCounters),
        }
        let pipes = after.table.all.iter().filter(|one| {
            one.readable && matches!(one.kind, Kind::Pipe | Kind::Fifo | Kind::Terminal)
        });
        for pipe in pipes {
            if self.baseline.watches.moved(before.pid, pipe.fd) {
                whats.push(What::PipeMoved { fd: pipe.fd });
            }
        }
        whats
    }

    /// It made read calls: from what may it have taken something that somebody meant for it?
    fn read(&self, after: &Process) -> Vec<What> {
        let mut whats = Vec::new();
        // What comes from a socket is marked at its reader, and pipes of the set are watched
        // themselves; each exec has such of its own.
        if self.facts.others.contains(Others::SHM) {
            whats.push(What::MayHaveRead("shared memory"));
        }
        for (kind, what) in [
            (Kind::Terminal, "a terminal"),
            (Kind::Watch, "inotify or fanotify"),
            (Kind::Odd, "a descriptor of an unknown kind"),
        ] {
            if after.table.of_kind(kind).is_some() {
                whats.push(What::MayHaveRead(what));
            }
        }
        whats
    }
}

fn same_process(a: &Process, b: &Process) -> bool {
    let leader = |process: &Process| {
        let task = process.tasks.iter().find(|task| task.tid == process.pid);
        task.map(|task| task.start)
    };
    a.inner_pid == b.inner_pid && leader(a).is_some() && leader(a) == leader(b)
}

/// (a): no thread was given a CPU since the baseline, and none has one now.
fn not_run(before: &Process, after: &Process) -> bool {
    let progress = |process: &Process| -> Vec<Progress> {
        process.tasks.iter().map(|task| task.progress).collect()
    };
    after.stood_still() && progress(before) == progress(after)
}

fn used(before: &Process, after: &Process) -> Duration {
    Duration::from_nanos(after.ran().saturating_sub(before.ran()))
}

fn memfd(process: &Process) -> bool {
    process.table.of_kind(Kind::Odd).is_some()
}

impl From<&Descriptor> for What {
    fn from(descriptor: &Descriptor) -> Self {
        Self::Descriptor {
            fd: descriptor.fd,
            target: descriptor.target.clone(),
        }
    }
}
