//! Which checkpoint holds the state after a turn: its own, or, if the turn changed nothing, an earlier one.

use std::collections::HashMap;

use anyhow::{Context, bail};

use crate::{
    sandbox::TurnNo,
    store::{Action, JournalLine, SandboxStore, Trigger},
};

/// A turn that was asked for, and the checkpoint that holds the state after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) turn: TurnNo,
    /// The same turn, or an earlier one with nothing but unchanged turns in between.
    pub(super) by: TurnNo,
}

/// Whether crab found that the turn had changed nothing. A turn that could not be protected has no
/// checkpoint either, and is no such one; nor is a checkpoint that was asked for and failed.
pub(super) fn is_none(line: &JournalLine) -> bool {
    let failed = line.note.as_deref();
    line.action == Action::Skip
        && matches!(
            line.trigger,
            Trigger::Exec | Trigger::Manual | Trigger::Timer
        )
        && line.effects.is_empty()
        && line.checkpoint.is_none()
        && !failed.is_some_and(|note| note.starts_with("not protected"))
}

/// A turn by number or name; without one the checkpoint that the sandbox goes on from.
pub(super) fn find(checkpoints: &SandboxStore, which: Option<&str>) -> anyhow::Result<Held> {
    let id = checkpoints.id();
    let own = |turn| Held { turn, by: turn };
    let Some(which) = which else {
        let head = checkpoints.head()?;
        return head
            .map(|c| own(c.turn()))
            .with_context(|| format!("{id} has no checkpoint"));
    };
    let Ok(turn) = which.parse() else {
        return Ok(own(checkpoints.named(which)?));
    };
    let kept = checkpoints.turns()?;
    if kept.contains(&turn) {
        return Ok(own(checkpoints.get(turn)?.turn()));
    }
    let journal = checkpoints.journal()?;
    let by = holder(&kept, &journal.lines, turn)
        .with_context(|| format!("{id} has no checkpoint of turn {turn}"))?;
    Ok(Held {
        turn,
        by: checkpoints.get(by)?.turn(),
    })
}

/// The newest turn whose state some checkpoint holds.
pub(super) fn newest(checkpoints: &SandboxStore) -> anyhow::Result<Option<Held>> {
    let kept = checkpoints.turns()?;
    let Some(&last) = kept.last() else {
        return Ok(None);
    };
    // Without a journal at least the checkpoint itself is known.
    let journal = checkpoints.journal().unwrap_or_default();
    let later = journal.lines.iter().rev().map(|line| line.turn);
    let mut later = later.take_while(|turn| *turn > last);
    let held = later.find_map(|turn| {
        let by = holder(&kept, &journal.lines, turn).ok()?;
        Some(Held { turn, by })
    });
    Ok(Some(held.unwrap_or(Held {
        turn: last,
        by: last,
    })))
}

/// Whether the turn left the sandbox as it was: it changed nothing, or is a rollback that was refused.
fn left_it(line: &JournalLine) -> bool {
    let refused =
        line.trigger.is_way_back() && line.effects.is_empty() && line.checkpoint.is_none();
    is_none(line) || refused
}

/// The checkpoint that holds the state after `turn`, which has none of its own. Each turn after that
/// checkpoint must be in the journal: of one that is missing nobody knows what it did.
fn holder(kept: &[TurnNo], lines: &[JournalLine], turn: TurnNo) -> anyhow::Result<TurnNo> {
    let by_turn: HashMap<TurnNo, &JournalLine> = lines.iter().map(|l| (l.turn, l)).collect();
    if !by_turn.contains_key(&turn) {
        bail!("the journal has no such turn");
    }
    let mut wanted = turn;
    while wanted != TurnNo::default() {
        if kept.contains(&wanted) {
            return Ok(wanted);
        }
        let Some(line) = by_turn.get(&wanted) else {
            bail!(
                "turn {turn} changed nothing, but the journal does not say what turn {wanted} did"
            );
        };
        wanted = match line.went_back_to(lines) {
            Some(to) => to,
            None if left_it(line) => TurnNo(wanted.0.saturating_sub(1)),
            None => bail!(why_not(line, turn)),
        };
    }
    bail!("turn {turn} changed nothing, but there is no checkpoint before it")
}

/// Why the chain of unchanged turns that ends with `turn` does not begin with a checkpoint.
fn why_not(line: &JournalLine, turn: TurnNo) -> String {
    let so = match &line.note {
        _ if line.checkpoint.is_some() => "its checkpoint is no longer kept".to_owned(),
        Some(note) => note.clone(),
        None => "not protected".to_owned(),
    };
    match line.turn == turn {
        true => so,
        false => format!(
            "it changed nothing since turn {}, and of that: {so}",
            line.turn
        ),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::store::Effect;

    /// One line a word: `full`, `none`, `said` and `timed` (nothing, by `crab turn` and by the timer),
    /// `failed` (a turn), `asked` (a checkpoint that failed), `-` (lost),
    /// `back:1` (a rollback), `refused` and `ended` (rollbacks that were not done).
    pub(in crate::cli) fn journal(words: &str) -> Vec<JournalLine> {
        let words = words.split_whitespace().zip(1..);
        let known = words.filter(|(word, _)| *word != "-");
        known.map(|(word, turn)| line(word, turn)).collect()
    }

    fn line(word: &str, turn: u64) -> JournalLine {
        let full = word == "full";
        let back = word.strip_prefix("back:").map(|to| to.parse().unwrap());
        let digest = |turn: u64| format!("blake3:{turn:064x}").parse().unwrap();
        let trigger = match word {
            "asked" | "said" => Trigger::Manual,
            "timed" => Trigger::Timer,
            "refused" | "ended" => Trigger::Rollback,
            _ if back.is_some() => Trigger::Rollback,
            _ => Trigger::Exec,
        };
        let long_ago = OffsetDateTime::UNIX_EPOCH;
        JournalLine {
            effects: match word {
                "full" | "failed" | "ended" => vec![Effect::Files],
                _ if back.is_some() => vec![Effect::Files],
                _ => Vec::new(),
            },
            action: if full { Action::Full } else { Action::Skip },
            checkpoint: back.or(full.then_some(turn)).map(digest),
            note: matches!(word, "failed" | "asked" | "ended")
                .then(|| "not protected: disk full".into()),
            ..JournalLine::new(TurnNo(turn), trigger, long_ago, long_ago)
        }
    }

    #[test]
    fn a_turn_that_changed_nothing_is_held_by_the_checkpoint_before_it() {
        let table = [
            // Journal, kept checkpoints, asked for: held by, or the reason why not.
            ("full none", &[1][..], 2, Ok(1)),
            ("full none none none", &[1], 4, Ok(1)),
            ("full said timed none", &[1], 4, Ok(1)),
            ("full none full none none", &[1, 3], 5, Ok(3)),
            ("full none full none none", &[1, 3], 2, Ok(1)),
            // Pruned: the state of an older one is another state.
            ("full full none full", &[1, 4], 3, Err("no longer kept")),
            ("full full none full", &[1, 4], 2, Err("no longer kept")),
            // Not protected, and so nothing after it is.
            ("full failed none", &[1], 2, Err("disk full")),
            (
                "full failed none",
                &[1],
                3,
                Err("since turn 2, and of that: not protected: disk full"),
            ),
            ("full asked none", &[1], 3, Err("disk full")),
            // The power failed before the line was written.
            ("full - none", &[1], 3, Err("does not say what turn 2 did")),
            ("full none", &[1], 7, Err("no such turn")),
            ("none none", &[], 2, Err("no checkpoint before it")),
            // A rollback is the turn that it went back to.
            ("full full back:1", &[1, 2], 3, Ok(1)),
            ("full full back:1 none none", &[1, 2], 5, Ok(1)),
            ("full full back:1 back:2 none", &[1, 2], 5, Ok(2)),
            ("full full back:1 full none", &[1, 2, 4], 5, Ok(4)),
            ("full full back:1 none", &[2], 4, Err("no longer kept")),
            ("full none refused none", &[1], 4, Ok(1)),
            ("full ended none", &[1], 3, Err("disk full")),
            // The line of the checkpoint itself was lost, or is of a life before the journal's.
            ("- none", &[1], 2, Ok(1)),
        ];
        for (words, kept, turn, wanted) in table {
            let kept: Vec<_> = kept.iter().copied().map(TurnNo).collect();
            let found = holder(&kept, &journal(words), TurnNo(turn));
            match (found, wanted) {
                (Ok(found), Ok(wanted)) => assert_eq!(found, TurnNo(wanted), "{words}@{turn}"),
                (Err(e), Err(wanted)) => {
                    assert!(e.to_string().contains(wanted), "{words}@{turn}: {e}");
                }
                (found, wanted) => panic!("{words}@{turn}: {found:?}, wanted {wanted:?}"),
            }
        }
    }
}
