//! Retention, and collection of what no checkpoint needs any more.
//!
//! A checkpoint goes by a rename: `N.pack` becomes `N.kept`, and what others need of it is still
//! there. Collection looks through these: it marks what the remaining checkpoints refer to, deletes
//! packs of which nothing is needed, and copies what is needed of mostly dead ones into a new pack,
//! which takes the place of one of them by a rename before the others are deleted. So at any moment
//! whatever a checkpoint needs is in some pack.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs,
};

use serde::Serialize;

use super::{
    Digest, SandboxStore, SandboxWriter, Store, StoreError,
    content::Cut,
    directory::{self, Page},
    entry::Node,
    failpoint::failpoint,
    files,
    objects::{self, Objects, slice},
    pack::{Pack, PackName, PackWriter, Place},
};
use crate::sandbox::TurnNo;

/// Looked through once so many packs are left of checkpoints that are gone,
const RETIRED_PACKS: u64 = 8;
/// and one more for so many names in the tree, all of which are looked at for it;
const NAMES_PER_PACK: u64 = 4096;
/// but no more than these,
const MAX_RETIRED_PACKS: u64 = 40;
/// or so many bytes.
const RETIRED_BYTES: u64 = 32 << 20;
/// As many kept packs of about one size are made one.
const MERGED: usize = 4;

/// What is kept of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// The newest turns; at least one.
    pub keep: usize,
    /// How large the sandbox's packs may be.
    pub sandbox_limit: Option<u64>,
    /// How large the packs of all sandboxes may be.
    pub store_limit: Option<u64>,
}

impl Retention {
    /// The newest turns, whatever their size.
    pub fn newest(keep: usize) -> Self {
        Self {
            keep,
            sandbox_limit: None,
            store_limit: None,
        }
    }
}

/// How much a collection takes upon itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effort {
    /// Packs stay as they are if half of them is needed: in the long run each byte is copied once.
    Little,
    /// No pack stays of which more than a sixteenth is dead: space is short, or somebody has asked.
    Full,
}

impl Effort {
    fn is_mostly_dead(self, needed: u64, total: u64) -> bool {
        match self {
            Self::Little => needed < total / 2,
            Self::Full => needed < total - total / 16,
        }
    }
}

/// What a collection has removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Freed {
    /// Checkpoints.
    pub turns: Vec<TurnNo>,
    /// On the disk.
    pub bytes: u64,
}

impl Freed {
    fn add(&mut self, other: Self) {
        self.turns.extend(other.turns);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// What is left of checkpoints that are gone, and was not looked through yet.
#[derive(Debug, Default)]
pub(super) struct Retired {
    packs: u64,
    bytes: u64,
}

impl Retired {
    /// After a start nobody knows what was looked through.
    pub(super) fn of(store: &SandboxStore) -> Result<Self, StoreError> {
        let mut retired = Self::default();
        for name in kept(store)? {
            retired.add(size(&store.packs_dir().join(name.file())));
        }
        Ok(retired)
    }

    fn add(&mut self, bytes: u64) {
        self.packs += 1;
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// `names`: how many the tree has.
    fn is_much(&self, names: u64) -> bool {
        let packs = (RETIRED_PACKS + names / NAMES_PER_PACK).min(MAX_RETIRED_PACKS);
        self.packs >= packs || self.bytes >= RETIRED_BYTES
    }
}

fn kept(store: &SandboxStore) -> Result<Vec<PackName>, StoreError> {
    let mut packs = objects::list(&store.packs_dir())?;
    packs.retain(|name| matches!(name, PackName::Kept(_)));
    Ok(packs)
}

/// A file's size; 0 if it is gone.
fn size(path: &std::path::Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |meta| meta.len())
}

/// A commit and a collection need memory in proportion to what they work on; an idle shim has to be
/// small. glibc would keep it for the next one, which is right for little: a turn of ten files gets its
/// memory page by page from the kernel otherwise.
fn give_back_memory() {
    /// So many bytes may stay.
    #[cfg(target_env = "gnu")]
    const SPARE: usize = 1 << 20;
    #[cfg(target_env = "gnu")]
    // SAFETY: the first call only counts, the second only returns free pages to the kernel.
    unsafe {
        if libc::mallinfo2().fordblks > SPARE {
            libc::malloc_trim(0);
        }
    }
}

impl SandboxStore {
    /// How large its packs are.
    pub fn size(&self) -> Result<u64, StoreError> {
        let packs = objects::list(&self.packs_dir())?;
        let sizes = packs
            .iter()
            .map(|name| size(&self.packs_dir().join(name.file())));
        Ok(sizes.fold(0, u64::saturating_add))
    }
}

impl SandboxWriter {
    /// Lets checkpoints go that need not be kept, the oldest first; never the newest one, the newest
    /// one with processes, the one that the sandbox goes on from, the armed one, or those with a name.
    /// Collects what they leave once that is much, or a limit demands it.
    pub fn retain(&self, retention: &Retention) -> Result<Freed, StoreError> {
        let keep = retention.keep.max(1);
        let mut freed = Freed {
            turns: self.retire(keep, usize::MAX)?,
            bytes: 0,
        };
        let over = |limit: Option<u64>, used: u64| limit.is_some_and(|limit| used > limit);
        let much = self.is_much()?;
        if much {
            freed.add(self.collect_with(Effort::Little)?);
        }
        if over(retention.sandbox_limit, self.size()?) {
            let limit = retention.sandbox_limit.unwrap_or(u64::MAX);
            freed.add(self.shrink(|| Ok(self.size()?.saturating_sub(limit)))?);
        }
        // What all sandboxes use is summed up when there was much to collect alone: the cost of a
        // turn must not grow with their number.
        if let (true, Some(limit)) = (much, retention.store_limit) {
            let store = self.all();
            freed.add(self.shrink(|| Ok(store.size()?.saturating_sub(limit)))?);
        }
        give_back_memory();
        Ok(freed)
    }

    fn is_much(&self) -> Result<bool, StoreError> {
        if self.guard().retired.lock().packs == 0 {
            return Ok(false);
        }
        let latest = self.latest()?;
        let names = latest.and_then(|checkpoint| checkpoint.manifest.contents.upper);
        let names = names.map_or(0, |upper| upper.entries);
        Ok(self.guard().retired.lock().is_much(names))
    }

    /// The store that it is in.
    fn all(&self) -> Store {
        let root = self.dir().ancestors().nth(2);
        Store {
            root: root.unwrap_or(self.dir()).to_owned(),
        }
    }

    /// Lets the oldest checkpoints go until nothing is `over` a limit, or one alone is left.
    pub fn shrink(&self, over: impl Fn() -> Result<u64, StoreError>) -> Result<Freed, StoreError> {
        let mut freed = self.collect()?;
        loop {
            let over = over()?;
            let mut gone = Vec::new();
            if over > 0 {
                // Guessed from the packs' sizes; what is shared with others does not come free.
                let oldest = self.droppable(1)?;
                let mut sum = 0;
                let enough = |turn: &&TurnNo| {
                    let before = sum;
                    sum += size(&self.pack_path(**turn));
                    before < over
                };
                let count = oldest.iter().take_while(enough).count();
                gone = self.retire(1, count)?;
            }
            if gone.is_empty() {
                if over > 0 {
                    log::warn!(
                        "{}: its checkpoints exceed the limit by {over} bytes, and none of them \
                         may go: the newest one, the newest one with processes, the armed one and \
                         those with a name stay",
                        self.id()
                    );
                }
                return Ok(freed);
            }
            freed.turns.extend(gone);
            freed.add(self.collect()?);
        }
    }

    /// Checkpoints that may go, the oldest first.
    fn droppable(&self, keep: usize) -> Result<Vec<TurnNo>, StoreError> {
        let mut turns = self.turns()?;
        turns.truncate(turns.len().saturating_sub(keep.max(1)));
        let named = self.names()?;
        let lock = self.guard();
        let stay = [
            self.armed()?,
            *lock.head.lock(),
            *lock.with_processes.lock(),
        ];
        turns.retain(|turn| {
            !stay.contains(&Some(*turn)) && !named.values().any(|named| named == turn)
        });
        Ok(turns)
    }

    /// Lets up to `count` checkpoints go.
    fn retire(&self, keep: usize, count: usize) -> Result<Vec<TurnNo>, StoreError> {
        let lock = self.guard();
        let _packs = lock.packs.lock();
        let _index = lock.index.lock();
        let mut turns = self.droppable(keep)?;
        turns.truncate(count);
        let mut retired = lock.retired.lock();
        for turn in &turns {
            let from = self.pack_path(*turn);
            let to = self.packs_dir().join(PackName::Kept(*turn).file());
            failpoint("retire a checkpoint");
            fs::rename(&from, &to).map_err(files::io("rename", &from))?;
            retired.add(size(&to));
        }
        // Not synced: after a power loss they are there again, whole, as long as nothing of them is deleted. The
        // next commit takes the renames along, which saves the journal of a file system one for each turn.
        Ok(turns)
    }

    /// Removes what no checkpoint needs. If one cannot be read nobody knows what it needs: an
    /// error, and nothing is removed.
    pub fn collect(&self) -> Result<Freed, StoreError> {
        self.collect_with(Effort::Full)
    }

    fn collect_with(&self, effort: Effort) -> Result<Freed, StoreError> {
        let lock = self.guard();
        let _packs = lock.packs.lock();
        let before = self.size()?;
        let kept = kept(self)?;
        *lock.retired.lock() = Retired::default();
        if !kept.is_empty() {
            // Before anything is deleted that checkpoints need which would otherwise come back.
            failpoint("sync retired checkpoints");
            files::sync_dir(&self.packs_dir())?;
            let live = self.mark()?;
            self.sweep(&kept, &live, effort)?;
        }
        Ok(Freed {
            turns: Vec::new(),
            bytes: before.saturating_sub(self.size()?),
        })
    }

    /// Whatever a checkpoint needs.
    fn mark(&self) -> Result<HashSet<Digest>, StoreError> {
        let mut marker = Marker {
            objects: Objects::open(&self.packs_dir())?,
            live: HashSet::new(),
        };
        for turn in self.turns()? {
            let contents = self.get(turn)?.manifest.contents;
            for file in contents.image.iter().chain(&contents.bundle) {
                marker.content(&file.cut())?;
            }
            if let Some(upper) = contents.upper {
                marker.tree(&upper.digest)?;
            }
        }
        Ok(marker.live)
    }

    fn sweep(
        &self,
        kept: &[PackName],
        live: &HashSet<Digest>,
        effort: Effort,
    ) -> Result<(), StoreError> {
        let mut needed = Vec::new();
        for name in kept {
            let path = self.packs_dir().join(name.file());
            // What a damaged pack holds nobody can tell: it stays, and `verify` names it.
            let opened = Pack::open(&path).and_then(|mut pack| Ok((pack.objects()?, pack)));
            let (all, pack) = match opened {
                Ok(opened) => opened,
                Err(e) => {
                    log::warn!("{}: a pack is not collected: {e}", self.id());
                    continue;
                }
            };
            let total: u64 = all.iter().map(|(_, place)| u64::from(place.length)).sum();
            let objects: Vec<_> = all
                .into_iter()
                .filter(|(digest, _)| live.contains(digest))
                .collect();
            if objects.is_empty() {
                files::remove(&path)?;
                continue;
            }
            let bytes: u64 = objects
                .iter()
                .map(|(_, place)| u64::from(place.length))
                .sum();
            needed.push(Needed {
                name: *name,
                pack,
                objects,
                is_mostly_dead: effort.is_mostly_dead(bytes, total),
                tier: bytes.max(1).ilog2() / 2,
            });
        }
        self.rewrite(to_rewrite(needed))
    }

    /// Makes one pack of several, of what is needed of them.
    fn rewrite(&self, mut packs: Vec<Needed>) -> Result<(), StoreError> {
        let Some(last) = packs.iter().map(|needed| needed.name).max() else {
            return Ok(());
        };
        let dir = self.packs_dir();
        let temporary = dir.join(format!("{}{}", files::TEMPORARY, last.file()));
        files::remove(&temporary)?;
        let mut writer = PackWriter::create(&temporary)?;
        let copied = packs
            .iter_mut()
            .try_for_each(|needed| copy(&mut writer, needed))
            .and_then(|()| writer.finish(None)?.sync(&temporary));
        if let Err(e) = copied {
            files::remove(&temporary)?;
            return Err(e);
        }
        failpoint("replace a kept pack");
        fs::rename(&temporary, dir.join(last.file())).map_err(files::io("rename", &temporary))?;
        failpoint("sync a kept pack");
        files::sync_dir(&dir)?;
        for needed in packs.iter().filter(|needed| needed.name != last) {
            files::remove(&dir.join(needed.name.file()))?;
        }
        Ok(())
    }
}

/// A kept pack of which something is needed.
struct Needed {
    name: PackName,
    pack: Pack,
    objects: Vec<(Digest, Place)>,
    is_mostly_dead: bool,
    /// Its size, in powers of four.
    tier: u32,
}

/// Packs that are mostly dead, and those of about one size if there are many: so that there are few
/// of them, and each byte is copied few times.
fn to_rewrite(needed: Vec<Needed>) -> Vec<Needed> {
    let mut tiers: BTreeMap<u32, usize> = BTreeMap::new();
    for pack in &needed {
        *tiers.entry(pack.tier).or_default() += 1;
    }
    let many: BTreeSet<u32> = tiers
        .into_iter()
        .filter(|(_, count)| *count >= MERGED)
        .map(|(tier, _)| tier)
        .collect();
    let chosen = |pack: &Needed| pack.is_mostly_dead || many.contains(&pack.tier);
    needed.into_iter().filter(chosen).collect()
}

fn copy(writer: &mut PackWriter, needed: &mut Needed) -> Result<(), StoreError> {
    let order = |(_, place): &(Digest, Place)| (place.block, place.offset);
    needed.objects.sort_unstable_by_key(order);
    let mut open: Option<(u32, Vec<u8>)> = None;
    for (digest, place) in &needed.objects {
        if writer.has(digest) {
            continue;
        }
        let block = match open.take().filter(|(number, _)| *number == place.block) {
            Some(open) => open,
            None => (place.block, needed.pack.block(place.block)?),
        };
        let bytes = slice(&block.1, place).unwrap_or_default();
        if Digest::of_object(place.kind, bytes) != *digest {
            return Err(StoreError::Damaged {
                path: needed.pack.path().to_owned(),
                reason: format!("object {digest} is not what its digest says"),
            });
        }
        writer.add(place.kind, *digest, bytes)?;
        open = Some(block);
    }
    Ok(())
}

struct Marker {
    objects: Objects,
    live: HashSet<Digest>,
}

impl Marker {
    fn content(&mut self, cut: &Cut) -> Result<(), StoreError> {
        if self.live.contains(&cut.content.root) {
            return Ok(());
        }
        let mut lists = Vec::new();
        let mut chunks = Vec::new();
        let live = &self.live;
        cut.for_each(
            &mut self.objects,
            &mut |list| {
                let new = !live.contains(list);
                lists.push(*list);
                new
            },
            &mut |_, _, chunk| {
                chunks.push(*chunk);
                Ok(())
            },
        )?;
        self.live.extend(lists);
        self.live.extend(chunks);
        Ok(())
    }

    fn tree(&mut self, root: &Digest) -> Result<(), StoreError> {
        if !self.live.insert(*root) {
            return Ok(());
        }
        let root = directory::read_root(&mut self.objects, root)?;
        let mut todo: Vec<(Digest, Option<u8>)> = Vec::new();
        todo.extend(root.dir().map(|dir| (dir.root, None)));
        while let Some((page, below)) = todo.pop() {
            if !self.live.insert(page) {
                continue;
            }
            match directory::read_page(&mut self.objects, &page, below)? {
                Page::Node(level, refs) => {
                    todo.extend(refs.iter().map(|page| (page.dir.root, Some(level))));
                }
                Page::Leaf(entries) => {
                    for entry in entries {
                        match entry.node {
                            Node::Directory(dir) => todo.push((dir.root, None)),
                            Node::File(content) => self.content(&Cut::file(content))?,
                            _ => {}
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
