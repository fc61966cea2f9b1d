//! What all shims of a host share: the programs and their maps.
//!
//! The first shim has them loaded, later ones join, the last one removes them. Pins are only where
//! they meet: each shim holds descriptors of its own, so nothing that is done to the pins takes the
//! programs away from it. Joining and leaving happen under one lock, which no one holds for long.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::{fcntl::Flock, mount::umount};

use super::{
    abi::{Plain, SIDES},
    load::{self, LINK, failpoint},
    probes::{MARKS, ProbeSet},
    slots::Slots,
    sys::{self, ControlPage, EpochNumbers},
};
use crate::slot_lock::SlotLock;

/// How often joining starts anew because the last shim has just left.
const ATTEMPTS: usize = 10;

/// Where things are.
#[derive(Debug, Clone)]
pub(super) struct Place {
    run: PathBuf,
    lock: PathBuf,
    pub(super) bpffs: PathBuf,
    pub(super) pins: PathBuf,
    slots: Slots,
}

impl Place {
    /// `run`: crab's directory below /run.
    pub(super) fn below(run: &Path) -> Self {
        let bpffs = run.join("bpf");
        let pins = load::pins(&bpffs);
        Self {
            lock: run.join("bpf.lock"),
            slots: slots_of(run, &load::build_hash()),
            bpffs,
            pins,
            run: run.to_owned(),
        }
    }

    pub(super) fn lock(&self) -> Result<Flock<File>, String> {
        load::lock_file(&self.lock).map_err(|e| format!("{}: {e}", self.lock.display()))
    }
}

/// The slots of a build.
fn slots_of(run: &Path, build: &str) -> Slots {
    Slots::at(run.join(format!("bpf-{build}.slots")))
}

/// The programs and maps, joined.
pub(super) struct Host {
    place: Place,
    pub(super) probes: ProbeSet,
    epochs: MapHandle,
    epoch_numbers: EpochNumbers,
    cgroups: MapHandle,
    overlays: MapHandle,
    pub(super) watched: MapHandle,
    pub(super) control: ControlPage,
    pub(super) shared_mappings: OwnedFd,
    pub(super) open_files: OwnedFd,
    pub(super) registers: OwnedFd,
    /// The programs that may not miss an event.
    of_files: Vec<OwnedFd>,
    of_tasks: Vec<OwnedFd>,
    /// The program that sees marks of written pages being cleared, if there is one.
    marks: Option<OwnedFd>,
    /// Keep the programs attached, whatever becomes of the pins.
    _links: Vec<OwnedFd>,
}

/// How a sandbox is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) cgroup: u64,
    /// Bit n: n levels below the root.
    pub(super) levels: u64,
    /// The kernel's device number of its overlay.
    pub(super) overlay: u32,
}

impl Host {
    /// Joins, and takes a slot for one sandbox. `load` has [`load::load`] run in another process.
    pub(super) fn join(
        run: &Path,
        load: &dyn Fn() -> Result<(), String>,
    ) -> Result<(Self, SlotLock), String> {
        let place = Place::below(run);
        fs::create_dir_all(run).map_err(|e| format!("{}: {e}", run.display()))?;
        for _ in 0..ATTEMPTS {
            if !place.pins.exists() {
                load()?;
            }
            let _alone = place.lock()?;
            if !place.pins.exists() {
                // The last shim has left between the two steps, and taken everything with it.
                continue;
            }
            let host = Self::open(&place)
                .map_err(|e| format!("cannot join at {}: {e}", place.pins.display()))?;
            let joined = host
                .claim()
                .map_err(|e| format!("cannot take a slot: {e}"))?;
            failpoint("claimed");
            return Ok((host, joined));
        }
        Err("the programs are removed each time before they can be joined".into())
    }

    fn open(place: &Place) -> io::Result<Self> {
        let pin = |name: &str| place.pins.join(name);
        let map = |name: &str| MapHandle::from_pinned_path(pin(name)).map_err(io::Error::other);
        let mut sets = ProbeSet::ALL.into_iter();
        let probes = sets
            .find(|set| pin(set.mark()).exists())
            .ok_or_else(|| io::Error::other("programs of no set are there"))?;
        let open = |names: &[&str], end: &str| -> io::Result<Vec<OwnedFd>> {
            names
                .iter()
                .map(|name| sys::open_pin(&pin(&format!("{name}{end}"))))
                .collect()
        };
        let control = map("control")?;
        Ok(Self {
            probes,
            epochs: map("epochs")?,
            epoch_numbers: EpochNumbers::map(&map("epoch_numbers")?)?,
            cgroups: map("cgroups")?,
            overlays: map("overlays")?,
            watched: map("watched")?,
            control: ControlPage::map(&control)?,
            shared_mappings: sys::open_pin(&pin("shared_mappings"))?,
            open_files: sys::open_pin(&pin("open_files"))?,
            registers: sys::open_pin(&pin("registers"))?,
            of_files: open(&probes.of_files(), "")?,
            of_tasks: open(&probes.of_tasks(), "")?,
            marks: match pin(MARKS).exists() {
                true => Some(sys::open_pin(&pin(MARKS))?),
                false => None,
            },
            _links: links(&place.pins)?,
            place: place.clone(),
        })
    }

    /// Under the lock.
    fn claim(&self) -> io::Result<SlotLock> {
        self.sweep()?;
        self.place
            .slots
            .claim()?
            .ok_or_else(|| io::Error::other("all slots are taken"))
    }

    /// Forgets the sandboxes whose shims are dead. Under the lock.
    fn sweep(&self) -> io::Result<()> {
        let mut dead = Vec::new();
        for (cgroup, slot) in sys::entries::<u64, u32>(self.cgroups.as_fd())? {
            if self.place.slots.is_free(slot)? {
                remove(&self.cgroups, &cgroup)?;
                failpoint("sweeping");
                dead.push(slot);
            }
        }
        for (overlay, slot) in sys::entries::<u32, u32>(self.overlays.as_fd())? {
            if self.place.slots.is_free(slot)? {
                remove(&self.overlays, &overlay)?;
                dead.push(slot);
            }
        }
        for slot in dead {
            self.remove_epochs(slot)?;
            self.unwatch(slot)?;
        }
        Ok(())
    }

    /// Watches no process for this slot.
    pub(super) fn unwatch(&self, slot: u32) -> io::Result<()> {
        for (tgid, its) in sys::entries::<u32, super::abi::Watched>(self.watched.as_fd())? {
            if its.slot == slot {
                remove(&self.watched, &tgid)?;
            }
        }
        Ok(())
    }

    /// Makes the programs see a sandbox. Its epoch has to be there before. An error if another shim
    /// watches it: what it does is recorded once, so one of the two would miss all of it.
    pub(super) fn register(&self, slot: u32, key: &Key) -> io::Result<()> {
        let _alone = self.place.lock().map_err(io::Error::other)?;
        if let Some(other) = get::<u64, u32>(&self.cgroups, &key.cgroup)?
            && other != slot
            && !self.place.slots.is_free(other)?
        {
            return Err(io::Error::other("it is watched already"));
        }
        self.control.add_levels(key.levels);
        // The number of an overlay that is unmounted may be used again before its shim leaves.
        put(&self.overlays, &key.overlay, &slot)?;
        failpoint("overlay");
        put(&self.cgroups, &key.cgroup, &slot)?;
        // What a CPU remembers of these tasks is that they don't matter.
        self.control.new_generation();
        Ok(())
    }

    /// After a [`Host::register`] under another key: what of the former one is no longer right.
    pub(super) fn forget_key(&self, slot: u32, former: &Key, now: &Key) -> io::Result<()> {
        let _alone = self.place.lock().map_err(io::Error::other)?;
        if former.cgroup != now.cgroup
            && get::<u64, u32>(&self.cgroups, &former.cgroup)? == Some(slot)
        {
            remove(&self.cgroups, &former.cgroup)?;
        }
        if former.overlay != now.overlay
            && get::<u32, u32>(&self.overlays, &former.overlay)? == Some(slot)
        {
            remove(&self.overlays, &former.overlay)?;
        }
        Ok(())
    }

    /// The reverse of [`Host::register`], and also if that failed.
    pub(super) fn unregister(&self, slot: u32, key: &Key) -> io::Result<()> {
        // Between a look at whose an entry is and its removal, nobody may take it over.
        let _alone = self.place.lock().map_err(io::Error::other)?;
        if get::<u64, u32>(&self.cgroups, &key.cgroup)? == Some(slot) {
            remove(&self.cgroups, &key.cgroup)?;
        }
        failpoint("unregistering");
        // The number may belong to another sandbox by now.
        if get::<u32, u32>(&self.overlays, &key.overlay)? == Some(slot) {
            remove(&self.overlays, &key.overlay)?;
        }
        self.remove_epochs(slot)?;
        self.unwatch(slot)
    }

    /// The number of the epoch that a slot is in.
    pub(super) fn epoch_number(&self, slot: u32) -> io::Result<u64> {
        Ok(self.number_of(slot)?.load(Ordering::SeqCst))
    }

    /// Puts an epoch where the programs will find it when its number comes. The kernel waits for running
    /// programs before it returns from this update (an RCU grace period): none is left that may write to
    /// the epoch that was there before.
    pub(super) fn put_epoch(&self, slot: u32, number: u64, epoch: &MapHandle) -> io::Result<()> {
        let fd = epoch.as_fd().as_raw_fd();
        put(&self.epochs, &place(slot, number), &fd.cast_unsigned())?;
        failpoint("put");
        Ok(())
    }

    /// Begins the epoch of the next number, which has been put in its place. A program that runs just now
    /// may go on to write to the former one.
    pub(super) fn next_epoch(&self, slot: u32) -> io::Result<()> {
        self.number_of(slot)?.fetch_add(1, Ordering::SeqCst);
        failpoint("next");
        Ok(())
    }

    fn number_of(&self, slot: u32) -> io::Result<&AtomicU64> {
        let number = self.epoch_numbers.of(slot);
        number.ok_or_else(|| io::Error::other("no such slot"))
    }

    fn remove_epochs(&self, slot: u32) -> io::Result<()> {
        (0..u64::from(SIDES)).try_for_each(|side| remove(&self.epochs, &place(slot, side)))
    }

    /// How many events were missed since the programs were loaded.
    pub(super) fn missed(&self) -> io::Result<u64> {
        let mut sum = 0;
        for program in self.of_files.iter().chain(&self.of_tasks) {
            sum += sys::missed(program.as_fd())?;
        }
        Ok(sum)
    }

    /// How many times it was missed that marks were cleared; None if nobody sees that here.
    pub(super) fn marks_missed(&self) -> io::Result<Option<u64>> {
        let marks = self.marks.as_ref();
        marks
            .map(|program| sys::missed(program.as_fd()))
            .transpose()
    }

    /// Leaves; the last one removes the programs. Nothing is left behind if this fails half-way that
    /// the next [`Host::join`] or [`sweep`] does not find.
    pub(super) fn leave(&self, slot: SlotLock) -> Result<(), String> {
        let _alone = self.place.lock()?;
        drop(slot);
        failpoint("left");
        remove_unused(&self.place)
    }
}

/// Removes the programs if no shim uses them: for whoever finds a shim dead.
pub fn sweep(run: &Path) -> Result<(), String> {
    let place = Place::below(run);
    if !place.bpffs.exists() {
        return Ok(());
    }
    let _alone = place.lock()?;
    remove_unused(&place)
}

/// Removes the programs of every build that no shim uses, and what was left half-way. Under the lock.
///
/// Of another build, too: after an upgrade nobody may ever start the one whose last shim was killed. A
/// shim that has loaded and not joined yet loses its pins to this, and loads again.
fn remove_unused(place: &Place) -> Result<(), String> {
    let failed = |e: io::Error| format!("cannot clean up {}: {e}", place.bpffs.display());
    if !load::is_bpffs(&place.bpffs).map_err(failed)? {
        return Ok(());
    }
    load::remove_unfinished(&place.bpffs).map_err(failed)?;
    let mut used = false;
    for build in builds(&place.bpffs).map_err(failed)? {
        let slots = slots_of(&place.run, &build);
        if slots.all_free().map_err(failed)? {
            let gone = load::unfinished(&place.bpffs);
            fs::rename(place.bpffs.join(&build), &gone).map_err(failed)?;
            failpoint("removing");
            fs::remove_dir_all(&gone).map_err(failed)?;
            slots.remove().map_err(failed)?;
        } else {
            used = true;
        }
    }
    if !used {
        failpoint("unmounting");
        umount(&place.bpffs).map_err(|e| failed(e.into()))?;
        fs::remove_dir(&place.bpffs).map_err(failed)?;
    }
    Ok(())
}

/// The builds whose programs are pinned. (The kernel puts files of its own there, too.)
fn builds(bpffs: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(bpffs)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(entry.file_name().into_string());
        }
    }
    Ok(found)
}

/// Where in `epochs` the programs look for a slot's epoch of this number.
fn place(slot: u32, number: u64) -> u32 {
    SIDES * slot + (number % u64::from(SIDES)) as u32
}

fn links(pins: &Path) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(pins)? {
        let path = entry?.path();
        if path
            .as_os_str()
            .as_encoded_bytes()
            .ends_with(LINK.as_bytes())
        {
            found.push(sys::open_pin(&path)?);
        }
    }
    Ok(found)
}

pub(super) fn get<K: Plain, V: Plain>(map: &MapHandle, key: &K) -> io::Result<Option<V>> {
    let found = map.lookup(key.bytes(), MapFlags::ANY).map_err(as_io)?;
    Ok(found.and_then(|bytes| V::read(&bytes)))
}

pub(super) fn put<K: Plain, V: Plain>(map: &MapHandle, key: &K, value: &V) -> io::Result<()> {
    map.update(key.bytes(), value.bytes(), MapFlags::ANY)
        .map_err(as_io)
}

/// What is not there need not be removed.
pub(super) fn remove<K: Plain>(map: &MapHandle, key: &K) -> io::Result<()> {
    match map.delete(key.bytes()).map_err(as_io) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

pub(super) fn as_io(e: libbpf_rs::Error) -> io::Error {
    use std::error::Error as _;
    let cause = e.source().and_then(|s| s.downcast_ref::<io::Error>());
    let code = cause.and_then(io::Error::raw_os_error);
    code.map_or_else(
        || io::Error::new(kind(&e), e.to_string()),
        io::Error::from_raw_os_error,
    )
}

fn kind(e: &libbpf_rs::Error) -> io::ErrorKind {
    match e.kind() {
        libbpf_rs::ErrorKind::NotFound => io::ErrorKind::NotFound,
        libbpf_rs::ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    }
}
