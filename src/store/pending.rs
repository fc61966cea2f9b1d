//! A checkpoint that is being made.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use rustix::{
    fs::{CWD, RenameFlags},
    io::Errno,
};

use super::{
    Checkpoint, Contents, Digest, FORMAT, Facts, FileEntry, Kind, Manifest, SandboxStore,
    StoreError, TreeEntry, TreeSummary,
    capture::{Ahead, Captured, Filling, Part, ReadAhead, Temporary},
    chain::{self, Upon, WholeMap},
    failpoint::failpoint,
    files,
    ingest::Ingest,
    keep::{keep_bytes, keep_files},
    objects::Objects,
    pack::PackWriter,
    sandbox::Lock,
    seal,
    staging::{PARENT, Staging},
};
use crate::{sandbox::TurnNo, tree::remove_tree};

/// Where the writable layer of a checkpoint comes from.
#[derive(Debug, Clone, Copy)]
pub enum Files<'a> {
    /// It has none.
    None,
    /// It was captured.
    Captured,
    /// It is that of an earlier checkpoint.
    Same(&'a Checkpoint),
}

/// Where the processes of a checkpoint come from.
#[derive(Debug, Clone, Copy)]
pub enum Images<'a> {
    /// CRIU's images are staged; none may be. Those that build upon others
    /// ([`Pending::build_upon`]) are made whole.
    Staged,
    /// It has none; what is staged of them does not count.
    None,
    /// They are those of an earlier checkpoint, which must still be in the store. The newest one will
    /// do, even if it has its processes from an earlier one itself.
    Same(&'a Checkpoint),
}

/// A checkpoint that is being made: a directory to fill, a writable layer to capture, of which
/// [`Self::commit`] makes a pack.
pub struct Pending {
    store: SandboxStore,
    turn: TurnNo,
    pub(super) staging: Staging,
    bundle: BTreeMap<String, Vec<u8>>,
    lock: Arc<Lock>,
    filling: Option<Filling>,
    /// The images that those of this turn build upon.
    pub(super) last: Option<Vec<FileEntry>>,
    /// Directories of the turn's pre-dumps.
    pub(super) pre_dumps: Vec<PathBuf>,
}

impl Pending {
    pub(super) fn new(
        store: SandboxStore,
        lock: Arc<Lock>,
        turn: TurnNo,
    ) -> Result<Self, StoreError> {
        if store.pack_path(turn).exists() {
            return Err(StoreError::Exists {
                sandbox: store.id().clone(),
                turn,
            });
        }
        let dir = staged(&store.scratch_dir(), turn);
        let staging = Staging {
            image: dir.join("image"),
            dir,
            parent: store.scratch_dir().join(PARENT),
            maps: Vec::new(),
            _lock: Arc::clone(&lock),
        };
        Ok(Self {
            store,
            turn,
            staging,
            bundle: BTreeMap::new(),
            lock,
            filling: None,
            last: None,
            pre_dumps: Vec::new(),
        })
    }

    /// Has the images made elsewhere than beside the packs.
    pub(super) fn stage_below(&mut self, place: &Path) {
        self.staging.dir = staged(place, self.turn);
        self.staging.image = self.staging.dir.join("image");
    }

    /// Makes the directory for CRIU's images. Whoever has none is spared it: a directory that comes and
    /// goes costs as much as all else that a small checkpoint writes.
    pub(super) fn stage(&self) -> Result<(), StoreError> {
        let builder = super::dir_builder();
        let make = |path: &Path| builder.create(path).map_err(files::io("make", path));
        remove_tree(&self.staging.dir)?;
        make(&self.staging.dir)?;
        make(&self.staging.image)
    }

    /// Which turn's.
    pub fn turn(&self) -> TurnNo {
        self.turn
    }

    /// Where CRIU's images go: an empty directory, unless this is [without
    /// images](SandboxWriter::begin_without_images).
    pub fn image_dir(&self) -> &Path {
        &self.staging.image
    }

    /// Adds `config.json` or one of its friends: a file of the checkpoint's `bundle/`.
    pub fn add_to_bundle(&mut self, name: &str, content: Vec<u8>) {
        self.bundle.insert(name.to_owned(), content);
    }

    /// Begins the pack, so that nothing of that has to be waited for in a freeze: opens the others,
    /// and keeps [collection](SandboxWriter::collect) away from them for as long as this lives.
    pub fn prepare(&mut self) -> Result<(), StoreError> {
        self.filling().map(drop)
    }

    /// What is captured from now on may be compressed at once, on another processor, where no dump wants it.
    pub fn compress_early(&mut self) -> Result<(), StoreError> {
        self.filling()?.ingest.writer.compress_early(true);
        Ok(())
    }

    /// After [`Self::prepare`]: reads files of the layer at `upper` before anything stands still. One
    /// that changes meanwhile is left to the capture, and so are those of which `is_written` (by device
    /// and inode) says that they can change without a sign.
    pub fn read_ahead(
        &mut self,
        upper: &Path,
        which: &Ahead,
        before: Option<&Checkpoint>,
        is_written: &dyn Fn(u64, u64) -> bool,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), StoreError> {
        // For the order of what is looked up alone.
        let before = before.and_then(|before| before.tree().ok()?);
        let filling = self.filling()?;
        let was_early = filling.ingest.writer.compress_early(true);
        let read = filling.read_ahead(upper, which, before, is_written, stop);
        filling.ingest.writer.compress_early(was_early);
        read
    }

    /// Of how many files there is something that was read ahead.
    pub fn ahead(&self) -> usize {
        self.filling.as_ref().map_or(0, |it| it.ahead.len())
    }

    /// Drops what was read ahead of inodes, by device and number, that may have been written since.
    pub fn distrust(&mut self, is_written: impl Fn(u64, u64) -> bool) {
        if let Some(filling) = &mut self.filling {
            filling.ahead.distrust(is_written);
        }
    }

    /// Reads the writable layer at `upper` into the pack, while nothing writes to it; what is noticed of
    /// that is an error. May be called again; only the last call counts.
    pub fn capture(
        &mut self,
        upper: &Path,
        part: Part<'_>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Captured, StoreError> {
        if let Part::Changes { base, .. } = part {
            self.refuse_absent(base)?;
        }
        self.filling()?.capture(upper, part, stop)
    }

    fn filling(&mut self) -> Result<&mut Filling, StoreError> {
        let filling = match self.filling.take() {
            Some(filling) => filling,
            None => self.begin()?,
        };
        Ok(self.filling.insert(filling))
    }

    fn begin(&self) -> Result<Filling, StoreError> {
        let packs = self.lock.packs.lock_arc();
        let temporary = self.lock.spare.path().to_owned();
        let objects = Objects::open_from(&self.store.packs_dir(), &self.lock.shelf)?;
        let writer = match self.lock.spare.take() {
            Some(file) => PackWriter::into(&temporary, file)?,
            None => {
                files::remove(&temporary)?;
                let begin = Instant::now();
                let writer = PackWriter::create(&temporary)?;
                self.lock.spare.took(begin.elapsed());
                writer
            }
        };
        Ok(Filling {
            file: Temporary(temporary),
            ingest: Ingest::new(objects, writer),
            ahead: ReadAhead::default(),
            layer: None,
            _packs: packs,
        })
    }

    /// Puts whatever the sandbox's packs do not have yet into a new one and that in its place. When
    /// this returns, the checkpoint survives a power failure. What was staged stays until the
    /// second thing returned is dropped.
    pub fn commit(
        mut self,
        facts: Facts,
        images: Images<'_>,
        files: Files<'_>,
    ) -> Result<(Checkpoint, Staging), StoreError> {
        if let Images::Same(of) = images {
            self.refuse_absent(of)?;
        }
        if let Files::Same(of) = files {
            self.refuse_absent(of)?;
        }
        self.filling()?;
        let Some(filling) = self.filling.take() else {
            return Err(self.unfit("no pack was begun"));
        };
        // The lock is let go last, when the temporary file is gone.
        let Filling {
            _packs,
            file,
            mut ingest,
            layer,
            ..
        } = filling;
        // Nothing stands still any more.
        ingest.writer.compress_early(true);
        let (contents, maps) = self.contents(&mut ingest, &facts, images, (files, layer))?;
        self.staging.maps = maps;
        let manifest = self.manifest(facts, contents);
        let json = manifest.to_json(&file.0)?;
        let pack = ingest.writer.finish(Some(&json))?;
        let path = self.store.pack_path(self.turn);
        self.place(&file.0, &path)?;
        seal::commit(&pack, &path)?;
        failpoint("committed");
        *self.lock.head.lock() = None;
        if manifest.facts.kind == Kind::Full {
            *self.lock.with_processes.lock() = Some(self.turn);
        }
        let digest = Digest::of(&json);
        let checkpoint = Checkpoint::new(self.store.packs_dir(), manifest, digest, pack.size);
        self.lock.shelf.written(&checkpoint, &path, &json);
        Ok((checkpoint, self.staging))
    }

    fn manifest(&self, facts: Facts, contents: Contents) -> Manifest {
        Manifest {
            format: FORMAT,
            namespace: self.store.id().namespace().to_owned(),
            id: self.store.id().id().to_owned(),
            turn: self.turn,
            origin: None,
            facts,
            contents,
        }
    }

    fn unfit(&self, reason: &str) -> StoreError {
        StoreError::Unfit {
            path: self.store.pack_path(self.turn),
            reason: reason.into(),
        }
    }

    fn place(&self, temporary: &Path, path: &Path) -> Result<(), StoreError> {
        failpoint("rename a pack");
        rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE).map_err(|e| {
            match e {
                Errno::EXIST => StoreError::Exists {
                    sandbox: self.store.id().clone(),
                    turn: self.turn,
                },
                e => files::io("rename", temporary)(e.into()),
            }
        })
    }

    /// What is said to be as in a checkpoint must be in this sandbox's store.
    fn refuse_absent(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let path = self.store.pack_path(checkpoint.turn());
        if checkpoint.is_elsewhere(&self.store.packs_dir()) || !path.exists() {
            return Err(StoreError::NoTurn {
                sandbox: self.store.id().clone(),
                turn: checkpoint.turn(),
            });
        }
        Ok(())
    }

    fn contents(
        &self,
        ingest: &mut Ingest,
        facts: &Facts,
        images: Images<'_>,
        (files, layer): (Files<'_>, Option<(Digest, TreeEntry)>),
    ) -> Result<(Contents, Vec<WholeMap>), StoreError> {
        // For the order of what is looked up alone.
        let parent = match images {
            Images::Same(of) if Some(of.turn()) == facts.parent => Some(of.clone()),
            _ => facts.parent.and_then(|turn| self.store.get(turn).ok()),
        };
        let before = |list: fn(&Contents) -> &[FileEntry]| {
            let parent = parent.as_ref();
            parent.map_or(&[][..], |parent| list(&parent.manifest.contents))
        };
        let (image, maps) = match images {
            Images::Same(of) => (of.manifest.contents.image.clone(), Vec::new()),
            Images::None => (Vec::new(), Vec::new()),
            Images::Staged => self.keep_images(ingest, before(|c| &c.image))?,
        };
        let bundle = keep_bytes(ingest, &self.bundle, before(|c| &c.bundle))?;
        let upper = match files {
            Files::None => None,
            Files::Same(of) => of.manifest.contents.upper.clone(),
            Files::Captured => {
                let layer = layer.ok_or_else(|| self.unfit("no writable layer was captured"))?;
                Some(layer.into())
            }
        };
        let size = image.iter().chain(&bundle).map(|f| f.data).sum::<u64>();
        let layer = upper.as_ref().map_or(0, |u: &TreeSummary| u.bytes);
        let contents = Contents {
            bytes: size.saturating_add(layer),
            image,
            bundle,
            upper,
        };
        Ok((contents, maps))
    }

    /// Keeps what is staged of CRIU's images, whole.
    fn keep_images(
        &self,
        ingest: &mut Ingest,
        before: &[FileEntry],
    ) -> Result<(Vec<FileEntry>, Vec<WholeMap>), StoreError> {
        let newest_first: Vec<PathBuf> = self.pre_dumps.iter().rev().cloned().collect();
        let upon = Upon {
            pre_dumps: &newest_first,
            last: self.last.as_deref(),
        };
        let dir = &self.staging.image;
        let (mut image, maps) = keep_files(ingest, dir, before, !upon.is_nothing())?;
        let (pages, maps) = chain::keep(ingest, dir, &maps, &upon, before)?;
        image.extend(pages);
        image.sort_by(|a, b| a.path.cmp(&b.path));
        Ok((image, maps))
    }
}

/// Where the images of a turn are made.
fn staged(place: &Path, turn: TurnNo) -> PathBuf {
    place.join(format!("staged-{turn}"))
}

impl From<(Digest, TreeEntry)> for TreeSummary {
    fn from((digest, root): (Digest, TreeEntry)) -> Self {
        Self {
            digest,
            entries: root.entries(),
            bytes: root.data(),
        }
    }
}
