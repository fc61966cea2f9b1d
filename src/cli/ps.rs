//! `crab ps`: who runs, and who is protected.

use std::{path::Path, process::ExitCode};

use super::{
    Scope, first_line, print, printable,
    turns::{self, Held},
};
use crate::{
    control::{api::Sandbox, client},
    sandbox::SandboxId,
    shim::run_dir::RUN,
    store::Checkpoint,
};

pub(super) fn run(scope: &Scope) -> anyhow::Result<ExitCode> {
    let (mut sandboxes, errors) = client::list(Path::new(RUN));
    sandboxes.retain(|s| scope.namespace.as_ref().is_none_or(|n| *n == s.namespace));
    sandboxes.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    let mut rows = vec![["NAMESPACE", "ID", "STATE", "TURN", "PROTECTED"].map(str::to_owned)];
    for sandbox in &sandboxes {
        let newest = newest(scope, sandbox);
        let facts = newest.as_ref().map(|(_, it)| &it.manifest.facts);
        let turn = newest.as_ref().map(|(held, _)| held.turn);
        if scope.json {
            let object = serde_json::json!({
                "namespace": sandbox.namespace, "id": sandbox.id, "state": sandbox.phase,
                "pid": sandbox.pid, "protected": sandbox.is_protected,
                "why_not": sandbox.why_not, "turn": turn,
                "checkpoint": newest.as_ref().map(|(held, _)| held.by),
                "kind": facts.map(|facts| facts.kind), "notes": facts.map(|facts| &facts.notes),
                "execs": sandbox.execs, "exposed": sandbox.exposed, "doing": sandbox.doing,
            });
            print(&object.to_string())?;
            continue;
        }
        rows.push([
            sandbox.namespace.clone(),
            sandbox.id.chars().take(24).collect(),
            sandbox.phase.clone(),
            turn.map_or_else(|| "-".into(), |t| t.to_string()),
            protected(sandbox, newest.as_ref().map(|(_, checkpoint)| checkpoint)),
        ]);
    }
    if !scope.json {
        table(&rows)?;
    }
    for error in &errors {
        eprintln!("crab: {}", printable(&error.to_string()));
    }
    Ok(match errors.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Whether it is protected, and what is not.
fn protected(sandbox: &Sandbox, newest: Option<&Checkpoint>) -> String {
    if !sandbox.is_protected {
        return format!("no: {}", sandbox.why_not);
    }
    let so = match newest.filter(|checkpoint| !checkpoint.has_processes()) {
        // CRIU's log may be part of the reason.
        Some(checkpoint) => format!("files {}", first_line(&checkpoint.manifest.facts.notes)),
        None => "yes".to_owned(),
    };
    match sandbox.execs.len() {
        _ if !sandbox.exposed.is_empty() => format!("{so}, but {}", sandbox.exposed),
        0 => so,
        n => format!("{so}, {n} exec(s) in the turn under way"),
    }
}

/// The newest turn that is protected, by its own checkpoint, or because it changed nothing; and what it is
/// protected by.
fn newest(scope: &Scope, sandbox: &Sandbox) -> Option<(Held, Checkpoint)> {
    let id = SandboxId::new(&sandbox.namespace, &sandbox.id).ok()?;
    if !scope.store_root.exists() {
        return None;
    }
    let checkpoints = scope.store().ok()?.sandbox(&id);
    let held = turns::newest(&checkpoints).ok()??;
    Some((held, checkpoints.get(held.by).ok()?))
}

/// Columns as wide as their widest cell; the last one as it is.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> anyhow::Result<()> {
    let widths: Vec<usize> = (0..N)
        .map(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0))
        .collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line += &format!("{:width$}  ", printable(cell));
        }
        print(line.trim_end())?;
    }
    Ok(())
}
