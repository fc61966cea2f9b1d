//! Why a cut has come to nothing.

use std::{io, path::Path};

use super::{
    cut::LATCH_LIMIT,
    freeze::FreezeError,
    poison::{self, Snapshot, SnapshotError, Verdict},
};
use crate::{
    cgroup::CgroupError,
    runtime::{self, RuntimeError, criu_conf, descriptors::DescriptorsError},
};

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// Some of its processes are not its own.
    #[error("the sandbox's processes cannot be kept: {0}")]
    Shared(String),
    /// CRIU would drop these processes without a word (D9b).
    #[error(
        "the sandbox has {} that CRIU cannot dump, because they are no descendants of its init: \
         wait for them or end them first",
        list_execs(.execs, .pids)
    )]
    LiveExecs {
        /// Execs that run.
        execs: Vec<String>,
        /// Host pids of all processes that would be lost.
        pids: Vec<i32>,
    },
    /// CRIU would hang in the kernel: a task that is stopped never answers in a v1 freezer.
    #[error(
        "the sandbox has stopped processes (host pid {}), on which CRIU hangs with cgroup v1: \
         continue or end them",
        list(.0)
    )]
    Stopped(Vec<i32>),
    /// A process stays in a state in which CRIU cannot dump it.
    #[error("process {pid} (host pid) {state} all the time, and CRIU cannot dump it so")]
    Unrest {
        /// Its host pid.
        pid: i32,
        /// What it does, in words.
        state: &'static str,
    },
    /// Another cut has taken longer than one may take.
    #[error("another checkpoint of the sandbox does not end")]
    Busy,
    /// An exec was being started for too long.
    #[error("an exec has been starting for {LATCH_LIMIT:?}")]
    Latch,
    /// The sandbox could not be frozen.
    #[error("cannot freeze the sandbox: {0}")]
    Freeze(#[from] FreezeError),
    /// Its processes could not be listed.
    #[error("cannot list the sandbox's processes: {0}")]
    Procs(#[from] CgroupError),
    /// A dump of these processes would fail, or be worth nothing.
    #[error("the sandbox's processes cannot be kept: {}", why_not(.0))]
    Poison(Verdict),
    /// Whether they can be dumped is not known.
    #[error("cannot tell whether the sandbox's processes can be kept: {0}")]
    Unknown(#[from] SnapshotError),
    /// CRIU failed.
    #[error("{}{source}; CRIU's log says:\n{log}", sentence(.means))]
    Dump {
        /// What that means, if it is known.
        means: Option<String>,
        /// The runtime's answer.
        source: RuntimeError,
        /// The end of CRIU's log.
        log: String,
    },
    /// The sandbox did not stand still.
    #[error("the sandbox did not stand still during the dump ({0}): discarded")]
    Disturbed(String),
    /// stdio could not be saved.
    #[error(transparent)]
    Streams(#[from] DescriptorsError),
    /// The part done by the caller.
    #[error("{0}")]
    Capture(String),
}

fn why_not(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Fine => String::new(),
        Verdict::FilesOnly(reasons) | Verdict::Refuse(reasons) => reasons.to_string(),
    }
}

fn sentence(means: &Option<String>) -> String {
    let means = means.as_ref();
    means.map_or_else(String::new, |means| format!("{means}. "))
}

fn list(pids: &[i32]) -> String {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    pids.join(", ")
}

fn list_execs(execs: &[String], pids: &[i32]) -> String {
    let pids = list(pids);
    match execs {
        [] => format!("processes (host pid {pids})"),
        execs => format!("live execs ({}; host pid {pids})", execs.join(", ")),
    }
}

impl CutError {
    /// What keeps the processes from being kept, if it is known that only they cannot be.
    pub fn why(&self) -> String {
        match self {
            Self::Shared(why) => why.clone(),
            Self::Poison(verdict) => why_not(verdict),
            e => e.to_string(),
        }
    }

    /// Whether only the processes stand in the way: its files can be kept, and are whole.
    pub fn spares_files(&self) -> bool {
        match self {
            Self::Shared(_)
            | Self::LiveExecs { .. }
            | Self::Stopped(_)
            | Self::Unrest { .. }
            | Self::Poison(Verdict::FilesOnly(_))
            | Self::Unknown(_)
            | Self::Dump { .. }
            | Self::Disturbed(_) => true,
            Self::Busy
            | Self::Latch
            | Self::Freeze(_)
            | Self::Procs(_)
            | Self::Poison(Verdict::Fine | Verdict::Refuse(_))
            | Self::Streams(_)
            | Self::Capture(_) => false,
        }
    }

    /// CRIU, or the runtime, has failed.
    pub(super) fn dump(
        args: &runtime::Checkpoint,
        snapshot: Option<&Snapshot>,
        source: RuntimeError,
    ) -> Self {
        let log = criu_conf::log_tail(&args.work_path.join("dump.log"));
        Self::Dump {
            means: poison::explain(&log, snapshot),
            source,
            log,
        }
    }

    /// What CRIU finds in its HOME could not be made.
    pub(super) fn home(args: &runtime::Checkpoint, error: &io::Error) -> Self {
        let home = args.home.as_deref().unwrap_or(Path::new("HOME"));
        Self::Capture(format!("{home:?}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_execs_and_pids() {
        let error = CutError::LiveExecs {
            execs: vec!["e1".into()],
            pids: vec![7, 8],
        };
        assert!(error.to_string().contains("live execs (e1; host pid 7, 8)"));
    }
}
