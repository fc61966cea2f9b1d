//! One sandbox, watched.
//!
//! Changes are collected in *epochs*, a map of the kernel each. [`Watch::look`] reads what has changed
//! since the last durable checkpoint, and resets nothing. [`Watch::prepare`] ends an epoch, [`Watch::cut`]
//! reads it in the freeze in which the files are captured. [`Watch::durable`] says that nothing can take the
//! checkpoint away again, and [`Watch::retire`] forgets what the cut has read, once no program adds to it.
//! If anything fails in between, the ended epoch stays, and what it holds stays dirty (D4).

use std::{
    collections::{HashMap, HashSet},
    fs, io, mem,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use super::{
    abi::{self, InodeKey, MAPPING_AIO, Mapping, Registers, Watched, seen_bits},
    dirty::{Dirty, Happened, Inode},
    epoch::{Ended, Epoch, FIRST_ROOM},
    host::{Key, get, put, remove},
    joined::Joined,
    load::failpoint,
    sys::{self, Whom},
};

/// Epochs that wait for a durable cut.
const MOST_ENDED: usize = 4;
/// So many inodes are forgotten in a freeze: CRIU leaves three or four.
const MOST_FORGOTTEN: usize = 256;
/// What [`Watch::forget_outsiders`] forgets. A directory: nobody maps it, and so changes it without a sign.
const OUTSIDERS: u32 = seen_bits::OUTSIDE | seen_bits::DIRECTORY;
const GIVEN_UP: &str = "too many checkpoints in a row have failed";
/// The programs look for a sandbox's cgroup up to this level.
const LEVELS: u64 = (1 << 24) - 1;

/// An event that a program did not run for, as it was running already on that CPU.
const MISSED: &str = "the kernel left out events";

/// Which sandbox.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its directory in the hierarchy of cgroup v2.
    pub cgroup: PathBuf,
    /// Where its root file system, an overlay, is mounted.
    pub rootfs: PathBuf,
}

/// One sandbox, watched until this is dropped, or [`Watch::leave`] is called.
pub struct Watch {
    joined: Joined,
    key: Key,
    now: Epoch,
    /// In its place already, for the time after `now`; None if the last ended one is still there.
    next: Option<Epoch>,
    /// Ended, and not yet in a durable checkpoint.
    ended: Vec<Ended>,
    /// In a durable checkpoint, as far as its cut has seen them. They count until they are retired.
    captured: Vec<Ended>,
    /// So many were not durable that they are forgotten: everything may have changed.
    given_up: bool,
    /// Taken out of `now`, and not yet in a durable checkpoint.
    forgotten: HashMap<InodeKey, u32>,
    /// Inodes that somebody outside of the sandbox has mapped: nobody tells when that ends.
    foreign: HashSet<InodeKey>,
    /// Watched processes: our pid of each, and that of the first pid namespace.
    watched: HashMap<i32, u32>,
    /// What happened in epochs that are forgotten, since [`Watch::watch_processes`].
    happened: Happened,
    /// How many times it had been missed then that marks were cleared; None if nobody sees that.
    marks_missed: Option<u64>,
}

impl Watch {
    /// Begins to watch. Everything counts as changed until the first [`Watch::cut`] is durable.
    pub fn begin(joined: Joined, subject: &Subject) -> Result<Self, String> {
        let key = key_of(subject)?;
        let host = &joined.host;
        let begun = Self::register(&joined, &key).and_then(|now| Ok((now, host.marks_missed()?)));
        match begun {
            Ok((now, marks_missed)) => Ok(Self {
                joined,
                key,
                now,
                next: None,
                ended: Vec::new(),
                captured: Vec::new(),
                given_up: false,
                forgotten: HashMap::new(),
                foreign: HashSet::new(),
                watched: HashMap::new(),
                happened: Happened::default(),
                marks_missed,
            }),
            Err(e) => {
                if let Err(e) = host.unregister(joined.slot(), &key) {
                    log::warn!("the inspector: {e}");
                }
                Err(format!("cannot register with the inspector: {e}"))
            }
        }
    }

    fn register(joined: &Joined, key: &Key) -> io::Result<Epoch> {
        let (host, slot) = (&joined.host, joined.slot());
        // What a dead shim may have left in this slot.
        host.unwatch(slot)?;
        let mut now = Epoch::new(FIRST_ROOM)?;
        now.missed = host.missed()?;
        now.doubt = Some("nothing has been captured yet".into());
        host.put_epoch(slot, host.epoch_number(slot)?, &now.map)?;
        host.register(slot, key)?;
        failpoint("registered");
        Ok(now)
    }

    /// The probe set in use.
    pub fn probes(&self) -> &'static str {
        self.joined.host.probes.name()
    }

    /// The sandbox has other processes, another mount of its files, and maybe another cgroup: from
    /// now on it is watched there. Everything counts as changed until the next cut is durable,
    /// since what happened in between was seen by nobody.
    pub fn follow(&mut self, subject: &Subject, why: String) -> Result<(), String> {
        self.now.doubt = Some(why);
        let key = key_of(subject)?;
        let moved = (self.joined.host)
            .unwatch(self.slot())
            .and_then(|()| self.joined.host.register(self.slot(), &key))
            .and_then(|()| self.joined.host.forget_key(self.slot(), &self.key, &key));
        moved.map_err(|e| format!("cannot register with the inspector: {e}"))?;
        self.watched.clear();
        self.foreign.clear();
        self.key = key;
        Ok(())
    }

    /// What may have changed since the last durable cut. Freezes nothing and resets nothing.
    pub fn look(&self) -> io::Result<Dirty> {
        let mut dirty = Dirty {
            happened: self.happened,
            ..Dirty::default()
        };
        let ended = self.ended.iter().chain(&self.captured);
        let ended = ended.map(|its| &its.epoch);
        // The next one holds something if a program that had begun in an epoch before found its place
        // taken.
        for epoch in ended.chain([&self.now]).chain(&self.next) {
            epoch.add_to(&mut dirty)?;
        }
        self.add_forgotten(&mut dirty);
        if self.given_up {
            dirty.doubts.push(GIVEN_UP.into());
        }
        if self.joined.host.missed()? != self.now.missed {
            dirty.doubts.push(MISSED.into());
        }
        Ok(dirty)
    }

    /// Ends the epoch and begins another, before a cut. The sandbox need not stand still: what changes
    /// from here until the cut is in the new epoch, so it counts for the cut and once more for the next
    /// turn, where it is found to be equal.
    pub fn prepare(&mut self) -> io::Result<()> {
        let mut next = self.take_next()?;
        // An event that is missed meanwhile counts for both epochs.
        next.missed = self.joined.host.missed()?;
        // Whatever fails from here on: the ended epoch counts until a cut is durable, and the new
        // one is not trusted before there was one.
        next.doubt = Some("the last cut was not finished".into());
        self.joined.host.next_epoch(self.slot())?;
        let ended = mem::replace(&mut self.now, next);
        self.ended.push(ended.into());
        failpoint("ended");
        self.give_up()?;
        let missed = self.joined.host.missed()?;
        if let Some(Ended { epoch, .. }) = self.ended.last_mut()
            && missed != epoch.missed
        {
            epoch.doubt.get_or_insert_with(|| MISSED.into());
        }
        Ok(())
    }

    /// The epoch that has waited for its turn, or, if there is none or it is too small, a new one: then
    /// the kernel waits for its running programs first.
    fn take_next(&mut self) -> io::Result<Epoch> {
        let room = self.now.next_room()?;
        match self.next.take() {
            Some(next) if next.room >= room => return Ok(next),
            Some(small) => self.ended.push(small.into()),
            None => {}
        }
        self.put_next(room)
    }

    /// Puts an epoch in the place of the last ended one. When this returns no program uses that any more.
    fn put_next(&self, room: u32) -> io::Result<Epoch> {
        let next = Epoch::new(room)?;
        let number = self.joined.host.epoch_number(self.slot())? + 1;
        self.joined.host.put_epoch(self.slot(), number, &next.map)?;
        Ok(next)
    }

    /// A sandbox that can never be dumped must not fill the kernel's memory with epochs.
    fn give_up(&mut self) -> io::Result<()> {
        while self.ended.len() > MOST_ENDED {
            let Ended { epoch, .. } = self.ended.remove(0);
            self.happened.0 |= epoch.happened()?.0;
            self.foreign.extend(epoch.foreign()?);
            self.given_up = true;
        }
        Ok(())
    }

    /// What may have changed up to here since the last durable cut. After [`Watch::prepare`], while
    /// the sandbox is frozen, or known to be idle. `pids` are its processes.
    pub fn cut(&mut self, pids: &[i32]) -> io::Result<Dirty> {
        for ended in &mut self.ended {
            // First, so that whatever comes while all the rest is read makes a difference.
            ended.see()?;
            self.foreign.extend(ended.epoch.foreign()?);
        }
        self.foreign.extend(self.now.foreign()?);
        self.now.carried = self.still_written(pids)?;
        self.now.doubt = None;
        failpoint("cut");
        self.look()
    }

    /// What may have changed since [`Watch::prepare`] alone. After [`Watch::cut`].
    pub fn since_prepared(&self) -> io::Result<Dirty> {
        let mut dirty = Dirty::default();
        self.now.add_to(&mut dirty)?;
        self.add_forgotten(&mut dirty);
        if self.joined.host.missed()? != self.now.missed {
            dirty.doubts.push(MISSED.into());
        }
        Ok(dirty)
    }

    /// The inodes that these processes can change without a sign, as of now. What is read of others
    /// after [`Watch::prepare`] holds as long as [`Watch::since_prepared`] does not name them, if no
    /// process forks meanwhile.
    pub fn can_change_unseen(&self, pids: &[i32]) -> io::Result<HashSet<Inode>> {
        let inodes = self.still_written(pids)?;
        Ok(inodes.into_iter().map(Inode::from).collect())
    }

    /// What was noted of these inodes since [`Watch::prepare`] is of no use. After [`Watch::cut`], while
    /// the sandbox is frozen, and before [`Watch::watch_processes`]: the programs do not tell twice of
    /// what they have told of, until that.
    pub fn forget(&mut self, inodes: impl Iterator<Item = Inode>) -> io::Result<()> {
        for inode in inodes {
            remove(&self.now.map, &InodeKey::from(inode))?;
        }
        Ok(())
    }

    /// What outsiders have done to directories since [`Watch::prepare`], and the cut has seen, need not count
    /// once more when that is durable: CRIU itself makes and removes a directory in the sandbox for each of
    /// its tmpfs. After [`Watch::cut`], while the sandbox is frozen, and **before** anything of what it has
    /// named is compared or read: then what an outsider does to that, and none of it sees, has an event after
    /// this.
    pub fn forget_outsiders(&mut self, seen: &Dirty) -> io::Result<()> {
        let mut theirs = self.now.noted()?;
        theirs.retain(|(key, its)| {
            its.bits & OUTSIDERS == OUTSIDERS && seen.inodes.contains_key(&Inode::from(*key))
        });
        if theirs.is_empty() || theirs.len() > MOST_FORGOTTEN {
            return Ok(());
        }
        for (key, its) in theirs {
            remove(&self.now.map, &key)?;
            *self.forgotten.entry(key).or_default() |= its.bits;
        }
        // What a CPU remembers of them stands nowhere any more. Only now: what is remembered from here on was
        // noted after they were removed.
        self.joined.host.control.new_generation();
        Ok(())
    }

    fn add_forgotten(&self, dirty: &mut Dirty) {
        for (key, bits) in &self.forgotten {
            dirty.add(key, *bits);
        }
    }

    /// The last cut is durable: what it has seen need not count any longer, once it is
    /// [retired](Watch::retire).
    pub fn durable(&mut self) {
        self.captured.append(&mut self.ended);
        self.forgotten.clear();
        self.given_up = false;
    }

    /// Forgets what is in a durable checkpoint, and puts the next epoch in its place. The kernel waits here
    /// for its running programs, 8 to 16 ms: for when nobody else waits.
    ///
    /// A program that began before [`Watch::prepare`] may have added something after the cut. What has more in
    /// it now than the cut has seen counts for the next one, too.
    pub fn retire(&mut self) -> io::Result<()> {
        if self.next.is_none() {
            let last = self.ended.last().or(self.captured.last());
            let room = last.map_or(&self.now, |its| &its.epoch).next_room()?;
            self.next = Some(self.put_next(room)?);
        }
        for ended in mem::take(&mut self.captured) {
            match ended.is_seen()? {
                true => self.happened.0 |= ended.epoch.happened()?.0,
                false => self.ended.push(ended),
            }
        }
        failpoint("retired");
        Ok(())
    }

    /// The inodes that can change without a sign: mapped ones, and those with I/O in flight.
    fn still_written(&self, pids: &[i32]) -> io::Result<HashSet<InodeKey>> {
        let mut inodes = self.foreign.clone();
        for pid in pids {
            let mappings = self.lines(&self.joined.host.shared_mappings, *pid)?;
            if mappings.iter().any(|m| m.kind == MAPPING_AIO) {
                let files = self.lines(&self.joined.host.open_files, *pid)?;
                inodes.extend(files.iter().filter_map(InodeKey::of));
            }
            inodes.extend(mappings.iter().filter_map(InodeKey::of));
        }
        Ok(inodes)
    }

    fn lines(&self, program: &OwnedFd, pid: i32) -> io::Result<Vec<Mapping>> {
        sys::iterate(program.as_fd(), Whom::Process(pid))
    }

    /// One number for all registers of a thread (host tid) that does not run; None if there is no
    /// such thread, or they cannot be read.
    pub fn registers(&self, tid: i32) -> Option<u64> {
        self.thread(tid).map(|its| its.hash)
    }

    fn thread(&self, tid: i32) -> Option<Registers> {
        let program = self.joined.host.registers.as_fd();
        sys::iterate(program, Whom::Thread(tid)).ok()?.pop()
    }

    /// From now on it is noted what these processes do, and what is done to them; the former ones,
    /// and what happened so far, are forgotten. They are those of a dump, and stand still.
    ///
    /// What the dump itself did in them is forgotten, too.
    pub fn watch_processes(&mut self, pids: &[i32]) -> io::Result<()> {
        self.joined.host.unwatch(self.slot())?;
        self.watched.clear();
        for pid in pids {
            // The programs know the pid of the first namespace, and we may be in another.
            if let Some(its) = self.thread(*pid) {
                let fresh = Watched {
                    slot: self.slot(),
                    did: 0,
                    keeper: its.reader,
                };
                put(&self.joined.host.watched, &its.tid, &fresh)?;
                self.watched.insert(*pid, its.tid);
            }
        }
        self.joined.host.control.set_watching();
        self.joined.host.control.new_generation();
        for ended in self.ended.iter().chain(&self.captured) {
            ended.epoch.forget_events()?;
        }
        self.now.forget_events()?;
        self.happened.0 &= Happened::REACH.0;
        self.marks_missed = self.joined.host.marks_missed()?;
        Ok(())
    }

    /// Whether it is seen when marks of written pages (soft-dirty) are cleared.
    pub fn sees_marks(&self) -> bool {
        self.marks_missed.is_some()
    }

    /// Whether somebody who does not dump the sandbox may have cleared marks of its processes since
    /// [`Watch::watch_processes`]. Never so where that is not [seen](Watch::sees_marks).
    pub fn marks_cleared(&self) -> io::Result<bool> {
        let mut happened = self.happened;
        let ended = self.ended.iter().chain(&self.captured);
        let ended = ended.map(|its| &its.epoch);
        for epoch in ended.chain([&self.now]).chain(&self.next) {
            happened.0 |= epoch.happened()?.0;
        }
        Ok(
            happened.has(Happened::CLEARED)
                || self.joined.host.marks_missed()? != self.marks_missed,
        )
    }

    /// What the watched processes did since [`Watch::watch_processes`], in bits of
    /// [`did_bits`](super::did_bits). One that is not watched is missing.
    pub fn did(&self, pids: &[i32]) -> io::Result<HashMap<i32, u32>> {
        let mut all = HashMap::new();
        for pid in pids {
            let Some(first) = self.watched.get(pid) else {
                continue;
            };
            if let Some(its) = get::<u32, Watched>(&self.joined.host.watched, first)?
                && its.slot == self.slot()
            {
                all.insert(*pid, its.did);
            }
        }
        Ok(all)
    }

    /// Watches no longer; the last one on this host removes the programs.
    pub fn leave(mut self) -> Result<(), String> {
        self.end()
    }

    fn end(&mut self) -> Result<(), String> {
        if self.joined.is_left() {
            return Ok(());
        }
        let unregistered = self.joined.host.unregister(self.slot(), &self.key);
        failpoint("unregistered");
        self.joined.leave()?;
        unregistered.map_err(|e| format!("cannot unregister from the inspector: {e}"))
    }

    fn slot(&self) -> u32 {
        self.joined.slot()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            log::warn!("{e}");
        }
    }
}

/// Magic numbers of file systems (statfs(2)).
const OVERLAYFS: u64 = 0x794c_7630;
const CGROUP2: u64 = 0x6367_7270;

/// How a sandbox is recognised, from where it is.
fn key_of(subject: &Subject) -> Result<Key, String> {
    let cgroup =
        fs::metadata(&subject.cgroup).map_err(|e| format!("{}: {e}", subject.cgroup.display()))?;
    let rootfs =
        fs::metadata(&subject.rootfs).map_err(|e| format!("{}: {e}", subject.rootfs.display()))?;
    let levels =
        levels(&subject.cgroup).map_err(|e| format!("{}: {e}", subject.cgroup.display()))?;
    if levels & LEVELS == 0 {
        return Err(format!("{} lies too deep", subject.cgroup.display()));
    }
    let overlay = rustix::fs::statfs(&subject.rootfs).map_err(|e| e.to_string())?;
    if overlay.f_type as u64 != OVERLAYFS {
        return Err(format!("{} is no overlay", subject.rootfs.display()));
    }
    let unified = rustix::fs::statfs(&subject.cgroup).map_err(|e| e.to_string())?;
    if unified.f_type as u64 != CGROUP2 {
        return Err(format!("{} is not cgroup v2's", subject.cgroup.display()));
    }
    Ok(Key {
        cgroup: cgroup.ino(),
        levels,
        overlay: abi::kernel_dev(rootfs.dev()),
    })
}

/// How far below the root a cgroup is. Where only a part of the hierarchy is mounted, that is not
/// known: then it is any level from there on.
fn levels(cgroup: &Path) -> io::Result<u64> {
    const ROOT: u64 = 1;
    let dev = fs::metadata(cgroup)?.dev();
    for (level, dir) in (0u32..).zip(cgroup.ancestors()) {
        let found = fs::metadata(dir)?;
        if found.dev() != dev {
            return Ok(!0 << level.saturating_sub(1).clamp(1, 63));
        }
        if found.ino() == ROOT {
            return Ok(1 << level.clamp(1, 63));
        }
    }
    Ok(!0 << 1)
}
