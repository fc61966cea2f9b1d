//! What a checkpoint is to be: a pure function of what is known before it.
//!
//! The model is in docs/engine.md, section "The plan". Pre-dumps are chosen for one purpose, to have the
//! sandbox frozen for a shorter time, and only if nobody waits the longer for it.

use std::time::Duration;

use super::estimator::Costs;

/// More rounds than this never pay: each is a start of CRIU, and a freeze.
pub const MOST_PRE_DUMPS: u32 = 3;

/// What is known before a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// Bytes of files that may have changed.
    pub files: u64,
    /// Whether any file may have.
    pub files_changed: bool,
    /// Whether any process may have, so that a dump is needed.
    pub processes_changed: bool,
    /// Bytes that a dump would have to write now: the processes' private memory, as far as it is known.
    pub memory: Option<u64>,
    /// The sandbox's last dump.
    pub last_dump: Option<Dump>,
    /// Bytes that the host could write now without a debt; None: any number.
    pub tokens: Option<u64>,
    /// How long the agent is expected to be away.
    pub wait: Duration,
    /// Whether this host's kernel can tell which pages have changed.
    pub can_pre_dump: bool,
}

/// A dump that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dump {
    /// Its bytes.
    pub bytes: u64,
    /// From the freeze to the thaw.
    pub took: Duration,
}

/// What to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing: there is no change.
    Nothing,
    /// Files, beside the image that there is.
    Files,
    /// Files and processes.
    Full {
        /// Rounds before the dump in which the processes run on.
        pre_dumps: u32,
    },
}

/// Why it is that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Nothing has changed.
    Unchanged,
    /// No process has changed.
    OnlyFiles,
    /// Processes have changed.
    Processes,
    /// No pre-dump: the kernel doesn't tell changed pages.
    NoDirtyPages,
    /// No pre-dump: each would freeze the sandbox for longer than it saves.
    TooSmall,
    /// No pre-dump, or fewer: the agent is back before they are done.
    TooSlow,
    /// No pre-dump, or fewer: they write what the host does not have to give.
    TooFewTokens,
    /// With pre-dumps the sandbox is frozen for a shorter time.
    ShorterFreeze,
}

/// A checkpoint to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What to take.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// Bytes that it is expected to capture.
    pub staged: u64,
    /// Bytes that it is expected to write to disk in the end.
    pub tokens: u64,
    /// How long the sandbox is expected to be frozen, pre-dumps' freezes included.
    pub frozen: Duration,
    /// From the beginning to the thaw after the capture.
    pub capture: Duration,
    /// From the beginning to the disk.
    pub durable: Duration,
}

/// Plans a checkpoint.
pub fn plan(now: &Situation, costs: &Costs) -> Plan {
    if !now.processes_changed {
        return match now.files_changed {
            false => Plan::nothing(),
            true => Plan::files(now, costs),
        };
    }
    let plain = Plan::full(now, costs, 0);
    if !now.can_pre_dump {
        return Plan {
            reason: Reason::NoDirtyPages,
            ..plain
        };
    }
    with_pre_dumps(now, costs, plain)
}

/// The one with the shortest freeze of those that nobody has to wait for and that can be paid.
fn with_pre_dumps(now: &Situation, costs: &Costs, plain: Plan) -> Plan {
    let mut best = plain;
    let mut reason = Reason::TooSmall;
    for rounds in 1..=MOST_PRE_DUMPS {
        let plan = Plan::full(now, costs, rounds);
        if plan.frozen >= best.frozen {
            continue;
        }
        if plan.durable > now.wait.max(plain.durable) {
            reason = Reason::TooSlow;
        } else if now.tokens.is_some_and(|tokens| plan.tokens > tokens) {
            reason = Reason::TooFewTokens;
        } else {
            best = plan;
            reason = Reason::ShorterFreeze;
        }
    }
    Plan { reason, ..best }
}

impl Plan {
    fn nothing() -> Self {
        Self {
            action: Action::Nothing,
            reason: Reason::Unchanged,
            staged: 0,
            tokens: 0,
            frozen: Duration::ZERO,
            capture: Duration::ZERO,
            durable: Duration::ZERO,
        }
    }

    fn files(now: &Situation, costs: &Costs) -> Self {
        let capture = costs.files(now.files);
        let (tokens, drain) = costs.drain(now.files);
        Self {
            action: Action::Files,
            reason: Reason::OnlyFiles,
            staged: now.files,
            tokens,
            // At worst: a sandbox in which nobody runs is not frozen at all.
            frozen: capture,
            capture,
            durable: capture + drain,
        }
    }

    fn full(now: &Situation, costs: &Costs, pre_dumps: u32) -> Self {
        let memory = now.dump_bytes();
        // What this sandbox's dump has taken beyond what its size explains: it has more processes.
        let own = now.last_dump.map_or(Duration::ZERO, |last| {
            last.took.saturating_sub(costs.dump(last.bytes))
        });
        let (mut left, mut staged) = (memory, now.files);
        let (mut frozen, mut before) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..pre_dumps {
            let takes = costs.pre_dump(left) + own;
            staged = staged.saturating_add(left);
            frozen += costs.pre_dump_freeze + own;
            before += takes;
            left = memory.min(costs.changed_in(takes));
        }
        let last = costs.dump(left) + own + costs.files(now.files);
        let staged = staged.saturating_add(left);
        let (tokens, drain) = costs.drain(staged);
        Self {
            action: Action::Full { pre_dumps },
            reason: Reason::Processes,
            staged,
            tokens,
            frozen: frozen + last,
            capture: before + last,
            durable: before + last + drain,
        }
    }
}

impl Situation {
    /// What a dump would write: what the processes have now, or what the last one was.
    fn dump_bytes(&self) -> u64 {
        let last = self.last_dump.map(|dump| dump.bytes);
        self.memory.or(last).unwrap_or(0)
    }
}
