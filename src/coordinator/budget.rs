//! A turn's part of the host's budget for checkpoints (D10).
//!
//! It is asked for after the look and before anything is latched or frozen, and settled when the
//! checkpoint is durable. An exec that comes to the gate meanwhile makes it urgent.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{chain::Link, doors::Doors, machine::Event};
use crate::engine::{
    Action, Caller, Dump, Estimator, Grant, Limits, Member, Plan, Reason, Request, Situation,
    Terms, Work, plan,
};

/// Longer than this no turn waits for the budget: its promise to be durable comes first. Shorter
/// than [`GATE_LIMIT`](super::doors::GATE_LIMIT), after which the gate would open without it.
const LONGEST: Duration = Duration::from_secs(60);
/// A wait that the journal mentions.
const WORTH_SAYING: Duration = Duration::from_millis(100);
/// What a sandbox's first capture of files is taken for.
const FIRST_FILES: u64 = 1 << 20;

/// Where the host's budget is, and how large.
#[derive(Debug, Clone)]
pub struct HostBudget {
    /// crab's directory below /run.
    pub run: PathBuf,
    /// What all sandboxes may spend.
    pub limits: Limits,
}

/// One sandbox's dealings with it.
pub(super) struct Budget {
    member: Member,
    doors: Arc<Doors>,
    history: History,
}

/// What its checkpoints were.
struct History {
    estimator: Estimator,
    last_dump: Option<Dump>,
    last_files: u64,
}

impl Budget {
    pub(super) fn join(host: &HostBudget, name: &str, doors: &Arc<Doors>) -> Self {
        Self {
            member: Member::join(&host.run, name, host.limits, Terms::default()),
            doors: Arc::clone(doors),
            history: History {
                estimator: Estimator::default(),
                last_dump: None,
                last_files: FIRST_FILES,
            },
        }
    }

    /// What a checkpoint is to be. `memory`: bytes that a dump would have, if pre-dumps are possible.
    /// `fixed`: how many there are to be, if that is configured.
    pub(super) fn plan(&mut self, reason: Reason, memory: Option<u64>, fixed: Option<u32>) -> Plan {
        let tokens = self.member.tokens();
        let situation = Situation {
            files: self.history.last_files,
            reason,
            memory,
            last_dump: self.history.last_dump,
            tokens: tokens.map(|tokens| u64::try_from(tokens).unwrap_or(0)),
            wait: self.doors.expected_absence(),
            can_pre_dump: memory.is_some(),
            fixed,
        };
        plan(&situation, self.history.estimator.costs())
    }

    /// Waits until the checkpoint may begin. `urgent`: somebody waits for it already.
    pub(super) fn ask(&mut self, plan: &Plan, urgent: bool) -> Result<Spending<'_>, String> {
        self.doors.on(Event::Ask);
        let caller = Caller::new();
        if urgent {
            caller.promote();
        }
        self.doors.set_caller(Some(Arc::clone(&caller)));
        let request = Request {
            work: match plan.action {
                Action::Nothing | Action::Files => Work::Files,
                Action::Full { .. } => Work::Dump,
            },
            tokens: plan.tokens,
            staged: plan.staged,
            expected: plan.capture,
        };
        let granted = self.member.acquire_or_force(&request, &caller, LONGEST);
        self.doors.set_caller(None);
        let grant = granted.map_err(|e| e.to_string())?;
        self.doors.on(Event::Granted);
        Ok(Spending {
            grant,
            doors: &self.doors,
            history: &mut self.history,
            pre_dumps: (0, None),
            drain: None,
        })
    }
}

/// A checkpoint that may be taken. One that fails is charged for what it has written: nothing, if it
/// was not captured.
#[must_use]
pub(super) struct Spending<'a> {
    grant: Grant<'a>,
    doors: &'a Doors,
    history: &'a mut History,
    /// Bytes of pre-dumps, and when the last of them began.
    pre_dumps: (u64, Option<Instant>),
    /// What was captured, and when the drain began.
    drain: Option<(u64, Instant)>,
}

impl Spending<'_> {
    /// So many pre-dumps came before the dump.
    pub(super) fn pre_dumped(&mut self, count: u32, link: &Link) {
        if let Some(each) = link.frozen.checked_div(count) {
            self.history.estimator.pre_dumped(each);
        }
        self.pre_dumps = (link.captured, link.since);
    }

    /// The sandbox runs again. `images`: the directory with the dump, if there is one.
    pub(super) fn captured(&mut self, images: Option<&Path>, files: u64, frozen: Duration) {
        self.doors.on(Event::Captured);
        let image = images.map_or(0, bytes_in);
        let history = &mut *self.history;
        history.last_files = files;
        if images.is_some() {
            let dump = Dump {
                bytes: image,
                took: frozen,
            };
            history.estimator.dumped(dump);
            if let Some(since) = self.pre_dumps.1 {
                let within = since.elapsed().saturating_sub(frozen);
                history.estimator.changed(image, within);
            }
            history.last_dump = Some(dump);
        } else {
            history.estimator.files_captured(files, frozen);
        }
        let staged = image.saturating_add(files).saturating_add(self.pre_dumps.0);
        self.drain = Some((staged, Instant::now()));
        self.grant
            .captured(staged, history.estimator.costs().drain(staged).1);
    }

    /// It is durable, and has added so many bytes to the store.
    pub(super) fn durable(self, written: u64) {
        if let Some((staged, begin)) = self.drain {
            let estimator = &mut self.history.estimator;
            estimator.drained(staged, written, begin.elapsed());
        }
        self.grant.settle(written);
    }

    /// It has come to nothing.
    pub(super) fn failed(self) {
        if self.drain.is_none() {
            self.grant.settle(0);
        }
    }

    /// What the journal is to say, if anything.
    pub(super) fn note(&self) -> Option<String> {
        let waited = self.grant.waited.as_secs_f64();
        if self.grant.is_forced {
            Some(format!("beyond the host's budget, after {waited:.1} s"))
        } else if self.grant.waited >= WORTH_SAYING {
            Some(format!("waited {waited:.1} s for the host's budget"))
        } else {
            None
        }
    }
}

/// The size of a directory's files. What cannot be read counts for nothing: it is an estimate.
pub(super) fn bytes_in(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|meta| meta.len())
        .fold(0, u64::saturating_add)
}
