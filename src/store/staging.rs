//! The directory in which a checkpoint's images are made, and what later ones build upon.
//!
//! ```text
//! tmp/staged-N/image     the dump
//! tmp/staged-N/pre-1     the turn's pre-dumps
//! tmp/parent             of the last dump: the indexes of its pages, made whole, and CRIU's inventory
//! ```
//!
//! A small dump that none builds upon may be made elsewhere, in memory: what is never to be on the disk as it is
//! need not go through the file system's journal.
//!
//! CRIU looks into the dump that one builds upon for which pages there are, and reads none: so the files of
//! pages there have their size, and no content.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Checkpoint, Pending, StoreError,
    chain::{self, WholeMap},
    dir_builder, files,
    sandbox::Lock,
};
use crate::tree::remove_tree;

/// What the last dump has left, below the directory for scratch.
pub(super) const PARENT: &str = "parent";
/// What CRIU tells of a dump as a whole: when it was, above all.
const INVENTORY: &str = "inventory.img";

/// The directory that is filled before a checkpoint is committed. It is removed when this is dropped.
#[derive(Debug)]
pub struct Staging {
    pub(super) dir: PathBuf,
    pub(super) image: PathBuf,
    /// Where it goes that later dumps build upon it.
    pub(super) parent: PathBuf,
    /// Indexes of its pages that were made whole.
    pub(super) maps: Vec<WholeMap>,
    pub(super) _lock: Arc<Lock>,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = remove_tree(&self.dir) {
            log::warn!("a staged checkpoint stays until the next start: {e}");
        }
    }
}

impl Staging {
    /// The images are in the store. Later dumps can build upon them from now on, and upon no earlier ones.
    pub fn leave_as_parent(&self) -> Result<(), StoreError> {
        remove_tree(&self.parent)?;
        for name in files::all_names(&self.image)? {
            let path = self.image.join(&name);
            if chain::is_about_pages(&name) {
                if !chain::is_map(&name) {
                    empty(&path)?;
                }
            } else if name != INVENTORY {
                files::remove(&path)?;
            }
        }
        for map in &self.maps {
            write(&self.image.join(&map.name), &map.bytes)?;
            let pages = self.image.join(&map.pages);
            let file = open(&pages)?;
            file.set_len(map.size)
                .map_err(files::io("extend", &pages))?;
        }
        fs::rename(&self.image, &self.parent).map_err(files::io("rename", &self.image))
    }
}

/// Leaves a file's size alone: nobody reads what is in it.
fn empty(path: &Path) -> Result<(), StoreError> {
    let file = open(path)?;
    let size = file.metadata().map_err(files::io("stat", path))?.len();
    file.set_len(0).map_err(files::io("empty", path))?;
    file.set_len(size).map_err(files::io("extend", path))
}

fn open(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(files::io("open", path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut file = open(path)?;
    file.set_len(0).map_err(files::io("empty", path))?;
    file.write_all(bytes).map_err(files::io("write", path))
}

impl Pending {
    /// The images build upon those of `last`, which [`Staging::leave_as_parent`] has left; call it before
    /// any pre-dump.
    pub fn build_upon(&mut self, last: &Checkpoint) {
        self.last = Some(last.manifest.contents.image.clone());
    }

    /// A directory for one more pre-dump, upon which the images build then.
    pub fn add_pre_dump(&mut self) -> Result<PathBuf, StoreError> {
        let number = self.pre_dumps.len() + 1;
        let dir = self.staging.dir.join(format!("pre-{number}"));
        dir_builder()
            .create(&dir)
            .map_err(files::io("make", &dir))?;
        self.pre_dumps.push(dir.clone());
        Ok(dir)
    }

    /// The images build upon nothing after all: the last pre-dump has failed.
    pub fn build_upon_nothing(&mut self) {
        self.last = None;
        self.pre_dumps.clear();
    }

    /// What the next dump or pre-dump builds upon, as seen from its own directory.
    pub fn parent_path(&self) -> Option<PathBuf> {
        match self.pre_dumps.len() {
            0 => self.last.as_ref().map(|_| Path::new("../..").join(PARENT)),
            number => Some(format!("../pre-{number}").into()),
        }
    }
}
