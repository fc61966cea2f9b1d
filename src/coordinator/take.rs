//! Taking one checkpoint: of everything, of files beside the image that there is, or of files
//! [without processes](super::without_processes).
//!
//! If the look says that files alone have changed, and none that a process stands upon, no process is
//! dumped: the checkpoint has the image of an earlier one, which is what the processes still are (D7a). It
//! is looked once more while nothing runs; if it is otherwise then, everything is taken.

use std::{borrow::Cow, collections::BTreeMap, fs, sync::Arc, time::Duration};

use time::OffsetDateTime;

use super::{
    budget::{Budget, Spending, bytes_in},
    chain::{self, Link},
    cut::{self, CutError},
    files::{add_artefacts, capture, distrust, read_ahead},
    known::{Still, Taken as Found},
    look::Look,
    references::References,
    stand_still::stand_still,
    stored_images::StoredImages,
    subject::{Subject, scene},
    turns::{Asked, ShutGate},
    without_processes::Rest,
    worker::{Worker, differing, micros, text},
};
use crate::{
    config::Gate,
    engine::{self, Reason},
    inspector::process::Stillness,
    rootfs::Overlay,
    runtime::{self, criu_conf::CriuConf, descriptors::Stream},
    sandbox::TurnNo,
    store::{
        Action, Captured, Checkpoint, Facts, Files, Host, Images, JournalLine, Kind, Pending,
        Staging, StdioPipe, StoreError, Trigger,
    },
};

/// What is to be taken.
pub(super) struct Order {
    pub(super) turn: TurnNo,
    /// The newest checkpoint.
    pub(super) parent: Option<Checkpoint>,
    /// The writable layer, or why there is none that crab can capture.
    pub(super) overlay: Result<Overlay, String>,
    /// What there is a checkpoint for.
    pub(super) reason: Reason,
    /// A large file may have changed.
    pub(super) large: bool,
    /// What if the processes cannot be kept.
    pub(super) without_processes: WithoutProcesses,
}

impl Order {
    /// The turn of the newest checkpoint.
    pub(super) fn parent(&self) -> Option<TurnNo> {
        self.parent.as_ref().map(Checkpoint::turn)
    }

    pub(super) fn overlay(&self) -> Result<&Overlay, String> {
        self.overlay.as_ref().map_err(Clone::clone)
    }
}

/// Whether a checkpoint may lack the processes, if they cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WithoutProcesses {
    No,
    Yes,
    /// Yes, unless the checkpoint before lacks them, too, and holds these very files.
    IfFilesChanged,
}

impl WithoutProcesses {
    /// What is wanted by whoever `asked`, or else after a turn.
    pub(super) fn of(asked: Option<&Asked>) -> Self {
        match asked {
            None => Self::IfFilesChanged,
            Some(asked) if asked.or_files => Self::Yes,
            Some(_) => Self::No,
        }
    }
}

/// What was taken.
pub(super) enum Taken {
    Checkpoint(Box<(Checkpoint, Staging)>),
    /// The checkpoint before holds all that can be kept.
    Nothing,
}

/// What became of a try to do without a dump.
enum Tried {
    Done(Box<(Checkpoint, Staging)>),
    /// A dump is needed.
    Not(Look),
}

/// A dump, and the files of its moment.
struct Dumped {
    done: cut::Done<Captured>,
    /// What the inspector found.
    seen: Option<Found>,
    artefacts: BTreeMap<String, Vec<u8>>,
}

impl Worker {
    /// Takes the cut and makes it durable, within the host's budget.
    pub(super) fn take(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
    ) -> Result<Taken, String> {
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
    ) -> Result<Taken, String> {
        let urgent = line.trigger == Trigger::Manual;
        let (memory, fixed) = (self.memory(subject), self.settings.pre_dumps);
        let mut plan = budget.plan(order.reason, memory, fixed);
        line.plan = Some(plan.to_string());
        if plan.action == engine::Action::Files {
            let mut spending = budget.ask(&plan, urgent)?;
            match self.take_files(subject, order, gate, line, &mut spending) {
                Ok(Tried::Done(taken)) => {
                    remark(line, spending.note());
                    spending.durable(taken.0.stored);
                    return Ok(Taken::Checkpoint(taken));
                }
                Ok(Tried::Not(look)) => {
                    spending.failed();
                    plan = budget.plan(look.reason(), memory, fixed);
                    line.plan = Some(format!("at first files alone, then {plan}"));
                    line.effects = look.effects;
                    line.note = look.note;
                }
                Err(e) => {
                    spending.failed();
                    return Err(e);
                }
            }
        }
        let mut spending = budget.ask(&plan, urgent)?;
        let taken = self.take_all(subject, order, plan.pre_dumps(), gate, line, &mut spending);
        remark(line, spending.note());
        match &taken {
            Ok(Taken::Checkpoint(done)) => spending.durable(done.0.stored),
            Ok(Taken::Nothing) | Err(_) => spending.failed(),
        }
        taken
    }

    /// Processes and files; or files alone, if the processes cannot be kept and that is wanted then.
    fn take_all(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        pre_dumps: u32,
        gate: &mut ShutGate,
        line: &mut JournalLine,
        spending: &mut Spending<'_>,
    ) -> Result<Taken, String> {
        let mut pending = self.begin_dump(subject, order.turn).map_err(text)?;
        pending.prepare().map_err(text)?;
        let mut link = self.link(subject, order, &mut pending)?;
        self.pre_dump(subject, pre_dumps, &mut pending, &mut link, line)?;
        let mut args = dump_args(subject, &pending, &link, self.settings.dump_limit, "turn")?;
        args.parent_path = pending.parent_path();
        let base = self.base(order);
        if let Some(inspection) = &mut self.inspection {
            inspection.prepare();
            if order.large {
                let scene = (subject, order.overlay()?, &*self.doors);
                read_ahead(scene, inspection, &mut pending, base.as_deref())?;
            }
        }
        let held_before = subject.parts()?.freeze.held();
        let dumped = self.dump(subject, order, (&args, link.upon), &mut pending);
        let dumped = match dumped? {
            Ok(dumped) if self.may_lack_pages(&link, dumped.seen.as_ref()) => {
                drop(pending);
                chain::dumped_in_vain(line, dumped.done.frozen);
                // Builds upon nothing this time.
                return self.take_all(subject, order, 0, gate, line, spending);
            }
            Ok(dumped) => dumped,
            Err(e) if !e.spares_files() => return Err(text(e)),
            Err(e) if order.without_processes == WithoutProcesses::No => {
                return Err(format!(
                    "{e}\n`crab checkpoint --or-files` keeps the files alone where the processes cannot be kept"
                ));
            }
            Err(e) => {
                let rest = Rest {
                    pending,
                    base: base.as_deref(),
                    why: e.why(),
                    held_before,
                };
                return self.take_rest(subject, order, rest, gate, line, spending);
            }
        };
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        spending.pre_dumped(line.pre_dumps, &link);
        spending.captured(
            Some(pending.image_dir()),
            dumped.done.captured.bytes,
            dumped.done.frozen,
        );
        let taken = self.keep(subject, order, (pending, link), dumped, line)?;
        // The checkpoint exists from here on: nothing may make its turn count as unprotected.
        if let Err(e) = fs::remove_dir_all(&args.work_path) {
            log::warn!("{}: cannot remove CRIU's work: {e}", self.store.id());
        }
        Ok(taken)
    }

    /// The cut.
    fn dump(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        (args, upon): (&runtime::Checkpoint, Option<u64>),
        pending: &mut Pending,
    ) -> Result<Result<Dumped, CutError>, String> {
        if let Some(why) = subject.never_dumped() {
            return Ok(Err(CutError::Shared(why)));
        }
        let overlay = order.overlay()?;
        let base = self.base(order);
        let (doors, image) = (&self.doors, pending.image_dir().to_owned());
        let mut inspection = self.inspection.as_mut();
        let (mut seen, mut artefacts) = (None, BTreeMap::new());
        let done = subject.parts()?.cut(args, upon, || {
            // Before it is captured: whoever is outside of the sandbox is not frozen, and what he
            // changes meanwhile must not be known without being in the capture.
            if let Some(inspection) = &mut inspection {
                seen = scene((subject, overlay, doors), |scene| {
                    inspection.frozen(scene, &image)
                })?;
                distrust(inspection, pending);
            }
            let comparison = seen.as_ref().and_then(Found::changes);
            let known = base.as_deref().zip(comparison);
            let captured = capture(pending, &overlay.upperdir, known, doors)?;
            artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(captured)
        });
        Ok(done.map(|done| Dumped {
            done,
            seen,
            artefacts,
        }))
    }

    /// Makes a dump durable.
    fn keep(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        (mut pending, link): (Pending, Link),
        dumped: Dumped,
        line: &mut JournalLine,
    ) -> Result<Taken, String> {
        let Dumped {
            done,
            seen,
            artefacts,
        } = dumped;
        line.freeze_us = micros(link.frozen + done.frozen);
        let dumped = bytes_in(pending.image_dir()).saturating_add(link.captured);
        let captured = &done.captured;
        let changes = seen.as_ref().and_then(Found::changes);
        line.changed_files = changes.map_or(captured.names, |its| its.len() as u64);
        let references = seen.as_ref().and_then(Found::references);
        let facts = Facts {
            parent: order.parent(),
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
        add_artefacts(&mut pending, &artefacts);
        let (checkpoint, staging) = pending
            .commit(facts, Images::Staged, Files::Captured)
            .map_err(text)?;
        self.artefacts = Some(artefacts);
        if let Some(inspection) = &mut self.inspection {
            let images = Arc::new(StoredImages(checkpoint.clone()));
            inspection.durable(order.turn, seen, captured, images);
        }
        line.action = Action::Full;
        let image = &checkpoint.manifest.contents.image;
        let image = match link.upon {
            // The other pages were not looked at.
            Some(_) => dumped,
            None => image.iter().map(|file| file.data).sum(),
        };
        line.bytes_captured = image.saturating_add(captured.bytes);
        if link.is_tracking {
            let init = subject.parts()?.scene.init_pid();
            self.goes_on_with((&checkpoint, &staging), init, done.number);
        }
        Ok(Taken::Checkpoint(Box::new((checkpoint, staging))))
    }

    /// The checkpoint that what is known is about: changes can be held against it.
    pub(super) fn base<'o>(&self, order: &'o Order) -> Option<Cow<'o, Checkpoint>> {
        let parent = order.parent.as_ref()?;
        let base = self.inspection.as_ref()?.base(parent.turn())?;
        if base == parent.turn() {
            return Some(Cow::Borrowed(parent));
        }
        // Everything is captured then.
        let unreadable = |e: &StoreError| log::warn!("{}: {e}", self.store.id());
        let base = self.store.get(base).inspect_err(unreadable);
        base.ok().map(Cow::Owned)
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
        let base = self.base(order);
        let (Some(head), Some(before)) = (&order.parent, base.as_deref()) else {
            return Ok(Tried::Not(Look::everything("nothing to compare with")));
        };
        let Some((inspection, dumped_in)) = self
            .inspection
            .as_mut()
            .and_then(|its| its.dumped_in().map(|turn| (its, turn)))
        else {
            return Ok(Tried::Not(Look::everything("no dump to compare with")));
        };
        let (parent, overlay) = (head.turn(), order.overlay()?);
        let pending = self.store.begin_without_images(order.turn);
        let mut pending = pending.map_err(text)?;
        pending.prepare().map_err(text)?;
        // No process is dumped beside it.
        pending.compress_early().map_err(text)?;
        inspection.prepare();
        let doors = &self.doors;
        if order.large {
            let scene = (subject, overlay, &**doors);
            read_ahead(scene, inspection, &mut pending, Some(before))?;
        }
        let mut artefacts = BTreeMap::new();
        let mut take =
            |now: Option<&Stillness>| -> Result<Result<(Still, Captured), Look>, String> {
                let seen = scene((subject, overlay, doors), |scene| {
                    inspection.still(scene, Some(parent), now)
                })?;
                let still = match seen {
                    Ok(still) => still,
                    Err(look) => return Ok(Err(look)),
                };
                distrust(inspection, &mut pending);
                let changes = Some((before, &still.comparison));
                let captured = capture(&mut pending, &overlay.upperdir, changes, doors)?;
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
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        spending.captured(None, captured.bytes, done.frozen);
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
            references: inspection.recorded(before)?,
            host: Host::detect(),
            ..before.manifest.facts.clone()
        };
        add_artefacts(&mut pending, &artefacts);
        let (checkpoint, staging) = pending
            .commit(facts, Images::Same(before), Files::Captured)
            .map_err(text)?;
        self.artefacts = Some(artefacts);
        let images = Arc::new(StoredImages(checkpoint.clone()));
        inspection.files_durable(order.turn, still, &captured, images);
        line.action = Action::Files;
        line.bytes_captured = captured.bytes;
        Ok(Tried::Done(Box::new((checkpoint, staging))))
    }
}

/// Adds something to what the journal says.
pub(super) fn remark(line: &mut JournalLine, said: Option<String>) {
    line.note = match (line.note.take(), said) {
        (Some(note), Some(said)) => Some(format!("{note}; {said}")),
        (note, said) => note.or(said),
    };
}

/// How a turn's processes are dumped. `whose`: CRIU's directories are its own, since the client may be about
/// to dump as well.
pub(super) fn dump_args(
    subject: &dyn Subject,
    pending: &Pending,
    link: &Link,
    limit: Duration,
    whose: &str,
) -> Result<runtime::Checkpoint, String> {
    let scratch = subject.scratch();
    let work = scratch.join(format!("criu-{whose}-work"));
    fs::create_dir_all(&work).map_err(|e| format!("{work:?}: {e}"))?;
    let conf = CriuConf::for_dump(false);
    let conf = match link.is_tracking {
        true => conf.tracking_memory(),
        false => conf,
    };
    let home = conf
        .write(&scratch.join(format!("criu-{whose}")))
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

fn pipe(stream: &Stream) -> StdioPipe {
    StdioPipe {
        exec_id: Some(stream.exec_id.clone()).filter(|id| !id.is_empty()),
        fd: stream.fd.into(),
        inode: stream.inode,
        target: stream.target.clone(),
        pending: Vec::new(),
    }
}
