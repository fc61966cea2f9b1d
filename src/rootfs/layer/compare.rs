//! From candidates to changes.
//!
//! A candidate that is a directory is listed again, one that is anything else is compared under
//! the first of its names that is still there. What a listing shows to be new, or to be another
//! inode than before, is compared with everything below it (`deep`). A name that is not where the
//! index has it, though its directory was no candidate, makes that directory one.

use std::{
    collections::{HashMap, HashSet},
    ffi::{CStr, OsStr},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{FileType, Stat};

use super::{
    changes::{Candidate, Change, Comparison, Now, Scope, What, shown_path},
    content::{Reader, unchanged},
    delta::{Delta, Insert, Place},
    facts::{Facts, Kind, Verdict, View},
    index::{Id, Layer},
    listing::{self, Listed},
    read::indexable,
};
use crate::{
    digest::Digest,
    tree::{self, Found, ShownPath, TreeError, failed, wide},
};

impl Layer {
    /// What differs in `upper` from the index, which stays as it is.
    ///
    /// `candidates` are all inodes that changed since the last capture, and any number of others.
    /// Nothing may write into the layer meanwhile; what is noticed of it is an error. For a look
    /// at a running sandbox take any error as a change, and do not [`Layer::apply`] the result.
    /// Anything on another file system below `upper` is an error too.
    pub fn compare(
        &self,
        upper: &Path,
        candidates: &[Candidate],
        scope: Scope,
        stop: &dyn Fn() -> bool,
    ) -> Result<Comparison, TreeError> {
        let root = tree::open_root(upper)?;
        let stat = rustix::fs::fstat(&root).map_err(failed("stat", upper))?;
        let mine = |c: &&Candidate| c.dev == self.dev;
        let unknown = |c: &&Candidate| mine(c) && self.named(c.ino).is_empty();
        let mut look = Look {
            layer: self,
            upper,
            root,
            stop,
            reader: Reader::new(stop),
            unexplained: candidates.iter().filter(unknown).map(|c| c.ino).collect(),
            settled: HashSet::new(),
            relisted: HashSet::new(),
            lost: HashSet::new(),
            changed: HashSet::new(),
            moved: HashMap::new(),
            digests: HashMap::new(),
            changes: Vec::new(),
            delta: Delta {
                generation: self.generation,
                removed: Vec::new(),
                updated: Vec::new(),
                inserted: Vec::new(),
            },
            names: 0,
        };
        // Another directory is there: nothing is known of it.
        let replaced = wide(stat.st_dev) != self.dev || wide(stat.st_ino) != self.ino(Id::ROOT);
        if replaced || scope == Scope::Everything {
            look.everything()?;
        } else {
            look.candidates(candidates.iter().filter(mine).map(|c| c.ino))?;
            if scope == Scope::Search {
                look.search()?;
            }
        }
        look.links();
        look.finish(candidates)
    }
}

pub(super) struct Look<'a> {
    pub(super) layer: &'a Layer,
    pub(super) upper: &'a Path,
    pub(super) root: OwnedFd,
    pub(super) stop: &'a dyn Fn() -> bool,
    reader: Reader<'a>,
    /// Candidates that no name was found for.
    unexplained: HashSet<u64>,
    /// Names that nothing more is to be found out about, nor about what is below them.
    pub(super) settled: HashSet<Id>,
    relisted: HashSet<Id>,
    /// Names that are gone, or of another kind.
    pub(super) lost: HashSet<Id>,
    pub(super) changed: HashSet<Id>,
    /// Names that have another inode now.
    pub(super) moved: HashMap<Id, u64>,
    /// Of inodes with several names.
    digests: HashMap<u64, Digest>,
    pub(super) changes: Vec<Change>,
    pub(super) delta: Delta,
    /// Bytes of new names.
    pub(super) names: usize,
}

impl<'a> Look<'a> {
    fn candidates(&mut self, inodes: impl Iterator<Item = u64>) -> Result<(), TreeError> {
        let layer = self.layer;
        let (mut dirs, mut others) = (Vec::new(), Vec::new());
        for ino in inodes {
            match layer.named(ino) {
                [] => {}
                [id] if layer.kind(*id) == Kind::Dir => dirs.push((layer.depth(*id), *id)),
                _ => others.push(ino),
            }
        }
        // From the top: what a directory has lost need not be listed.
        dirs.sort_unstable();
        for (_, id) in dirs {
            self.relist(id)?;
        }
        others.into_iter().try_for_each(|ino| self.inode(ino))
    }

    /// Compares an inode under a name that it had and has.
    fn inode(&mut self, ino: u64) -> Result<(), TreeError> {
        let layer = self.layer;
        let mut known: Option<(Facts, Option<What>)> = None;
        for id in layer.named(ino).iter().copied() {
            if self.settled.contains(&id) {
                continue;
            }
            let path = layer.path(id);
            let shown = self.shown(&path);
            let there = tree::reach(&self.root, &path, &shown)?;
            let Some((fd, stat)) = there.filter(|(_, stat)| wide(stat.st_ino) == ino) else {
                self.misplaced(id, &shown)?;
                continue;
            };
            let found = found(fd.as_fd(), &stat, &shown);
            let (facts, what) = match known {
                Some(known) => known,
                None => self.judge(&layer.facts(id), &found)?,
            };
            known = Some((facts, what));
            match what {
                // Removed and made anew under the same number, perhaps with much below it.
                Some(What::Kind) => self.deep_at(&path, id)?,
                _ => {
                    unchanged(&found)?;
                    self.settled.insert(id);
                    self.note(id, what, &facts, &found)?;
                }
            }
            // Its other names are names of an equal inode.
            if what.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Lists a directory again.
    fn relist(&mut self, id: Id) -> Result<(), TreeError> {
        if self.settled.contains(&id) || !self.relisted.insert(id) {
            return Ok(());
        }
        let path = self.layer.path(id);
        let shown = self.shown(&path);
        let there = tree::reach(&self.root, &path, &shown)?;
        let ino = self.layer.ino(id);
        match there.filter(|(_, stat)| wide(stat.st_ino) == ino) {
            None => self.misplaced(id, &shown),
            Some((fd, stat)) => {
                let now = FileType::from_raw_mode(stat.st_mode);
                match (self.layer.kind(id), now) {
                    (Kind::Dir, FileType::Directory) => self.list(id, &path, &fd, &stat),
                    _ => self.deep_at(&path, id),
                }
            }
        }
    }

    /// An inode is not where the index has it: the nearest directory above that is knows more.
    fn misplaced(&mut self, id: Id, shown: &Path) -> Result<(), TreeError> {
        let layer = self.layer;
        for dir in std::iter::successors(layer.parent(id), |id| layer.parent(*id)) {
            let path = layer.path(dir);
            let there = tree::reach(&self.root, &path, &self.shown(&path))?;
            if there.is_some_and(|(_, stat)| wide(stat.st_ino) == layer.ino(dir)) {
                self.relist(dir)?;
                break;
            }
        }
        // All that a listing finds moved or gone is settled with it.
        match self.settled.contains(&id) {
            true => Ok(()),
            false => Err(TreeError::Changed {
                path: ShownPath::new(shown),
                what: "it was moved",
            }),
        }
    }

    fn list(&mut self, id: Id, path: &Path, fd: &OwnedFd, stat: &Stat) -> Result<(), TreeError> {
        let shown = self.shown(path);
        let dir = tree::open_dir(fd).map_err(failed("open", &shown))?;
        let found = found(dir.as_fd(), stat, &shown);
        self.reader.check_stop(&found)?;
        let (facts, what) = self.judge(&self.layer.facts(id), &found)?;
        self.note(id, what, &facts, &found)?;
        let mut before = self.children(id);
        for now in listing::list(dir.as_fd(), &shown)? {
            let old = before.remove(now.name.to_bytes());
            if old.is_none_or(|old| self.another(old, &now)) {
                let path = path.join(OsStr::from_bytes(now.name.to_bytes()));
                self.deep(Place::Known(id), dir.as_fd(), &now.name, &path, old)?;
            }
        }
        for id in before.into_values() {
            self.remove(id);
        }
        unchanged(&found)
    }

    /// Whether a name has another inode than it had, as far as a listing shows. If the number was
    /// used again, the inode is a candidate itself.
    fn another(&self, old: Id, now: &Listed) -> bool {
        !self.settled.contains(&old) && self.layer.ino(old) != now.ino
    }

    pub(super) fn children(&self, id: Id) -> HashMap<&'a [u8], Id> {
        let children = self.layer.children(id);
        children.map(|id| (self.layer.name(id), id)).collect()
    }

    /// Compares what a walk or a listing has come to, and says what was below it.
    pub(super) fn meet(
        &mut self,
        parent: Place,
        name: &CStr,
        old: Option<Id>,
        found: &Found<'_>,
    ) -> Result<(Place, HashMap<&'a [u8], Id>), TreeError> {
        indexable(found, name, self.layer.dev)?;
        self.reader.check_stop(found)?;
        self.unexplained.remove(&wide(found.stat.st_ino));
        let Some(id) = old else {
            let path = shown_path(self.relative(found.path));
            let facts = Facts::of(found, View::Overlay)?;
            self.changes.push(Change {
                path,
                what: What::Added,
                now: Some(now(&facts, found)?),
            });
            self.names += name.count_bytes();
            self.delta.inserted.push(Insert {
                parent,
                name: name.to_bytes().into(),
                facts,
            });
            let place = Place::New(self.delta.inserted.len() - 1);
            return Ok((place, HashMap::new()));
        };
        self.settled.insert(id);
        let (facts, what) = self.judge(&self.layer.facts(id), found)?;
        self.note(id, what, &facts, found)?;
        let mut below = self.children(id);
        if what == Some(What::Kind) {
            self.lost.insert(id);
            below.drain().for_each(|(_, id)| self.remove(id));
        }
        Ok((Place::Known(id), below))
    }

    /// What is there now, and how it differs.
    fn judge(
        &mut self,
        old: &Facts,
        found: &Found<'_>,
    ) -> Result<(Facts, Option<What>), TreeError> {
        let mut now = Facts::of(found, View::Overlay)?;
        let what = match now.verdict(old) {
            Verdict::Differs(what) => Some(what),
            Verdict::Equal => None,
            Verdict::ReadIt => match old.content {
                // Not known, so never equal.
                None => Some(What::Content),
                before => {
                    now.content = Some(self.digest(found)?);
                    (now.content != before).then_some(What::Content)
                }
            },
        };
        Ok((now, what))
    }

    fn digest(&mut self, found: &Found<'_>) -> Result<Digest, TreeError> {
        let ino = wide(found.stat.st_ino);
        if let Some(digest) = self.digests.get(&ino) {
            return Ok(*digest);
        }
        let digest = self.reader.digest(found)?;
        if found.stat.st_nlink > 1 {
            self.digests.insert(ino, digest);
        }
        Ok(digest)
    }

    fn note(
        &mut self,
        id: Id,
        what: Option<What>,
        facts: &Facts,
        found: &Found<'_>,
    ) -> Result<(), TreeError> {
        let old = self.layer.facts(id);
        if let Some(what) = what {
            self.changes.push(Change {
                path: shown_path(&self.layer.path(id)),
                what,
                now: Some(now(facts, found)?),
            });
            self.changed.insert(id);
        }
        if old.ino != facts.ino {
            self.moved.insert(id, facts.ino);
        }
        if old != *facts {
            self.delta.updated.push((id, *facts));
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, id: Id) {
        if self.lost.contains(&id) {
            return;
        }
        self.delta.removed.push(id);
        for id in self.layer.below(id) {
            self.settled.insert(id);
            self.lost.insert(id);
            self.changes.push(Change {
                path: shown_path(&self.layer.path(id)),
                what: What::Removed,
                now: None,
            });
        }
    }

    /// Looks for candidates that nothing has explained among the names of the whole layer.
    fn search(&mut self) -> Result<(), TreeError> {
        if self.unexplained.is_empty() {
            return Ok(());
        }
        for dir in listing::find(&self.root, self.upper, &self.unexplained, self.stop)? {
            let mut known = Id::ROOT;
            for name in dir.iter() {
                match self.layer.child(known, name.as_bytes()) {
                    Some(id) => known = id,
                    None => break,
                }
            }
            self.relist(known)?;
        }
        Ok(())
    }

    fn finish(mut self, candidates: &[Candidate]) -> Result<Comparison, TreeError> {
        let (records, names) = (self.delta.inserted.len(), self.names);
        self.layer.room(records, names, self.upper)?;
        self.changes
            .sort_by(|a, b| bytes(&a.path).cmp(bytes(&b.path)));
        self.changes.dedup_by(|b, a| a.path == b.path);
        let outside = |c: &&Candidate| c.dev != self.layer.dev || self.unexplained.contains(&c.ino);
        let mut outside: Vec<_> = candidates.iter().filter(outside).copied().collect();
        outside.sort_unstable();
        outside.dedup();
        let linked = self.linked();
        Ok(Comparison {
            linked,
            changes: self.changes,
            outside,
            bytes_read: self.reader.bytes,
            delta: self.delta,
        })
    }

    /// The path of a name for messages.
    pub(super) fn shown(&self, relative: &Path) -> PathBuf {
        match relative.as_os_str().is_empty() {
            true => self.upper.to_owned(),
            false => {
                let path = [bytes(self.upper), bytes(relative)].join(&b'/');
                PathBuf::from(OsStr::from_bytes(&path))
            }
        }
    }

    /// The other way round.
    fn relative<'p>(&self, shown: &'p Path) -> &'p Path {
        let rest = bytes(shown).get(bytes(self.upper).len() + 1..);
        Path::new(OsStr::from_bytes(rest.unwrap_or_default()))
    }
}

fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Attributes by which overlay does not show at a directory what lies below it in the lower layers.
const HIDING: [&[u8]; 2] = [b"opaque", b"redirect"];

fn now(facts: &Facts, found: &Found<'_>) -> Result<Now, TreeError> {
    let hiding = |name: &[u8]| {
        let own = name.strip_prefix(b"trusted.overlay.");
        let own = own.or_else(|| name.strip_prefix(b"user.overlay."));
        own.is_some_and(|own| HIDING.contains(&own))
    };
    let is_dir = facts.kind() == Kind::Dir;
    let hides = is_dir
        && found
            .xattrs()?
            .iter()
            .any(|(name, _)| hiding(name.to_bytes()));
    Ok(Now {
        mode: u32::from(facts.mode),
        size: facts.size,
        hides,
    })
}

pub(super) fn found<'f>(fd: BorrowedFd<'f>, stat: &'f Stat, path: &'f Path) -> Found<'f> {
    Found {
        parent: None,
        name: c"",
        fd,
        stat,
        path,
        depth: 0,
    }
}
