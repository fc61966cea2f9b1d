//! The checkpoints of one sandbox, to read and to write.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read, Seek, Write},
    ops::Deref,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::Mutex;
use rustix::fs::FlockOperation;

use super::{
    Digest, Journal, JournalLine, Manifest, Pending, StoreError, Sync, arm, files, journal,
    manifest::MAX_MANIFEST,
};
use crate::{
    sandbox::{SandboxId, TurnNo, check},
    tree::remove_tree,
};

/// How a directory in `turns/` begins that is not a checkpoint yet.
pub(super) const TEMPORARY: &str = ".tmp-";
/// And one that is not a checkpoint any more.
const CONDEMNED: &str = ".condemned-";

/// A checkpoint that is in the store.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What it says about itself.
    pub manifest: Manifest,
    /// Of the manifest, and through it of everything.
    pub digest: Digest,
    pub(super) dir: PathBuf,
}

impl Checkpoint {
    /// Which turn's.
    pub fn turn(&self) -> TurnNo {
        self.manifest.turn
    }

    /// CRIU's images.
    pub fn image_dir(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// The copy of the writable layer; absent unless the manifest's contents have one.
    pub fn upper_dir(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// `config.json` and friends.
    pub fn bundle_dir(&self) -> PathBuf {
        self.dir.join("bundle")
    }
}

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

    /// Where a name that begins with `.tmp-` may be made, on the file system of the checkpoints.
    /// The next writer removes what was left there.
    pub fn scratch_dir(&self) -> PathBuf {
        self.turns_dir()
    }

    /// Where.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All checkpoints, oldest first.
    pub fn turns(&self) -> Result<Vec<TurnNo>, StoreError> {
        let names = files::names(&self.turns_dir())?;
        let canonical = |name: &String| {
            let turn: TurnNo = name.parse().ok()?;
            (turn.to_string() == *name).then_some(turn)
        };
        let mut turns: Vec<_> = names.iter().filter_map(canonical).collect();
        turns.sort_unstable();
        Ok(turns)
    }

    /// The newest checkpoint. A damaged one is an error, not passed over in silence.
    pub fn latest(&self) -> Result<Option<Checkpoint>, StoreError> {
        self.turns()?.last().map(|turn| self.get(*turn)).transpose()
    }

    /// The checkpoint of one turn. Its manifest is checked; its contents are not, see
    /// [`Self::verify`].
    pub fn get(&self, turn: TurnNo) -> Result<Checkpoint, StoreError> {
        let dir = self.turn_dir(turn);
        let path = dir.join("manifest.json");
        let Some(json) = files::read(&path, MAX_MANIFEST)? else {
            return Err(match dir.exists() {
                true => StoreError::Damaged {
                    path,
                    reason: "it is missing".into(),
                },
                false => StoreError::NoTurn {
                    sandbox: self.id.clone(),
                    turn,
                },
            });
        };
        let manifest = Manifest::parse(&json, &path, &self.id, turn)?;
        let digest = Digest::of(&json);
        let sum = files::read(&dir.join("manifest.sha256"), 4096)?.unwrap_or_default();
        if sum != checksum_line(&digest).as_bytes() {
            return Err(StoreError::Damaged {
                path,
                reason: "its checksum in manifest.sha256 is another one".into(),
            });
        }
        Ok(Checkpoint {
            manifest,
            digest,
            dir,
        })
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

    /// The journal of all turns.
    pub fn journal(&self) -> Result<Journal, StoreError> {
        journal::read(&self.dir.join("journal.jsonl"))
    }

    pub(super) fn turns_dir(&self) -> PathBuf {
        self.dir.join("turns")
    }

    pub(super) fn turn_dir(&self, turn: TurnNo) -> PathBuf {
        self.turns_dir().join(turn.to_string())
    }

    fn name_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        let name = check("checkpoint name", name)?;
        Ok(self.dir.join("names").join(name))
    }
}

/// As `sha256sum -c` reads it.
pub(super) fn checksum_line(digest: &Digest) -> String {
    format!("{}  manifest.json\n", digest.hex())
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
    /// Open for as long as the lock is held; dropping it is what unlocks.
    #[cfg_attr(not(test), expect(dead_code, reason = "held, not read"))]
    file: File,
    /// Held while names, arming and the set of checkpoints are changed; never while trees are
    /// written or deleted.
    index: Mutex<()>,
}

impl Deref for SandboxWriter {
    type Target = SandboxStore;

    fn deref(&self) -> &SandboxStore {
        &self.store
    }
}

impl SandboxWriter {
    pub(super) fn lock(store: SandboxStore) -> Result<Self, StoreError> {
        files::make_dir(store.dir())?;
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

        for dir in ["turns", "names"] {
            files::make_dir(&store.dir().join(dir))?;
        }
        journal::mend(&store.dir().join("journal.jsonl"))?;
        for name in files::all_names(&store.turns_dir())? {
            if name.starts_with(TEMPORARY) || name.starts_with(CONDEMNED) {
                remove_tree(&store.turns_dir().join(name))?;
            }
        }
        let lock = Lock {
            file,
            index: Mutex::new(()),
        };
        Ok(Self {
            store,
            lock: Arc::new(lock),
        })
    }

    /// Starts the checkpoint of a turn.
    pub fn begin(&self, turn: TurnNo) -> Result<Pending, StoreError> {
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
        arm::disarm(&self.dir.join("armed"))
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
        journal::append(&self.dir.join("journal.jsonl"), line, sync)
    }

    /// Deletes all checkpoints but the newest `keep` (at least one), named and armed ones, and
    /// says which are gone.
    pub fn prune(&self, keep: usize) -> Result<Vec<TurnNo>, StoreError> {
        let condemned = {
            let _index = self.lock.index.lock();
            self.condemn(keep)?
        };
        for turn in &condemned {
            remove_tree(&self.condemned_dir(*turn))?;
        }
        Ok(condemned)
    }

    fn condemn(&self, keep: usize) -> Result<Vec<TurnNo>, StoreError> {
        let mut turns = self.turns()?;
        turns.truncate(turns.len().saturating_sub(keep.max(1)));
        let named = self.names()?;
        let armed = self.armed()?;
        turns.retain(|turn| armed != Some(*turn) && !named.values().any(|named| named == turn));
        for turn in &turns {
            let from = self.turn_dir(*turn);
            std::fs::rename(&from, self.condemned_dir(*turn))
                .map_err(files::io("rename", &from))?;
        }
        if !turns.is_empty() {
            files::sync_dir(&self.turns_dir())?;
        }
        Ok(turns)
    }

    #[cfg(test)]
    pub(super) fn lock_file(&self) -> &File {
        &self.lock.file
    }

    fn condemned_dir(&self, turn: TurnNo) -> PathBuf {
        self.turns_dir().join(format!("{CONDEMNED}{turn}"))
    }
}
