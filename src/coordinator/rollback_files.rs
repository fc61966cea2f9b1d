//! Going back by files alone, while the processes stay what they are.
//!
//! If the checkpoint gone back to has its processes from the dump that is the newest one still, and no process has
//! changed since, then the sandbox differs from that checkpoint in files. Frozen, its tree is made equal to that
//! of the checkpoint by ordinary operations through the mount that it has (D13). Nothing is done to what a process
//! stands upon (D7a), so whatever the processes hold is the inode that they held, with the bytes that it had.
//!
//! Whatever is not certain is a reason to go the other way: before anything was touched, so that nobody notices.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    compare::{basis, compare, glimpse},
    cut::LATCH_LIMIT,
    doors::Latched,
    freeze::Held,
    inspection::{Inspection, Scene},
    memory_files::Mounts,
    references::References,
    rollback::{Step as Part, Steps},
    subject::{Subject, scene},
    wanted::{Wanted, hides},
    worker::{Worker, text},
};
use crate::{
    content::Data,
    rootfs::{
        Overlay,
        layer::Comparison,
        merged::{Depth, Merged, Plan, Step, plan},
    },
    sandbox::TurnNo,
    store::{Checkpoint, Tree, TreeEntry},
};

/// More names than these are sooner put back as a layer of their own.
const MAX_NAMES: usize = 2000;
/// And more bytes. They are in memory before anything is touched.
const MAX_BYTES: u64 = 32 << 20;

/// A checkpoint that may be gone back to by files alone.
pub(super) struct OnlyFiles {
    turn: TurnNo,
    /// What the sandbox goes on from until then.
    head: TurnNo,
    /// What the writable layer is held against.
    base: Tree,
    wanted: Wanted,
    overlay: Overlay,
    merged: Merged,
    /// Names that differ between the two checkpoints.
    paths: BTreeMap<PathBuf, Depth>,
}

/// What became of a rollback of files alone.
pub(super) enum Went {
    /// It is done.
    Back(Steps),
    /// Nothing was touched.
    Not(String),
    /// The files are half-way; the sandbox stands still, and nobody can enter it.
    HalfWay(String, Held, Latched),
}

/// What is to be done, and all that it takes.
struct Work {
    plan: Plan,
    contents: HashMap<PathBuf, Data>,
}

impl Worker {
    /// Whether files alone may do, as far as it can be known before the sandbox stands still. The error says why
    /// not.
    pub(super) fn only_files(
        &mut self,
        subject: &dyn Subject,
        target: &Checkpoint,
    ) -> Result<OnlyFiles, String> {
        let head = self.parent().map_err(text)?.ok_or("no checkpoint")?.turn();
        let inspection = self.inspection.as_ref().ok_or("nobody watches")?;
        let dumped = inspection.dumped_in().ok_or("no dump is known")?;
        let base = inspection.base(head).ok_or("nothing is known")?;
        let base = self.store.get(base).map_err(text)?;
        same_processes(target, &base, dumped)?;
        inspection.processes_know_no_files()?;
        if self.artefacts != Some(subject.artefacts()?) {
            return Err("files of the host that belong to it have changed".into());
        }
        if !self.doors.inside().is_empty() {
            return Err("an exec runs".into());
        }
        let overlay = subject.overlay()?;
        if let Some(option) = overlay.unknown_option() {
            return Err(format!("its overlay is mounted with {option}"));
        }
        let lower = Merged::lower(&overlay, &self.store.scratch_dir()).map_err(text)?;
        let merged = Merged::open(&subject.root()).map_err(text)?;
        let tree = |checkpoint: &Checkpoint| {
            let tree = checkpoint.strict_tree().map_err(text)?;
            tree.ok_or_else(|| "a checkpoint without files".to_owned())
        };
        let (mut base, mut wanted) = (tree(&base)?, tree(target)?);
        let paths = differing(&mut base, &mut wanted)?;
        Ok(OnlyFiles {
            turn: target.turn(),
            head,
            base,
            wanted: Wanted::new(wanted, lower),
            overlay,
            merged,
            paths,
        })
    }

    /// Takes the files back.
    pub(super) fn back_by_files(&mut self, subject: &dyn Subject, mut files: OnlyFiles) -> Went {
        let mut steps = Steps::begin();
        let limit = self.settings.dump_limit + LATCH_LIMIT;
        let doors = Arc::clone(&self.doors);
        let Some(_alone) = doors.cut_alone(limit) else {
            return Went::Not("another checkpoint is being taken".into());
        };
        let Some(latched) = doors.latch(LATCH_LIMIT) else {
            return Went::Not("an exec is being started".into());
        };
        let held = match subject.parts() {
            Ok(parts) => parts.freeze.hold(),
            Err(e) => return Went::Not(e),
        };
        let held = match held {
            Ok(held) => held,
            Err(e) => return Went::Not(e.to_string()),
        };
        steps.done(Part::Freeze);
        let work = match self.to_do(subject, &mut files) {
            Ok(work) => work,
            Err(why) => return Went::Not(why),
        };
        let done = files.merged.apply(&work.plan, &work.contents);
        let done = done.map_err(text).and_then(|()| subject.restored_hook());
        if let Err(e) = done {
            return Went::HalfWay(e, held, latched);
        }
        if let Some(inspection) = &mut self.inspection {
            inspection.went_back(files.turn);
        }
        drop(held);
        steps.done(Part::Files);
        Went::Back(steps)
    }

    /// In the freeze: what is to be done. Touches nothing.
    fn to_do(&self, subject: &dyn Subject, files: &mut OnlyFiles) -> Result<Work, String> {
        if !self.doors.inside().is_empty() {
            return Err("an exec runs".into());
        }
        let inspection = self.inspection.as_ref().ok_or("nobody watches")?;
        let (changed, mounts) = scene((subject, &files.overlay, &*self.doors), |scene| {
            let mounts = Mounts::of(scene.init).map_err(text)?;
            Ok::<_, String>((inspection.files_alone(scene, files.head)?, mounts))
        })??;
        add_changed(&mut files.paths, &changed, &mut files.base)?;
        let plan = plan(
            &mut files.wanted,
            &mut files.merged,
            &files.paths,
            MAX_NAMES,
        );
        let plan = plan.map_err(text)?;
        for step in &plan.steps {
            spares_processes(step, inspection, &mounts)?;
        }
        let mut contents = HashMap::new();
        let mut left = MAX_BYTES;
        for path in plan.steps.iter().filter_map(Step::file) {
            let data = files.wanted.data(path, left).map_err(text)?;
            left -= data
                .pieces
                .iter()
                .map(|(_, bytes)| bytes.len() as u64)
                .sum::<u64>();
            contents.insert(path.to_owned(), data);
        }
        Ok(Work { plan, contents })
    }
}

impl Inspection {
    /// In the freeze: how the writable layer differs from what it is held against.
    /// An error if anything else may have changed, if that touches what the processes stand upon, or if one of
    /// them has read since: it would go on with what it knows of files that are taken back, a state that no
    /// schedule leads to.
    fn files_alone(&self, scene: &Scene<'_>, head: TurnNo) -> Result<Comparison, String> {
        let watch = self.watch.as_ref()?;
        let known = self.known.as_ref();
        let glimpse = glimpse(known, scene, None);
        let dirty = watch.look().map_err(|e| e.to_string())?;
        let basis = basis(known, glimpse, &dirty, Some(head))?;
        let (look, comparison) = compare(basis, watch, &dirty, scene);
        let comparison = match comparison {
            Some(comparison) if look.only_files || look.effects.is_empty() => comparison,
            _ => {
                let more = || "more than files changed".into();
                return Err(look.note.unwrap_or_else(more));
            }
        };
        self.processes_know_no_files()?;
        Ok(comparison)
    }

    /// An error if a process of the dump has read since, or is not known.
    fn processes_know_no_files(&self) -> Result<(), String> {
        let known = self.known.as_ref();
        let processes = known.and_then(|known| known.dump.as_ref()?.processes.as_ref());
        processes
            .ok_or("the processes are not known")?
            .know_no_files()
    }

    /// What the processes stand upon, if it is known.
    fn references(&self) -> Option<&References> {
        self.known.as_ref()?.dump.as_ref()?.references.as_ref().ok()
    }

    /// Files alone were taken back to the checkpoint of `turn`. Whatever was dirty stays so, and what was written
    /// for that is dirty, too: the next turn holds all of it against the checkpoint that is known.
    fn went_back(&mut self, turn: TurnNo) {
        if let Some(known) = &mut self.known {
            known.back_to = Some(turn);
        }
    }
}

/// An error unless two checkpoints hold the same processes: those of one dump. `dumped`: the turn of the dump
/// that `base` has its processes from.
fn same_processes(target: &Checkpoint, base: &Checkpoint, dumped: TurnNo) -> Result<(), String> {
    let (then, now) = (&target.manifest, &base.manifest);
    if then.contents.bundle != now.contents.bundle {
        return Err("files of the host that belong to it were others then".into());
    }
    let same_dump = then.facts.processes_of.unwrap_or(then.turn) == dumped;
    match same_dump && then.contents.image == now.contents.image {
        true => Ok(()),
        false => Err("they are of another dump than the newest ones".into()),
    }
}

/// An error if a process could notice this step by something that it holds, or a mount by what it is mounted on.
fn spares_processes(step: &Step, inspection: &Inspection, mounts: &Mounts) -> Result<(), String> {
    let path = step.path();
    // A name that comes or goes takes along what is below it.
    let below = matches!(
        step,
        Step::Remove { .. } | Step::Make { .. } | Step::Link { .. }
    );
    let references = inspection
        .references()
        .ok_or("it is not known what the processes use")?;
    if let Some(used) = references.at(path, below) {
        return Err(format!("{path:?} differs, and a process uses {used:?}"));
    }
    match mounts.at_or_below(path).filter(|_| below) {
        Some(place) => Err(format!("{path:?} differs, and {place:?} is a mount")),
        None => Ok(()),
    }
}

/// The names at which two writable layers differ, and so what they show.
fn differing(base: &mut Tree, wanted: &mut Tree) -> Result<BTreeMap<PathBuf, Depth>, String> {
    let mut paths = BTreeMap::new();
    for difference in base.diff(wanted).map_err(text)? {
        let (path, before, after) = (difference.path, difference.before, difference.after);
        let was_dir = before.as_ref().and_then(TreeEntry::dir);
        let is_dir = after.as_ref().and_then(TreeEntry::dir);
        // What is below a directory that comes or goes is not listed.
        let below = match (was_dir, is_dir) {
            (Some(dir), None) => Some((&mut *base, dir)),
            (None, Some(dir)) => Some((&mut *wanted, dir)),
            _ => None,
        };
        if let Some((tree, dir)) = below {
            if dir.entries > MAX_NAMES as u64 {
                return Err(too_many());
            }
            for (path, entry) in tree.entries_under(&path).map_err(text)? {
                let depth = depth(hides(&path, Some(&entry)).map_err(text)?, false);
                paths.insert(path, depth);
            }
        }
        let was_hiding = hides(&path, before.as_ref()).map_err(text)?;
        let is_hiding = hides(&path, after.as_ref()).map_err(text)?;
        paths.insert(path, depth(was_hiding, is_hiding));
        if paths.len() > MAX_NAMES {
            return Err(too_many());
        }
    }
    Ok(paths)
}

/// Adds the names at which the sandbox's layer differs from `base` now.
fn add_changed(
    paths: &mut BTreeMap<PathBuf, Depth>,
    changed: &Comparison,
    base: &mut Tree,
) -> Result<(), String> {
    if changed.len() > MAX_NAMES {
        return Err(too_many());
    }
    for change in &changed.changes {
        let path = match change.path == Path::new(".") {
            true => Path::new(""),
            false => &change.path,
        };
        let before = base.lookup(path).map_err(text)?;
        let was_hiding = hides(path, before.as_ref()).map_err(text)?;
        let is_hiding = change.now.is_some_and(|now| !now.is_dir() || now.hides);
        let depth = depth(was_hiding, is_hiding);
        let known = paths.entry(path.to_owned()).or_insert(depth);
        *known = (*known).max(depth);
    }
    for path in changed.linked() {
        paths.entry(path.to_owned()).or_insert(Depth::Itself);
    }
    Ok(())
}

/// Whether the layers below may show in one and not in the other.
fn depth(before: bool, after: bool) -> Depth {
    match before == after {
        true => Depth::Itself,
        false => Depth::Below,
    }
}

fn too_many() -> String {
    format!("more than {MAX_NAMES} names differ")
}
