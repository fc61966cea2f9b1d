//! The journal of a sandbox: one line for each turn, as `crab log --json` shows it.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{Digest, StoreError, files};
use crate::sandbox::TurnNo;

/// Longer lines are refused, to write and to read.
pub(super) const MAX_LINE: usize = 64 << 10;
/// As much of a journal is read; a million turns take about half of it.
const MAX_JOURNAL: u64 = 1 << 30;
/// Notes are cut to this many characters.
const MAX_NOTE: usize = 8 << 10;

/// One turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JournalLine {
    /// Which.
    pub turn: TurnNo,
    /// Why it ended.
    pub trigger: Trigger,
    /// What it changed; empty for nothing.
    pub effects: Vec<Effect>,
    /// What crab did.
    pub action: Action,
    /// What is part of a state and not in the checkpoint; `note` says why.
    #[serde(default)]
    pub missing: Vec<Missing>,
    /// What was planned for it, what for, and what that was expected to cost.
    #[serde(default)]
    pub plan: Option<String>,
    /// How many came before the final dump.
    pub pre_dumps: u32,
    /// The digest of the checkpoint's manifest, if there is one.
    pub checkpoint: Option<Digest>,
    /// How many files differ from the checkpoint before.
    pub changed_files: u64,
    /// Bytes read in the cut.
    pub bytes_captured: u64,
    /// Bytes written to the store.
    pub bytes_written: u64,
    /// How long the look took.
    pub look_us: u64,
    /// How long the sandbox was frozen.
    pub freeze_us: u64,
    /// From the boundary until the checkpoint was durable; none without one.
    pub durable_us: Option<u64>,
    /// How long the next exec was held at the gate.
    pub exposed_us: u64,
    /// When the turn began.
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    /// When it ended: its boundary.
    #[serde(with = "time::serde::rfc3339")]
    pub ended_at: OffsetDateTime,
    /// Whatever a person should know.
    pub note: Option<String>,
}

impl Trigger {
    /// Whether the sandbox went back to a checkpoint, or was to.
    pub fn is_way_back(&self) -> bool {
        matches!(self, Self::Rollback | Self::Recovery)
    }
}

impl JournalLine {
    /// A turn of which nothing is known yet but when it was.
    pub fn new(
        turn: TurnNo,
        trigger: Trigger,
        started_at: OffsetDateTime,
        ended_at: OffsetDateTime,
    ) -> Self {
        Self {
            turn,
            trigger,
            effects: Vec::new(),
            action: Action::Skip,
            missing: Vec::new(),
            plan: None,
            pre_dumps: 0,
            checkpoint: None,
            changed_files: 0,
            bytes_captured: 0,
            bytes_written: 0,
            look_us: 0,
            freeze_us: 0,
            durable_us: None,
            exposed_us: 0,
            started_at,
            ended_at,
            note: None,
        }
    }
}

/// Why a turn ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trigger {
    /// The last live exec ended.
    Exec,
    /// `crab turn` or `crab checkpoint`.
    Manual,
    /// Time passed.
    Timer,
    /// `crab rollback`.
    Rollback,
    /// It had died, and went on from a checkpoint.
    Recovery,
    /// Written by a newer crab.
    #[serde(untagged)]
    Other(String),
}

/// What a turn changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// The writable layer.
    Files,
    /// Tasks came or went.
    Processes,
    /// Tasks that stayed have other memory.
    Memory,
    /// The mount table.
    Mounts,
    /// Written by a newer crab.
    #[serde(untagged)]
    Other(String),
}

/// What a checkpoint may lack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missing {
    /// All processes.
    Processes,
    /// The files in a tmpfs.
    Tmpfs,
    /// Written by a newer crab.
    #[serde(untagged)]
    Other(String),
}

/// What crab did at the end of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Nothing: nothing had changed.
    Skip,
    /// Captured files.
    Files,
    /// Captured files and dumped processes.
    Full,
}

/// When a line has to be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// When `append` returns.
    Now,
    /// Whenever the kernel writes it: fine for a turn that changed nothing.
    Later,
}

/// A journal as it was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Journal {
    /// The turns, oldest first, each once.
    pub lines: Vec<JournalLine>,
    /// What could not be read. A torn last line isn't among them: it was never completed.
    pub broken: Vec<BrokenLine>,
}

/// A line that is no [`JournalLine`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokenLine {
    /// Counted from 1.
    pub number: usize,
    /// Why.
    pub reason: String,
}

/// Appends a line with one write. The caller is the only writer.
pub(super) fn append(path: &Path, line: &JournalLine, sync: Sync) -> Result<(), StoreError> {
    let mut short = line.clone();
    if let Some(note) = &mut short.note
        && let Some((end, _)) = note.char_indices().nth(MAX_NOTE)
    {
        note.truncate(end);
        note.push('…');
    }
    let unfit = |reason| StoreError::Unfit {
        path: path.to_owned(),
        reason,
    };
    let mut text = serde_json::to_vec(&short).map_err(|e| unfit(e.to_string()))?;
    text.push(b'\n');
    if text.len() > MAX_LINE {
        return Err(unfit(format!(
            "the line of turn {} is longer than {MAX_LINE} bytes",
            line.turn
        )));
    }
    let mut file = open(path)?;
    let start = file.metadata().map_err(files::io("stat", path))?.len();
    if let Err(e) = file.write_all(&text) {
        // Half a line (a full disk) must not stay: the next one would be appended to it.
        let _ = file.set_len(start);
        return Err(files::io("append to", path)(e));
    }
    match sync {
        Sync::Now => file.sync_data().map_err(files::io("fdatasync", path)),
        Sync::Later => Ok(()),
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(files::io("open", path))
}

/// Cuts off a last line that a crash has torn. Only for the one writer.
pub(super) fn mend(path: &Path) -> Result<(), StoreError> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(files::io("open", path)(e)),
    };
    let length = file
        .seek(SeekFrom::End(0))
        .map_err(files::io("seek in", path))?;
    let start = length.saturating_sub(MAX_LINE as u64);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(start))
        .map_err(files::io("seek in", path))?;
    file.read_to_end(&mut tail)
        .map_err(files::io("read", path))?;
    if tail.last().is_none_or(|last| *last == b'\n') {
        return Ok(());
    }
    // Without any end of line in a whole line's length this is no tear: one is written instead,
    // and the reader will report the line.
    match tail.iter().rposition(|b| *b == b'\n') {
        Some(end) => file.set_len(start + end as u64 + 1),
        None if start == 0 => file.set_len(0),
        None => file.write_all(b"\n"),
    }
    .map_err(files::io("mend", path))
}

impl Journal {
    /// A later line about a turn replaces the earlier one: what a gate held up is known only
    /// after the turn has been written down.
    fn take(&mut self, line: JournalLine) {
        match self.lines.last_mut() {
            Some(last) if last.turn == line.turn => *last = line,
            _ => self.lines.push(line),
        }
    }
}

/// Where the journal of the sandbox at `dir` is.
pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("journal.jsonl")
}

/// Reads all lines; an absent journal is empty.
pub(super) fn read(path: &Path) -> Result<Journal, StoreError> {
    let text = files::read(path, MAX_JOURNAL)?.unwrap_or_default();
    let mut journal = Journal::default();
    for (index, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        let Some(line) = line.strip_suffix(b"\n") else {
            break;
        };
        let parsed = match line.len() {
            n if n >= MAX_LINE => Err(format!("{n} bytes are too many for one line")),
            _ => serde_json::from_slice(line).map_err(|e| e.to_string()),
        };
        match parsed {
            Ok(line) => journal.take(line),
            Err(reason) => journal.broken.push(BrokenLine {
                number: index + 1,
                reason,
            }),
        }
    }
    Ok(journal)
}
