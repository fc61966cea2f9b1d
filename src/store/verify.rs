//! Whether the store still holds what was put into it.

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
};

use super::{
    Checkpoint, Digest, FileEntry, SandboxStore, StoreError,
    content::{Cut, read_chunk},
    directory,
    entry::{DirRef, Node, TreeEntry, kind},
    objects::{self, Objects, slice},
    pack::{Pack, Place},
};
use crate::sandbox::TurnNo;

/// As many faults are named.
const MAX_FAULTS: usize = 100;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A file of the checkpoint: below `image`, `bundle` or `upper`, escaped; or a pack.
    pub path: String,
    /// What.
    pub reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

impl SandboxStore {
    /// Reads everything that a checkpoint needs and compares it with its digests. Names up to 100
    /// faults; none means that it is sound. An error means that the manifest itself is not.
    pub fn verify(&self, turn: TurnNo) -> Result<Vec<Fault>, StoreError> {
        let checkpoint = self.get(turn)?;
        let mut verifier = Verifier::of(&checkpoint)?;
        let contents = &checkpoint.manifest.contents;
        for (dir, files) in [("image", &contents.image), ("bundle", &contents.bundle)] {
            for file in files {
                verifier.file(dir, file);
            }
        }
        if let Some(upper) = &contents.upper {
            verifier.tree(&upper.digest);
        }
        verifier.faults.truncate(MAX_FAULTS);
        Ok(verifier.faults)
    }

    /// Reads every byte of every pack. What is broken here need not be missed by a checkpoint.
    pub fn verify_packs(&self) -> Result<Vec<Fault>, StoreError> {
        let mut faults = Vec::new();
        for name in objects::list(&self.packs_dir())? {
            let path = self.packs_dir().join(name.file());
            let found = check_pack(&path);
            let named = |reason| Fault {
                path: format!("packs/{}", name.file()),
                reason,
            };
            match found {
                Ok(found) => faults.extend(found.into_iter().map(named)),
                Err(e) => faults.push(named(e.to_string())),
            }
        }
        faults.truncate(MAX_FAULTS);
        Ok(faults)
    }
}

impl Checkpoint {
    /// Reads all of the writable layer and compares it with its digests.
    pub(super) fn check_upper(&self) -> Result<(), StoreError> {
        let Some(upper) = &self.manifest.contents.upper else {
            return Ok(());
        };
        let mut verifier = Verifier::of(self)?;
        verifier.tree(&upper.digest);
        match verifier.faults.into_iter().next() {
            None => Ok(()),
            Some(fault) => Err(verifier.objects.damaged(fault.to_string())),
        }
    }
}

struct Verifier {
    objects: Objects,
    faults: Vec<Fault>,
    /// Contents and directories that were whole.
    sound: HashSet<Digest>,
}

impl Verifier {
    fn of(checkpoint: &Checkpoint) -> Result<Self, StoreError> {
        Ok(Self {
            objects: checkpoint.strict_objects()?,
            faults: Vec::new(),
            sound: HashSet::new(),
        })
    }

    fn fault(&mut self, path: String, error: &StoreError) {
        self.faults.push(Fault {
            path,
            reason: error.to_string(),
        });
    }

    fn file(&mut self, dir: &str, file: &FileEntry) {
        let path = format!("{dir}/{}", file.path.escape_debug());
        self.content(path, &file.cut());
    }

    fn content(&mut self, path: String, cut: &Cut) {
        if let Err(e) = self.try_content(cut) {
            self.fault(path, &e);
        }
    }

    fn try_content(&mut self, cut: &Cut) -> Result<(), StoreError> {
        if self.sound.contains(&cut.content.root) {
            return Ok(());
        }
        let mut data = 0;
        let mut each = |objects: &mut Objects, number, digest: &Digest| {
            data += read_chunk(objects, cut, number, digest)?.len() as u64;
            Ok(())
        };
        cut.for_each(&mut self.objects, &mut |_| true, &mut each)?;
        if data != cut.content.data {
            return Err(self.objects.damaged("its lists hold other chunks"));
        }
        self.sound.insert(cut.content.root);
        Ok(())
    }

    fn tree(&mut self, root: &Digest) {
        let root = match directory::read_root(&mut self.objects, root) {
            Ok(root) => root,
            Err(e) => return self.fault("upper".into(), &e),
        };
        let mut todo = vec![(PathBuf::from("upper"), root)];
        while let Some((path, entry)) = todo.pop() {
            if self.faults.len() >= MAX_FAULTS {
                return;
            }
            match &entry.node {
                Node::Directory(dir) => self.directory(&path, dir, &mut todo),
                Node::File(content) => self.content(shown(&path), &Cut::file(*content)),
                _ => {}
            }
        }
    }

    fn directory(&mut self, path: &Path, dir: &DirRef, todo: &mut Vec<(PathBuf, TreeEntry)>) {
        if self.sound.contains(&dir.root) {
            return;
        }
        let before = self.faults.len();
        match directory::read_dir(&mut self.objects, dir) {
            Ok(entries) => {
                let sums = entries.iter().fold((0u64, 0u64), |(names, data), entry| {
                    let names = names.saturating_add(entry.entries());
                    (names, data.saturating_add(entry.data()))
                });
                if sums != (dir.entries, dir.data) {
                    let e = self.objects.damaged("its directory has other sums");
                    self.fault(shown(path), &e);
                }
                todo.extend(entries.into_iter().map(|e| (path.join(e.name()), e)));
            }
            Err(e) => self.fault(shown(path), &e),
        }
        // What lies below is looked at once, and named once.
        if self.faults.len() == before {
            self.sound.insert(dir.root);
        }
    }
}

fn shown(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().escape_ascii().to_string()
}

/// Every block and object of one pack. An error if it is broken in a way that ends the search.
fn check_pack(path: &Path) -> Result<Vec<String>, StoreError> {
    let mut pack = Pack::open(path)?;
    let mut faults = Vec::new();
    if let Err(e) = pack.manifest() {
        faults.push(e.to_string());
    }
    pack.check()?;
    let mut objects = pack.objects()?;
    objects.sort_unstable_by_key(|(_, place)| (place.block, place.offset));
    let mut rest = objects.as_slice();
    for number in 0..pack.blocks() {
        let here = rest.partition_point(|(_, place)| u64::from(place.block) <= number);
        let (these, later) = rest.split_at(here);
        rest = later;
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        match pack.block(number) {
            Ok(block) => faults.extend(check_block(number, &block, these)),
            Err(e) => {
                let lost = these.iter().map(|(digest, _)| digest.to_string());
                let lost: Vec<_> = lost.take(3).collect();
                faults.push(format!(
                    "{e}; lost: {} object(s): {} …",
                    these.len(),
                    lost.join(", ")
                ));
            }
        }
    }
    if !rest.is_empty() {
        faults.push(format!("{} objects are in no block", rest.len()));
    }
    Ok(faults)
}

/// The objects of one block, in its order: whole, without a gap.
fn check_block(number: u32, block: &[u8], objects: &[(Digest, Place)]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut end = 0;
    for (digest, place) in objects {
        let bytes = slice(block, place).unwrap_or_default();
        let known = matches!(place.kind, kind::CHUNK..=kind::ROOT);
        if !known || Digest::of_object(place.kind, bytes) != *digest {
            faults.push(format!("object {digest} is not what its digest says"));
        }
        if place.offset != end {
            faults.push(format!("block {number} has a gap"));
        }
        end = place.offset.saturating_add(place.length);
    }
    if end as usize != block.len() {
        faults.push(format!("block {number} holds more than its objects"));
    }
    faults
}
