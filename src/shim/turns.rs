//! The container as the coordinator sees it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use time::OffsetDateTime;

use super::{
    artefacts,
    container::Container,
    error::{Context, Kind, Result, ShimError},
    hooks, prove,
    reaper::Exit,
    restore::Source,
    view,
};
use crate::{
    config::units,
    coordinator::{
        budget::HostBudget,
        cut,
        subject::Subject,
        turns::{Asked, Proof, Settings, Turns},
        view::View,
    },
    inspector::{self, Watch},
    rootfs::Overlay,
    store::{Checkpoint, JournalLine, Retention, SandboxWriter, Store},
};

/// An exec that takes longer is worth a word.
const LONG: Duration = Duration::from_secs(60);
/// How long a start waits for whoever else writes the sandbox's checkpoints.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

impl Subject for Container {
    fn parts(&self) -> std::result::Result<cut::Sandbox<'_>, String> {
        self.cut_parts().map_err(|e| e.to_string())
    }

    fn never_dumped(&self) -> Option<String> {
        self.spec.shared_with_others().map(str::to_owned)
    }

    fn root(&self) -> PathBuf {
        self.rootfs()
    }

    fn overlay(&self) -> std::result::Result<Overlay, String> {
        self.host.overlay(&self.rootfs())
    }

    fn artefacts(&self) -> std::result::Result<BTreeMap<String, Vec<u8>>, String> {
        artefacts::of(self).map_err(|e| format!("cannot read what belongs to the container: {e}"))
    }

    fn scratch(&self) -> PathBuf {
        self.run_dir.path().to_owned()
    }

    fn has_terminal(&self) -> bool {
        self.init.stdio.terminal
    }

    fn watch(&self) -> std::result::Result<Watch, String> {
        let subject = self.to_watch()?;
        let joined = self.early_join.get();
        Watch::begin(
            joined.unwrap_or_else(|| self.host.join_inspector())?,
            &subject,
        )
    }

    fn to_watch(&self) -> std::result::Result<inspector::Subject, String> {
        let place = self.place().map_err(|e| e.to_string())?;
        let cgroup = place.freeze.cgroup().unified_dir();
        Ok(inspector::Subject {
            cgroup: cgroup
                .ok_or("the host has no hierarchy of cgroup v2")?
                .to_owned(),
            rootfs: self.rootfs(),
        })
    }

    fn input_marks(&self) -> Vec<Option<Instant>> {
        let mut marks = vec![self.init.io().and_then(|io| io.input_mark())];
        let leftovers = self.leftovers.lock();
        marks.extend(leftovers.iter().map(|l| l.io.input_mark()));
        marks
    }

    fn frozen_hook(&self) -> std::result::Result<(), String> {
        hooks::run_frozen(self)
    }

    fn has_frozen_hook(&self) -> bool {
        hooks::frozen_exists()
    }

    fn restored_hook(&self) -> std::result::Result<(), String> {
        hooks::run_restored_while_held(self)
    }

    fn show(&self, view: &View) -> std::result::Result<(), String> {
        view::show(&self.run_dir, view).map_err(|e| e.to_string())
    }

    fn prove(&self, checkpoint: &Checkpoint) -> std::result::Result<(), String> {
        prove::prove(self, checkpoint)
    }
}

impl Container {
    /// Where the root file system is mounted.
    pub(super) fn rootfs(&self) -> PathBuf {
        let mounted = self.mounted.clone();
        mounted.unwrap_or_else(|| self.spec.rootfs(&self.bundle))
    }

    /// The right to write its checkpoints, before anything of its start is done; None if it needs none, or runs
    /// unprotected. An armed start is not done without: nobody could take it off, and the next start would go
    /// back again, over all that came since.
    pub(super) fn writer(&self) -> Result<Option<SandboxWriter>> {
        let is_armed = matches!(self.source, Some(Source::Armed { .. }));
        if !is_armed && !self.config.enabled {
            return Ok(None);
        }
        let writer = Store::open(&self.config.store)
            .and_then(|store| store.writer_within(&self.sandbox, LOCK_LIMIT));
        match writer {
            Ok(writer) => Ok(Some(writer)),
            Err(e) if is_armed => Err(ShimError::new(
                Kind::Failed,
                format!(
                    "{}: an armed start needs its checkpoints: {e}",
                    self.sandbox
                ),
            )),
            Err(e) => {
                log::error!("{}: not protected: {e}", self.sandbox);
                Ok(None)
            }
        }
    }

    /// Begins to take turns, if the container has opted in. A sandbox that cannot be protected
    /// runs all the same, and the log says why.
    pub(super) fn protect(self: &Arc<Self>, writer: Option<SandboxWriter>) {
        let Some(store) = writer.filter(|_| self.config.enabled) else {
            return;
        };
        let settings = Settings {
            gate: self.config.gate,
            retention: Retention {
                keep: usize::try_from(self.config.keep).unwrap_or(usize::MAX),
                sandbox_limit: self.config.sandbox_limit,
                store_limit: self.config.store_limit,
            },
            dump_limit: self.config.dump_timeout,
            skip_unchanged: self.config.skip_unchanged,
            consistent_cut: self.config.consistent_cut,
            incremental: self.config.incremental,
            pre_dumps: self.config.pre_dumps,
            view: self.config.view,
            started_from: self.source.as_ref().and_then(Source::turn),
            timer: self.config.timer,
            budget: HostBudget {
                run: self.run_dir.run().to_owned(),
                limits: self.config.engine.limits(),
            },
        };
        let this: Weak<Self> = Arc::downgrade(self);
        // Also of an earlier life with another configuration.
        let marked = store.set_alive(self.recovers()).map_err(|e| e.to_string());
        let started = marked.and_then(|()| {
            Turns::start(this, store, Arc::clone(&self.doors), settings).map_err(|e| e.to_string())
        });
        match started {
            Ok(turns) => {
                // protect() runs once: it is called by Start, which is alone.
                let _ = self.turns.set(turns);
            }
            Err(e) => log::error!("{}: not protected: {e}", self.sandbox),
        }
    }

    /// An armed restore has been done: the next start boots again.
    pub(super) fn disarm(&self, writer: Option<&SandboxWriter>) {
        if let (Some(Source::Armed { laid, .. }), Some(writer)) = (&self.source, writer) {
            if let Err(e) = laid.remove() {
                log::warn!(
                    "{}: what was laid out for the restore stays: {e}",
                    self.sandbox
                );
            }
            if let Err(e) = writer.disarm() {
                log::error!("{}: stays armed: {e}", self.sandbox);
            }
        }
    }

    /// If it has ended as it should, its next start boots. Before anybody is told of its end: they may
    /// start it again.
    pub(super) fn note_end(&self, exit: Exit) {
        if !self.recovers() || !self.inner.lock().is_clean(exit) {
            return;
        }
        let store = Store::open(&self.config.store).map(|store| store.sandbox(&self.sandbox));
        if let Err(e) = store.and_then(|store| store.set_alive(false)) {
            log::error!("{}: its next start will restore it: {e}", self.sandbox);
        }
    }

    fn turns(&self) -> Result<&Turns> {
        let turns = self.turns.get();
        turns.map(|turns| &**turns).ok_or_else(|| {
            let text = format!(
                "{}: {}",
                self.sandbox,
                self.why_unprotected().unwrap_or_default()
            );
            ShimError::new(Kind::FailedPrecondition, text)
        })
    }

    /// Takes a checkpoint now, as a turn of its own.
    pub(super) fn checkpoint_now(&self, asked: Asked) -> Result<(JournalLine, Proof)> {
        self.turns()?
            .checkpoint(asked)
            .context(format_args!("{}: checkpoint", self.sandbox))
    }

    /// Ends the turn under way, as the end of its last exec would.
    pub(super) fn end_turn(&self) -> Result<JournalLine> {
        self.turns()?
            .boundary_now()
            .context(format_args!("{}: turn", self.sandbox))
    }

    /// What of a protected sandbox no checkpoint holds, and when it will: the work of an exec that takes
    /// long.
    pub(super) fn exposed_work(&self) -> Option<String> {
        self.turns.get()?;
        let (execs, begin) = self.doors.turn_under_way()?;
        let lasts = (OffsetDateTime::now_utc() - begin).unsigned_abs();
        (lasts >= LONG).then(|| {
            let until = match self.config.timer {
                Some(timer) => format!(
                    "the timer keeps its files every {}",
                    units::show_duration(timer)
                ),
                None => "nothing of it is kept before it ends (timer is off)".into(),
            };
            format!(
                "exec {} has run for {} min: {until}",
                execs.join(", "),
                lasts.as_secs() / 60
            )
        })
    }

    /// Why no turns are taken; None if they are.
    pub(super) fn why_unprotected(&self) -> Option<String> {
        match (self.turns.get(), self.config.enabled) {
            (Some(_), _) => None,
            (None, false) => Some(
                "not opted in: set enabled = true in crab's configuration, or the annotation \
                 dev.crab.enabled=true on the container"
                    .into(),
            ),
            (None, true) => Some("not started yet, or the store is out of order".into()),
        }
    }

    /// Takes no more turns.
    pub(super) fn stop_turns(&self) {
        if let Some(turns) = self.turns.get() {
            turns.stop();
        }
        // If it was never started.
        drop(self.early_join.get());
    }
}
