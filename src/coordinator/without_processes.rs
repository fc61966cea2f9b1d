//! A checkpoint without processes: what is left to take where they cannot be kept (D9b, D9c).
//!
//! Files are taken in one cut as ever, in a freeze of its own if one is needed. A start boots on them;
//! what is missing, and why, is in the manifest and in the journal.

use std::{collections::BTreeMap, time::Duration};

use time::OffsetDateTime;

use super::{
    budget::Spending,
    files::{add_artefacts, capture, distrust},
    known::Outline,
    memory_files::Mounts,
    stand_still::stand_still,
    subject::{Subject, scene},
    take::{Order, Taken, WithoutProcesses},
    turns::ShutGate,
    worker::{Worker, micros, text},
};
use crate::{
    config::Gate,
    inspector::process::Stillness,
    store::{
        Action, Captured, Checkpoint, Effect, Facts, Files, Host, Images, JournalLine, Kind,
        Missing, Pending,
    },
};

/// More of a reason (CRIU's log may be part of it) is not kept in a manifest. In characters.
const MAX_REASON: usize = 2000;
/// So many tmpfs are named: a sandbox may mount thousands.
const MAX_NAMED: usize = 8;

/// What a try to dump the processes has left.
pub(super) struct Rest<'o> {
    /// Whatever is staged as images is of no use.
    pub(super) pending: Pending,
    /// The checkpoint that changes of files can be held against.
    pub(super) base: Option<&'o Checkpoint>,
    /// Why the processes cannot be kept.
    pub(super) why: String,
    /// How long crab had held the sandbox before that.
    pub(super) held_before: Duration,
}

/// The files of one moment.
struct FilesCut {
    captured: Captured,
    outline: Option<Outline>,
    artefacts: BTreeMap<String, Vec<u8>>,
    /// Where a tmpfs holds files, which are not captured; or why that is not known.
    tmpfs: Result<Vec<String>, String>,
}

impl FilesCut {
    /// Whether the writable layer is known to equal that of the checkpoint before.
    fn equal_layer(&self) -> bool {
        let changes = self.outline.as_ref().and_then(Outline::changes);
        changes.is_some_and(|changes| changes.is_empty())
    }
}

impl Worker {
    /// Takes the files alone, in a cut of its own.
    pub(super) fn take_rest(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        rest: Rest<'_>,
        gate: &mut ShutGate,
        line: &mut JournalLine,
        spending: &mut Spending<'_>,
    ) -> Result<Taken, String> {
        let Rest {
            mut pending,
            base,
            why,
            held_before,
        } = rest;
        let cut = self.cut_files(subject, order, &mut pending, base);
        // It stood still for the try, too.
        let held = subject.parts()?.freeze.held();
        line.freeze_us = micros(held.saturating_sub(held_before));
        let files =
            cut.map_err(|e| format!("its processes cannot be kept ({why}), nor its files: {e}"))?;
        spending.captured(None, files.captured.bytes, held.saturating_sub(held_before));
        if self.settings.gate == Gate::Async {
            line.exposed_us = micros(gate.open());
        }
        let continues = |base: &Checkpoint| Some(base.turn()) == order.parent();
        let unchanged = base.is_some_and(continues)
            && files.equal_layer()
            && self.artefacts.as_ref() == Some(&files.artefacts);
        if unchanged {
            line.effects.retain(|effect| *effect != Effect::Files);
        }
        let lacked_before = base.is_some_and(|base| !base.has_processes());
        if let (true, Some(base)) = (unchanged && lacked_before, base)
            && order.without_processes == WithoutProcesses::IfFilesChanged
        {
            // All that it could differ in is equal.
            line.effects.clear();
            line.note = Some(format!("no file changed; without processes: {why}"));
            if let Some(inspection) = &mut self.inspection {
                inspection.layer_durable(base.turn(), files.outline, &files.captured);
            }
            return Ok(Taken::Nothing);
        }
        self.keep_files(subject, order, pending, files, &why, line)
    }

    fn cut_files(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        pending: &mut Pending,
        base: Option<&Checkpoint>,
    ) -> Result<FilesCut, String> {
        let overlay = order.overlay()?;
        let (doors, inspection) = (&self.doors, &mut self.inspection);
        let dying = || doors.is_dying();
        let mut take = |_: Option<&Stillness>| -> Result<FilesCut, String> {
            let (outline, tmpfs) = scene((subject, overlay, doors), |scene| {
                let outline = inspection.as_mut().and_then(|its| its.outline(scene));
                (outline, tmpfs_of(scene.init, &dying))
            })?;
            if let Some(inspection) = inspection.as_ref() {
                distrust(inspection, pending);
            }
            let known = base.zip(outline.as_ref().and_then(Outline::changes));
            let captured = capture(pending, &overlay.upperdir, known, doors)?;
            let artefacts = subject.artefacts()?;
            subject.frozen_hook()?;
            Ok(FilesCut {
                captured,
                outline,
                artefacts,
                tmpfs,
            })
        };
        let must_freeze = subject.has_frozen_hook();
        let limit = self.settings.dump_limit;
        let parts = subject.parts()?;
        let still = stand_still(&parts.freeze, parts.doors, limit, must_freeze, &mut take);
        Ok(still.map_err(text)?.captured)
    }

    fn keep_files(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        mut pending: Pending,
        taken: FilesCut,
        why: &str,
        line: &mut JournalLine,
    ) -> Result<Taken, String> {
        let changes = taken.outline.as_ref().and_then(Outline::changes);
        line.changed_files = changes.map_or(taken.captured.names, |its| its.len() as u64);
        line.bytes_captured = taken.captured.bytes;
        let notes = notes(why, &taken.tmpfs);
        let facts = Facts {
            parent: order.parent(),
            created_at: OffsetDateTime::now_utc(),
            kind: Kind::Files,
            processes: 0,
            processes_of: None,
            references: Vec::new(),
            host: Host::detect(),
            pipes: Vec::new(),
            runtime: serde_json::json!({ "terminal": subject.has_terminal() }),
            notes: notes.clone(),
        };
        add_artefacts(&mut pending, &taken.artefacts);
        let (checkpoint, staging) = pending
            .commit(facts, Images::None, Files::Captured)
            .map_err(text)?;
        self.artefacts = Some(taken.artefacts);
        if let Some(inspection) = &mut self.inspection {
            inspection.layer_durable(order.turn, taken.outline, &taken.captured);
        }
        let before = order.parent.as_ref();
        if before.is_none_or(Checkpoint::has_processes) {
            // Once; as long as it goes on, `crab ps` and `crab log` say so.
            let (id, turn) = (self.store.id(), order.turn);
            log::warn!("{id}: turn {turn} is kept {}", notes.join("; "));
        }
        line.action = Action::Files;
        line.missing = vec![Missing::Processes];
        if taken
            .tmpfs
            .as_ref()
            .map_or(true, |places| !places.is_empty())
        {
            line.missing.push(Missing::Tmpfs);
        }
        line.note = Some(match line.note.take() {
            Some(note) => format!("{}; {note}", notes.join("; ")),
            None => notes.join("; "),
        });
        Ok(Taken::Checkpoint(Box::new((checkpoint, staging))))
    }
}

/// Where the sandbox has a tmpfs that holds files. Its names are the sandbox's, so they are escaped.
fn tmpfs_of(init: i32, stop: &dyn Fn() -> bool) -> Result<Vec<String>, String> {
    let mounts = Mounts::of(init).map_err(text)?;
    let places = mounts.tmpfs_with_files(init, stop).into_iter();
    Ok(places.map(|place| format!("{place:?}")).collect())
}

/// What is missing, and why.
fn notes(why: &str, tmpfs: &Result<Vec<String>, String>) -> Vec<String> {
    let reason: String = why.chars().take(MAX_REASON).collect();
    let mut notes = vec![format!("without processes: {reason}")];
    notes.extend(match tmpfs {
        Ok(places) if places.is_empty() => None,
        Ok(places) => {
            let named = places[..places.len().min(MAX_NAMED)].join(", ");
            let more = match places.len().saturating_sub(MAX_NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            Some(format!("without the files of the tmpfs at {named}{more}"))
        }
        Err(e) => Some(format!(
            "without the files of any tmpfs (the mounts cannot be listed: {e})"
        )),
    });
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_in_a_few_words_whatever_the_sandbox_does() {
        assert_eq!(
            notes("x", &Ok(Vec::new())),
            ["without processes: x".to_owned()]
        );
        let many = vec!["\"/m\"".to_owned(); MAX_NAMED + 5000];
        let said = notes(&"é".repeat(1 << 20), &Ok(many));
        assert!(said.concat().len() < 5000, "{} bytes", said.concat().len());
        assert!(said[1].ends_with("\"/m\" and 5000 more"), "{}", said[1]);
        let unknown = notes("x", &Err("gone".into()));
        assert!(unknown[1].contains("any tmpfs"), "{}", unknown[1]);
    }
}
