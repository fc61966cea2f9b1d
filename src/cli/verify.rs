//! `crab verify`: whether the store still holds what was put into it.

use std::process::ExitCode;

use anyhow::bail;

use super::{Scope, print, printable, split_at, turns};
use crate::{
    sandbox::{SandboxId, TurnNo},
    store::{Fault, Kind, SandboxStore},
};

pub(super) fn run(scope: &Scope, word: Option<&str>) -> anyhow::Result<ExitCode> {
    let store = scope.store()?;
    let (word, which) = match word.map(split_at) {
        Some((word, which)) => (Some(word), which),
        None => (None, None),
    };
    let sandboxes = match word {
        Some(word) => vec![scope.find(word)?],
        None => store.sandboxes()?,
    };
    let mut broken = 0;
    for sandbox in sandboxes {
        let checkpoints = store.sandbox(&sandbox);
        let turns = match which {
            Some(_) => vec![turns::find(&checkpoints, which)?.by],
            None => checkpoints.turns()?,
        };
        let mut lost = Vec::new();
        for turn in turns {
            let faults: Vec<String> = match checkpoints.verify(turn) {
                Ok(faults) => faults.iter().map(ToString::to_string).collect(),
                Err(e) => vec![e.to_string()],
            };
            // One whose manifest cannot be read has a fault.
            let kind = checkpoints.get(turn).ok().map(|c| c.manifest.facts.kind);
            say(scope, &sandbox, turn, kind, &faults)?;
            if !faults.is_empty() {
                lost.push((turn, faults));
            }
        }
        broken += lost.len();
        if which.is_none() {
            broken += packs(scope, &sandbox, &checkpoints, &lost)?;
        }
    }
    if broken > 0 {
        bail!("{broken} broken checkpoint(s) or pack(s)");
    }
    Ok(ExitCode::SUCCESS)
}

fn say(
    scope: &Scope,
    sandbox: &SandboxId,
    turn: TurnNo,
    kind: Option<Kind>,
    faults: &[String],
) -> anyhow::Result<()> {
    if scope.json {
        let object = serde_json::json!({
            "sandbox": sandbox.id(), "namespace": sandbox.namespace(),
            "turn": turn, "kind": kind, "faults": faults,
        });
        return Ok(print(&object.to_string())?);
    }
    if faults.is_empty() {
        let lacks = match kind {
            Some(Kind::Files) => ", without processes",
            Some(Kind::Full) | None => "",
        };
        print(&format!("{sandbox}@{turn}  ok{lacks}"))?;
    }
    for fault in faults {
        print(&format!("{sandbox}@{turn}  BROKEN  {}", printable(fault)))?;
    }
    Ok(())
}

/// Every byte of every pack, also of what no checkpoint needs. Sound ones are not mentioned.
fn packs(
    scope: &Scope,
    sandbox: &SandboxId,
    checkpoints: &SandboxStore,
    lost: &[(TurnNo, Vec<String>)],
) -> anyhow::Result<usize> {
    let faults = checkpoints.verify_packs()?;
    for Fault { path, reason } in &faults {
        let names = |(_, faults): &&(TurnNo, Vec<String>)| faults.iter().any(|f| f.contains(path));
        let turns: Vec<TurnNo> = lost.iter().filter(names).map(|(turn, _)| *turn).collect();
        if scope.json {
            let object = serde_json::json!({
                "sandbox": sandbox.id(), "namespace": sandbox.namespace(),
                "pack": path, "faults": [reason], "turns": turns,
            });
            print(&object.to_string())?;
            continue;
        }
        let turns: Vec<String> = turns.iter().map(ToString::to_string).collect();
        let so = match turns.is_empty() {
            true => "no checkpoint is lost by it".to_owned(),
            false => format!("turns lost: {}", turns.join(", ")),
        };
        let reason = printable(reason);
        print(&format!("{sandbox} {path}  BROKEN  {reason} ({so})"))?;
    }
    Ok(faults.len())
}
