//! Taking one checkpoint: of everything, or of files beside the image that there is.
//!
//! If the look says that files alone have changed, and none that a process stands upon, no process is
//! dumped: the checkpoint has the image of an earlier one, which is what the processes still are (D7a). It
//! is looked once more while nothing runs; if it is otherwise then, everything is taken.

use std::{collections::BTreeMap, fs, path::Path};

use time::OffsetDateTime;

use super::{
    doors::Doors,
    inspection::{Inspection, Look, Still, Taken},
    references::References,
    stand_still::stand_still,
    turns::{ShutGate, Subject, Worker, differing, micros, scene, text},
};
use crate::{
    config::Gate,
    rootfs::{self, Prestaged},
    runtime::{self, criu_conf::CriuConf, descriptors::Stream},
    sandbox::TurnNo,
    store::{Action, Checkpoint, Facts, Host, JournalLine, Kind, Pending, StdioPipe},
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
    Done(Box<Checkpoint>),
    /// A dump is needed.
    Not(Look),
}

impl Worker {
    /// Takes the cut and makes it durable.
    pub(super) fn take(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
    ) -> Result<Checkpoint, String> {
        if order.only_files {
            match self.take_files(subject, order, gate, line)? {
                Tried::Done(checkpoint) => return Ok(*checkpoint),
                Tried::Not(look) => {
                    line.effects = look.effects;
                    line.note = look.note;
                }
            }
        }
        self.take_all(subject, order, gate, line)
    }

    /// Processes and files.
    fn take_all(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
    ) -> Result<Checkpoint, String> {
        let overlay = subject.overlay()?;
        let pending = self.store.begin(order.turn).map_err(text)?;
        let scratch = subject.scratch();
        // Not the client's: both may be about to dump.
        let work = scratch.join("criu-turn-work");
        fs::create_dir_all(&work).map_err(|e| format!("{work:?}: {e}"))?;
        let home = CriuConf::for_dump(false)
            .write(&scratch.join("criu-turn"))
            .map_err(|e| format!("{scratch:?}: {e}"))?;
        let args = runtime::Checkpoint {
            image_path: pending.image_dir().to_owned(),
            work_path: work.clone(),
            leave_running: true,
            // Kept in the image; whether they are closed is decided at the restore.
            tcp_established: true,
            file_locks: true,
            shell_job: subject.has_terminal(),
            home: Some(home),
            limit: self.settings.dump_limit,
            ..Default::default()
        };
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
            let stats = rootfs::capture_with(
                &overlay.upperdir,
                pending.upper_dir(),
                &mut prestaged,
                &dying,
            );
            let stats = stats.map_err(text)?;
            artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(stats)
        });
        let done = done.map_err(text)?;
        drop(prestaged);
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        let changes = seen.as_ref().and_then(Taken::changes);
        line.changed_files = changes.map_or(done.captured.entries(), |its| its.len() as u64);
        let references = seen.as_ref().and_then(Taken::references);
        let facts = Facts {
            parent: order.parent,
            created_at: OffsetDateTime::now_utc(),
            kind: Kind::Full,
            processes: done.processes as u64,
            processes_of: None,
            references: references.map(escaped).unwrap_or_default(),
            host: Host::detect(),
            pipes: done.streams.iter().map(pipe).collect(),
            runtime: serde_json::json!({ "terminal": subject.has_terminal() }),
            notes: Vec::new(),
        };
        let checkpoint = commit(pending, &artefacts, facts)?;
        self.artefacts = Some(artefacts);
        if let Some(inspection) = inspection {
            inspection.durable(order.turn, seen, &checkpoint.image_dir());
        }
        line.action = Action::Full;
        line.bytes_captured = checkpoint.manifest.contents.bytes;
        // The checkpoint exists from here on: nothing may make its turn count as unprotected.
        if let Err(e) = fs::remove_dir_all(&work) {
            log::warn!("{}: cannot remove {work:?}: {e}", self.store.id());
        }
        Ok(checkpoint)
    }

    /// Files, beside the image of the newest checkpoint.
    fn take_files(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        gate: &mut ShutGate,
        line: &mut JournalLine,
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
        let mut capture = || -> Result<Result<Still, Look>, String> {
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
            rootfs::capture_with(
                &overlay.upperdir,
                pending.upper_dir(),
                &mut prestaged,
                &dying,
            )
            .map_err(text)?;
            artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(Ok(still))
        };
        let must_freeze = subject.has_frozen_hook();
        let limit = self.settings.dump_limit;
        let parts = subject.parts()?;
        let done = stand_still(parts.freeze, parts.doors, limit, must_freeze, &mut capture);
        let done = done.map_err(text)?;
        let mut still = match done.captured {
            Ok(still) => still,
            Err(look) => return Ok(Tried::Not(look)),
        };
        drop(prestaged);
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        line.freeze_us = micros(done.frozen);
        line.changed_files = still.comparison.len() as u64;
        if let Some(then) = &self.artefacts
            && *then != artefacts
        {
            still.look.also_beside(differing(then, &artefacts));
        }
        line.note = still.look.note.take();
        copy_image(&before.image_dir(), pending.image_dir())?;
        let facts = Facts {
            parent: Some(parent),
            created_at: OffsetDateTime::now_utc(),
            processes_of: Some(dumped_in),
            host: Host::detect(),
            ..before.manifest.facts
        };
        let checkpoint = commit(pending, &artefacts, facts)?;
        self.artefacts = Some(artefacts);
        inspection.files_durable(order.turn, still, &checkpoint.image_dir());
        line.action = Action::Files;
        line.bytes_captured = checkpoint.manifest.contents.bytes;
        Ok(Tried::Done(Box::new(checkpoint)))
    }
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

/// Links to the files of an image: nobody writes to them any more.
fn copy_image(from: &Path, to: &Path) -> Result<(), String> {
    let failed = |e| format!("cannot take the image {from:?} over: {e}");
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        fs::hard_link(entry.path(), to.join(entry.file_name())).map_err(failed)?;
    }
    Ok(())
}

/// Adds what is kept of the host's files and makes all of it durable.
fn commit(
    pending: Pending,
    artefacts: &BTreeMap<String, Vec<u8>>,
    facts: Facts,
) -> Result<Checkpoint, String> {
    for (name, bytes) in artefacts {
        let kept = pending.bundle_dir().join(name);
        fs::write(&kept, bytes).map_err(|e| format!("cannot write {kept:?}: {e}"))?;
    }
    pending.commit(facts).map_err(text)
}

fn escaped(references: &References) -> Vec<String> {
    use std::os::unix::ffi::OsStrExt;
    let escape = |path: &Path| path.as_os_str().as_bytes().escape_ascii().to_string();
    references.paths().map(escape).collect()
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
