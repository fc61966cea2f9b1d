//! Finding objects in the packs of one sandbox.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Digest, StoreError,
    pack::{Pack, PackName, Place},
    seal,
    shelf::Shelf,
};

/// So many blocks stay decompressed: 1 MiB.
const CACHED: usize = 8;
/// All packs in a directory, the newest last; without one that was never completed.
pub(super) fn list(dir: &Path) -> Result<Vec<PackName>, StoreError> {
    let mut packs = PackName::all(dir)?;
    if let Some(PackName::Checkpoint(turn)) = packs.last()
        && seal::is_unfinished(dir, *turn)
    {
        packs.pop();
    }
    Ok(packs)
}

/// The packs of one sandbox, open to be read.
#[derive(Debug)]
pub(super) struct Objects {
    dir: PathBuf,
    packs: Vec<Opened>,
    /// Why others could not be opened.
    broken: Vec<String>,
    cache: VecDeque<(usize, u32, Arc<Vec<u8>>)>,
    /// Whether each pack is checked before anything in it is used.
    strict: bool,
    /// The pack that had the object asked for last: likely the next one's, too.
    last: usize,
    /// Where packs come from that others have opened, and where they go when this is dropped.
    shelf: Option<Arc<Shelf>>,
}

#[derive(Debug)]
struct Opened {
    pack: Pack,
    is_checked: bool,
}

impl Objects {
    /// Opens all packs in a directory. Damaged ones are passed over: what is missing then says so.
    pub(super) fn open(dir: &Path) -> Result<Self, StoreError> {
        Self::open_by(dir, false, None)
    }

    /// The same; what is on the shelf need not be opened again.
    pub(super) fn open_from(dir: &Path, shelf: &Arc<Shelf>) -> Result<Self, StoreError> {
        Self::open_by(dir, false, Some(Arc::clone(shelf)))
    }

    /// The same for a restore: of each pack that is used, table and index are checked as well.
    pub(super) fn open_strictly(dir: &Path) -> Result<Self, StoreError> {
        Self::open_by(dir, true, None)
    }

    fn open_by(dir: &Path, strict: bool, shelf: Option<Arc<Shelf>>) -> Result<Self, StoreError> {
        let mut objects = Self {
            dir: dir.to_owned(),
            packs: Vec::new(),
            broken: Vec::new(),
            cache: VecDeque::new(),
            strict,
            last: 0,
            shelf,
        };
        objects.open_all()?;
        Ok(objects)
    }

    fn open_all(&mut self) -> Result<(), StoreError> {
        self.packs.clear();
        self.cache.clear();
        self.broken.clear();
        let mut shelved = self.shelf.as_ref().map(|shelf| shelf.take());
        for name in list(&self.dir)?.into_iter().rev() {
            let path = self.dir.join(name.file());
            let known = shelved.as_mut().and_then(|packs| packs.remove(&path));
            match known
                .filter(Pack::is_fresh)
                .map_or_else(|| Pack::open(&path), Ok)
            {
                Ok(pack) => self.packs.push(Opened {
                    pack,
                    is_checked: false,
                }),
                // Collected meanwhile; what was needed of it is elsewhere.
                Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
                Err(e) => self.broken.push(e.to_string()),
            }
        }
        Ok(())
    }

    /// Whether every pack could be opened: what a checkpoint names is there then, as far as that tells.
    pub(super) fn is_whole(&self) -> bool {
        self.broken.is_empty()
    }

    /// Whether some pack has the object. One that cannot say has not.
    pub(super) fn has(&mut self, digest: &Digest) -> bool {
        let mut packs = self.packs.iter_mut();
        packs.any(|opened| matches!(opened.pack.find(digest), Ok(Some(_))))
    }

    /// An object and its kind. Its digest is right.
    pub(super) fn get(&mut self, digest: &Digest) -> Result<(u8, Vec<u8>), StoreError> {
        let mut error = match self.try_get(digest) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(e) => Some(e),
        };
        if error.is_none() {
            // gc may have moved it since the packs were opened.
            self.open_all()?;
            match self.try_get(digest) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(e) => error = Some(e),
            }
        }
        Err(error.unwrap_or_else(|| self.missing(digest)))
    }

    /// An object that must be of one kind.
    pub(super) fn expect(&mut self, kind: u8, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let (found, bytes) = self.get(digest)?;
        match found == kind {
            true => Ok(bytes),
            false => Err(self.damaged(format!("object {digest} is of another kind"))),
        }
    }

    /// An error about what the objects say.
    pub(super) fn damaged(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Damaged {
            path: self.dir.clone(),
            reason: reason.into(),
        }
    }

    fn missing(&self, digest: &Digest) -> StoreError {
        let mut reason = format!("no pack has object {digest}");
        for broken in &self.broken {
            reason += "; ";
            reason += broken;
        }
        self.damaged(reason)
    }

    fn try_get(&mut self, digest: &Digest) -> Result<Option<(u8, Vec<u8>)>, StoreError> {
        let mut error = None;
        let last = self.last;
        let others = (0..self.packs.len()).filter(|number| *number != last);
        for number in std::iter::once(last).chain(others) {
            match self.get_from(number, digest) {
                Ok(None) => {}
                Ok(found) => {
                    self.last = number;
                    return Ok(found);
                }
                // Another pack may have it, too.
                Err(e) => {
                    error.get_or_insert(e);
                }
            }
        }
        error.map_or(Ok(None), Err)
    }

    fn get_from(
        &mut self,
        number: usize,
        digest: &Digest,
    ) -> Result<Option<(u8, Vec<u8>)>, StoreError> {
        let Some(opened) = self.packs.get_mut(number) else {
            return Ok(None);
        };
        let Some(place) = opened.pack.find(digest)? else {
            return Ok(None);
        };
        if self.strict && !opened.is_checked {
            opened.pack.check()?;
            opened.is_checked = true;
        }
        let block = self.block(number, place.block)?;
        let bytes = slice(&block, &place).map(<[u8]>::to_vec);
        match bytes.filter(|bytes| Digest::of_object(place.kind, bytes) == *digest) {
            Some(bytes) => Ok(Some((place.kind, bytes))),
            None => Err(StoreError::Damaged {
                path: self.packs[number].pack.path().to_owned(),
                reason: format!("object {digest} is not what its digest says"),
            }),
        }
    }

    fn block(&mut self, number: usize, block: u32) -> Result<Arc<Vec<u8>>, StoreError> {
        let wanted = |(a, b, _): &&(usize, u32, _)| (*a, *b) == (number, block);
        if let Some((.., bytes)) = self.cache.iter().find(wanted) {
            return Ok(Arc::clone(bytes));
        }
        let bytes = Arc::new(self.packs[number].pack.block(block)?);
        if self.cache.len() >= CACHED {
            self.cache.pop_front();
        }
        self.cache.push_back((number, block, Arc::clone(&bytes)));
        Ok(bytes)
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        if let Some(shelf) = &self.shelf {
            shelf.put(self.packs.drain(..).map(|opened| opened.pack));
        }
    }
}

/// An object within its block.
pub(super) fn slice<'a>(block: &'a [u8], place: &Place) -> Option<&'a [u8]> {
    let from = usize::try_from(place.offset).ok()?;
    let length = usize::try_from(place.length).ok()?;
    block.get(from..from.checked_add(length)?)
}
