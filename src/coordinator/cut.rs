//! One consistent cut: latch, start CRIU, freeze, let it dump, look whether it held, capture, thaw (D7).

use std::{
    cell::Cell,
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::Arc,
    thread::{self, Scope},
    time::{Duration, Instant},
};

use super::{
    doors::Doors,
    early::{Early, Runner, Started},
    freeze::{Freeze, FreezeError, Held},
    poison::{self, Reasons, Snapshot, Verdict},
    unrest::{Stat, Unrest, is_dying, is_stopped},
};
use crate::{
    packet_lock::PacketLock,
    runtime::{
        self, OciRuntime, RuntimeError,
        criu_conf::CriuConf,
        descriptors::{self, Stream},
    },
};

pub use super::cut_error::CutError;

/// How long a cut waits for execs that are half-way through the door.
pub(super) const LATCH_LIMIT: Duration = Duration::from_secs(30);
/// A vforked child needs a few hundred microseconds to its exec, and the threads of a process that
/// ends a little longer to theirs.
const UNREST_PAUSE: Duration = Duration::from_millis(3);
const UNREST_TRIES: u32 = 100;
/// How long a server that has time is given to accept a connection, and data to arrive.
const ACCEPT_PAUSE: Duration = Duration::from_millis(5);
const ACCEPT_TRIES: u32 = 20;
/// The same for the rest of a connection that was closed: what looks like it may be another container's.
const CLOSED_TRIES: u32 = 4;
/// After so many hundredths of its limit CRIU may be hanging because somebody on the host has frozen the
/// sandbox under its hands. A thaw helps then; to be killed costs the process that CRIU works in its life.
const LAST_CHANCE: u32 = 90;

/// What a cut must know of the sandbox's processes.
pub trait Scene: Send + Sync {
    /// Host pid of init.
    fn init_pid(&self) -> i32;
    /// Moves the frozen processes' output into the shim: it was written before the cut.
    fn drain(&self);
    /// The pipes between the processes and the shim.
    fn streams(&self) -> Result<Vec<Stream>, String>;
    /// The directories of its overlay, the writable one first; none if it has no overlay.
    fn layers(&self) -> Vec<PathBuf>;
    /// Its network namespace, which a restore finds, too; or why there is none.
    fn network(&self) -> Result<PathBuf, String>;
}

/// The parts of a sandbox that take part in a cut.
pub struct Sandbox<'a> {
    /// The container's id for the runtime.
    pub id: &'a str,
    /// Who dumps.
    pub runtime: &'a dyn OciRuntime,
    /// Who freezes.
    pub freeze: Arc<Freeze>,
    /// Who keeps execs out.
    pub doors: &'a Arc<Doors>,
    /// Its processes.
    pub scene: &'a dyn Scene,
}

/// What a cut found and took.
#[derive(Debug)]
pub struct Done<T> {
    /// From the freeze to the thaw.
    pub frozen: Duration,
    /// How many processes are in the dump.
    pub processes: usize,
    /// Which of the sandbox's dumps it is.
    pub number: u64,
    /// The pipes that are in the dump.
    pub streams: Vec<Stream>,
    /// What the caller took while all stood still.
    pub captured: T,
}

/// A sandbox that stands still.
struct Moment {
    held: Held,
    begin: Instant,
    procs: BTreeSet<i32>,
    snapshot: Snapshot,
}

impl Sandbox<'_> {
    /// Dumps all processes into `args.image_path` and calls `capture` while they stand still. `upon`: which
    /// of the sandbox's dumps this one builds upon; there must have been none in between.
    ///
    /// The sandbox is thawed and its doors are open again when this returns, unless the client
    /// has paused it. After an error nothing in the image directory is worth keeping.
    pub fn cut<T>(
        &self,
        args: &runtime::Checkpoint,
        upon: Option<u64>,
        capture: impl FnOnce() -> Result<T, String>,
    ) -> Result<Done<T>, CutError> {
        let alone = self
            .doors
            .cut_alone(args.limit + LATCH_LIMIT)
            .ok_or(CutError::Busy)?;
        let number = alone.begin_dump(upon)?;
        let _latched = self.doors.latch(LATCH_LIMIT).ok_or(CutError::Latch)?;
        let stopped = self.stopped()?;
        if !stopped.is_empty() {
            return Err(CutError::Stopped(stopped));
        }
        let early = self.early(args).map_err(|e| CutError::home(args, &e))?;
        thread::scope(|scope| {
            let criu = match &early {
                Some(early) => self.start(scope, early, args, None)?,
                None => None,
            };
            let done = self.cut_frozen(scope, args, early.as_ref(), criu, capture)?;
            Ok(Done { number, ..done })
        })
    }

    /// The part of a cut from the freeze on. `criu` waits to dump, if it could be started early.
    fn cut_frozen<'scope, T>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        args: &'scope runtime::Checkpoint,
        early: Option<&Early>,
        criu: Option<Runner<'scope>>,
        capture: impl FnOnce() -> Result<T, String>,
    ) -> Result<Done<T>, CutError> {
        let Moment {
            held,
            begin,
            procs: before,
            snapshot,
        } = self.hold_at_a_good_moment()?;
        match poison::judge(&snapshot) {
            Verdict::Fine => {}
            verdict => return Err(CutError::Poison(verdict)),
        }
        self.scene.drain();
        let streams = self.scene.streams().map_err(CutError::Capture)?;
        let criu = self.renew(scope, args, early, criu, &snapshot)?;
        let locked = self.hold_packets(args, &snapshot)?;
        let lent = held.lend();
        let dumped = match criu {
            Some(criu) => criu.go(),
            None => self.run_criu(args),
        };
        drop(lent);
        dumped.map_err(|source| CutError::dump(args, Some(&snapshot), source))?;
        if args.leave_running {
            self.check_stillness(&before)?;
        }
        descriptors::save(&args.image_path, &streams, snapshot.has_outside_tcp())?;
        let captured = capture().map_err(CutError::Capture)?;
        // With --exit it is meant to die.
        if args.leave_running && self.freeze.is_dying() {
            return Err(FreezeError::Dying.into());
        }
        // Until here nothing arrives: what the caller sees is what has been dumped.
        drop(locked);
        drop(held);
        Ok(Done {
            frozen: begin.elapsed(),
            processes: before.len(),
            number: 0,
            streams,
            captured,
        })
    }

    /// In the freeze: what the sandbox's connections are about to carry waits until they are dumped.
    fn hold_packets(
        &self,
        args: &runtime::Checkpoint,
        snapshot: &Snapshot,
    ) -> Result<Option<PacketLock>, CutError> {
        if !args.tcp_established || !snapshot.has_data_under_way() {
            return Ok(None);
        }
        let locked = self.scene.network().and_then(|path| PacketLock::of(&path));
        locked.map(Some).map_err(|why| {
            CutError::Poison(Verdict::FilesOnly(Reasons::new(format!(
                "data is under way in TCP connections between its processes and cannot be held back, since \
                 {why}, so that CRIU could not dump both ends as they are at one moment"
            ))))
        })
    }

    /// Whether [`Self::hold_packets`] would have to and cannot.
    fn cannot_hold_packets(&self, snapshot: &Snapshot) -> bool {
        snapshot.has_data_under_way()
            && (self.scene.network().is_err() || PacketLock::prepare().is_err())
    }

    /// Processes on which CRIU would hang.
    pub(super) fn stopped(&self) -> Result<Vec<i32>, CutError> {
        let cgroup = self.freeze.cgroup();
        if !cgroup.hangs_on_stopped() {
            return Ok(Vec::new());
        }
        let mut stopped = cgroup.procs()?;
        stopped.retain(|pid| is_stopped(*pid));
        Ok(stopped)
    }

    /// How CRIU is started before the freeze; None if it cannot be.
    fn early(&self, args: &runtime::Checkpoint) -> io::Result<Option<Early>> {
        let procs = self.freeze.cgroup().procs().unwrap_or_default();
        let procs: BTreeSet<i32> = procs.into_iter().collect();
        let init = self.scene.init_pid();
        // They run, and may come and go: what counts is what is found in the freeze.
        let Ok(snapshot) = Snapshot::read(&procs, init) else {
            return Ok(None);
        };
        if snapshot.has_data_under_way() {
            // What is done once is done before the freeze.
            let _ = PacketLock::prepare();
        }
        let is_fine = matches!(poison::judge(&snapshot), Verdict::Fine);
        match is_fine && strangers(&procs, init).is_empty() {
            true => Early::of(args, snapshot.watched_paths(|| self.scene.layers())),
            false => Ok(None),
        }
    }

    /// Starts CRIU, which waits; None if it does not.
    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        early: &Early,
        args: &'scope runtime::Checkpoint,
        snapshot: Option<&Snapshot>,
    ) -> Result<Option<Runner<'scope>>, CutError> {
        let started = early.start(scope, || self.run_criu(args));
        match started.map_err(|e| CutError::home(args, &e))? {
            Started::Waits(criu) => Ok(Some(criu)),
            Started::NotEarly => Ok(None),
            Started::Failed(source) => Err(CutError::dump(args, snapshot, source)),
        }
    }

    /// In the freeze: CRIU, told where the watched files are. It reads that when it starts.
    fn renew<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        args: &'scope runtime::Checkpoint,
        early: Option<&Early>,
        criu: Option<Runner<'scope>>,
        snapshot: &Snapshot,
    ) -> Result<Option<Runner<'scope>>, CutError> {
        let watched = snapshot.watched_paths(|| self.scene.layers());
        let told = early.map(|its| &*its.watched).unwrap_or_default();
        if watched == told {
            return Ok(criu);
        }
        if let Some(home) = &args.home {
            CriuConf::add_watched(home, &watched).map_err(|e| CutError::home(args, &e))?;
        }
        match (early, criu) {
            (Some(early), Some(criu)) => {
                criu.give_up();
                self.start(scope, early, args, Some(snapshot))
            }
            _ => Ok(None),
        }
    }

    /// Freezes at a moment when no connection waits to be accepted or for what a closed end has still to
    /// send, as far as there is one, and lists the processes.
    fn hold_at_a_good_moment(&self) -> Result<Moment, CutError> {
        let mut tries = 0;
        loop {
            let begin = Instant::now();
            let held = self.hold_at_rest()?;
            let procs: BTreeSet<i32> = self.freeze.cgroup().procs()?.into_iter().collect();
            let strangers = strangers(&procs, self.scene.init_pid());
            if !strangers.is_empty() {
                return Err(CutError::LiveExecs {
                    execs: self.doors.inside(),
                    pids: strangers,
                });
            }
            let snapshot = Snapshot::read(&procs, self.scene.init_pid())?;
            if tries >= self.worthwhile_tries(&snapshot) {
                return Ok(Moment {
                    held,
                    begin,
                    procs,
                    snapshot,
                });
            }
            tries += 1;
            drop(held);
            thread::sleep(ACCEPT_PAUSE);
        }
    }

    /// How often another moment is worth trying for.
    fn worthwhile_tries(&self, snapshot: &Snapshot) -> u32 {
        if snapshot.has_waiting_connection() || self.cannot_hold_packets(snapshot) {
            ACCEPT_TRIES
        } else if snapshot.has_lone_end() {
            CLOSED_TRIES
        } else {
            0
        }
    }

    /// Freezes at a moment when no process is in a passing state that CRIU cannot dump. Whoever is
    /// gets a moment to pass.
    fn hold_at_rest(&self) -> Result<Held, CutError> {
        let mut tries = 0;
        loop {
            let held = self.freeze.hold()?;
            let procs = self.freeze.cgroup().procs()?;
            let stops = self.freeze.cgroup().hangs_on_stopped();
            let unrest = procs
                .iter()
                .find_map(|pid| Some((*pid, Unrest::of(*pid, stops)?)));
            let (pid, state) = match unrest {
                None => return Ok(held),
                Some((pid, Unrest::Stopped)) => return Err(CutError::Stopped(vec![pid])),
                Some((pid, Unrest::Passing(state))) => (pid, state),
            };
            tries += 1;
            if tries == UNREST_TRIES {
                return Err(CutError::Unrest { pid, state });
            }
            drop(held);
            thread::sleep(UNREST_PAUSE);
        }
    }

    pub(super) fn run_criu(&self, args: &runtime::Checkpoint) -> Result<(), RuntimeError> {
        // CRIU and an init that dies under its hands wait for each other. With --exit it is CRIU
        // that kills.
        let init = self.scene.init_pid();
        let last_chance = Instant::now() + args.limit * LAST_CHANCE / 100;
        let thawed = Cell::new(false);
        let stop = || {
            if args.leave_running && Instant::now() >= last_chance && !thawed.replace(true) {
                log::warn!("{}: CRIU does not end: the sandbox is thawed", self.id);
                if let Err(e) = self.freeze.cgroup().thaw() {
                    log::warn!("{}: {e}", self.id);
                }
            }
            args.leave_running && (self.freeze.is_dying() || is_dying(init))
        };
        self.runtime.checkpoint(self.id, args, &stop)
    }

    /// CRIU thaws a v1 cgroup while it works. What then came or went is not in the images.
    fn check_stillness(&self, before: &BTreeSet<i32>) -> Result<(), CutError> {
        let after: BTreeSet<i32> = self.freeze.cgroup().procs()?.into_iter().collect();
        if &after != before {
            let changed: Vec<&i32> = after.symmetric_difference(before).collect();
            return Err(CutError::Disturbed(format!(
                "processes came or went: {changed:?}"
            )));
        }
        if !self.freeze.cgroup().is_frozen()? {
            return Err(CutError::Disturbed("it was thawed".into()));
        }
        Ok(())
    }
}

/// Processes that are neither init nor its descendants: those whose parent is outside.
pub(super) fn strangers(procs: &BTreeSet<i32>, init: i32) -> Vec<i32> {
    procs
        .iter()
        .copied()
        .filter(|pid| *pid != init && !Stat::of(*pid).is_some_and(|s| procs.contains(&s.parent)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_whose_parent_is_outside_is_a_stranger() {
        let me = std::process::id() as i32;
        let init = Stat::of(me).unwrap().parent;
        // With the parent inside I am one of them.
        assert!(strangers(&BTreeSet::from([init, me]), init).is_empty());
        assert_eq!(strangers(&BTreeSet::from([me]), init), [me]);
        assert!(strangers(&BTreeSet::from([me]), me).is_empty());
    }
}
