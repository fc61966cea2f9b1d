//! `crab verify`: whether the store still holds what was put into it.

use std::process::ExitCode;

use anyhow::bail;

use super::{
    Scope, print,
    progress::Progress,
    scope::split_at,
    term::{count, one_line, print_json},
    turns,
};
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
    let mut sandboxes = match word {
        Some(word) => vec![scope.find(word)?],
        None => store.sandboxes()?,
    };
    sandboxes.retain(|sandbox| scope.has(sandbox.namespace()));
    let progress = Progress::begin("verifying");
    let mut broken = 0;
    for sandbox in sandboxes {
        broken += check(scope, &store.sandbox(&sandbox), which, &progress)?;
    }
    drop(progress);
    if broken > 0 {
        bail!(
            "{}",
            count(
                broken as u64,
                "broken checkpoint or pack",
                "broken checkpoints or packs"
            )
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The checkpoints of one sandbox, or one of them; returns how many things are broken.
fn check(
    scope: &Scope,
    checkpoints: &SandboxStore,
    which: Option<&str>,
    progress: &Progress,
) -> anyhow::Result<usize> {
    let sandbox = checkpoints.id();
    let turns = match which {
        Some(_) => vec![turns::find(checkpoints, which)?.by],
        None => checkpoints.turns()?,
    };
    let mut lost = Vec::new();
    for (n, turn) in turns.iter().enumerate() {
        progress.say(format!(
            "verifying {sandbox}@{turn}, {} of {}",
            n + 1,
            turns.len()
        ));
        let faults: Vec<String> = match checkpoints.verify(*turn) {
            Ok(faults) => faults.iter().map(ToString::to_string).collect(),
            Err(e) => vec![e.to_string()],
        };
        // A running sandbox lets its oldest ones go meanwhile.
        if !faults.is_empty() && !checkpoints.turns()?.contains(turn) {
            continue;
        }
        // One whose manifest cannot be read has a fault.
        let kind = checkpoints.get(*turn).ok().map(|c| c.manifest.facts.kind);
        say(scope, sandbox, *turn, kind, &faults)?;
        if !faults.is_empty() {
            lost.push((*turn, faults));
        }
    }
    if which.is_some() {
        return Ok(lost.len());
    }
    progress.say(format!("verifying the packs of {sandbox}"));
    Ok(lost.len() + packs(scope, sandbox, checkpoints, &lost)?)
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
        return print_json(&object);
    }
    if faults.is_empty() {
        let lacks = match kind {
            Some(Kind::Files) => ", without processes",
            Some(Kind::Full) | None => "",
        };
        print(&format!("{sandbox}@{turn}  ok{lacks}"))?;
    }
    for fault in faults {
        print(&format!("{sandbox}@{turn}  BROKEN  {}", one_line(fault)))?;
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
    let mut faults = checkpoints.verify_packs()?;
    // Collected meanwhile.
    faults.retain(|fault| checkpoints.dir().join(&fault.path).exists());
    for Fault { path, reason } in &faults {
        let names = |(_, faults): &&(TurnNo, Vec<String>)| faults.iter().any(|f| f.contains(path));
        let turns: Vec<TurnNo> = lost.iter().filter(names).map(|(turn, _)| *turn).collect();
        if scope.json {
            let object = serde_json::json!({
                "sandbox": sandbox.id(), "namespace": sandbox.namespace(),
                "pack": path, "faults": [reason], "turns": turns,
            });
            print_json(&object)?;
            continue;
        }
        let turns: Vec<String> = turns.iter().map(ToString::to_string).collect();
        let so = match turns.is_empty() {
            true => "no checkpoint is lost by it".to_owned(),
            false => format!("turns lost: {}", turns.join(", ")),
        };
        let reason = one_line(reason);
        print(&format!("{sandbox} {path}  BROKEN  {reason} ({so})"))?;
    }
    Ok(faults.len())
}
