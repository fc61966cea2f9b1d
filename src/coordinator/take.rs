//! Taking one checkpoint: of everything, or of files beside the image that there is.
//!
//! If the look says that files alone have changed, and none that a process stands upon, no process is
//! dumped: the checkpoint has the image of an earlier one, which is what the processes still are (D7a). It
//! is looked once more while nothing runs; if it is otherwise then, everything is taken.

use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use time::OffsetDateTime;

use super::{
    budget::{Budget, Spending},
    doors::Doors,
    inspection::{Inspection, Look, Still, Taken},
    references::References,
    stand_still::stand_still,
    stored_images::StoredImages,
    turns::{ShutGate, Subject, Worker, differing, micros, scene, text},
};
use crate::{
    config::Gate,
    engine::Work,
    rootfs::{self, CaptureStats, LayerChanges, Prestaged, layer::Comparison},
    runtime::{self, criu_conf::CriuConf, descriptors::Stream},
    sandbox::TurnNo,
    store::{
        self, Action, Checkpoint, Facts, Files, Host, Images, JournalLine, Kind, Pending, Staging,
        StdioPipe, Trigger,
    },
    tree::remove_tree,
};

/// What is to be taken.
pub(super) struct Order {
    pub(super) turn: TurnNo,
    /// The newest checkpoint.
    pub(super) parent: Option<TurnNo>,
    /// Files beside the image that there is.
    pub(super) only_files: bool,
    /// A large file may have changed.
    pub(super) large: bool,
}

/// What became of a try to do without a dump.
enum Tried {
    Done(Box<(Checkpoint, Staging)>),
    /// A dump is needed.
    Not(Look),
}

impl Worker {
    /// Takes the cut and makes it durable, within the host's budget.
    pub(super) fn take(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
    ) -> Result<(Checkpoint, Staging), String> {
        let join = |worker: &Self| {
            let name = worker.store.id().to_string();
            Budget::join(&worker.settings.budget, &name, &worker.doors)
        };
        let mut budget = self.budget.take().unwrap_or_else(|| join(self));
        let taken = self.take_with(subject, order, gate, line, &mut budget);
        self.budget = Some(budget);
        taken
    }

    fn take_with(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
        budget: &mut Budget,
    ) -> Result<(Checkpoint, Staging), String> {
        let urgent = line.trigger == Trigger::Manual;
        if order.only_files {
            let mut spending = budget.ask(Work::Files, urgent)?;
            let tried = self.take_files(subject, order, gate, line, &mut spending);
            match tried {
                Ok(Tried::Done(taken)) => {
                    remark(line, spending.note());
                    spending.durable(taken.0.stored);
                    return Ok(*taken);
                }
                Ok(Tried::Not(look)) => {
                    spending.failed();
                    line.effects = look.effects;
                    line.note = look.note;
                }
                Err(e) => {
                    spending.failed();
                    return Err(e);
                }
            }
        }
        let mut spending = budget.ask(Work::Dump, urgent)?;
        let taken = self.take_all(subject, order, gate, line, &mut spending);
        remark(line, spending.note());
        match &taken {
            Ok((checkpoint, _)) => spending.durable(checkpoint.stored),
            Err(_) => spending.failed(),
        }
        taken
    }

    /// Processes and files.
    fn take_all(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
        spending: &mut Spending<'_>,
    ) -> Result<(Checkpoint, Staging), String> {
        let overlay = subject.overlay()?;
        let pending = self.store.begin(order.turn).map_err(text)?;
        let args = dump_args(subject, &pending, self.settings.dump_limit)?;
        let base = self.base(order)?;
        let dying = || self.doors.is_dying();
        let mut inspection = self.inspection.as_mut();
        if let Some(inspection) = &mut inspection {
            inspection.prepare();
        }
        let mut prestaged = match &inspection {
            Some(inspection) if order.large => {
                prestage(subject, &self.doors, inspection, &pending)?
            }
            _ => Prestaged::default(),
        };
        let (mut seen, mut artefacts) = (None, BTreeMap::new());
        let done = subject.parts()?.cut(&args, || {
            // Before the copy is made: whoever is outside of the sandbox is not frozen, and what
            // he changes meanwhile must not be known without being in the copy.
            if let Some(inspection) = &mut inspection {
                seen = scene(subject, &self.doors, |scene| {
                    inspection.frozen(scene, pending.image_dir())
                })?;
                inspection.distrust(&mut prestaged);
            }
            let changes = seen.as_ref().and_then(Taken::changes);
            let changes = changes.filter(|_| base.is_some());
            let upper = &overlay.upperdir;
            let captured = capture(upper, pending.upper_dir(), changes, &mut prestaged, &dying)?;
            artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(captured)
        });
        let done = done.map_err(text)?;
        drop(prestaged);
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        let captured = &done.captured;
        spending.captured(Some(pending.image_dir()), captured.stats.bytes, done.frozen);
        let changes = seen.as_ref().and_then(Taken::changes);
        line.changed_files = changes.map_or(captured.stats.entries(), |its| its.len() as u64);
        let references = seen.as_ref().and_then(Taken::references);
        let facts = Facts {
            parent: order.parent,
            created_at: OffsetDateTime::now_utc(),
            kind: Kind::Full,
            processes: done.processes as u64,
            processes_of: None,
            references: references.map(References::named).unwrap_or_default(),
            host: Host::detect(),
            pipes: done.streams.iter().map(pipe).collect(),
            runtime: serde_json::json!({ "terminal": subject.has_terminal() }),
            notes: Vec::new(),
        };
        keep(&pending, &artefacts)?;
        let files = files(base.as_ref(), captured);
        let (checkpoint, staging) = pending.commit(facts, Images::Staged, files).map_err(text)?;
        self.artefacts = Some(artefacts);
        if let Some(inspection) = inspection {
            let images = Arc::new(StoredImages(checkpoint.clone()));
            inspection.durable(order.turn, seen, images);
        }
        line.action = Action::Full;
        let image = &checkpoint.manifest.contents.image;
        let image: u64 = image.iter().map(|file| file.data).sum();
        line.bytes_captured = image.saturating_add(done.captured.stats.bytes);
        // The checkpoint exists from here on: nothing may make its turn count as unprotected.
        if let Err(e) = fs::remove_dir_all(&args.work_path) {
            log::warn!("{}: cannot remove CRIU's work: {e}", self.store.id());
        }
        Ok((checkpoint, staging))
    }

    /// The checkpoint that what is known is about: changes can be held against it.
    fn base(&self, order: &Order) -> Result<Option<Checkpoint>, String> {
        match (&self.inspection, order.parent) {
            (Some(inspection), Some(parent)) if inspection.is_about(parent) => {
                self.store.get(parent).map(Some).map_err(text)
            }
            _ => Ok(None),
        }
    }

    /// Files, beside the image of the newest checkpoint.
    fn take_files(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
        spending: &mut Spending<'_>,
    ) -> Result<Tried, String> {
        let (Some(parent), Some(inspection)) = (order.parent, &mut self.inspection) else {
            return Ok(Tried::Not(Look::everything("nothing to compare with")));
        };
        let Some(dumped_in) = inspection.dumped_in() else {
            return Ok(Tried::Not(Look::everything("no dump to compare with")));
        };
        let overlay = subject.overlay()?;
        let before = self.store.get(parent).map_err(text)?;
        let pending = self.store.begin(order.turn).map_err(text)?;
        inspection.prepare();
        let doors = &self.doors;
        let mut prestaged = match order.large {
            true => prestage(subject, doors, inspection, &pending)?,
            false => Prestaged::default(),
        };
        let mut artefacts = BTreeMap::new();
        let mut take = || -> Result<Result<(Still, Captured), Look>, String> {
            // Of a try in which somebody ran.
            remove_tree(pending.upper_dir()).map_err(text)?;
            let seen = scene(subject, doors, |scene| {
                inspection.still(scene, Some(parent))
            })?;
            let still = match seen {
                Ok(still) => still,
                Err(look) => return Ok(Err(look)),
            };
            inspection.distrust(&mut prestaged);
            let dying = || doors.is_dying();
            let changes = Some(&still.comparison);
            let upper = &overlay.upperdir;
            let captured = capture(upper, pending.upper_dir(), changes, &mut prestaged, &dying)?;
            artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(Ok((still, captured)))
        };
        let must_freeze = subject.has_frozen_hook();
        let limit = self.settings.dump_limit;
        let parts = subject.parts()?;
        let done = stand_still(&parts.freeze, parts.doors, limit, must_freeze, &mut take);
        let done = done.map_err(text)?;
        let (mut still, captured) = match done.captured {
            Ok(taken) => taken,
            Err(look) => return Ok(Tried::Not(look)),
        };
        drop(prestaged);
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        spending.captured(None, captured.stats.bytes, done.frozen);
        line.changed_files = still.comparison.len() as u64;
        if let Some(then) = &self.artefacts
            && *then != artefacts
        {
            still.look.also_beside(differing(then, &artefacts));
        }
        line.note = still.look.note.take();
        let facts = Facts {
            parent: Some(parent),
            created_at: OffsetDateTime::now_utc(),
            processes_of: Some(dumped_in),
            references: inspection.recorded(&before)?,
            host: Host::detect(),
            ..before.manifest.facts.clone()
        };
        keep(&pending, &artefacts)?;
        let (checkpoint, staging) = pending
            .commit(
                facts,
                Images::Same(&before),
                files(Some(&before), &captured),
            )
            .map_err(text)?;
        self.artefacts = Some(artefacts);
        let images = Arc::new(StoredImages(checkpoint.clone()));
        inspection.files_durable(order.turn, still, images);
        line.action = Action::Files;
        line.bytes_captured = captured.stats.bytes;
        Ok(Tried::Done(Box::new((checkpoint, staging))))
    }
}

/// Adds something to what the journal says.
fn remark(line: &mut JournalLine, said: Option<String>) {
    line.note = match (line.note.take(), said) {
        (Some(note), Some(said)) => Some(format!("{note}; {said}")),
        (note, said) => note.or(said),
    };
}

/// How a turn's processes are dumped.
fn dump_args(
    subject: &dyn Subject,
    pending: &Pending,
    limit: Duration,
) -> Result<runtime::Checkpoint, String> {
    let scratch = subject.scratch();
    // Not the client's: both may be about to dump.
    let work = scratch.join("criu-turn-work");
    fs::create_dir_all(&work).map_err(|e| format!("{work:?}: {e}"))?;
    let home = CriuConf::for_dump(false)
        .write(&scratch.join("criu-turn"))
        .map_err(|e| format!("{scratch:?}: {e}"))?;
    Ok(runtime::Checkpoint {
        image_path: pending.image_dir().to_owned(),
        work_path: work,
        leave_running: true,
        // Kept in the image; whether they are closed is decided at the restore.
        tcp_established: true,
        file_locks: true,
        shell_job: subject.has_terminal(),
        home: Some(home),
        limit,
        ..Default::default()
    })
}

/// Copies what is large before anything stands still.
fn prestage(
    subject: &dyn Subject,
    doors: &Doors,
    inspection: &Inspection,
    pending: &Pending,
) -> Result<Prestaged, String> {
    scene(subject, doors, |scene| {
        inspection.prestage(scene, pending.upper_dir())
    })
}

/// What was copied of a writable layer.
struct Captured {
    /// All of it, or (Some) what makes it out of that of the checkpoint before.
    changes: Option<store::LayerChanges>,
    stats: CaptureStats,
}

/// Copies a writable layer: what differs, if that is known, or all of it.
fn capture(
    upper: &Path,
    dest: &Path,
    comparison: Option<&Comparison>,
    prestaged: &mut Prestaged,
    stop: &dyn Fn() -> bool,
) -> Result<Captured, String> {
    let Some(comparison) = comparison else {
        let stats = rootfs::capture_with(upper, dest, prestaged, stop).map_err(text)?;
        return Ok(Captured {
            changes: None,
            stats,
        });
    };
    let (changes, stats) =
        rootfs::capture_changes(upper, dest, comparison, prestaged, stop).map_err(text)?;
    let LayerChanges { removed, staged } = changes;
    Ok(Captured {
        changes: Some(store::LayerChanges { removed, staged }),
        stats,
    })
}

/// The same for the store.
fn files<'a>(base: Option<&'a Checkpoint>, captured: &'a Captured) -> Files<'a> {
    match (base, &captured.changes) {
        (Some(base), Some(changes)) => Files::Delta { base, changes },
        _ => Files::Whole,
    }
}

/// Adds what is kept of the host's files.
fn keep(pending: &Pending, artefacts: &BTreeMap<String, Vec<u8>>) -> Result<(), String> {
    for (name, bytes) in artefacts {
        let kept = pending.bundle_dir().join(name);
        fs::write(&kept, bytes).map_err(|e| format!("cannot write {kept:?}: {e}"))?;
    }
    Ok(())
}

fn pipe(stream: &Stream) -> StdioPipe {
    StdioPipe {
        exec_id: Some(stream.exec_id.clone()).filter(|id| !id.is_empty()),
        fd: stream.fd.into(),
        inode: stream.inode,
        target: stream.target.clone(),
        pending: Vec::new(),
    }
}
