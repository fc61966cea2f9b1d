//! Comparing whole subtrees: what is new, what was replaced, or everything.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{fs::FileType, io::Errno};

use super::{
    compare::{Look, found},
    content::unchanged,
    delta::Place,
    index::Id,
};
use crate::tree::{self, Expect, Found, TreeError, Visitor, failed};

impl<'a> Look<'a> {
    pub(super) fn everything(&mut self) -> Result<(), TreeError> {
        let root = tree::open_dir(&self.root).map_err(failed("open", self.upper))?;
        let place = Place::Known(Id::ROOT);
        self.walk(root, self.upper, place, c"", Some(Id::ROOT))
    }

    /// Compares one name of a directory, and all below it, with what the index has there.
    pub(super) fn deep(
        &mut self,
        parent: Place,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
        old: Option<Id>,
    ) -> Result<(), TreeError> {
        let shown = self.shown(path);
        let fd = tree::look_at(dir, name).map_err(failed("open", &shown))?;
        let stat = rustix::fs::fstat(&fd).map_err(failed("stat", &shown))?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let dir = tree::open_dir(&fd).map_err(failed("open", &shown))?;
            return self.walk(dir, &shown, parent, name, old);
        }
        let found = found(fd.as_fd(), &stat, &shown);
        self.meet(parent, name, old, &found)?;
        unchanged(&found)
    }

    /// The same for a name that the index has.
    pub(super) fn deep_at(&mut self, path: &Path, id: Id) -> Result<(), TreeError> {
        let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
            return self.everything();
        };
        let shown = self.shown(above);
        let missing = || failed("open", &shown)(Errno::NOENT);
        let dir = tree::reach(&self.root, above, &shown)?.ok_or_else(missing)?;
        let name = CString::new(name.as_bytes()).map_err(|_| missing())?;
        let parent = self.layer.parent(id).unwrap_or(Id::ROOT);
        self.deep(Place::Known(parent), dir.0.as_fd(), &name, path, Some(id))
    }

    fn walk(
        &mut self,
        dir: OwnedFd,
        shown: &Path,
        parent: Place,
        name: &CStr,
        old: Option<Id>,
    ) -> Result<(), TreeError> {
        let stop = self.stop;
        let mut deep = Deep {
            look: self,
            top: (parent, name, old),
            levels: Vec::new(),
        };
        tree::walk(dir, shown, Expect::Unchanged, stop, &mut deep)
    }
}

struct Deep<'l, 'a> {
    look: &'l mut Look<'a>,
    /// Where the walk begins: its parent, its name, what was there.
    top: (Place, &'l CStr, Option<Id>),
    levels: Vec<Level<'a>>,
}

struct Level<'a> {
    place: Place,
    /// What was in the directory and has not been met.
    before: HashMap<&'a [u8], Id>,
}

impl<'a> Deep<'_, 'a> {
    fn meet(&mut self, found: &Found<'_>) -> Result<Level<'a>, TreeError> {
        let (parent, name, old) = match self.levels.last_mut() {
            None => self.top,
            Some(level) => {
                let old = level.before.remove(found.name.to_bytes());
                (level.place, found.name, old)
            }
        };
        let (place, before) = self.look.meet(parent, name, old, found)?;
        Ok(Level { place, before })
    }
}

impl Visitor for Deep<'_, '_> {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        let level = self.meet(dir)?;
        self.levels.push(level);
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.meet(found).map(drop)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        let level = self.levels.pop();
        for id in level.into_iter().flat_map(|l| l.before.into_values()) {
            self.look.remove(id);
        }
        Ok(())
    }
}
