//! `crab log`: the turns of a sandbox, newest last.

use std::{
    collections::{BTreeMap, HashSet},
    process::ExitCode,
};

use super::{
    Scope,
    term::{Cell, Colour, Screen, align, bytes, complain, count, list, print_json, span},
    turns,
};
use crate::{
    sandbox::TurnNo,
    store::{Action, Effect, JournalLine, SandboxStore},
};

pub(super) fn run(scope: &Scope, word: &str, last: Option<usize>) -> anyhow::Result<ExitCode> {
    let sandbox = scope.find(word)?;
    let checkpoints = scope.store()?.sandbox(&sandbox);
    let journal = checkpoints.journal()?;
    let skipped = journal
        .lines
        .len()
        .saturating_sub(last.unwrap_or(usize::MAX));
    let lines = journal.lines.get(skipped..).unwrap_or_default();
    if scope.json {
        for line in lines {
            print_json(line)?;
        }
    } else {
        let kept = Kept::of(&checkpoints)?;
        let rows: Vec<_> = lines.iter().map(|line| row(line, Some(&kept))).collect();
        list(&rows)?;
    }
    for broken in &journal.broken {
        complain(&format!(
            "{sandbox}: line {} of the journal cannot be read: {}",
            broken.number, broken.reason
        ));
    }
    Ok(match journal.broken.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Which checkpoints are still there, and what points to them.
#[derive(Default)]
pub(super) struct Kept {
    turns: HashSet<TurnNo>,
    marks: BTreeMap<TurnNo, Vec<String>>,
}

impl Kept {
    fn of(checkpoints: &SandboxStore) -> anyhow::Result<Self> {
        let turns = checkpoints.turns()?;
        let mut marks: BTreeMap<TurnNo, Vec<String>> = BTreeMap::new();
        // A damaged one is verify's to tell.
        if let Ok(Some(head)) = checkpoints.head()
            && turns.last() != Some(&head.turn())
        {
            marks.entry(head.turn()).or_default().push("head".into());
        }
        if let Some(armed) = checkpoints.armed()? {
            marks.entry(armed).or_default().push("armed".into());
        }
        for (name, turn) in checkpoints.names()? {
            marks.entry(turn).or_default().push(name);
        }
        Ok(Self {
            turns: turns.into_iter().collect(),
            marks,
        })
    }
}

/// One turn in one line, by itself.
pub(super) fn describe(line: &JournalLine) -> String {
    align(&[row(line, None)], Screen::stdout()).join("\n")
}

/// One turn. Without `kept`, its checkpoint is there.
fn row(line: &JournalLine, kept: Option<&Kept>) -> [Cell; 7] {
    let digest = match (line.checkpoint, kept) {
        (None, _) => Cell::new("-", Colour::Faint),
        // A rollback's line names the checkpoint that it went back to.
        (Some(_), Some(kept))
            if !line.trigger.is_way_back() && !kept.turns.contains(&line.turn) =>
        {
            Cell::new("let go", Colour::Faint)
        }
        (Some(digest), _) => Cell::new(&digest.hex()[..12], Colour::Link),
    };
    let size = match line.bytes_written {
        0 => Cell::number(""),
        n => Cell::number(bytes(n)),
    };
    let frozen = match line.freeze_us {
        0 => Cell::number(""),
        us => Cell::number(format!("frozen {}", span(us))),
    };
    let marks = kept.and_then(|kept| kept.marks.get(&line.turn));
    let marks = marks.map(|marks| format!("({})", marks.join(", ")));
    let notes = marks.into_iter().chain(line.note.clone());
    let notes: Vec<String> = notes.collect();
    [
        Cell::number(format!("{:>5}", line.turn)),
        digest,
        action(line),
        changes(line).into(),
        size,
        frozen,
        notes.join(" ").into(),
    ]
}

/// What crab did.
fn action(line: &JournalLine) -> Cell {
    match line.action {
        Action::Skip if turns::is_none(line) => Cell::new("none", Colour::Faint),
        Action::Skip if line.trigger.is_way_back() && line.checkpoint.is_some() => {
            Cell::new("back", Colour::Strong)
        }
        // Not protected: the note says why.
        Action::Skip => Cell::new("-", Colour::Bad),
        Action::Files => "files".into(),
        Action::Full => "full".into(),
    }
}

/// What changed.
pub(super) fn changes(line: &JournalLine) -> String {
    let word = |effect: &Effect| match effect {
        Effect::Files => match line.changed_files {
            0 => "files".to_owned(),
            n => count(n, "file", "files"),
        },
        Effect::Processes => "processes".to_owned(),
        Effect::Memory => "memory".to_owned(),
        Effect::Mounts => "mounts".to_owned(),
        Effect::Other(word) => word.clone(),
    };
    let words: Vec<String> = line.effects.iter().map(word).collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::fixture::journal;

    #[test]
    fn a_turn_is_a_line() {
        let mut lines = journal("full full none failed back:1");
        lines[1].action = Action::Files;
        lines[1].changed_files = 12;
        lines[1].bytes_written = 1536;
        lines[1].freeze_us = 34_400;
        lines[1].effects.push(Effect::Other("odd\x1b[2J".into()));
        lines[2].note = Some("ran and moved no data:\nnginx \u{202e}(12)".into());
        let kept = Kept {
            turns: [TurnNo(2)].into(),
            marks: [(TurnNo(2), vec!["armed".into(), "before".into()])].into(),
        };
        let rows: Vec<_> = lines.iter().map(|line| row(line, Some(&kept))).collect();
        assert_eq!(
            align(&rows, &Screen::PLAIN),
            [
                "    1  let go        full   files",
                "    2  000000000000  files  12 files, odd\\u{1b}[2J  1.5 KiB  frozen 34 ms  (armed, before)",
                "    3  -             none                                                  ran and moved no data:; nginx \\u{202e}(12)",
                "    4  -             -      files                                          not protected: disk full",
                "    5  000000000000  back   files",
            ]
        );
    }
}
