//! What a checkpoint is to be: a pure function of what is known before it.
//!
//! The model is in docs/engine.md, section "The plan". Pre-dumps are chosen for one purpose, to have the
//! sandbox frozen for a shorter time, and only if nobody waits the longer for it.

use std::{fmt, time::Duration};

use super::estimator::Costs;

/// More rounds than this never pay: each is a start of CRIU, and a freeze.
pub const MOST_PRE_DUMPS: u32 = 3;

/// What is known before a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// Bytes of files that may have changed.
    pub files: u64,
    /// What may have changed.
    pub reason: Reason,
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
    /// So many pre-dumps, whatever they cost; None: as many as pay.
    pub fixed: Option<u32>,
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

/// What there is a checkpoint for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Nothing has changed.
    Unchanged,
    /// Files have changed, and no process.
    OnlyFiles,
    /// Processes have changed, or nobody knows.
    Processes,
    /// Files have changed that a process stands upon: the last dump does not fit them.
    UsedFiles,
    /// Somebody has asked for a whole one, whatever has changed.
    AskedFor,
}

/// Why a dump that could have pre-dumps has none, or some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreDumps {
    /// None: each would freeze the sandbox for longer than it saves.
    TooSmall,
    /// None, or fewer: the agent is back before they are done.
    TooSlow,
    /// None, or fewer: they write what the host does not have to give.
    TooFewTokens,
    /// With pre-dumps the sandbox is frozen for a shorter time.
    ShorterFreeze,
    /// Their number is configured.
    Fixed,
}

/// A checkpoint to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// What to take.
    pub action: Action,
    /// What for.
    pub reason: Reason,
    /// Why it has no pre-dumps, or has them; None if it could have none: it is no dump, or nobody can
    /// tell which pages change.
    pub pre_dumps: Option<PreDumps>,
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
    match now.reason {
        Reason::Unchanged => Plan::nothing(),
        Reason::OnlyFiles => Plan::files(now, costs),
        Reason::Processes | Reason::UsedFiles | Reason::AskedFor => {
            let plain = Plan::full(now, costs, 0);
            match (now.can_pre_dump, now.fixed) {
                (false, _) => plain,
                (true, None) => with_pre_dumps(now, costs, plain),
                (true, Some(rounds)) => Plan {
                    pre_dumps: Some(PreDumps::Fixed),
                    ..Plan::full(now, costs, rounds.min(MOST_PRE_DUMPS))
                },
            }
        }
    }
}

/// The one with the shortest freeze of those that nobody has to wait for and that can be paid.
fn with_pre_dumps(now: &Situation, costs: &Costs, plain: Plan) -> Plan {
    let mut best = plain;
    let mut why = PreDumps::TooSmall;
    for rounds in 1..=MOST_PRE_DUMPS {
        let plan = Plan::full(now, costs, rounds);
        if plan.frozen >= best.frozen {
            continue;
        }
        if plan.durable > now.wait.max(plain.durable) {
            why = PreDumps::TooSlow;
        } else if now.tokens.is_some_and(|tokens| plan.tokens > tokens) {
            why = PreDumps::TooFewTokens;
        } else {
            best = plan;
            why = PreDumps::ShorterFreeze;
        }
    }
    Plan {
        pre_dumps: Some(why),
        ..best
    }
}

impl Plan {
    /// How many pre-dumps come before the dump.
    pub fn pre_dumps(&self) -> u32 {
        match self.action {
            Action::Full { pre_dumps } => pre_dumps,
            Action::Nothing | Action::Files => 0,
        }
    }

    /// That of a turn that has changed nothing.
    pub fn nothing() -> Self {
        Self {
            action: Action::Nothing,
            reason: Reason::Unchanged,
            pre_dumps: None,
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
            pre_dumps: None,
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
            reason: now.reason,
            pre_dumps: None,
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

/// For the journal: what is taken, what for, and what that was expected to cost.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.action {
            Action::Nothing => return write!(f, "nothing: {}", self.reason),
            Action::Files => write!(f, "files: {}", self.reason)?,
            Action::Full { pre_dumps: 0 } => write!(f, "full: {}", self.reason)?,
            Action::Full { pre_dumps } => {
                write!(f, "full after {pre_dumps} pre-dump(s): {}", self.reason)?;
            }
        }
        if let Some(why) = self.pre_dumps {
            write!(f, ", {why}")?;
        }
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (staged, tokens) = (mb(self.staged), mb(self.tokens));
        let ms = self.frozen.as_millis();
        write!(
            f,
            " (expected: {staged:.1} MB captured, {tokens:.1} MB written, frozen for {ms} ms)"
        )
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unchanged => "nothing has changed",
            Self::OnlyFiles => "no process has changed",
            Self::Processes => "processes have changed, or may have",
            Self::UsedFiles => "files have changed that a process stands upon",
            Self::AskedFor => "it was asked for",
        })
    }
}

impl fmt::Display for PreDumps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooSmall => "pre-dumps would freeze it for longer",
            Self::TooSlow => "the agent would be back before the pre-dumps are done",
            Self::TooFewTokens => "the budget has too little for pre-dumps",
            Self::ShorterFreeze => "pre-dumps shorten the freeze",
            Self::Fixed => "as many pre-dumps as are configured",
        })
    }
}
