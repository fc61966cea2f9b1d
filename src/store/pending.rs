//! A checkpoint that is being made.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, FileType, RenameFlags},
    io::Errno,
};

use super::{
    Checkpoint, Contents, Digest, FORMAT, Facts, FileEntry, Kind, LayerChanges, Manifest,
    SandboxStore, StoreError, TreeSummary,
    content::{Cut, FILE_CHUNK, PAGE_CHUNK},
    failpoint::failpoint,
    files,
    ingest::Ingest,
    layer,
    objects::Objects,
    pack::PackWriter,
    sandbox::{Lock, TEMPORARY},
};
use crate::{
    sandbox::TurnNo,
    tree::{self, Expect, Found, TreeError, Visitor, remove_tree},
};

/// Where the writable layer of a checkpoint comes from.
#[derive(Debug, Clone, Copy)]
pub enum Files<'a> {
    /// None was captured.
    None,
    /// The staged copy is all of it.
    Whole,
    /// It is that of an earlier checkpoint.
    Same(&'a Checkpoint),
    /// It is that of an earlier checkpoint, but for what is staged and what is gone.
    Delta {
        /// The earlier one.
        base: &'a Checkpoint,
        /// What differs.
        changes: &'a LayerChanges,
    },
}

/// Where the processes of a checkpoint come from.
#[derive(Debug, Clone, Copy)]
pub enum Images<'a> {
    /// CRIU's images are staged; none may be.
    Staged,
    /// It has none; what is staged of them does not count.
    None,
    /// They are those of an earlier checkpoint, which must still be in the store. The newest one will
    /// do, even if it has its processes from an earlier one itself.
    Same(&'a Checkpoint),
}

/// Directories that are filled before a checkpoint is committed. They are removed when this is
/// dropped.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    image: PathBuf,
    bundle: PathBuf,
    upper: PathBuf,
    _lock: Arc<Lock>,
}

impl Staging {
    /// Where the copy of the writable layer is.
    pub fn upper_dir(&self) -> &Path {
        &self.upper
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = remove_tree(&self.dir) {
            log::warn!("a staged checkpoint stays until the next start: {e}");
        }
    }
}

/// A checkpoint that is being made: directories to fill, of which [`Self::commit`] makes a pack.
#[derive(Debug)]
pub struct Pending {
    store: SandboxStore,
    turn: TurnNo,
    staging: Staging,
    lock: Arc<Lock>,
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
        let dir = store.scratch_dir().join(format!("staged-{turn}"));
        let builder = super::dir_builder();
        let make = |path: &Path| builder.create(path).map_err(files::io("make", path));
        remove_tree(&dir)?;
        make(&dir)?;
        let staging = Staging {
            image: dir.join("image"),
            bundle: dir.join("bundle"),
            upper: dir.join("upper"),
            dir,
            _lock: Arc::clone(&lock),
        };
        make(&staging.image)?;
        make(&staging.bundle)?;
        Ok(Self {
            store,
            turn,
            staging,
            lock,
        })
    }

    /// Which turn's.
    pub fn turn(&self) -> TurnNo {
        self.turn
    }

    /// Where CRIU's images go: an empty directory.
    pub fn image_dir(&self) -> &Path {
        &self.staging.image
    }

    /// Where `config.json` and friends go: an empty directory.
    pub fn bundle_dir(&self) -> &Path {
        &self.staging.bundle
    }

    /// Where the copy of the writable layer goes. Not made: `rootfs::capture` does.
    pub fn upper_dir(&self) -> &Path {
        &self.staging.upper
    }

    /// Puts whatever the sandbox's packs do not have yet into a new one and that in its place. When
    /// this returns, the checkpoint survives a power failure. What was staged stays until the
    /// second thing returned is dropped.
    pub fn commit(
        self,
        facts: Facts,
        images: Images<'_>,
        files: Files<'_>,
    ) -> Result<(Checkpoint, Staging), StoreError> {
        // Nothing that this checkpoint is about to refer to may go meanwhile.
        let lock = Arc::clone(&self.lock);
        let _packs = lock.packs.lock();
        let path = self.store.pack_path(self.turn);
        let name = format!("{TEMPORARY}{}.pack", self.turn);
        let temporary = self.store.packs_dir().join(name);
        let written = self.write(&temporary, facts, images, files);
        let placed = written.and_then(|written| {
            self.place(&temporary, &path)?;
            Ok(written)
        });
        let (manifest, digest, stored) = placed.inspect_err(|_| {
            // The next writer does it otherwise.
            let _ = files::remove(&temporary);
        })?;
        failpoint("sync packs");
        files::sync_dir(&self.store.packs_dir())?;
        failpoint("committed");
        *lock.head.lock() = None;
        if manifest.facts.kind == Kind::Full {
            *lock.with_processes.lock() = Some(self.turn);
        }
        let checkpoint = Checkpoint::new(self.store.packs_dir(), manifest, digest, stored);
        Ok((checkpoint, self.staging))
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

    fn write(
        &self,
        temporary: &Path,
        facts: Facts,
        images: Images<'_>,
        files: Files<'_>,
    ) -> Result<(Manifest, Digest, u64), StoreError> {
        self.refuse_absent(images, files)?;
        let objects = Objects::open(&self.store.packs_dir())?;
        files::remove(temporary)?;
        let mut ingest = Ingest::new(objects, PackWriter::create(temporary)?);
        let parent = facts.parent.map(|parent| self.store.get(parent));
        // For the order of what is looked up alone.
        let parent = parent.and_then(Result::ok);
        let contents = self.contents(&mut ingest, parent.as_ref(), images, files)?;
        let manifest = Manifest {
            format: FORMAT,
            namespace: self.store.id().namespace().to_owned(),
            id: self.store.id().id().to_owned(),
            turn: self.turn,
            origin: None,
            facts,
            contents,
        };
        let json = manifest.to_json(temporary)?;
        let stored = ingest.writer.finish(Some(&json))?;
        Ok((manifest, Digest::of(&json), stored))
    }

    /// What is said to be as in a checkpoint must be in this sandbox's store.
    fn refuse_absent(&self, images: Images<'_>, files: Files<'_>) -> Result<(), StoreError> {
        let image = match images {
            Images::Same(of) => Some(of),
            Images::Staged | Images::None => None,
        };
        let layer = match files {
            Files::Same(of) | Files::Delta { base: of, .. } => Some(of),
            Files::None | Files::Whole => None,
        };
        for checkpoint in image.into_iter().chain(layer) {
            let path = self.store.pack_path(checkpoint.turn());
            if checkpoint.is_elsewhere(&self.store.packs_dir()) || !path.exists() {
                return Err(StoreError::NoTurn {
                    sandbox: self.store.id().clone(),
                    turn: checkpoint.turn(),
                });
            }
        }
        Ok(())
    }

    fn contents(
        &self,
        ingest: &mut Ingest,
        parent: Option<&Checkpoint>,
        images: Images<'_>,
        files: Files<'_>,
    ) -> Result<Contents, StoreError> {
        let before = |list: fn(&Contents) -> &[FileEntry]| {
            parent.map_or(&[][..], |parent| list(&parent.manifest.contents))
        };
        let image = match images {
            Images::Same(of) => of.manifest.contents.image.clone(),
            Images::None => Vec::new(),
            Images::Staged => keep_files(ingest, &self.staging.image, before(|c| &c.image))?,
        };
        let bundle = keep_files(ingest, &self.staging.bundle, before(|c| &c.bundle))?;
        let upper = match files {
            Files::None => None,
            Files::Same(of) => of.manifest.contents.upper.clone(),
            Files::Whole => Some(layer::whole(ingest, &self.staging.upper)?.into()),
            Files::Delta { base, changes } => {
                let upper = base.manifest.contents.upper.as_ref();
                let root = upper.ok_or_else(|| StoreError::Unfit {
                    path: self.staging.upper.clone(),
                    reason: format!("turn {} has no files to build upon", base.turn()),
                })?;
                Some(layer::delta(ingest, &root.digest, &self.staging.upper, changes)?.into())
            }
        };
        let size = image.iter().chain(&bundle).map(|f| f.data).sum::<u64>();
        let layer = upper.as_ref().map_or(0, |u: &TreeSummary| u.bytes);
        Ok(Contents {
            bytes: size.saturating_add(layer),
            image,
            bundle,
            upper,
        })
    }
}

impl From<(Digest, super::TreeEntry)> for TreeSummary {
    fn from((digest, root): (Digest, super::TreeEntry)) -> Self {
        Self {
            digest,
            entries: root.entries(),
            bytes: root.data(),
        }
    }
}

/// Keeps all files below a directory of crab's own making. `before`: those of the checkpoint before.
fn keep_files(
    ingest: &mut Ingest,
    dir: &Path,
    before: &[FileEntry],
) -> Result<Vec<FileEntry>, StoreError> {
    let mut keeper = Keeper {
        ingest,
        root: dir,
        before,
        list: Vec::new(),
        failed: None,
    };
    let root = tree::open_root(dir)?;
    let walked = tree::walk(root, dir, Expect::Unchanged, &|| false, &mut keeper);
    match keeper.failed {
        Some(error) => Err(error),
        None => {
            walked?;
            Ok(keeper.list)
        }
    }
}

struct Keeper<'a> {
    ingest: &'a mut Ingest,
    root: &'a Path,
    before: &'a [FileEntry],
    list: Vec<FileEntry>,
    failed: Option<StoreError>,
}

impl Keeper<'_> {
    fn keep(&mut self, found: &Found<'_>) -> Result<(), StoreError> {
        let path = found.path.strip_prefix(self.root).ok();
        let (FileType::RegularFile, Some(path)) = (found.kind(), path.and_then(Path::to_str))
        else {
            // CRIU's `parent` link is one: a checkpoint must not depend on another (D8).
            return Err(StoreError::Unfit {
                path: found.path.to_owned(),
                reason: match found.kind() {
                    FileType::RegularFile => "its name is not UTF-8".into(),
                    kind => format!("it is a {kind:?}, not a regular file"),
                },
            });
        };
        let before = self.before.iter().find(|file| file.path == path);
        let chunk = chunk_of(path);
        let content = self.ingest.file(found, chunk, before.map(FileEntry::cut))?;
        let cut = Cut { content, chunk };
        self.list.push(FileEntry {
            path: path.to_owned(),
            size: cut.content.size,
            data: cut.content.data,
            chunk: cut.chunk,
            digest: cut.content.root,
        });
        Ok(())
    }
}

/// CRIU's files of pages are cut into pages.
fn chunk_of(path: &str) -> u32 {
    match path.starts_with("pages-") {
        true => PAGE_CHUNK,
        false => FILE_CHUNK,
    }
}

impl Visitor for Keeper<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.keep(found).map_err(|e| {
            self.failed.get_or_insert(e);
            found.changed("it cannot be kept")
        })
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}
