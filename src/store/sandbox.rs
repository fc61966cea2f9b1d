//! The checkpoints of one sandbox, to read and to write.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{ErrorKind, Read, Seek, Write},
    ops::Deref,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::fs::FlockOperation;

use super::{
    Checkpoint, Digest, Journal, JournalLine, Manifest, Pending, StoreError, Sync, arm, files,
    gc::Retired,
    journal,
    lay_out::tidy,
    objects,
    pack::{Pack, PackName, Stamp},
    seal,
    shelf::Shelf,
    spare::Spare,
};
use crate::sandbox::{SandboxId, TurnNo, check};

/// A file that is there from a container's start until it ends as it should, if it recovers.
const ALIVE: &str = "alive";
/// Where version 1 kept its checkpoints.
const FORMAT_1: &str = "turns";

/// The checkpoints of one sandbox, to read.
#[derive(Debug, Clone)]
pub struct SandboxStore {
    id: SandboxId,
    dir: PathBuf,
}

impl SandboxStore {
    pub(super) fn new(id: SandboxId, dir: PathBuf) -> Self {
        Self { id, dir }
    }

    /// Whose.
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    /// Where a name may be made, on the file system of the checkpoints. The next writer removes
    /// what was left there.
    pub fn scratch_dir(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// Where.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All checkpoints, oldest first.
    pub fn turns(&self) -> Result<Vec<TurnNo>, StoreError> {
        let packs = objects::list(&self.packs_dir())?;
        let checkpoint = |name: PackName| match name {
            PackName::Checkpoint(turn) => Some(turn),
            PackName::Kept(_) => None,
        };
        Ok(packs.into_iter().filter_map(checkpoint).collect())
    }

    /// The newest checkpoint. A damaged one is an error, not passed over in silence.
    pub fn latest(&self) -> Result<Option<Checkpoint>, StoreError> {
        self.turns()?.last().map(|turn| self.get(*turn)).transpose()
    }

    /// The checkpoint of one turn. Its manifest is checked; its contents are not, see
    /// [`Self::verify`].
    pub fn get(&self, turn: TurnNo) -> Result<Checkpoint, StoreError> {
        self.read(turn).map(|(checkpoint, ..)| checkpoint)
    }

    /// The same, with the file that it is in, and the size of its manifest.
    pub(super) fn read(&self, turn: TurnNo) -> Result<(Checkpoint, Stamp, usize), StoreError> {
        let path = self.pack_path(turn);
        let pack = Pack::open(&path).map_err(|e| match e {
            StoreError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                StoreError::NoTurn {
                    sandbox: self.id.clone(),
                    turn,
                }
            }
            e => e,
        })?;
        let json = pack.manifest()?.ok_or_else(|| StoreError::Damaged {
            path: path.clone(),
            reason: "it has no manifest".into(),
        })?;
        let manifest = Manifest::parse(&json, &path, &self.id, turn)?;
        let digest = Digest::of(&json);
        let checkpoint = Checkpoint::new(self.packs_dir(), manifest, digest, pack.size());
        Ok((checkpoint, pack.stamp(), json.len()))
    }

    /// The named checkpoints.
    pub fn names(&self) -> Result<BTreeMap<String, TurnNo>, StoreError> {
        let mut names = BTreeMap::new();
        for name in files::names(&self.dir.join("names"))? {
            // Removed meanwhile, or not ours.
            if let Ok(name) = check("checkpoint name", &name) {
                let turn = self.named(&name)?;
                names.insert(name, turn);
            }
        }
        Ok(names)
    }

    /// The turn of a named checkpoint.
    pub fn named(&self, name: &str) -> Result<TurnNo, StoreError> {
        let path = self.name_path(name)?;
        let text = files::read(&path, 64)?.ok_or_else(|| StoreError::NoName {
            sandbox: self.id.clone(),
            name: name.to_owned(),
        })?;
        let turn = std::str::from_utf8(&text)
            .ok()
            .and_then(|t| t.trim_end().parse().ok());
        turn.ok_or_else(|| StoreError::Damaged {
            path,
            reason: "it holds no turn".into(),
        })
    }

    /// The turn that the next start restores; none if it boots.
    pub fn armed(&self) -> Result<Option<TurnNo>, StoreError> {
        arm::armed(&self.dir.join("armed"))
    }

    /// Whether its container was started, and has not ended as it should.
    pub fn was_alive(&self) -> bool {
        self.dir.join(ALIVE).exists()
    }

    /// Says whether it was started, or has ended as it should. Only its shim may.
    pub fn set_alive(&self, alive: bool) -> Result<(), StoreError> {
        let path = self.dir.join(ALIVE);
        match alive {
            true => files::replace(&path, b""),
            false => arm::disarm(&path),
        }
    }

    /// The journal of all turns.
    pub fn journal(&self) -> Result<Journal, StoreError> {
        journal::read(&journal::path(&self.dir))
    }

    pub(super) fn packs_dir(&self) -> PathBuf {
        self.dir.join("packs")
    }

    pub(super) fn pack_path(&self, turn: TurnNo) -> PathBuf {
        self.packs_dir().join(PackName::Checkpoint(turn).file())
    }

    fn name_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let name = check("checkpoint name", name)?;
        Ok(self.dir.join("names").join(name))
    }
}

/// The checkpoints of one sandbox, to write. Clones share one lock, which ends with the last of
/// them and the last [`Pending`], or with the process.
#[derive(Debug, Clone)]
pub struct SandboxWriter {
    store: SandboxStore,
    lock: Arc<Lock>,
}

/// The sandbox's flock, and the order among this process's own threads.
#[derive(Debug)]
pub(super) struct Lock {
    /// Open, and locked, for as long as this lives.
    file: File,
    /// Held while names, arming and the set of checkpoints are changed; never while packs are
    /// written.
    pub(super) index: Mutex<()>,
    /// Held while a pack is written or collected: what a new pack is about to refer to must not go. A
    /// checkpoint holds it from before the freeze on, across the dump (D17 notwithstanding): nobody but
    /// collection waits for it.
    /// Taken before `index`.
    pub(super) packs: Arc<Mutex<()>>,
    /// What was kept of checkpoints that are gone, and not looked through yet.
    pub(super) retired: Mutex<Retired>,
    /// What the sandbox goes on from, until there is a newer checkpoint: it may have been rolled back
    /// to one that is not the newest.
    pub(super) head: Mutex<Option<TurnNo>>,
    /// The newest checkpoint that has processes.
    pub(super) with_processes: Mutex<Option<TurnNo>>,
    /// What need not be read again.
    pub(super) shelf: Arc<Shelf>,
    /// For the next pack.
    pub(super) spare: Spare,
}

impl Drop for Lock {
    /// Closing alone would not unlock: a child that another thread is just starting has a copy of
    /// every descriptor from its fork until its exec, and a flock goes with the last copy.
    fn drop(&mut self) {
        // The next writer has one of the same name.
        self.spare.remove();
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl Deref for SandboxWriter {
    type Target = SandboxStore;

    fn deref(&self) -> &SandboxStore {
        &self.store
    }
}

impl SandboxWriter {
    pub(super) fn lock(store: SandboxStore) -> Result<Self, StoreError> {
        let is_new = files::make_dir_unsynced(store.dir())?;
        let path = store.dir().join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(files::io("open", &path))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut pid);
            return Err(StoreError::Locked {
                sandbox: store.id,
                pid: pid.trim().parse().ok(),
            });
        }
        // Only a hint for the error above.
        let _ = file.set_len(0);
        let _ = file.rewind();
        let _ = writeln!(file, "{}", std::process::id());

        let mut is_complete = true;
        for dir in ["packs", "names", "tmp"] {
            is_complete &= !files::make_dir_unsynced(&store.dir().join(dir))?;
        }
        if !is_complete {
            files::sync_dir(store.dir())?;
        }
        if is_new {
            files::sync_parent(store.dir())?;
        }
        journal::mend(&journal::path(store.dir()))?;
        for dir in ["", "packs", "names"] {
            files::remove_temporary(&store.dir().join(dir))?;
        }
        seal::settle(&store.packs_dir())?;
        tidy(&store.scratch_dir())?;
        let old = store.dir().join(FORMAT_1);
        if old.exists() {
            log::warn!(
                "{}: {old:?} holds checkpoints of format 1, which this version does not read; \
                 remove them: rm -r {old:?}",
                store.id()
            );
        }
        let head = store.head().unwrap_or_else(|e| {
            // Whoever needs it is told of the damage then.
            log::warn!("{}: {e}", store.id());
            None
        });
        // Where the way to it is damaged, what can be read.
        let with_processes = match store.head_with_processes() {
            Ok(found) => found,
            Err(_) => store.newest_with_processes()?,
        };
        let lock = Lock {
            file,
            index: Mutex::new(()),
            packs: Arc::default(),
            retired: Mutex::new(Retired::of(&store)?),
            head: Mutex::new(head.map(|checkpoint| checkpoint.turn())),
            with_processes: Mutex::new(with_processes.map(|checkpoint| checkpoint.turn())),
            shelf: Arc::default(),
            spare: Spare::new(&store),
        };
        Ok(Self {
            store,
            lock: Arc::new(lock),
        })
    }

    /// Makes the file of the next pack, while nobody waits for it.
    pub fn make_ready(&self) {
        let _packs = self.lock.packs.lock();
        self.lock.spare.make();
    }

    /// [`SandboxStore::get`], which does not read the checkpoint again that was written last.
    pub fn current(&self, turn: TurnNo) -> Result<Checkpoint, StoreError> {
        self.lock.shelf.get(&self.store, turn)
    }

    /// Starts the checkpoint of a turn.
    pub fn begin(&self, turn: TurnNo) -> Result<Pending, StoreError> {
        let pending = self.begin_without_images(turn)?;
        pending.stage()?;
        Ok(pending)
    }

    /// The same, with its images below `place` until they are in the pack: a directory of this sandbox alone
    /// that is gone with it, in memory for instance. Nothing can build upon such a dump.
    pub fn begin_in(&self, turn: TurnNo, place: &Path) -> Result<Pending, StoreError> {
        let mut pending = self.begin_without_images(turn)?;
        pending.stage_below(place);
        pending.stage()?;
        Ok(pending)
    }

    /// Starts the checkpoint of a turn that gets no new images of processes.
    pub fn begin_without_images(&self, turn: TurnNo) -> Result<Pending, StoreError> {
        Pending::new(self.store.clone(), Arc::clone(&self.lock), turn)
    }

    /// Makes the container's next start restore `turn`.
    pub fn arm(&self, turn: TurnNo) -> Result<(), StoreError> {
        let _index = self.lock.index.lock();
        self.get(turn)?;
        arm::arm(&self.dir.join("armed"), turn)
    }

    /// Makes the container's next start boot it.
    pub fn disarm(&self) -> Result<(), StoreError> {
        let _index = self.lock.index.lock();
        arm::disarm(&self.dir.join("armed"))?;
        self.set_alive(false)
    }

    /// The sandbox goes on from the checkpoint of `turn`, which has processes: it is kept as long as no newer one of
    /// this way has some, whatever there is on the ways that were left.
    pub fn goes_on_from(&self, turn: TurnNo) {
        *self.lock.head.lock() = Some(turn);
        *self.lock.with_processes.lock() = Some(turn);
    }

    /// Names a checkpoint, which is then kept; a name that is in use moves to it.
    pub fn name(&self, name: &str, turn: TurnNo) -> Result<(), StoreError> {
        let path = self.name_path(name)?;
        let _index = self.lock.index.lock();
        self.get(turn)?;
        files::replace(&path, format!("{turn}\n").as_bytes())
    }

    /// Appends a turn to the journal.
    pub fn append(&self, line: &JournalLine, sync: Sync) -> Result<(), StoreError> {
        let _index = self.lock.index.lock();
        journal::append(&journal::path(&self.dir), line, sync)
    }

    pub(super) fn guard(&self) -> &Lock {
        &self.lock
    }

    #[cfg(test)]
    pub(super) fn lock_file(&self) -> &File {
        &self.lock.file
    }
}
