//! `crab ps`: who runs, who is protected up to which turn, and what is wrong if not.

use std::{path::Path, process::ExitCode};

use serde::Serialize;
use time::OffsetDateTime;

use super::{
    Scope, first_line,
    scope::run_dirs,
    term::{Cell, Colour, complain, count, list, print_json, span},
    turns::{self, Held},
};
use crate::{
    control::{
        api::Sandbox,
        client::{self, Surveyed},
    },
    sandbox::SandboxId,
    shim::run_dir::RUN,
    store::{Checkpoint, JournalLine, Store},
};

pub(super) fn run(scope: &Scope) -> anyhow::Result<ExitCode> {
    // Of a store that is out of order each sandbox says so.
    let store = scope.store_if_any();
    let run = Path::new(RUN);
    let mut all = Vec::new();
    let mut code = ExitCode::SUCCESS;
    for Surveyed { sandboxes, answer } in
        client::survey(run, &run_dirs(run), scope.namespace.as_deref())
    {
        match answer {
            Ok(answer) => {
                let here = answer.sandboxes.into_iter();
                let here = here.filter(|sandbox| scope.has(&sandbox.namespace));
                all.extend(here.map(|sandbox| Seen::of(sandbox, &answer.version, &store)));
            }
            Err(e) => {
                let here: Vec<_> = sandboxes
                    .into_iter()
                    .filter(|s| scope.has(s.namespace()))
                    .collect();
                if here.is_empty() && scope.namespace.is_some() {
                    continue;
                }
                complain(&e.to_string());
                code = ExitCode::FAILURE;
                all.extend(here.iter().map(|id| Seen::silent(id, &store)));
            }
        }
    }
    all.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    if scope.json {
        for seen in &all {
            print_json(seen)?;
        }
    } else {
        list(&rows(&all, OffsetDateTime::now_utc()))?;
    }
    Ok(code)
}

/// Whether a crash now would lose a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// The last turn's files and processes are kept.
    Yes,
    /// The last turn's files are.
    Files,
    /// An earlier turn's.
    Behind,
    /// Nothing, or no turn any more.
    No,
    /// The shim does not answer.
    Unknown,
}

/// A sandbox as it is shown.
#[derive(Debug, Serialize)]
struct Seen {
    namespace: String,
    id: String,
    state: String,
    /// Of init, on the host; 0 without one.
    pid: i32,
    /// Whether turns are taken.
    protected: bool,
    why_not: String,
    status: Status,
    /// The newest turn whose state is kept.
    turn: Option<u64>,
    /// The turn whose checkpoint keeps it.
    checkpoint: Option<u64>,
    /// When that turn ended.
    #[serde(with = "time::serde::rfc3339::option")]
    held_at: Option<OffsetDateTime>,
    kind: Option<crate::store::Kind>,
    notes: Option<Vec<String>>,
    /// The newest turn, if it is not kept, and why it is not.
    lost: Option<Lost>,
    execs: Vec<String>,
    /// What no checkpoint holds yet, and when one will.
    exposed: String,
    /// What crab does with it just now.
    doing: String,
    /// Of the shim.
    version: String,
    /// What is wrong, for people.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Lost {
    turn: u64,
    note: Option<String>,
}

/// What the store knows about a sandbox.
#[derive(Default)]
struct Stored {
    held: Option<(Held, Checkpoint)>,
    last: Option<JournalLine>,
    held_at: Option<OffsetDateTime>,
}

impl Stored {
    fn of(store: &Store, id: &SandboxId) -> anyhow::Result<Self> {
        let checkpoints = store.sandbox(id);
        let held = match turns::newest(&checkpoints)? {
            Some(held) => Some((held, checkpoints.get(held.by)?)),
            None => None,
        };
        let mut lines = checkpoints.journal()?.lines;
        let its = |line: &&JournalLine| {
            held.as_ref()
                .is_some_and(|(held, _)| held.turn == line.turn)
        };
        let ended = lines.iter().rev().find(its).map(|line| line.ended_at);
        let made = held.as_ref().map(|(_, it)| it.manifest.facts.created_at);
        Ok(Self {
            held_at: ended.or(made),
            last: lines.pop(),
            held,
        })
    }
}

impl Seen {
    fn of(sandbox: Sandbox, version: &str, store: &anyhow::Result<Option<Store>>) -> Self {
        let id = SandboxId::new(&sandbox.namespace, &sandbox.id);
        let stored = match (store, id) {
            (Ok(Some(store)), Ok(id)) => Stored::of(store, &id),
            (Ok(_), _) => Ok(Stored::default()),
            (Err(e), _) => Err(anyhow::anyhow!("{e:#}")),
        };
        Self::judge(sandbox, version, stored)
    }

    /// `stored`: or why nothing is known of it.
    fn judge(sandbox: Sandbox, version: &str, stored: anyhow::Result<Stored>) -> Self {
        let (stored, trouble) = match stored {
            Ok(stored) => (stored, None),
            Err(e) => (Stored::default(), Some(format!("{e:#}"))),
        };
        let facts = stored.held.as_ref().map(|(_, it)| &it.manifest.facts);
        let turn = stored.held.as_ref().map(|(held, _)| held.turn);
        let lost = stored
            .last
            .filter(|last| turn.is_none_or(|turn| last.turn > turn));
        let (status, problem) = match (facts, &lost) {
            _ if !sandbox.is_protected => (Status::No, Some(sandbox.why_not.clone())),
            _ if trouble.is_some() => (Status::No, trouble),
            (None, None) => (Status::No, Some("no turn has ended yet".to_owned())),
            (None, Some(lost)) => (Status::No, Some(why(lost))),
            (Some(_), Some(lost)) => (Status::Behind, Some(why(lost))),
            (Some(facts), None) if facts.kind == crate::store::Kind::Files => {
                (Status::Files, Some(first_line(&facts.notes)))
            }
            (Some(_), None) => (Status::Yes, None),
        };
        Self {
            state: sandbox.phase,
            pid: sandbox.pid,
            protected: sandbox.is_protected,
            why_not: sandbox.why_not,
            status,
            turn: turn.map(|turn| turn.0),
            checkpoint: stored.held.as_ref().map(|(held, _)| held.by.0),
            held_at: stored.held_at,
            kind: facts.map(|facts| facts.kind),
            notes: facts.map(|facts| facts.notes.clone()),
            lost: lost.map(|line| Lost {
                turn: line.turn.0,
                note: line.note,
            }),
            execs: sandbox.execs,
            exposed: sandbox.exposed,
            doing: sandbox.doing,
            version: version.to_owned(),
            problem,
            namespace: sandbox.namespace,
            id: sandbox.id,
        }
    }

    /// One whose shim does not answer: what the store knows.
    fn silent(id: &SandboxId, store: &anyhow::Result<Option<Store>>) -> Self {
        let sandbox = Sandbox {
            namespace: id.namespace().to_owned(),
            id: id.id().to_owned(),
            phase: "unknown".to_owned(),
            is_protected: true,
            ..Default::default()
        };
        let problem = Some("its shim does not say".to_owned());
        Self {
            status: Status::Unknown,
            protected: false,
            why_not: "its shim does not answer".to_owned(),
            problem,
            ..Self::of(sandbox, "", store)
        }
    }

    fn row(&self, id: &str, now: OffsetDateTime) -> [Cell; 7] {
        let (word, colour) = match self.status {
            Status::Yes => ("yes", Colour::Good),
            Status::Files => ("files", Colour::Warning),
            Status::Behind => ("behind", Colour::Bad),
            Status::No => ("no", Colour::Bad),
            Status::Unknown => ("?", Colour::Bad),
        };
        let age = self.held_at.map(|then| {
            let micros = (now - then).max(time::Duration::ZERO).whole_microseconds();
            span(u64::try_from(micros).unwrap_or(u64::MAX))
        });
        let open = match self.execs.len() as u64 {
            _ if !self.exposed.is_empty() => Some(self.exposed.clone()),
            0 => None,
            n => Some(format!(
                "a turn is under way ({})",
                count(n, "exec", "execs")
            )),
        };
        let notes: Vec<String> = self.problem.iter().cloned().chain(open).collect();
        [
            self.namespace.as_str().into(),
            id.into(),
            self.state.as_str().into(),
            Cell::new(word, colour),
            Cell::number(self.turn.map_or_else(|| "-".into(), |t| t.to_string())),
            Cell::number(age.unwrap_or_else(|| "-".into())),
            notes.join("; ").into(),
        ]
    }
}

/// Why a turn is not kept.
fn why(line: &JournalLine) -> String {
    let note = line.note.as_deref().unwrap_or("not protected");
    format!(
        "turn {}: {}",
        line.turn,
        note.lines().next().unwrap_or_default()
    )
}

fn rows(all: &[Seen], now: OffsetDateTime) -> Vec<[Cell; 7]> {
    let head = |text| Cell::new(text, Colour::Strong);
    let mut rows = vec![[
        head("NAMESPACE"),
        head("ID"),
        head("STATE"),
        head("PROTECTED"),
        head("TURN"),
        head("AGE"),
        head("NOTE"),
    ]];
    let ids: Vec<&str> = all.iter().map(|seen| seen.id.as_str()).collect();
    rows.extend(all.iter().map(|seen| seen.row(short(&seen.id, &ids), now)));
    rows
}

/// Docker's and Kubernetes' ids as these show them, if that says which one is meant.
fn short<'a>(id: &'a str, all: &[&str]) -> &'a str {
    let long = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let Some(short) = id.get(..12).filter(|_| long) else {
        return id;
    };
    match all.iter().filter(|other| other.starts_with(short)).count() {
        1 => short,
        _ => id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{
            fixture::{Shelf, facts, journal},
            term::{Screen, align},
        },
        sandbox::TurnNo,
    };

    fn sandbox(id: &str) -> Sandbox {
        Sandbox {
            namespace: "default".into(),
            id: id.into(),
            phase: "running".into(),
            pid: 17,
            is_protected: true,
            ..Default::default()
        }
    }

    fn shown(all: &[Seen]) -> Vec<String> {
        let now = OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(100);
        align(&rows(all, now), &Screen::PLAIN)
    }

    #[test]
    fn who_is_not_protected_says_why() {
        let not_in = Sandbox {
            is_protected: false,
            why_not: "not opted in: set enabled = true".into(),
            ..sandbox("c1")
        };
        let open = Sandbox {
            execs: vec!["a".into(), "b".into()],
            ..sandbox("c2")
        };
        let failed = Stored {
            last: journal("failed").pop(),
            ..Stored::default()
        };
        let broken = anyhow::anyhow!("the store is\x1b[2J damaged");
        let all = [
            Seen::judge(not_in, "1", Ok(Stored::default())),
            Seen::judge(open, "1", Ok(Stored::default())),
            Seen::judge(sandbox("c3"), "1", Ok(failed)),
            Seen::judge(sandbox("c4"), "1", Err(broken)),
        ];
        assert_eq!(
            shown(&all),
            [
                "NAMESPACE  ID  STATE    PROTECTED  TURN  AGE  NOTE",
                "default    c1  running  no            -    -  not opted in: set enabled = true",
                "default    c2  running  no            -    -  no turn has ended yet; a turn is under way (2 execs)",
                "default    c3  running  no            -    -  turn 1: not protected: disk full",
                "default    c4  running  no            -    -  the store is\\u{1b}[2J damaged",
            ]
        );
        let json = serde_json::to_value(&all[2]).unwrap();
        assert_eq!(json["status"], "no");
        assert_eq!(json["lost"]["turn"], 1);
    }

    #[test]
    fn a_turn_that_was_lost_after_the_last_one_kept_shows() {
        let shelf = Shelf::new();
        let kept = shelf.checkpoint(2, facts(None), |_| ());
        let stored = |last: &str, turn| Stored {
            held: Some((
                Held {
                    turn: TurnNo(turn),
                    by: TurnNo(2),
                },
                kept.clone(),
            )),
            last: journal(last).pop(),
            held_at: Some(OffsetDateTime::UNIX_EPOCH),
        };
        let all = [
            Seen::judge(sandbox("c1"), "1", Ok(stored("full full none", 3))),
            Seen::judge(sandbox("c2"), "1", Ok(stored("full full failed", 2))),
        ];
        assert_eq!(
            shown(&all)[1..],
            [
                "default    c1  running  yes           3  1 min",
                "default    c2  running  behind        2  1 min  turn 3: not protected: disk full",
            ]
        );
    }

    #[test]
    fn long_ids_are_short_where_that_is_enough() {
        let (a, b) = ("a".repeat(64), format!("{}b", "a".repeat(63)));
        let c = format!("c{}", "0".repeat(63));
        let all = [a.as_str(), b.as_str(), c.as_str(), "name"];
        assert_eq!(all.map(|id| short(id, &all).len()), [64, 64, 12, 4]);
    }
}
