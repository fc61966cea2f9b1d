//! Whether the processes are those of the last dump (D6): what the kernel, the shim and /proc say, put
//! together for the judge in [`process`](crate::inspector::process).

use std::{
    collections::HashSet,
    fs, io,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::{inspection::Scene, look::Look};
use crate::{
    inspector::{
        Dirty, Happened, How, Inode, Watch,
        process::{
            self, Acquittal, Baseline, Did, Images, KernelFacts, Others, Reason, Registers, Rest,
            Settings, Settled, Snapshot, Stillness, Verdict, What, no_registers,
        },
    },
    store::Effect,
};

/// How often it is looked whether all tasks have blocked again after a thaw.
const SETTLE_TRIES: u32 = 5;
/// And how long in between.
const SETTLE_PAUSE: Duration = Duration::from_millis(4);
/// So many reasons are told.
const TOLD: usize = 4;
/// So many processes are named that ran and were acquitted nevertheless, of each way.
const NAMED: usize = 16;

/// The processes of the last dump.
pub(super) struct Processes {
    baseline: Baseline,
    /// Host pids of all of them.
    pids: Vec<i32>,
    marks: Vec<Option<Instant>>,
    /// Inodes of all shared memory that one of them has.
    memory: HashSet<u64>,
    /// Those that ran after the thaw until all had blocked again, which counts as the dump's: the
    /// same rule as that of the consistent cut, and named like it.
    settled: Vec<(i32, String)>,
    settings: Settings,
}

/// How each process was acquitted.
type Acquitted = Vec<(i32, String, Acquittal)>;

/// What a look has found that nothing happened in, and by what it is seen that nothing has since.
#[derive(Debug)]
pub(super) struct Rested {
    rest: Rest,
    seen: Seen,
    by: Acquitted,
}

/// What changes with whatever a process does, or has done to it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// CPU time of the cgroup, read before all else: an exec that came and went is in it.
    cpu: u64,
    facts: KernelFacts,
    /// When input last came.
    marks: Vec<Option<Instant>>,
}

/// An earlier look, and how far the threads have come by now. None of them runs.
pub(super) type Since<'a> = Option<(&'a Rested, &'a Stillness)>;

/// What is read of the processes before the kernel side is asked: whatever they did up to then is in its
/// answer.
pub(super) struct Glimpse<'a> {
    /// CPU time of the cgroup, read before all else: an exec that came and went is in it.
    cpu: Option<u64>,
    /// What they are; None where the kernel side's answer may be enough.
    snapshot: Option<Result<Snapshot, String>>,
    since: Since<'a>,
}

impl Processes {
    /// In the freeze, after the dump into `image`.
    pub(super) fn take(
        pids: &[i32],
        scene: &Scene<'_>,
        image: &Path,
        watch: &Watch,
        consistent_cut: bool,
    ) -> Result<Self, String> {
        let registers = |tid| watch.registers(tid);
        Ok(Self {
            baseline: Baseline::take(pids, image, &registers).map_err(|e| e.to_string())?,
            pids: pids.to_vec(),
            marks: scene.marks.clone(),
            memory: memory_of(pids).map_err(|e| e.to_string())?,
            settled: Vec::new(),
            settings: Settings {
                consistent_cut,
                ..Settings::default()
            },
        })
    }

    /// The image has moved.
    pub(super) fn at(mut self, images: Arc<dyn Images>) -> Self {
        self.baseline.set_images(images);
        self
    }

    /// What ran between the thaw and the moment when every task had blocked again belongs to the dump,
    /// if no data moved.
    pub(super) fn settle(&mut self, watch: &Watch, scene: &Scene<'_>) {
        for _ in 0..SETTLE_TRIES {
            match self.try_to_settle(watch, scene) {
                Ok(Settled::NotYet) => thread::sleep(SETTLE_PAUSE),
                Ok(Settled::Yes) => {
                    // Each of them was given a CPU, into the freezer and out of it.
                    let name = |pid: &i32| (*pid, comm(*pid));
                    self.settled = self.pids.iter().map(name).collect();
                    return;
                }
                Ok(Settled::No(why)) => return log::debug!("not settled: {}", tell(&why)),
                Err(e) => return log::debug!("not settled: {e}"),
            }
        }
    }

    fn try_to_settle(&mut self, watch: &Watch, scene: &Scene<'_>) -> Result<Settled, String> {
        let cpu = cpu_ns(scene);
        let now = self.snapshot(scene, &|tid| watch.registers(tid))?;
        let dirty = watch.look().map_err(|e| e.to_string())?;
        let facts = self.facts(watch, &dirty, scene, false)?;
        let marks = || marks_hold(watch, scene);
        let settled = self
            .baseline
            .settle(now, &facts, &marks, &self.settings, cpu);
        Ok(settled)
    }

    /// To be called before the kernel side is asked. `since`: it need not be looked again at what cannot have
    /// changed.
    pub(super) fn glimpse<'a>(&self, scene: &Scene<'_>, since: Since<'a>) -> Glimpse<'a> {
        let cpu = cpu_ns(scene);
        // After an exec it is another one.
        let may_rest = |cpu: u64| since.is_some() || self.baseline.may_be_quick(cpu);
        Glimpse {
            cpu,
            // Registers are read for those alone that cannot be acquitted without: it takes 50 us each.
            snapshot: (!cpu.is_some_and(may_rest)).then(|| self.snapshot(scene, &no_registers)),
            since,
        }
    }

    /// Adds what the processes did to `look`, or how each was acquitted. `dirty` was read after the glimpse.
    /// `orphans`: a file without a name was changed. Returns whether the mounts were looked at, too, and are
    /// those of the dump.
    pub(super) fn look(
        &self,
        (watch, dirty): (&Watch, &Dirty),
        scene: &Scene<'_>,
        glimpse: Glimpse<'_>,
        orphans: bool,
        look: &mut Look,
    ) -> bool {
        let has_snapshot = glimpse.snapshot.is_some();
        let verdict = self.verdict((watch, dirty), scene, glimpse, orphans);
        let verdict = verdict.map(|(verdict, rested)| {
            look.rested = rested.map(Box::new);
            verdict
        });
        match verdict {
            Ok(Verdict::Unchanged { by }) => {
                look.tell(acquitted(&by));
                if !self.settled.is_empty() {
                    look.tell(format!(
                        "settled after the thaw: {}",
                        names(self.settled.iter())
                    ));
                }
                return has_snapshot;
            }
            Ok(Verdict::Changed { why }) => {
                for reason in &why {
                    look.add(effect(&reason.what));
                }
                look.tell(tell(&why));
            }
            Err(e) => {
                look.add(Effect::Memory);
                look.tell(format!("the processes cannot be looked at: {e}"));
            }
        }
        false
    }

    fn verdict(
        &self,
        (watch, dirty): (&Watch, &Dirty),
        scene: &Scene<'_>,
        glimpse: Glimpse<'_>,
        orphans: bool,
    ) -> Result<(Verdict, Option<Rested>), String> {
        let cpu = glimpse.cpu;
        let facts = self.facts(watch, dirty, scene, orphans)?;
        let judged = match (glimpse.snapshot, cpu) {
            (Some(now), _) => self.judge(watch, scene, &now?, facts, &no_registers),
            (None, Some(cpu)) => {
                if self.baseline.quick(cpu, &facts, &self.settings) {
                    return Ok((Verdict::Unchanged { by: Vec::new() }, None));
                }
                let seen = Seen {
                    cpu,
                    facts,
                    marks: scene.marks.clone(),
                };
                if let Some(by) = glimpse.since.and_then(|since| self.still_so(since, &seen)) {
                    return Ok((Verdict::Unchanged { by: by.clone() }, None));
                }
                self.judge_anew(watch, scene, orphans, &no_registers)?
            }
            (None, None) => self.judge_anew(watch, scene, orphans, &no_registers)?,
        };
        let (verdict, rested) = judged;
        let Verdict::Unchanged { by } = &verdict else {
            let registers = |tid| watch.registers(tid);
            let (verdict, _) = self.judge_anew(watch, scene, orphans, &registers)?;
            return Ok((verdict, None));
        };
        let rested = cpu.zip(rested).map(|(cpu, (rest, facts))| Rested {
            rest,
            seen: Seen {
                cpu,
                facts,
                marks: scene.marks.clone(),
            },
            by: by.clone(),
        });
        Ok((verdict, rested))
    }

    /// What an earlier look has found, if nothing has happened since: no task of the cgroup was given a CPU,
    /// the kernel side saw nothing, the client sent nothing, and nothing came through the network.
    ///
    /// What others set meanwhile without waking anybody (a limit, a mount) is found by the next look, as with
    /// [`Baseline::quick`]: the consistent cut's answer, too.
    fn still_so<'a>(
        &self,
        (rested, now): (&'a Rested, &Stillness),
        seen: &Seen,
    ) -> Option<&'a Acquitted> {
        let is_so = self.settings.consistent_cut
            && rested.seen == *seen
            && self.baseline.still_rests(&rested.rest, now);
        is_so.then_some(&rested.by)
    }

    fn judge_anew(
        &self,
        watch: &Watch,
        scene: &Scene<'_>,
        orphans: bool,
        registers: Registers<'_>,
    ) -> Result<(Verdict, Option<(Rest, KernelFacts)>), String> {
        let now = self.snapshot(scene, registers)?;
        // After the snapshot: what was done up to any moment of it is then in the facts.
        let dirty = watch.look().map_err(|e| e.to_string())?;
        if let Some(doubt) = dirty.doubts.first() {
            return Err(doubt.clone());
        }
        let facts = self.facts(watch, &dirty, scene, orphans)?;
        Ok(self.judge(watch, scene, &now, facts, registers))
    }

    fn judge(
        &self,
        watch: &Watch,
        scene: &Scene<'_>,
        now: &Snapshot,
        facts: KernelFacts,
        registers: Registers<'_>,
    ) -> (Verdict, Option<(Rest, KernelFacts)>) {
        let marks = || marks_hold(watch, scene);
        let verdict = (self.baseline).verdict(now, &facts, (registers, &marks), &self.settings);
        let rest = self.baseline.at_rest(now);
        (verdict, rest.map(|rest| (rest, facts)))
    }

    /// An error if one of them may know what is in a file now: it has read since the dump. It holds for
    /// good in a freeze.
    pub(super) fn know_no_files(&self) -> Result<(), String> {
        match self.baseline.reader() {
            Ok(None) => Ok(()),
            Ok(Some((pid, comm))) => {
                Err(format!("{pid} {comm:?} has read something since its dump"))
            }
            Err(e) => Err(e.to_string()),
        }
    }

    fn snapshot(&self, scene: &Scene<'_>, registers: Registers<'_>) -> Result<Snapshot, String> {
        let pids = scene.cgroup.procs().map_err(|e| e.to_string())?;
        (self.baseline.look(&pids, registers)).map_err(|e| e.to_string())
    }

    fn facts(
        &self,
        watch: &Watch,
        dirty: &Dirty,
        scene: &Scene<'_>,
        orphans: bool,
    ) -> Result<KernelFacts, String> {
        let did = watch.did(&self.pids).map_err(|e| e.to_string())?;
        let mut others = Others::default();
        for (what, other) in [
            (Happened::SOCKET, Others::SOCK),
            (Happened::PIPE, Others::PIPE),
            (Happened::MEMORY, Others::MEMORY),
            (Happened::QUEUE, Others::SHM),
        ] {
            if dirty.happened.has(what) {
                others = others.with(other);
            }
        }
        // Those that have it mapped are judged by what they did themselves.
        let theirs = |(inode, how): (&Inode, &How)| {
            how.is_seen()
                && Some(inode.dev) == process::shared_memory()
                && self.memory.contains(&inode.ino)
        };
        if dirty.inodes.iter().any(theirs) {
            others = others.with(Others::SHM);
        }
        Ok(KernelFacts {
            did: did
                .into_iter()
                .map(|(pid, bits)| (pid, Did(bits)))
                .collect(),
            others,
            orphans_touched: orphans,
            memory_reached: dirty.happened.has(Happened::REACH),
            client_bytes: u64::from(scene.marks != self.marks),
        })
    }
}

/// Whether the kernel's marks of written pages are those since the last dump, and nobody has cleared any.
fn marks_hold(watch: &Watch, scene: &Scene<'_>) -> bool {
    let cleared = || watch.marks_cleared().unwrap_or(true);
    (scene.is_marked)() && watch.sees_marks() && !cleared()
}

/// The inodes of the kernel's own tmpfs that these processes have mapped or open.
fn memory_of(pids: &[i32]) -> io::Result<HashSet<u64>> {
    let dev = process::shared_memory().ok_or_else(|| io::Error::other("no shared memory"))?;
    let shown = format!("{:02x}:{:02x}", libc::major(dev), libc::minor(dev));
    let mut found = HashSet::new();
    for pid in pids {
        let maps = fs::read(format!("/proc/{pid}/maps"))?;
        for line in maps.split(|byte| *byte == b'\n') {
            let mut words = line.split(|byte| *byte == b' ').skip(3);
            let mapped = words.next() == Some(shown.as_bytes());
            let ino: Option<u64> = words
                .next()
                .and_then(|word| str::from_utf8(word).ok()?.parse().ok());
            found.extend(ino.filter(|_| mapped));
        }
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            // Without asking a file system that the sandbox itself serves, and that stands still.
            let asked = AtFlags::STATX_DONT_SYNC;
            let its = statx(CWD, entry?.path(), asked, StatxFlags::INO)?;
            if libc::makedev(its.stx_dev_major, its.stx_dev_minor) == dev {
                found.insert(its.stx_ino);
            }
        }
    }
    Ok(found)
}

fn cpu_ns(scene: &Scene<'_>) -> Option<u64> {
    let used = scene.cgroup.cpu_time().ok()?;
    u64::try_from(used.as_nanos()).ok()
}

/// Tasks that came or went are one effect, what became of the others is another.
fn effect(what: &What) -> Effect {
    match what {
        What::Created | What::Gone | What::Threads | What::Children => Effect::Processes,
        _ => Effect::Memory,
    }
}

fn comm(pid: i32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(&name).trim_end().to_owned()
}

/// `7 "bash", 8 "vi" and 3 more`
fn names<'a>(all: impl Iterator<Item = &'a (i32, String)>) -> String {
    let mut all = all.map(|(pid, comm)| format!("{pid} {comm:?}"));
    let named: Vec<_> = all.by_ref().take(NAMED).collect();
    match all.count() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

/// By which of D6's three ways each process was acquitted; none: nothing in the sandbox ran at all.
fn acquitted(by: &[(i32, String, Acquittal)]) -> String {
    if by.is_empty() {
        return "no process ran".into();
    }
    let named = |way: Acquittal, title: &str| {
        let mut all = by.iter().filter(|(.., how)| *how == way);
        let name = |(pid, comm, _): &(i32, String, Acquittal)| format!("{pid} {comm:?}");
        let names: Vec<_> = all.by_ref().take(NAMED).map(name).collect();
        let more = match all.count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (!names.is_empty()).then(|| format!("{title}: {}{more}", names.join(", ")))
    };
    // Who did not run is the rule, and not worth a name.
    let still = by.iter().filter(|(.., how)| *how == Acquittal::NotRun);
    let ways = [
        Some(format!("did not run: {}", still.count())),
        named(Acquittal::ConsistentCut, "ran and moved no data"),
        named(Acquittal::Equal, "equal to the image"),
    ];
    ways.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

fn tell(why: &[Reason]) -> String {
    let mut text: Vec<_> = why.iter().take(TOLD).map(ToString::to_string).collect();
    if why.len() > TOLD {
        text.push(format!("and {} more", why.len() - TOLD));
    }
    text.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_child::TestChild;

    #[test]
    fn the_way_of_each_acquittal_is_told_and_the_text_stays_short() {
        assert_eq!(acquitted(&[]), "no process ran");
        let one = |pid, comm: &str, way| (pid, comm.to_owned(), way);
        let by = [
            one(1, "init", Acquittal::NotRun),
            one(2, "re\ndis", Acquittal::ConsistentCut),
            one(3, "sh", Acquittal::Equal),
        ];
        assert_eq!(
            acquitted(&by),
            "did not run: 1; ran and moved no data: 2 \"re\\ndis\"; equal to the image: 3 \"sh\""
        );
        let many = vec![one(7, "x", Acquittal::Equal); NAMED + 3];
        let text = acquitted(&many);
        assert!(text.ends_with("7 \"x\" and 3 more"), "{text}");
        assert_eq!(text.matches("7 \"x\"").count(), NAMED);
    }

    /// A process in a network of its own, that sleeps.
    fn sleeper() -> (TestChild, Processes, Rested) {
        let mut unshare = std::process::Command::new("unshare");
        unshare.args(["--net", "sleep", "1000"]);
        let sleeper = TestChild::asleep_as(unshare);
        let pid = sleeper.pid();
        let baseline = Baseline::take(&[pid], Path::new("/nowhere"), &no_registers).unwrap();
        let snapshot = Snapshot::take(&[pid], &no_registers).unwrap();
        let rested = Rested {
            rest: baseline.at_rest(&snapshot).unwrap(),
            seen: seen(7, Others::default(), None),
            by: vec![(pid, "sleep".into(), Acquittal::NotRun)],
        };
        let processes = Processes {
            baseline,
            pids: vec![pid],
            marks: Vec::new(),
            memory: HashSet::new(),
            settled: Vec::new(),
            settings: Settings::default(),
        };
        (sleeper, processes, rested)
    }

    fn seen(cpu: u64, others: Others, mark: Option<Instant>) -> Seen {
        Seen {
            cpu,
            facts: KernelFacts {
                others,
                ..KernelFacts::default()
            },
            marks: vec![mark],
        }
    }

    #[test]
    fn a_look_is_made_again_once_anything_has_happened() {
        let (_sleeper, mut processes, rested) = sleeper();
        let now = Stillness::of(&processes.pids).unwrap().unwrap();
        let still_so = |processes: &Processes, seen: &Seen| {
            let found = processes.still_so((&rested, &now), seen);
            found.is_some_and(|by| *by == rested.by)
        };
        assert!(still_so(&processes, &seen(7, Others::default(), None)));
        for other in [
            seen(8, Others::default(), None),
            seen(7, Others::PIPE, None),
            seen(7, Others::default(), Some(Instant::now())),
        ] {
            assert!(!still_so(&processes, &other), "{other:?}");
        }
        processes.settings.consistent_cut = false;
        assert!(!still_so(&processes, &rested.seen));
    }
}
