//! Reading the writable layer of a checkpoint without laying it out.

use std::{
    collections::HashSet,
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use super::{
    Checkpoint, Digest, StoreError,
    content::{Cut, read_chunk},
    directory,
    entry::{Content, DirRef, TreeEntry},
    objects::Objects,
};
use crate::content::Data;

/// The writable layer of one checkpoint.
#[derive(Debug)]
pub struct Tree {
    pub(super) objects: Objects,
    root: TreeEntry,
}

/// One name that differs between two trees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Relative to the root, which is empty.
    pub path: PathBuf,
    /// What it was; None if it was not there.
    pub before: Option<TreeEntry>,
    /// What it is. Of a directory that comes, goes, or is another kind of thing, what lies below is
    /// not listed by itself.
    pub after: Option<TreeEntry>,
}

impl Checkpoint {
    /// Its writable layer, to look at; None if it has none.
    pub fn tree(&self) -> Result<Option<Tree>, StoreError> {
        let Some(upper) = &self.manifest.contents.upper else {
            return Ok(None);
        };
        let mut objects = self.objects()?;
        let root = directory::read_root(&mut objects, &upper.digest)?;
        Ok(Some(Tree { objects, root }))
    }

    /// The same, of which each pack that is used is checked first, as a restore does it.
    pub fn strict_tree(&self) -> Result<Option<Tree>, StoreError> {
        let Some(upper) = &self.manifest.contents.upper else {
            return Ok(None);
        };
        let mut objects = self.strict_objects()?;
        let root = directory::read_root(&mut objects, &upper.digest)?;
        Ok(Some(Tree { objects, root }))
    }

    /// A file that its processes refer to and that is not what it was at their dump (D7a): they would be
    /// restored upon another one. None if there is none.
    pub fn changed_reference(&self) -> Result<Option<PathBuf>, StoreError> {
        let facts = &self.manifest.facts;
        let (Some(_), Some(mut tree)) = (facts.processes_of, self.tree()?) else {
            return Ok(None);
        };
        for reference in &facts.references {
            let found = tree.lookup(&reference.path)?;
            // Of directories the dump's own is not recorded: they change with every name in them.
            let found = found.filter(|entry| entry.dir().is_none());
            if found.map(|entry| entry.digest()) != reference.entry {
                return Ok(Some(reference.path.clone()));
            }
        }
        Ok(None)
    }

    /// One name of the writable layer. For many of them, [`Self::tree`] is quicker.
    pub fn lookup(&self, path: &Path) -> Result<Option<TreeEntry>, StoreError> {
        match self.tree()? {
            Some(mut tree) => tree.lookup(path),
            None => Ok(None),
        }
    }
}

impl Tree {
    /// The root's own entry.
    pub fn root(&self) -> &TreeEntry {
        &self.root
    }

    /// One name, relative to the root; symbolic links are not followed. `""` is the root.
    pub fn lookup(&mut self, path: &Path) -> Result<Option<TreeEntry>, StoreError> {
        let mut entry = self.root.clone();
        for part in path.components() {
            let name = match part {
                Component::Normal(name) => name.as_bytes(),
                Component::CurDir => continue,
                _ => return Ok(None),
            };
            let Some(dir) = entry.dir() else {
                return Ok(None);
            };
            match directory::find(&mut self.objects, &dir, name)? {
                Some(found) => entry = found,
                None => return Ok(None),
            }
        }
        Ok(Some(entry))
    }

    /// One name of a directory.
    pub fn child(&mut self, dir: &DirRef, name: &OsStr) -> Result<Option<TreeEntry>, StoreError> {
        directory::find(&mut self.objects, dir, name.as_bytes())
    }

    /// The bytes of a file, checked against their digests. What is all zeros is in no piece.
    pub fn data(&mut self, content: Content) -> Result<Data, StoreError> {
        let cut = Cut::file(content);
        let mut pieces = Vec::new();
        cut.for_each(
            &mut self.objects,
            &mut |_| true,
            &mut |objects, number, digest| {
                let bytes = read_chunk(objects, &cut, number, digest)?;
                pieces.push((number * u64::from(cut.chunk), bytes));
                Ok(())
            },
        )?;
        let data: usize = pieces.iter().map(|(_, bytes)| bytes.len()).sum();
        match data as u64 == content.data {
            true => Ok(Data {
                size: content.size,
                pieces,
            }),
            false => Err(self
                .objects
                .damaged("the lists of a file hold other chunks")),
        }
    }

    /// The names directly in a directory, in byte order.
    pub fn entries(&mut self, dir: &DirRef) -> Result<Vec<TreeEntry>, StoreError> {
        directory::read_dir(&mut self.objects, dir)
    }

    /// Everything below a directory, each directory before what is in it, names in byte order.
    pub fn entries_under(&mut self, path: &Path) -> Result<Vec<(PathBuf, TreeEntry)>, StoreError> {
        let mut all = Vec::new();
        let top = self.lookup(path)?.and_then(|entry| entry.dir());
        let mut todo: Vec<(PathBuf, TreeEntry)> = Vec::new();
        let mut next = top.map(|dir| (path.to_owned(), dir));
        loop {
            if let Some((path, dir)) = next {
                let entries = self.entries(&dir)?;
                let below = entries.into_iter().rev();
                todo.extend(below.map(|entry| (path.join(entry.name()), entry)));
            }
            let Some((path, entry)) = todo.pop() else {
                return Ok(all);
            };
            next = entry.dir().map(|dir| (path.clone(), dir));
            all.push((path, entry));
        }
    }

    /// Whatever differs from this tree to `after`. Descends only where digests differ. A directory
    /// whose names differ is listed itself only if its attributes do.
    pub fn diff(&mut self, after: &mut Self) -> Result<Vec<Difference>, StoreError> {
        let mut all = Vec::new();
        let (before_root, after_root) = (self.root.clone(), after.root.clone());
        let mut todo = vec![Difference {
            path: PathBuf::new(),
            before: Some(before_root),
            after: Some(after_root),
        }];
        while let Some(difference) = todo.pop() {
            let (Some(a), Some(b)) = (&difference.before, &difference.after) else {
                all.push(difference);
                continue;
            };
            if let (Some(x), Some(y)) = (a.dir(), b.dir())
                && x != y
            {
                let mut below = self.diff_dirs(&x, after, &y, &difference.path)?;
                below.reverse();
                todo.extend(below);
            }
            if !a.same_attributes(b) {
                all.push(difference);
            }
        }
        Ok(all)
    }

    /// The names of two directories that differ, in byte order.
    fn diff_dirs(
        &mut self,
        a: &DirRef,
        after: &mut Self,
        b: &DirRef,
        path: &Path,
    ) -> Result<Vec<Difference>, StoreError> {
        let (a_pages, b_pages) = (
            directory::read_pages(&mut self.objects, a)?,
            directory::read_pages(&mut after.objects, b)?,
        );
        let digests = |pages: &[super::entry::PageRef]| -> HashSet<Digest> {
            pages.iter().map(|page| page.dir.root).collect()
        };
        let (in_a, in_b) = (digests(&a_pages), digests(&b_pages));
        let mut before = Vec::new();
        for page in a_pages.iter().filter(|page| !in_b.contains(&page.dir.root)) {
            before.extend(directory::read_leaf(&mut self.objects, &page.dir.root)?);
        }
        let mut now = Vec::new();
        for page in b_pages.iter().filter(|page| !in_a.contains(&page.dir.root)) {
            now.extend(directory::read_leaf(&mut after.objects, &page.dir.root)?);
        }
        Ok(merge(before, now, path))
    }
}

fn merge(before: Vec<TreeEntry>, after: Vec<TreeEntry>, path: &Path) -> Vec<Difference> {
    let mut all = Vec::new();
    let (mut a, mut b) = (before.into_iter().peekable(), after.into_iter().peekable());
    loop {
        let name = match (a.peek(), b.peek()) {
            (Some(a), Some(b)) => a.name.clone().min(b.name.clone()),
            (Some(one), None) | (None, Some(one)) => one.name.clone(),
            (None, None) => return all,
        };
        let (before, after) = (
            a.next_if(|entry| entry.name == name),
            b.next_if(|entry| entry.name == name),
        );
        if before != after {
            all.push(Difference {
                path: path.join(OsStr::from_bytes(&name)),
                before,
                after,
            });
        }
    }
}
