//! What changes in a sandbox between two cuts: a map of the kernel.

use std::{collections::HashSet, io, os::fd::AsFd};

use libbpf_rs::{MapHandle, MapType};

use super::{
    abi::{self, InodeKey, MAPPING_AIO, Mapping, Seen, epoch_bits, seen_bits},
    dirty::{Dirty, Happened, How, Inode},
    host::{as_io, get, put},
    sys,
};

/// Inodes that one epoch has room for at first. A bucket takes 16 bytes, at once; an inode that is
/// recorded takes about 80.
pub(super) const FIRST_ROOM: u32 = 4 << 10;
/// The most: about 25 MiB of the kernel's memory.
const MOST_ROOM: u32 = 256 << 10;

/// The epoch's own entry: [`epoch_bits`], and how many inodes there are.
const HEADER: InodeKey = own(0);
/// What happened besides: [`Happened`].
const EVENTS: InodeKey = own(1);

/// `enum own_keys` of `bpf/inspector.h`.
const fn own(which: u32) -> InodeKey {
    InodeKey {
        ino: 0,
        dev: which,
        strange: 0,
    }
}

/// What is dirty in an epoch.
pub(super) struct Epoch {
    pub(super) map: MapHandle,
    pub(super) room: u32,
    /// Events that the programs had missed when it began.
    pub(super) missed: u64,
    /// Inodes that can change in it without a sign.
    pub(super) carried: HashSet<InodeKey>,
    /// Why anything may have changed in it.
    pub(super) doubt: Option<String>,
}

/// How much has been noted in an epoch. Inodes are added and bits are set, never the reverse: between two
/// readings of the same extent nothing has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    inodes: usize,
    /// The sum of all words of bits, which grows with each bit.
    bits: u64,
}

/// An epoch that has ended, and counts until a cut that has seen all of it is durable.
pub(super) struct Ended {
    pub(super) epoch: Epoch,
    /// What the last cut has seen of it.
    seen: Option<Extent>,
}

impl From<Epoch> for Ended {
    fn from(epoch: Epoch) -> Self {
        Self { epoch, seen: None }
    }
}

impl Ended {
    /// A cut is made: whatever is in it by now is seen.
    pub(super) fn see(&mut self) -> io::Result<()> {
        self.seen = Some(self.epoch.extent()?);
        Ok(())
    }

    /// Whether the last cut has seen all that is in it now.
    pub(super) fn is_seen(&self) -> io::Result<bool> {
        Ok(self.seen == Some(self.epoch.extent()?))
    }
}

impl Epoch {
    pub(super) fn new(room: u32) -> io::Result<Self> {
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
            map_flags: libbpf_sys::BPF_F_NO_PREALLOC,
            ..Default::default()
        };
        let (key, value) = (size_of::<InodeKey>() as u32, size_of::<Seen>() as u32);
        let map = MapHandle::create(MapType::Hash, Some("epoch"), key, value, room, &options)
            .map_err(as_io)?;
        put(&map, &HEADER, &Seen::default())?;
        put(&map, &EVENTS, &Seen::default())?;
        Ok(Self {
            map,
            room,
            missed: 0,
            carried: HashSet::new(),
            doubt: None,
        })
    }

    fn header(&self) -> io::Result<Seen> {
        get(&self.map, &HEADER)?.ok_or_else(|| io::Error::other("an epoch without a header"))
    }

    /// What happened in it besides changes of files.
    pub(super) fn happened(&self) -> io::Result<Happened> {
        let events = get::<_, Seen>(&self.map, &EVENTS)?;
        events
            .map(|events| Happened(events.bits))
            .ok_or_else(|| io::Error::other("an epoch without its events"))
    }

    /// Forgets what happened. While none of the sandbox's tasks runs: nobody else notes events.
    pub(super) fn forget_events(&self) -> io::Result<()> {
        let left = Seen {
            bits: self.happened()?.0 & Happened::REACH.0,
            count: 0,
        };
        put(&self.map, &EVENTS, &left)
    }

    /// Room for the next one: more if this one was nearly too small.
    pub(super) fn next_room(&self) -> io::Result<u32> {
        let header = self.header()?;
        let full = header.bits & epoch_bits::OVERFLOW != 0 || header.count > self.room / 2;
        let empty = header.count < self.room / 16;
        Ok(match (full, empty) {
            (true, _) => self.room.saturating_mul(4).min(MOST_ROOM),
            (_, true) => (self.room / 2).max(FIRST_ROOM),
            _ => self.room,
        })
    }

    /// How much has been noted in it so far.
    fn extent(&self) -> io::Result<Extent> {
        let header = self.header()?;
        let inodes = self.inodes(&header)?;
        let bits = inodes.iter().map(|(_, seen)| u64::from(seen.bits));
        Ok(Extent {
            inodes: inodes.len(),
            bits: bits.sum::<u64>() + u64::from(header.bits),
        })
    }

    /// The inodes that are in it; none if its header, read before, counts none.
    fn inodes(&self, header: &Seen) -> io::Result<Vec<(InodeKey, Seen)>> {
        if header.count == 0 {
            return Ok(Vec::new());
        }
        let mut all = sys::entries::<InodeKey, Seen>(self.map.as_fd())?;
        all.retain(|(key, _)| key.ino != 0);
        Ok(all)
    }

    /// The inodes that are in it.
    pub(super) fn noted(&self) -> io::Result<Vec<(InodeKey, Seen)>> {
        self.inodes(&self.header()?)
    }

    /// Adds what happened in it.
    pub(super) fn add_to(&self, dirty: &mut Dirty) -> io::Result<()> {
        let header = self.header()?;
        dirty.happened.0 |= self.happened()?.0;
        if header.bits & epoch_bits::OVERFLOW != 0 {
            let room = self.room;
            dirty.doubts.push(format!(
                "more inodes changed than there is room for ({room})"
            ));
        }
        dirty.doubts.extend(self.doubt.clone());
        for key in &self.carried {
            dirty.add(key, seen_bits::CARRIED);
        }
        for (key, seen) in self.inodes(&header)? {
            dirty.add(&key, seen.bits);
        }
        Ok(())
    }

    /// Inodes that somebody outside of the sandbox has mapped.
    pub(super) fn foreign(&self) -> io::Result<Vec<InodeKey>> {
        const BOTH: u32 = seen_bits::OUTSIDE | seen_bits::MAPPED;
        let all = self.noted()?;
        let foreign = all.into_iter().filter(|(_, seen)| seen.bits & BOTH == BOTH);
        Ok(foreign.map(|(key, _)| key).collect())
    }
}

/// A file on btrfs whose module came after the programs: they do not know its structures.
const STRANGE: &str = "a file system's module was loaded after the inspector's programs, which name its \
    inodes wrongly; they are loaded anew once no sandbox is left";

impl Dirty {
    pub(super) fn add(&mut self, key: &InodeKey, bits: u32) {
        if key.strange != 0 && !self.doubts.iter().any(|doubt| doubt == STRANGE) {
            self.doubts.push(STRANGE.into());
        }
        let how = self.inodes.entry(Inode::from(*key)).or_insert(How(0));
        how.0 |= bits;
    }
}

impl From<InodeKey> for Inode {
    fn from(key: InodeKey) -> Self {
        Self {
            dev: abi::user_dev(key.dev),
            ino: key.ino,
        }
    }
}

impl From<Inode> for InodeKey {
    fn from(inode: Inode) -> Self {
        Self {
            ino: inode.ino,
            dev: abi::kernel_dev(inode.dev),
            strange: 0,
        }
    }
}

impl InodeKey {
    /// The inode that an iterator's line names; none for a ring of asynchronous I/O.
    pub(super) fn of(mapping: &Mapping) -> Option<Self> {
        (mapping.kind != MAPPING_AIO).then_some(Self {
            ino: mapping.ino,
            dev: mapping.dev,
            strange: mapping.strange,
        })
    }
}
