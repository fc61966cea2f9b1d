//! A checkpoint that is being made.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::{
    fs::{CWD, FileType, RenameFlags},
    io::Errno,
};
use sha2::Digest as _;

use super::{
    Checkpoint, Contents, Digest, FORMAT, Facts, FileEntry, Manifest, SandboxStore, StoreError,
    TreeSummary,
    digest::{self, Lister},
    files,
    sandbox::{Lock, TEMPORARY, checksum_line},
};
use crate::{
    sandbox::TurnNo,
    tree::{self, Durably, Expect, Found, TreeError, Visitor, remove_tree},
};

/// A checkpoint that is being made: directories to fill. Dropped without [`Self::commit`], it is
/// removed.
#[derive(Debug)]
pub struct Pending {
    store: SandboxStore,
    turn: TurnNo,
    dir: PathBuf,
    image: PathBuf,
    bundle: PathBuf,
    upper: PathBuf,
    committed: bool,
    durably: Durably,
    _lock: Arc<Lock>,
}

impl Pending {
    pub(super) fn new(
        store: SandboxStore,
        lock: Arc<Lock>,
        turn: TurnNo,
    ) -> Result<Self, StoreError> {
        if store.turn_dir(turn).exists() {
            return Err(StoreError::Exists {
                sandbox: store.id().clone(),
                turn,
            });
        }
        let dir = store.turns_dir().join(format!("{TEMPORARY}{turn}"));
        let builder = super::dir_builder();
        let make = |path: &Path| builder.create(path).map_err(files::io("make", path));
        make(&dir)?;
        let pending = Self {
            image: dir.join("image"),
            bundle: dir.join("bundle"),
            upper: dir.join("upper"),
            committed: false,
            durably: Durably::at(&dir)?,
            _lock: lock,
            store,
            turn,
            dir,
        };
        make(&pending.image)?;
        make(&pending.bundle)?;
        Ok(pending)
    }

    /// Which turn's.
    pub fn turn(&self) -> TurnNo {
        self.turn
    }

    /// Where CRIU's images go: an empty directory.
    pub fn image_dir(&self) -> &Path {
        &self.image
    }

    /// Where `config.json` and friends go: an empty directory.
    pub fn bundle_dir(&self) -> &Path {
        &self.bundle
    }

    /// Where the copy of the writable layer goes. Not made: `rootfs::capture` does. If it stays
    /// absent, the checkpoint has no files.
    pub fn upper_dir(&self) -> &Path {
        &self.upper
    }

    /// Digests everything, writes it to the disk and puts the checkpoint in its place. When this
    /// returns, it survives a power failure.
    pub fn commit(mut self, facts: Facts) -> Result<Checkpoint, StoreError> {
        let contents = self.contents()?;
        let manifest = Manifest {
            format: FORMAT,
            namespace: self.store.id().namespace().to_owned(),
            id: self.store.id().id().to_owned(),
            turn: self.turn,
            facts,
            contents,
        };
        let path = self.dir.join("manifest.json");
        let json = manifest.to_json(&path)?;
        let digest = Digest::of(&json);
        files::write_new(&path, &json)?;
        let sum = self.dir.join("manifest.sha256");
        files::write_new(&sum, checksum_line(&digest).as_bytes())?;
        self.durably.sync(&self.dir)?;

        let (turns, dir) = (self.store.turns_dir(), self.store.turn_dir(self.turn));
        rustix::fs::renameat_with(CWD, &self.dir, CWD, &dir, RenameFlags::NOREPLACE).map_err(
            |e| match e {
                Errno::EXIST => StoreError::Exists {
                    sandbox: self.store.id().clone(),
                    turn: self.turn,
                },
                e => files::io("rename", &self.dir)(e.into()),
            },
        )?;
        self.committed = true;
        files::sync_dir(&turns)?;
        Ok(Checkpoint {
            manifest,
            digest,
            dir,
        })
    }

    fn contents(&self) -> Result<Contents, StoreError> {
        let image = list_files(&self.image)?;
        let bundle = list_files(&self.bundle)?;
        let upper = match self.upper.exists() {
            true => Some(list_tree(&self.upper, &self.dir.join("upper.list"))?),
            false => None,
        };
        let files = image.iter().chain(&bundle).map(|f| f.size).sum::<u64>();
        Ok(Contents {
            bytes: files + upper.as_ref().map_or(0, |u| u.bytes),
            image,
            bundle,
            upper,
        })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.committed
            && let Err(e) = remove_tree(&self.dir)
        {
            log::warn!(
                "{}: an abandoned checkpoint stays until the next start: {e}",
                self.store.id()
            );
        }
    }
}

/// Digests of all files below a directory of crab's own making.
pub(super) fn list_files(dir: &Path) -> Result<Vec<FileEntry>, StoreError> {
    let mut files = Files {
        root: dir,
        list: Vec::new(),
        unfit: None,
    };
    let root = tree::open_root(dir)?;
    tree::walk(root, dir, Expect::Unchanged, &|| false, &mut files)?;
    match files.unfit {
        Some(error) => Err(error),
        None => Ok(files.list),
    }
}

struct Files<'a> {
    root: &'a Path,
    list: Vec<FileEntry>,
    unfit: Option<StoreError>,
}

impl Visitor for Files<'_> {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let path = found
            .path
            .strip_prefix(self.root)
            .ok()
            .and_then(Path::to_str);
        match (found.kind(), path) {
            (FileType::RegularFile, Some(path)) => {
                let (sha256, size) = digest::of_file(found)?;
                self.list.push(FileEntry {
                    path: path.to_owned(),
                    size,
                    sha256,
                });
            }
            // CRIU's `parent` link is one: a checkpoint must not depend on another (D8).
            (kind, _) => {
                self.unfit.get_or_insert(StoreError::Unfit {
                    path: found.path.to_owned(),
                    reason: match kind {
                        FileType::RegularFile => "its name is not UTF-8".into(),
                        kind => format!("it is a {kind:?}, not a regular file"),
                    },
                });
            }
        }
        Ok(())
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

/// Writes the list of a tree, and sums it up.
fn list_tree(dir: &Path, list: &Path) -> Result<TreeSummary, StoreError> {
    let file = files::write_new(list, b"")?;
    let mut out = BufWriter::with_capacity(256 << 10, file);
    let (mut entries, mut bytes) = (0, 0);
    let mut hash = sha2::Sha256::new();
    let mut failed = None;
    let mut lister = Lister {
        each: |entry: digest::Entry, size, _: &Found<'_>| {
            let line = entry.line();
            hash.update(line.as_bytes());
            failed = failed.take().or(out.write_all(line.as_bytes()).err());
            entries += 1;
            bytes += size;
            Ok(())
        },
    };
    let root = tree::open_root(dir)?;
    tree::walk(root, dir, Expect::Unchanged, &|| false, &mut lister)?;
    let written: Result<File, _> = out.into_inner().map_err(|e| e.into_error());
    match failed.map_or(written, Err) {
        Ok(_) => Ok(TreeSummary {
            digest: Digest::from_hash(hash),
            entries,
            bytes,
        }),
        Err(e) => Err(files::io("write", list)(e)),
    }
}
