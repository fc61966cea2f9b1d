//! What the programs and user space agree upon: the Rust side of `bpf/inspector.h`.

/// Sandboxes that one host can watch at once.
pub(super) const SLOTS: u32 = 4096;
/// Epochs of one sandbox that the programs may write to: that of an even number, and of an odd one.
pub(super) const SIDES: u32 = 2;

/// An inode, as the programs name it. The key of zeros is an epoch's header.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct InodeKey {
    pub(super) ino: u64,
    /// The kernel's `dev_t`: major << 20 | minor.
    pub(super) dev: u32,
    /// Not 0: `stat()` shows it otherwise. Its file system is a module that came later than the programs.
    pub(super) strange: u32,
}

/// How an inode changed; of a header: [`epoch_bits`], and the number of inodes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) bits: u32,
    pub(super) count: u32,
}

/// What a watched process did.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Watched {
    pub(super) slot: u32,
    pub(super) did: u32,
    /// The cgroup of the shim, and of those whom it has dump the sandbox.
    pub(super) keeper: u64,
}

/// What user space tells the programs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Control {
    pub(super) generation: u64,
    pub(super) levels: u64,
    pub(super) watching: u64,
}

/// A line of an iterator.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mapping {
    pub(super) ino: u64,
    pub(super) dev: u32,
    pub(super) tgid: u32,
    pub(super) kind: u32,
    pub(super) strange: u32,
}

/// The registers of a thread, as one number.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Registers {
    pub(super) tid: u32,
    pub(super) unused: u32,
    pub(super) hash: u64,
    /// The cgroup of whoever asks, by its id in cgroup v2's hierarchy.
    pub(super) reader: u64,
}

/// [`Mapping::kind`] of a ring of asynchronous I/O.
pub(super) const MAPPING_AIO: u32 = 1;

/// Bits of [`Seen::bits`] of an inode.
pub(super) mod seen_bits {
    pub(in super::super) const CTIME: u32 = 1 << 0;
    pub(in super::super) const PAGES: u32 = 1 << 1;
    pub(in super::super) const MAPPED: u32 = 1 << 2;
    pub(in super::super) const OVERLAY: u32 = 1 << 3;
    pub(in super::super) const OUTSIDE: u32 = 1 << 4;
    pub(in super::super) const DIRECTORY: u32 = 1 << 5;
    /// Not the kernel's: still mapped, or being written, when its epoch began.
    pub(in super::super) const CARRIED: u32 = 1 << 31;
}

/// Bits of [`Seen::bits`] of a header.
pub(super) mod epoch_bits {
    pub(in super::super) const OVERFLOW: u32 = 1 << 0;
}

/// What [`Watch::did`](super::Watch::did) returns.
pub mod did_bits {
    /// Changed an inode of a file.
    pub const FILE: u32 = 1 << 0;
    /// Sent through a socket.
    pub const SEND: u32 = 1 << 1;
    /// Received from a socket; also its end.
    pub const RECEIVE: u32 = 1 << 2;
    /// Wrote to a pipe.
    pub const PIPE: u32 = 1 << 3;
    /// Forked, a thread included.
    pub const FORK: u32 = 1 << 4;
    /// Executed a program.
    pub const EXEC: u32 = 1 << 5;
    /// Sent a signal.
    pub const SIGNAL: u32 = 1 << 6;
    /// Was sent a signal.
    pub const GET_SIGNAL: u32 = 1 << 7;
    /// Touched memory of the kernel's own tmpfs: memfd, SysV, shared anonymous memory.
    pub const MEMORY: u32 = 1 << 8;
    /// One of its threads ended.
    pub const EXIT: u32 = 1 << 9;
}

/// A structure without padding, of which every pattern of bits is a value.
///
/// # Safety
/// The type is `repr(C)`, consists of integers and has no padding.
pub(super) unsafe trait Plain: Copy + Default {
    /// Its bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: no padding, so every byte is initialised; the lifetime is self's.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast(), size_of::<Self>()) }
    }

    /// Reads one; None if there are not exactly as many bytes.
    fn read(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length is right, any bits are a value, and the read does not need alignment.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

macro_rules! plain {
    ($($type:ty = $size:literal),* $(,)?) => {
        $(
            // SAFETY: repr(C) structures of integers; the sizes are those of their fields together.
            unsafe impl Plain for $type {}
            const _: () = assert!(size_of::<$type>() == $size);
        )*
    };
}

plain!(
    u32 = 4,
    u64 = 8,
    InodeKey = 16,
    Seen = 8,
    Watched = 16,
    Control = 24,
    Mapping = 24,
    Registers = 24
);

/// A device number as `stat()` shows it, in the kernel's form.
pub(super) fn kernel_dev(dev: u64) -> u32 {
    libc::major(dev) << 20 | libc::minor(dev) & 0xf_ffff
}

/// The reverse of [`kernel_dev`].
pub(super) fn user_dev(dev: u32) -> u64 {
    libc::makedev(dev >> 20, dev & 0xf_ffff)
}
