//! `crab show`: one checkpoint: what it holds, where it comes from, and why it is kept.

use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;
use time::OffsetDateTime;

use super::{
    Scope,
    log::changes,
    scope::split_at,
    term::{Cell, Colour, bytes, count, print_json, span, table},
    turns::{self, Held},
};
use crate::{
    sandbox::{SandboxId, TurnNo},
    store::{Checkpoint, Digest, Host, JournalLine, Kind, Origin, SandboxStore, TreeSummary},
};

pub(super) fn run(scope: &Scope, word: &str) -> anyhow::Result<ExitCode> {
    let (word, which) = split_at(word);
    let sandbox = scope.find(word)?;
    let checkpoints = scope.store()?.sandbox(&sandbox);
    let held = turns::find(&checkpoints, which)?;
    let shown = Shown::of(&checkpoints, held)?;
    match scope.json {
        true => print_json(&shown)?,
        false => table(&shown.rows(&this_boot()))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn this_boot() -> String {
    Host::detect().boot_id
}

/// Everything about one checkpoint that is not its content.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    sandbox: SandboxId,
    /// The turn that was asked for.
    asked: TurnNo,
    /// The turn that the checkpoint is of: since then up to `asked` nothing changed.
    turn: TurnNo,
    checkpoint: Digest,
    kind: Kind,
    #[serde(with = "time::serde::rfc3339")]
    created_at: OffsetDateTime,
    /// The turn's line in the journal, unless it is lost.
    journal: Option<JournalLine>,
    processes: u64,
    /// The turn whose dump the processes are.
    processes_of: Option<TurnNo>,
    /// How many files they refer to.
    references: usize,
    /// Of CRIU's images.
    image_bytes: u64,
    upper: Option<TreeSummary>,
    /// What it added to the store.
    stored_bytes: u64,
    parent: Option<TurnNo>,
    origin: Option<Origin>,
    /// The turns whose checkpoints continue this one.
    children: Vec<TurnNo>,
    /// The rollbacks that went back to it, by their turns.
    rollbacks: Vec<TurnNo>,
    names: Vec<String>,
    /// Why gc lets it stay.
    kept: Vec<String>,
    /// What a trial restore said; null if there was none.
    proof: Option<String>,
    notes: Vec<String>,
    host: Host,
}

impl Shown {
    fn of(checkpoints: &SandboxStore, held: Held) -> anyhow::Result<Self> {
        let checkpoint = checkpoints.get(held.by)?;
        let journal = checkpoints.journal()?.lines;
        let turn = checkpoint.turn();
        let names = checkpoints.names()?.into_iter();
        let names: Vec<String> = names
            .filter(|(_, of)| *of == turn)
            .map(|(name, _)| name)
            .collect();
        let back = |line: &&JournalLine| line.went_back_to(&journal) == Some(turn);
        let rollbacks = journal.iter().filter(back).map(|line| line.turn).collect();
        let line = journal.iter().find(|line| line.turn == turn).cloned();
        let Checkpoint {
            manifest,
            digest,
            stored,
            ..
        } = checkpoint;
        let facts = manifest.facts;
        Ok(Self {
            sandbox: checkpoints.id().clone(),
            asked: held.turn,
            turn,
            checkpoint: digest,
            kind: facts.kind,
            created_at: facts.created_at,
            proof: line.as_ref().and_then(proof),
            journal: line,
            processes: facts.processes,
            processes_of: facts.processes_of,
            references: facts.references.len(),
            image_bytes: manifest.contents.image.iter().map(|file| file.size).sum(),
            upper: manifest.contents.upper,
            stored_bytes: stored,
            parent: facts.parent,
            origin: manifest.origin,
            children: children(checkpoints, turn)?,
            rollbacks,
            kept: kept(checkpoints, turn, &names)?,
            names,
            notes: facts.notes,
            host: facts.host,
        })
    }

    fn rows(&self, boot: &str) -> Vec<[Cell; 2]> {
        let Self { sandbox, turn, .. } = self;
        let list = |turns: &[TurnNo]| {
            let turns: Vec<String> = turns.iter().map(|turn| format!("turn {turn}")).collect();
            Some(turns.join(", ")).filter(|text| !text.is_empty())
        };
        let asked =
            (self.asked != *turn).then(|| format!("turn {} changed nothing since", self.asked));
        let journal = self.journal.as_ref();
        let changed = journal.map(changes).filter(|text| !text.is_empty());
        let added = format!("{} added to the store", bytes(self.stored_bytes));
        let mut rows: Vec<[Cell; 2]> = vec![
            [
                "checkpoint".into(),
                Cell::new(self.checkpoint.to_string(), Colour::Link),
            ],
            ["sandbox".into(), sandbox.to_string().into()],
        ];
        let lines = [
            ("turn", Some(turn.to_string())),
            ("", asked),
            ("taken", Some(self.taken(boot))),
            ("holds", Some(self.holds())),
            ("changed", changed),
            ("plan", journal.and_then(|line| line.plan.clone())),
            ("size", Some(format!("{}; {added}", self.sizes()))),
            ("times", journal.map(times)),
            ("parent", self.parent.map(|parent| format!("turn {parent}"))),
            ("fork of", self.origin.as_ref().map(fork)),
            ("continued", list(&self.children)),
            (
                "gone back",
                list(&self.rollbacks).map(|turns| format!("to this one as {turns}")),
            ),
            (
                "names",
                Some(self.names.join(", ")).filter(|text| !text.is_empty()),
            ),
            ("kept", Some(self.kept.join("; "))),
            (
                "proof",
                Some(self.proof.clone().unwrap_or_else(|| "not tried".into())),
            ),
            ("host", Some(host(&self.host))),
        ];
        let told = lines
            .into_iter()
            .filter_map(|(word, text)| Some([word.into(), text?.into()]));
        rows.extend(told);
        let notes = self
            .notes
            .iter()
            .map(|note| ["lacks".into(), note.as_str().into()]);
        rows.extend(notes);
        let said = journal.and_then(|line| line.note.as_deref());
        rows.extend(said.map(|note| ["note".into(), note.into()]));
        rows
    }

    fn taken(&self, boot: &str) -> String {
        let at = self.created_at.to_offset(time::UtcOffset::UTC);
        let (hour, minute, second) = at.to_hms();
        let at = format!("{} {hour:02}:{minute:02}:{second:02} UTC", at.date());
        match self.host.boot_id == boot {
            true => at,
            false => format!("{at}, before this boot"),
        }
    }

    fn holds(&self) -> String {
        let processes = count(self.processes, "process", "processes");
        match (self.kind, self.processes_of) {
            (Kind::Files, _) => "files, no processes: a start boots on them".to_owned(),
            (Kind::Full, None) => format!("files and {processes}"),
            (Kind::Full, Some(of)) => format!("files, and {processes} as dumped at turn {of}"),
        }
    }

    fn sizes(&self) -> String {
        let files = self.upper.as_ref().map(|upper| {
            let names = count(upper.entries, "name", "names");
            format!("{} in {names}", bytes(upper.bytes))
        });
        let image =
            (self.image_bytes > 0).then(|| format!("{} of processes", bytes(self.image_bytes)));
        let parts: Vec<String> = files.into_iter().chain(image).collect();
        parts.join(", ")
    }
}

fn fork(origin: &Origin) -> String {
    format!("{}/{}@{}", origin.namespace, origin.id, origin.turn)
}

fn host(host: &Host) -> String {
    let parts = [
        Some(format!("Linux {} {}", host.kernel, host.arch)),
        host.criu.as_ref().map(|version| format!("CRIU {version}")),
        host.runtime.clone(),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

fn times(line: &JournalLine) -> String {
    let mut parts = vec![match line.freeze_us {
        0 => "not frozen".to_owned(),
        us => format!("frozen {}", span(us)),
    }];
    parts.extend(
        line.durable_us
            .map(|us| format!("durable after {}", span(us))),
    );
    if line.look_us > 0 {
        parts.insert(0, format!("looked {}", span(line.look_us)));
    }
    if line.exposed_us > 0 {
        parts.push(format!("the next turn waited {}", span(line.exposed_us)));
    }
    parts.join(", ")
}

/// A trial restore leaves what it found in the turn's note.
fn proof(line: &JournalLine) -> Option<String> {
    let note = line.note.as_deref()?;
    let from = note
        .rfind("not proved: ")
        .or_else(|| note.rfind("proved by a trial restore"))?;
    note.get(from..).map(str::to_owned)
}

/// The turns whose checkpoints continue that of `turn`. Damaged ones are verify's to tell.
fn children(checkpoints: &SandboxStore, turn: TurnNo) -> anyhow::Result<Vec<TurnNo>> {
    let later = checkpoints
        .turns()?
        .into_iter()
        .filter(|other| *other > turn);
    let continues = |other: &TurnNo| {
        let other = checkpoints.get(*other);
        other.is_ok_and(|it| it.manifest.facts.parent == Some(turn))
    };
    Ok(later.filter(continues).collect())
}

/// Why gc lets it stay.
fn kept(checkpoints: &SandboxStore, turn: TurnNo, names: &[String]) -> anyhow::Result<Vec<String>> {
    let turns = checkpoints.turns()?;
    let newer = turns.iter().filter(|other| **other > turn).count();
    let head = checkpoints
        .head()
        .context("the checkpoint that it goes on from")?;
    let with_processes = checkpoints.newest_with_processes()?;
    let is = |other: Option<Checkpoint>| other.is_some_and(|other| other.turn() == turn);
    let table = [
        ("the newest", newer == 0),
        ("the sandbox goes on from it", newer > 0 && is(head)),
        ("the newest with processes", newer > 0 && is(with_processes)),
        (
            "armed: the next start goes back to it",
            checkpoints.armed()? == Some(turn),
        ),
        ("has a name", !names.is_empty()),
    ];
    let reasons = table.into_iter().filter(|(_, holds)| *holds);
    let mut reasons: Vec<String> = reasons.map(|(reason, _)| reason.to_owned()).collect();
    if reasons.is_empty() {
        let newer = count(newer as u64, "newer one", "newer ones");
        reasons.push(format!("as long as `keep` has room beside {newer}"));
    }
    Ok(reasons)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{
        cli::{
            fixture::{Shelf, facts, journal},
            term::{Screen, align},
        },
        store::{Facts, Sync},
    };

    fn shown(shelf: &Shelf, turn: u64, by: u64) -> Shown {
        let held = Held {
            turn: TurnNo(turn),
            by: TurnNo(by),
        };
        Shown::of(&shelf.checkpoints, held).unwrap()
    }

    #[test]
    fn a_checkpoint_says_what_it_holds_and_why_it_is_kept() {
        let shelf = Shelf::new();
        let mut lines = journal("full full none");
        lines[1].changed_files = 12;
        lines[1].freeze_us = 34_000;
        lines[1].durable_us = Some(120_000);
        lines[1].note = Some("ran: a\x1b[2J; proved by a trial restore".into());
        for line in &lines {
            shelf.writer.append(line, Sync::Later).unwrap();
        }
        shelf.checkpoint(1, facts(None), |_| ());
        let joined = Facts {
            processes_of: Some(TurnNo(1)),
            notes: vec!["/dev/shm is missing".into()],
            ..facts(Some(1))
        };
        let two = shelf.checkpoint(2, joined, |root| {
            fs::write(root.join("file"), "text").unwrap();
        });
        shelf.writer.name("before", TurnNo(2)).unwrap();
        let it = shown(&shelf, 3, 2);
        let lines = align(&it.rows("now"), &Screen::PLAIN);
        let added = bytes(two.stored);
        assert_eq!(
            lines,
            [
                format!("checkpoint  {}", two.digest),
                "sandbox     default/c1".into(),
                "turn        2".into(),
                "            turn 3 changed nothing since".into(),
                "taken       1970-01-01 00:00:00 UTC, before this boot".into(),
                "holds       files, and 3 processes as dumped at turn 1".into(),
                "changed     12 files".into(),
                format!(
                    "size        4 B in 2 names, 9.8 KiB of processes; {added} added to the store"
                ),
                "times       frozen 34 ms, durable after 120 ms".into(),
                "parent      turn 1".into(),
                "names       before".into(),
                "kept        the newest; has a name".into(),
                "proof       proved by a trial restore".into(),
                "host        Linux 6.18.44 x86_64, CRIU 4.2.1, runc 1.1.15".into(),
                "lacks       /dev/shm is missing".into(),
                "note        ran: a\\u{1b}[2J; proved by a trial restore".into(),
            ]
        );
        let json = serde_json::to_value(&it).unwrap();
        assert_eq!((&json["id"], &json["turn"]), (&"c1".into(), &2.into()));
        let one = shown(&shelf, 1, 1);
        assert_eq!(one.children, [TurnNo(2)]);
        assert_eq!(one.kept, ["as long as `keep` has room beside 1 newer one"]);
    }

    #[test]
    fn what_gc_spares_says_so() {
        let shelf = Shelf::new();
        let files = Facts {
            kind: Kind::Files,
            processes: 0,
            ..facts(Some(1))
        };
        shelf.checkpoint(1, facts(None), |_| ());
        shelf.checkpoint(2, files, |_| ());
        shelf.writer.arm(TurnNo(1)).unwrap();
        let it = shown(&shelf, 1, 1);
        let wanted = [
            "the newest with processes",
            "armed: the next start goes back to it",
        ];
        assert_eq!(it.kept, wanted);
        assert_eq!(it.proof, None);
        assert_eq!(shown(&shelf, 2, 2).kept, ["the newest"]);
    }
}
