//! What may have changed in a sandbox.

use std::collections::BTreeMap;

use super::abi::seen_bits;

/// An inode that may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Inode {
    /// As `stat()` shows it: `makedev(major, minor)`. Of btrfs the subvolume's.
    pub dev: u64,
    /// Its number there.
    pub ino: u64,
}

/// How an inode was seen to change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct How(pub(super) u32);

impl How {
    /// The kernel saw it change; else it merely could have, being mapped.
    pub fn is_seen(self) -> bool {
        self.0 & !seen_bits::CARRIED != 0
    }

    /// Somebody outside of the sandbox's cgroup changed it.
    pub fn is_outside(self) -> bool {
        self.0 & seen_bits::OUTSIDE != 0
    }

    /// Words for a person.
    pub fn words(self) -> Vec<&'static str> {
        [
            (seen_bits::CTIME, "ctime"),
            (seen_bits::PAGES, "pages"),
            (seen_bits::MAPPED, "mapped"),
            (seen_bits::OVERLAY, "overlay"),
            (seen_bits::OUTSIDE, "outside"),
            (seen_bits::CARRIED, "carried"),
        ]
        .into_iter()
        .filter_map(|(bit, word)| (self.0 & bit != 0).then_some(word))
        .collect()
    }
}

/// What happened in a sandbox besides changes of files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Happened(pub(super) u32);

macro_rules! happened {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $word:literal;)*) => {
        impl Happened {
            $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)*

            /// Words for a person.
            pub fn words(self) -> Vec<&'static str> {
                [$((Self::$name, $word)),*]
                    .into_iter()
                    .filter_map(|(what, word)| self.has(what).then_some(word))
                    .collect()
            }
        }
    };
}

happened! {
    /// A task forked.
    FORK = 0, "fork";
    /// A task executed a program.
    EXEC = 1, "exec";
    /// A task ended.
    EXIT = 2, "exit";
    /// A process that is not watched moved data through a socket.
    SOCKET = 3, "socket";
    /// A process that is not watched wrote to a pipe.
    PIPE = 4, "pipe";
    /// A process that is not watched touched memory of the kernel's own tmpfs (memfd, SysV).
    MEMORY = 5, "memory";
    /// A POSIX message queue changed.
    QUEUE = 6, "queue";
    /// A watched process did something, or was sent a signal: see [`Watch::did`].
    WATCHED = 7, "watched";
    /// Somebody may have reached into a process's memory by way of /proc/PID/mem. The kernel tells of
    /// the first time alone, so this is never forgotten.
    REACH = 8, "reach";
    /// Somebody who does not dump the sandbox cleared the marks of pages that were written to.
    CLEARED = 9, "cleared";
}

impl Happened {
    /// Whether any of these happened.
    pub fn has(self, what: Self) -> bool {
        self.0 & what.0 != 0
    }

    /// Whether nothing at all did.
    pub fn nothing(self) -> bool {
        self.0 == 0
    }
}

/// What may have changed.
#[derive(Debug, Clone, Default)]
pub struct Dirty {
    /// Each inode, and how.
    pub inodes: BTreeMap<Inode, How>,
    /// What else happened.
    pub happened: Happened,
    /// Not empty: everything may have changed, and why.
    pub doubts: Vec<String>,
}

impl Dirty {
    /// Whether nothing can have changed.
    pub fn is_clean(&self) -> bool {
        self.inodes.is_empty() && self.happened.nothing() && self.doubts.is_empty()
    }
}
