//! What a turn changed: the kernel names candidates, comparison with the last checkpoint decides (D6).
//!
//! Around one checkpoint: [`Inspection::look`] says whether to act; [`Inspection::prepare`] before the
//! freeze, [`Inspection::frozen`] in it, after the dump; [`Inspection::durable`] once nothing can take
//! the checkpoint away again, and [`Inspection::learn`] when nobody waits any more. If anything fails in
//! between, what was known before counts on, and what cannot be known any more counts as changed.

use std::{path::Path, sync::Arc, time::Instant};

use super::{
    freeze::Freezable,
    memory_files::{MemoryFiles, Mounts},
    processes::Processes,
};
use crate::{
    inspector::{self, Dirty, Inode, Watch, process},
    rootfs::layer::{Candidate, Comparison, Layer, Scope},
    sandbox::TurnNo,
    store::Effect,
};

/// The sandbox, as far as it is looked at.
pub(super) struct Scene<'a> {
    /// Host pid of init.
    pub(super) init: i32,
    /// The writable layer.
    pub(super) upper: &'a Path,
    pub(super) cgroup: &'a dyn Freezable,
    /// See [`Subject::input_marks`](super::turns::Subject::input_marks).
    pub(super) marks: Vec<Option<Instant>>,
    /// Whether to give up.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// What a look found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Empty: the sandbox is what the last checkpoint holds.
    pub(super) effects: Vec<Effect>,
    /// How many names of the writable layer differ, if that is known.
    pub(super) changed_files: Option<u64>,
    /// What a person should know of how this was found.
    pub(super) note: Option<String>,
}

impl Look {
    /// Adds an effect, once.
    pub(super) fn add(&mut self, effect: Effect) {
        if !self.effects.contains(&effect) {
            self.effects.push(effect);
        }
    }

    /// Adds to the note.
    pub(super) fn tell(&mut self, what: impl Into<String>) {
        let before = self
            .note
            .take()
            .map_or_else(String::new, |note| note + "; ");
        self.note = Some(before + &what.into());
    }

    /// Nothing is known, so everything counts as changed.
    pub(super) fn everything(why: impl Into<String>) -> Self {
        Self {
            effects: vec![Effect::Files, Effect::Processes, Effect::Memory],
            changed_files: None,
            note: Some(format!("all counts as changed: {}", why.into())),
        }
    }
}

/// What is known of a sandbox since its last durable checkpoint.
pub(super) struct Inspection {
    watch: Result<Watch, String>,
    known: Option<Known>,
    consistent_cut: bool,
}

/// The state of the last checkpoint.
struct Known {
    turn: TurnNo,
    layer: Layer,
    memory_files: MemoryFiles,
    mounts: Mounts,
    processes: Option<Processes>,
}

/// What was found in the freeze of one checkpoint.
pub(super) struct Taken {
    layer: Result<Outline, String>,
    memory_files: MemoryFiles,
    mounts: Mounts,
    processes: Result<Processes, String>,
    /// How many names of the writable layer differ from the checkpoint before.
    pub(super) changed_files: Option<u64>,
}

enum Outline {
    New(Layer),
    Delta(Comparison),
}

impl Inspection {
    /// Begins to watch; a host where that is impossible has everything changed after each turn.
    pub(super) fn begin(watch: Result<Watch, String>, consistent_cut: bool) -> Self {
        Self {
            watch,
            known: None,
            consistent_cut,
        }
    }

    /// Why nothing can be said; None if the kernel tells.
    pub(super) fn blind(&self) -> Option<&str> {
        self.watch.as_ref().err().map(String::as_str)
    }

    pub(super) fn is_blind(&self) -> bool {
        self.watch.is_err()
    }

    /// What has changed since the checkpoint of `latest`. Freezes nothing.
    pub(super) fn look(&self, scene: &Scene<'_>, latest: Option<TurnNo>) -> Look {
        let watch = match &self.watch {
            Ok(watch) => watch,
            Err(e) => return Look::everything(e),
        };
        let dirty = match watch.look() {
            Ok(dirty) => dirty,
            Err(e) => return Look::everything(format!("cannot read the kernel's maps: {e}")),
        };
        if !dirty.doubts.is_empty() {
            return Look::everything(dirty.doubts.join("; "));
        }
        let Some(known) = &self.known else {
            return Look::everything("no checkpoint to compare with");
        };
        if latest != Some(known.turn) {
            return Look::everything("the last checkpoint is not in the store");
        }
        let Some(processes) = &known.processes else {
            return Look::everything("the processes of the last checkpoint are not known");
        };
        let mut look = Look::default();
        let orphans = files(
            &known.layer,
            &known.memory_files,
            &known.mounts,
            &dirty,
            scene,
            &mut look,
        );
        let verdict = Mounts::of(scene.init).map(|now| now == known.mounts);
        if !verdict.is_ok_and(|same| same) {
            look.add(Effect::Mounts);
        }
        processes.look(watch, scene, orphans, &mut look);
        look
    }

    /// Before the freeze of a checkpoint.
    pub(super) fn prepare(&mut self) {
        let prepared = match &mut self.watch {
            Ok(watch) => watch.prepare(),
            Err(_) => return,
        };
        if let Err(e) = prepared {
            self.lose(format!("cannot begin an epoch: {e}"));
        }
    }

    /// In the freeze, after the dump into `image`.
    pub(super) fn frozen(&mut self, scene: &Scene<'_>, image: &Path) -> Option<Taken> {
        let Ok(watch) = &mut self.watch else {
            return None;
        };
        match taken(
            watch,
            self.known.as_ref(),
            scene,
            image,
            self.consistent_cut,
        ) {
            Ok(taken) => {
                // Watched from here on for the new dump, so that the former one can no longer be
                // compared with, should this checkpoint fail.
                if let Some(known) = &mut self.known {
                    known.processes = None;
                }
                Some(taken)
            }
            Err(e) => {
                self.lose(e);
                None
            }
        }
    }

    /// The checkpoint of `turn` is durable, its images are where `images` says.
    pub(super) fn durable(
        &mut self,
        turn: TurnNo,
        taken: Option<Taken>,
        images: Arc<dyn process::Images>,
    ) {
        let Some(taken) = taken else {
            self.known = None;
            return;
        };
        let forgotten = match &mut self.watch {
            Ok(watch) => watch.durable(),
            Err(_) => return,
        };
        let known = self.known.take();
        let layer = forgotten
            .map_err(|e| e.to_string())
            .and(taken.layer)
            .and_then(|outline| match (outline, known) {
                (Outline::New(layer), _) => Ok(layer),
                (Outline::Delta(delta), Some(mut known)) => match known.layer.apply(delta) {
                    Ok(()) => Ok(known.layer),
                    Err(e) => Err(e.to_string()),
                },
                (Outline::Delta(_), None) => Err("nothing to compare with".into()),
            });
        match layer {
            Ok(layer) => {
                self.known = Some(Known {
                    turn,
                    layer,
                    memory_files: taken.memory_files,
                    mounts: taken.mounts,
                    processes: taken
                        .processes
                        .map(|processes| processes.at(images))
                        .inspect_err(|e| log::warn!("the processes cannot be compared: {e}"))
                        .ok(),
                });
            }
            Err(e) => log::warn!("the writable layer cannot be compared: {e}"),
        }
    }

    /// What can wait until the gate is open: digests out of the copy of the writable layer, and how the
    /// processes settled after the thaw.
    pub(super) fn learn(&mut self, scene: &Scene<'_>, copy: &Path) {
        let (Some(known), Ok(watch)) = (&mut self.known, &self.watch) else {
            return;
        };
        if let Some(processes) = &mut known.processes {
            processes.settle(watch, scene);
        }
        if let Err(e) = known.layer.learn(copy, scene.stop) {
            log::warn!("not all files can be compared: {e}");
        }
    }

    /// The sandbox was taken back: it is watched where it is now, and nothing is known of it.
    pub(super) fn follow(&mut self, subject: Result<inspector::Subject, String>, why: String) {
        self.known = None;
        let followed = match &mut self.watch {
            Ok(watch) => subject.and_then(|subject| watch.follow(&subject, why)),
            Err(_) => return,
        };
        if let Err(e) = followed {
            self.lose(format!("cannot follow a rollback: {e}"));
        }
    }

    /// The inspector can no longer be relied upon.
    fn lose(&mut self, why: String) {
        log::warn!("the inspector is lost: {why}");
        self.watch = Err(why);
        self.known = None;
    }
}

fn taken(
    watch: &mut Watch,
    known: Option<&Known>,
    scene: &Scene<'_>,
    image: &Path,
    consistent_cut: bool,
) -> Result<Taken, String> {
    let pids = scene.cgroup.procs().map_err(|e| e.to_string())?;
    let dirty = watch
        .cut(&pids)
        .map_err(|e| format!("cannot end an epoch: {e}"))?;
    let (layer, changed_files) = outline(known, &dirty, scene);
    let mounts = Mounts::of(scene.init).map_err(|e| format!("cannot list the mounts: {e}"))?;
    let memory_files = MemoryFiles::of(scene.init, &mounts, scene.stop);
    let processes = Processes::take(&pids, scene, image, watch, consistent_cut);
    if let Ok(Outline::Delta(delta)) = &layer {
        // Without a name, and as they are now they belong to the dump. CRIU itself makes and removes
        // a directory in the sandbox for each of its tmpfs.
        let ours = |one: &&Candidate| known.is_some_and(|known| known.layer.dev() == one.dev);
        let inode = |one: &Candidate| Inode {
            dev: one.dev,
            ino: one.ino,
        };
        watch
            .forget(delta.outside.iter().filter(ours).map(inode))
            .map_err(|e| format!("cannot forget an inode: {e}"))?;
    }
    watch
        .watch_processes(&pids)
        .map_err(|e| format!("cannot watch the processes: {e}"))?;
    Ok(Taken {
        layer,
        memory_files,
        mounts,
        processes,
        changed_files,
    })
}

/// The index of the writable layer, or what to add to the one that there is.
fn outline(
    known: Option<&Known>,
    dirty: &Dirty,
    scene: &Scene<'_>,
) -> (Result<Outline, String>, Option<u64>) {
    if let Some(known) = known
        && dirty.doubts.is_empty()
    {
        let (candidates, scope) = candidates(dirty);
        // An index that does not fit any more is made anew.
        if let Ok(delta) = known
            .layer
            .compare(scene.upper, &candidates, scope, scene.stop)
        {
            let changed = delta.len() as u64;
            return (Ok(Outline::Delta(delta)), Some(changed));
        }
    }
    let new = Layer::outline(scene.upper, scene.stop);
    (new.map(Outline::New).map_err(|e| e.to_string()), None)
}

/// The inodes to look at. Whoever is outside of the sandbox may have copied directories up without a
/// sign, so then names that nothing explains are searched for.
fn candidates(dirty: &Dirty) -> (Vec<Candidate>, Scope) {
    let outside = dirty.inodes.values().any(|how| how.is_outside());
    let candidate = |inode: &Inode| Candidate {
        dev: inode.dev,
        ino: inode.ino,
    };
    let scope = match outside {
        true => Scope::Search,
        false => Scope::Candidates,
    };
    (dirty.inodes.keys().map(candidate).collect(), scope)
}

/// What differs in the writable layer and in memory. Returns whether an inode without a name was
/// changed: it belongs to the processes that have it open.
fn files(
    layer: &Layer,
    memory_files: &MemoryFiles,
    mounts: &Mounts,
    dirty: &Dirty,
    scene: &Scene<'_>,
    look: &mut Look,
) -> bool {
    let (candidates, scope) = candidates(dirty);
    let outside = match layer.compare(scene.upper, &candidates, scope, scene.stop) {
        Ok(comparison) => {
            look.changed_files = Some(comparison.len() as u64);
            if !comparison.is_empty() {
                look.add(Effect::Files);
            }
            comparison.outside
        }
        // Something writes while we read.
        Err(e) => {
            look.add(Effect::Files);
            look.tell(format!("the files change: {e}"));
            return true;
        }
    };
    let mut orphans = false;
    let mut devices: Vec<u64> = Vec::new();
    for candidate in outside {
        match candidate.dev == layer.dev() {
            true => orphans = true,
            false => devices.push(candidate.dev),
        }
    }
    devices.dedup();
    for dev in devices {
        let why = match mounts.tmpfs(dev) {
            Some(_) if memory_files.is_as_it_was(scene.init, mounts, dev, scene.stop) => continue,
            Some(place) => format!("{} changed", place.display()),
            // Volumes are the host's; of memory the processes' own marks tell.
            None if mounts.is_external(dev) || Some(dev) == process::shared_memory() => continue,
            // The runtime, which has joined the sandbox's cgroup and not yet its mounts.
            None if Mounts::of_self().is_ok_and(|host| host.has(dev)) => continue,
            None => {
                let (major, minor) = (libc::major(dev), libc::minor(dev));
                format!("something changed on device {major}:{minor}, which init has not mounted")
            }
        };
        look.add(Effect::Files);
        look.tell(why);
    }
    orphans
}
