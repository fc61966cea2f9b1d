//! What a turn changed: the kernel names candidates, comparison with the last checkpoint decides (D6).
//!
//! Around one checkpoint: [`Inspection::look`] says whether to act, and how; [`Inspection::prepare`] and
//! [`Inspection::ahead`] before the freeze. In it, for a full one, [`Inspection::frozen`] after the
//! dump; for one of files alone [`Inspection::still`], which looks once more; for one without processes
//! [`Inspection::outline`]. [`Inspection::durable`], [`Inspection::files_durable`] or
//! [`Inspection::layer_durable`] once nothing can take the checkpoint away again, and
//! [`Inspection::settle`] when nobody waits any more. If anything fails in between, what was known before
//! counts on, and what cannot be known any more counts as changed.
//!
//! Files are held against the newest checkpoint, processes against the dump that it has its image from,
//! which may be an older one (D7a).

use std::{path::Path, sync::Arc, time::Instant};

use super::{
    compare::{ahead, basis, compare, glimpse, outline},
    freeze::Freezable,
    known::{Dump, Known, Outline, Still, Taken, ToRead, Written},
    look::Look,
    memory_files::{MemoryFiles, Mounts},
    processes::{Processes, Rested},
    references::References,
};
use crate::{
    inspector::{
        self, Happened, Inode, Watch,
        process::{self, Stillness},
    },
    rootfs::layer::Candidate,
    sandbox::TurnNo,
    store::{Captured, Checkpoint, Reference},
};

/// The sandbox, as far as it is looked at.
pub(super) struct Scene<'a> {
    /// Host pid of init.
    pub(super) init: i32,
    /// The writable layer.
    pub(super) upper: &'a Path,
    pub(super) cgroup: &'a dyn Freezable,
    /// See [`Subject::input_marks`](super::subject::Subject::input_marks).
    pub(super) marks: Vec<Option<Instant>>,
    /// Whether the kernel's marks of written pages are those since the last dump.
    pub(super) is_marked: &'a dyn Fn() -> bool,
    /// Whether to give up.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// What is known of a sandbox since its last durable checkpoint.
pub(super) struct Inspection {
    pub(super) watch: Result<Watch, String>,
    pub(super) known: Option<Known>,
    /// What the last look found of the processes, if nothing ran meanwhile: for the cut that follows.
    rested: Option<Box<Rested>>,
    consistent_cut: bool,
}

impl Inspection {
    /// Begins to watch; a host where that is impossible has everything changed after each turn.
    pub(super) fn begin(watch: Result<Watch, String>, consistent_cut: bool) -> Self {
        Self {
            watch,
            known: None,
            rested: None,
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

    /// Why it would not be seen if somebody cleared the marks of pages that were written to.
    pub(super) fn sees_marks(&self) -> Result<(), String> {
        match self.watch.as_ref()?.sees_marks() {
            true => Ok(()),
            false => Err("nobody sees here who clears the marks of written pages".into()),
        }
    }

    /// Whether somebody may have cleared marks since the last dump, as far as it is seen.
    pub(super) fn marks_cleared(&self) -> bool {
        let watch = self.watch.as_ref().ok();
        watch.is_some_and(|watch| watch.marks_cleared().unwrap_or(true))
    }

    /// What has changed since the checkpoint of `latest`. Freezes nothing.
    pub(super) fn look(&mut self, scene: &Scene<'_>, latest: Option<TurnNo>) -> Look {
        self.rested = None;
        let watch = match &self.watch {
            Ok(watch) => watch,
            Err(e) => return Look::everything(e),
        };
        let known = self.known.as_ref();
        let glimpse = glimpse(known, scene, None);
        let dirty = match watch.look() {
            Ok(dirty) => dirty,
            Err(e) => return Look::everything(format!("cannot read the kernel's maps: {e}")),
        };
        let mut look = match basis(known, glimpse, &dirty, latest) {
            Ok(basis) => compare(basis, watch, &dirty, scene).0,
            Err(why) => Look::everything(why),
        };
        self.rested = look.rested.take();
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

    /// After [`Inspection::prepare`]: what to read before the freeze; None if nobody could tell whether
    /// it has changed since.
    pub(super) fn ahead(&self, scene: &Scene<'_>) -> Option<ToRead> {
        let watch = self.watch.as_ref().ok()?;
        ahead(watch, self.known.as_ref(), scene)
            // They change, perhaps. Then the capture does it.
            .inspect_err(|e| log::debug!("nothing is read before the freeze: {e}"))
            .ok()
    }

    /// In the freeze, after [`Inspection::frozen`] or [`Inspection::still`]: what may have been written
    /// since [`Inspection::prepare`].
    pub(super) fn written(&self) -> Written {
        let since = self.watch.as_ref().ok().map(Watch::since_prepared);
        match since {
            // A child may have a mapping that its parent no longer had when it was asked.
            Some(Ok(since)) if since.doubts.is_empty() && !since.happened.has(Happened::FORK) => {
                Written::These(since.inodes.into_keys().collect())
            }
            _ => Written::Anything,
        }
    }

    /// While nothing runs: looks once more, and this is what the checkpoint of files alone holds.
    /// An error says why it cannot be one. `now`: how far the threads have come, unless they were frozen.
    pub(super) fn still(
        &mut self,
        scene: &Scene<'_>,
        latest: Option<TurnNo>,
        now: Option<&Stillness>,
    ) -> Result<Still, Look> {
        let rested = self.rested.take();
        let Ok(watch) = &mut self.watch else {
            return Err(Look::everything("nobody watches"));
        };
        let pids = scene
            .cgroup
            .procs()
            .map_err(|e| Look::everything(e.to_string()))?;
        let known = self.known.as_ref();
        let glimpse = glimpse(known, scene, rested.as_deref().zip(now));
        let dirty = match watch.cut(&pids) {
            Ok(dirty) => dirty,
            Err(e) => {
                let why = format!("cannot end an epoch: {e}");
                self.lose(why.clone());
                return Err(Look::everything(why));
            }
        };
        let basis = basis(known, glimpse, &dirty, latest).map_err(Look::everything)?;
        let (look, comparison) = compare(basis, watch, &dirty, scene);
        match comparison {
            Some(comparison) if look.only_files || look.effects.is_empty() => {
                Ok(Still { comparison, look })
            }
            _ => Err(look),
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
                if let Some(dump) = self.dump_mut() {
                    dump.processes = None;
                }
                Some(taken)
            }
            Err(e) => {
                self.lose(e);
                None
            }
        }
    }

    fn dump_mut(&mut self) -> Option<&mut Dump> {
        self.known.as_mut()?.dump.as_mut()
    }

    /// While nothing runs, for a checkpoint without processes: what its writable layer is, if that can
    /// be known.
    pub(super) fn outline(&mut self, scene: &Scene<'_>) -> Option<Outline> {
        let Ok(watch) = &mut self.watch else {
            return None;
        };
        let pids = scene.cgroup.procs().map_err(|e| e.to_string());
        let dirty = pids.and_then(|pids| watch.cut(&pids).map_err(|e| e.to_string()));
        match dirty {
            Ok(dirty) => outline(self.known.as_ref(), &dirty, scene)
                .inspect_err(|e| log::warn!("the writable layer cannot be compared: {e}"))
                .ok(),
            Err(e) => {
                self.lose(format!("cannot end an epoch: {e}"));
                None
            }
        }
    }

    /// The checkpoint of `turn` is durable, its images are where `images` says.
    pub(super) fn durable(
        &mut self,
        turn: TurnNo,
        taken: Option<Taken>,
        captured: &Captured,
        images: Arc<dyn process::Images>,
    ) {
        let Some(taken) = taken else {
            self.known = None;
            return;
        };
        if self.watch.is_err() {
            return;
        }
        let dump = Dump {
            turn,
            memory_files: taken.memory_files,
            mounts: taken.mounts,
            processes: taken
                .processes
                .map(|processes| processes.at(images))
                .inspect_err(|e| log::warn!("the processes cannot be compared: {e}"))
                .ok(),
            references: taken.references,
            settled: false,
        };
        self.know(turn, taken.layer, Some(dump), captured);
    }

    /// The checkpoint of `turn`, without processes, is durable; or what was found equals it.
    pub(super) fn layer_durable(
        &mut self,
        turn: TurnNo,
        layer: Option<Outline>,
        captured: &Captured,
    ) {
        match layer {
            Some(layer) => self.know(turn, Ok(layer), None, captured),
            None => self.known = None,
        }
    }

    /// The checkpoint of `turn` is what is compared with from now on.
    fn know(
        &mut self,
        turn: TurnNo,
        layer: Result<Outline, String>,
        dump: Option<Dump>,
        captured: &Captured,
    ) {
        let Ok(watch) = &mut self.watch else {
            return;
        };
        watch.durable();
        let known = self.known.take();
        let layer = layer.and_then(|outline| match (outline, known) {
            (Outline::New(layer), _) => Ok(layer),
            (Outline::Delta(delta), Some(mut known)) => match known.layer.apply(delta) {
                Ok(()) => Ok(known.layer),
                Err(e) => Err(e.to_string()),
            },
            (Outline::Delta(_), None) => Err("nothing to compare with".into()),
        });
        match layer {
            Ok(mut layer) => {
                layer.learn(&captured.contents);
                self.known = Some(Known {
                    turn,
                    back_to: None,
                    layer,
                    dump,
                });
            }
            Err(e) => log::warn!("the writable layer cannot be compared: {e}"),
        }
    }

    /// The checkpoint of `turn`, of files alone, is durable, its images are where `images` says.
    pub(super) fn files_durable(
        &mut self,
        turn: TurnNo,
        still: Still,
        captured: &Captured,
        images: Arc<dyn process::Images>,
    ) {
        let (Ok(watch), Some(mut known)) = (&mut self.watch, self.known.take()) else {
            return;
        };
        watch.durable();
        match known.layer.apply(still.comparison) {
            Ok(()) => {
                known.turn = turn;
                known.back_to = None;
                known.layer.learn(&captured.contents);
                if let Some(dump) = &mut known.dump {
                    dump.settled = true;
                    dump.processes = dump.processes.take().map(|its| its.at(images));
                }
                self.known = Some(known);
            }
            Err(e) => log::warn!("the writable layer cannot be compared: {e}"),
        }
    }

    /// The checkpoint that files are held against, if the sandbox goes on from that of `head`: the same one,
    /// but after a rollback of files alone.
    pub(super) fn base(&self, head: TurnNo) -> Option<TurnNo> {
        let known = self.known.as_ref().filter(|known| known.head() == head);
        known.map(|known| known.turn)
    }

    /// What the processes stand upon, as it was at their dump: in the files of `newest`, the newest
    /// checkpoint, it still is.
    pub(super) fn recorded(&mut self, newest: &Checkpoint) -> Result<Vec<Reference>, String> {
        match self.dump_mut().map(|dump| &mut dump.references) {
            Some(Ok(references)) => references.recorded(newest),
            _ => Err("it is not known which files the processes use".into()),
        }
    }

    /// The turn whose dump the newest checkpoint has its image from, if it is known.
    pub(super) fn dumped_in(&self) -> Option<TurnNo> {
        let dump = self.known.as_ref()?.dump.as_ref()?;
        Some(dump.turn)
    }

    /// What can wait until the gate is open: epochs of the checkpoint are forgotten, and it is seen how
    /// the processes settled after the thaw.
    pub(super) fn settle(&mut self, scene: &Scene<'_>) {
        if let Ok(watch) = &mut self.watch
            && let Err(e) = watch.retire()
        {
            return self.lose(format!("cannot forget an epoch: {e}"));
        }
        let (Some(known), Ok(watch)) = (&mut self.known, &self.watch) else {
            return;
        };
        // Once for each dump: what is forgiven each time would add up.
        if let Some(dump) = known.dump.as_mut().filter(|dump| !dump.settled) {
            if let Some(processes) = &mut dump.processes {
                processes.settle(watch, scene);
            }
            dump.settled = true;
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
    watch
        .forget_outsiders(&dirty)
        .map_err(|e| format!("cannot forget what the dump did: {e}"))?;
    let layer = outline(known, &dirty, scene);
    let mounts = Mounts::of(scene.init).map_err(|e| format!("cannot list the mounts: {e}"))?;
    let memory_files = MemoryFiles::of(scene.init, &mounts, scene.stop);
    let processes = Processes::take(&pids, scene, image, watch, consistent_cut);
    let references = References::of(&pids)
        .inspect_err(|e| log::info!("every file counts as used by the processes: {e}"));
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
    let marks_cleared = watch
        .marks_cleared()
        .map_err(|e| format!("cannot read what happened: {e}"))?;
    watch
        .watch_processes(&pids)
        .map_err(|e| format!("cannot watch the processes: {e}"))?;
    Ok(Taken {
        layer,
        memory_files,
        mounts,
        processes,
        references,
        marks_cleared,
    })
}
