//! What the kernel side (BPF) and the shim know, and what this module answers.

use std::{collections::HashMap, fmt, time::Duration};

/// A set of single bits with names; the bits are those of the BPF programs.
macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $bit:expr, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name(pub u32);

        impl $name {
            $($(#[$item_doc])* pub const $item: Self = Self(1 << $bit);)*

            /// Whether all of `other`'s bits are set.
            pub fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether no bit is set.
            pub fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// The bits of both.
            #[must_use]
            pub fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// What the set bits mean; an unknown bit is told, too.
            pub fn names(self) -> Vec<&'static str> {
                let known = [$((Self::$item, $text)),*];
                let mut names: Vec<_> = known.iter().filter(|(bit, _)| self.contains(*bit)).map(|(_, text)| *text).collect();
                if known.iter().fold(self.0, |left, (bit, _)| left & !bit.0) != 0 {
                    names.push("did something that this version does not know");
                }
                names
            }
        }
    };
}

flags! {
    /// What a process that dump P holds did, or had done to it, since P.
    Did {
        /// Changed the inode of a file, in whichever file system.
        FILE = 0, "touched a file";
        /// Sent on a socket.
        SEND = 1, "sent data on a socket";
        /// Received from a socket.
        RECV = 2, "received data from a socket";
        /// Wrote a pipe.
        PIPE = 3, "wrote a pipe";
        /// Made a process or a thread.
        FORK = 4, "forked";
        /// Executed a program.
        EXEC = 5, "executed a program";
        /// Sent a signal, or was the cause of one (a tracee's stop).
        SIGNAL = 6, "sent a signal";
        /// A signal was queued for it.
        GOT_SIGNAL = 7, "got a signal";
        /// Touched others' shared memory, or made a shared mapping.
        SHM = 8, "made a shared mapping";
    }
}

flags! {
    /// What tasks did since P that P does not hold: an exec's processes, gone by now.
    Others {
        /// Moved data on some socket.
        SOCK = 0, "an exec used a socket";
        /// Wrote some pipe.
        PIPE = 1, "an exec wrote a pipe";
        /// Wrote or mapped shared memory that a process of P has, too.
        SHM = 2, "an exec used shared memory";
        /// Wrote or mapped any shared memory, be it its own.
        MEMORY = 3, "an exec used memory of its own";
    }
}

/// What the BPF programs and the shim's I/O pump know since dump P.
///
/// Read it **after** [`Snapshot::take`](super::Snapshot::take) has returned: what the processes
/// did up to any instant of the snapshot is then in the facts. The other way round, a datum that
/// lay in a queue when the facts were read, and was received before the queue was looked at,
/// would be in neither.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelFacts {
    /// One entry for each process that P held, by host pid (tgid). A process without an entry is
    /// not watched, so nothing is known of it: changed.
    pub did: HashMap<i32, Did>,
    /// What tasks did that P does not hold.
    pub others: Others,
    /// An inode of the writable layer that has no name was changed.
    pub orphans_touched: bool,
    /// A task of the sandbox may hold a way to write into another one's memory without a trace
    /// (`/proc/PID/mem`). Sticky: once true it stays true until the sandbox has new processes
    /// only. Then nothing but a comparison with the image acquits.
    pub memory_reached: bool,
    /// Bytes moved between the client and persistent standard streams.
    pub client_bytes: u64,
}

impl KernelFacts {
    /// Whether nothing at all happened, to whatever process.
    pub fn is_quiet(&self) -> bool {
        self.did.values().all(|did| did.is_empty())
            && self.others.is_empty()
            && !self.orphans_touched
            && self.client_bytes == 0
    }
}

/// CPU time that the consistent-cut rule forgives: waking up after a thaw costs 20–70 µs a task.
pub const CUT_CPU_FLOOR: Duration = Duration::from_millis(20);
/// And this part of the time since the baseline: redis with its 10 Hz uses 0.3 %.
pub const CUT_CPU_PER_MILLE: u32 = 10;
/// But never more than this: what a program works out in a background thread without telling
/// anybody is worth a checkpoint in the end.
pub const CUT_CPU_CEILING: Duration = Duration::from_secs(10);
/// So much memory of one process is compared with its image; a look must not cost more than the
/// dump that it saves (1 ms a MiB, measured: docs/inspector-processes.md).
pub const COMPARED_BYTES: u64 = 64 << 20;

/// What may acquit a process.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Whether the consistent-cut rule (c) is used.
    pub consistent_cut: bool,
    /// Whether memory is compared with the image (b).
    pub compare_memory: bool,
    /// (c): CPU time that is always forgiven.
    pub cpu_floor: Duration,
    /// (c): and this part of the elapsed time, in thousandths.
    pub cpu_per_mille: u32,
    /// (c): and never more than this.
    pub cpu_ceiling: Duration,
    /// (b): bytes of one process.
    pub compared_bytes: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            consistent_cut: true,
            compare_memory: true,
            cpu_floor: CUT_CPU_FLOOR,
            cpu_per_mille: CUT_CPU_PER_MILLE,
            cpu_ceiling: CUT_CPU_CEILING,
            compared_bytes: COMPARED_BYTES,
        }
    }
}

impl Settings {
    /// CPU time that a process may have used `elapsed` after the baseline.
    pub fn cpu_limit(&self, elapsed: Duration) -> Duration {
        let share = elapsed
            .checked_mul(self.cpu_per_mille)
            .map_or(Duration::MAX, |time| time / 1000);
        self.cpu_floor.saturating_add(share).min(self.cpu_ceiling)
    }
}

/// Why a process counts as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Acquittal {
    /// (a) It used no CPU time, and nothing was put into its queues.
    NotRun,
    /// (b) Memory, registers and descriptors equal the image.
    Equal,
    /// (c) It ran, and no data moved: the older state is one that the sandbox could be in.
    ConsistentCut,
}

/// What is in the way of an acquittal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A process that P does not hold.
    Created,
    /// A process of P is no more (or its pid is another one's by now).
    Gone,
    /// The kernel side has no entry for it.
    NotWatched,
    /// A bit of [`Did`].
    Did(&'static str),
    /// A thread was started or has ended.
    Threads,
    /// A zombie or another child appeared or went.
    Children,
    /// Credentials, masks, limits, priorities, working directory, namespaces, …: which.
    Attribute(&'static str),
    /// A descriptor was opened, closed, moved, or its queue holds something else.
    Descriptor {
        /// Its number.
        fd: i32,
        /// What it refers to; from the sandbox, shortened, not escaped.
        target: String,
    },
    /// An exec changed a file without a name, and this process holds such a one.
    DeletedFile,
    /// An exec used shared memory, and this process has some.
    SharedMemory,
    /// It maps a file that others can see, shared and writable: stores leave no trace.
    SharedFile,
    /// Somebody wrote into a pipe or terminal that it holds.
    PipeMoved {
        /// Its number.
        fd: i32,
    },
    /// It read, and from what it holds that may have been somebody's message.
    MayHaveRead(&'static str),
    /// The kernel writes into its memory while it sleeps (the ring of a packet socket).
    FilledByKernel,
    /// It wrote (`wchar`, `syscw` of /proc/PID/io).
    Wrote,
    /// Its I/O counters cannot be read.
    NoCounters,
    /// Somebody connected to a listener of its network namespace.
    Connected,
    /// It used more CPU time than the rule forgives.
    Ran(Duration),
    /// Another process may have written into its memory.
    MemoryReached,
    /// (b) Its memory or registers differ from the image: where.
    Memory(String),
    /// (b) could not be tried: why.
    NotCompared(String),
    /// Of the whole sandbox: mounts, SysV IPC, host name, network.
    Sandbox(&'static str),
    /// A limit on what is read of a hostile sandbox was met, or it cannot be read.
    Unknown(String),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created => f.write_str("created"),
            Self::Gone => f.write_str("gone"),
            Self::NotWatched => f.write_str("not watched"),
            Self::Did(what) | Self::Sandbox(what) => f.write_str(what),
            Self::Threads => f.write_str("a thread came or went"),
            Self::Children => f.write_str("its children changed"),
            Self::Attribute(what) => write!(f, "changed its {what}"),
            Self::Descriptor { fd, target } => write!(f, "descriptor {fd} ({target:?}) changed"),
            Self::DeletedFile => f.write_str("an exec changed a deleted file"),
            Self::SharedMemory => f.write_str("an exec used shared memory"),
            Self::SharedFile => f.write_str("ran, and has a file mapped that it may have written"),
            Self::PipeMoved { fd } => write!(f, "ran, and somebody wrote to its descriptor {fd}"),
            Self::MayHaveRead(what) => write!(f, "may have read from {what}"),
            Self::FilledByKernel => f.write_str("the kernel writes into its memory"),
            Self::Wrote => f.write_str("wrote"),
            Self::NoCounters => f.write_str("its I/O is not counted"),
            Self::Connected => f.write_str("ran after a connection was made"),
            Self::Ran(time) => write!(f, "ran for {time:?}"),
            Self::MemoryReached => f.write_str("others may have written its memory"),
            Self::Memory(place) => write!(f, "differs from the image: {place}"),
            Self::NotCompared(why) => write!(f, "was not compared with the image: {why}"),
            Self::Unknown(why) => write!(f, "unknown: {why}"),
        }
    }
}

/// One reason to call a sandbox's processes changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// Host pid; 0 for what belongs to the whole sandbox.
    pub pid: i32,
    /// The process's name; from the sandbox, not escaped. Shown escaped.
    pub comm: String,
    /// What happened.
    pub what: What,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            return self.what.fmt(f);
        }
        write!(f, "{} {:?}: {}", self.pid, self.comm, self.what)
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// P's image may stand for what the processes are now.
    Unchanged {
        /// For each process (host pid, name): by which rule.
        by: Vec<(i32, String, Acquittal)>,
    },
    /// It may not.
    Changed {
        /// At least one reason.
        why: Vec<Reason>,
    },
}

impl Verdict {
    /// Whether P's image may stand for what the processes are now.
    pub fn is_unchanged(&self) -> bool {
        matches!(self, Self::Unchanged { .. })
    }
}
