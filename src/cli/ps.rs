//! `crab ps`: who runs, and who is protected.

use std::{path::Path, process::ExitCode};

use super::{
    Scope, print, printable,
    turns::{self, Held},
};
use crate::{
    control::{api::Sandbox, client},
    sandbox::SandboxId,
    shim::run_dir::RUN,
};

pub(super) fn run(scope: &Scope) -> anyhow::Result<ExitCode> {
    let (mut sandboxes, errors) = client::list(Path::new(RUN));
    sandboxes.retain(|s| scope.namespace.as_ref().is_none_or(|n| *n == s.namespace));
    sandboxes.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    let mut rows = vec![["NAMESPACE", "ID", "STATE", "TURN", "PROTECTED"].map(str::to_owned)];
    for sandbox in &sandboxes {
        let held = newest(scope, sandbox);
        let turn = held.map(|held| held.turn);
        if scope.json {
            let object = serde_json::json!({
                "namespace": sandbox.namespace, "id": sandbox.id, "state": sandbox.phase,
                "pid": sandbox.pid, "protected": sandbox.is_protected,
                "why_not": sandbox.why_not, "turn": turn,
                "checkpoint": held.map(|held| held.by), "execs": sandbox.execs,
            });
            print(&object.to_string())?;
            continue;
        }
        rows.push([
            sandbox.namespace.clone(),
            sandbox.id.chars().take(24).collect(),
            sandbox.phase.clone(),
            turn.map_or_else(|| "-".into(), |t| t.to_string()),
            match (sandbox.is_protected, sandbox.execs.len()) {
                (false, _) => format!("no: {}", sandbox.why_not),
                (true, 0) => "yes".into(),
                (true, n) => format!("yes, {n} exec(s) in the turn under way"),
            },
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

/// The newest turn that is protected: by its own checkpoint, or because it changed nothing.
fn newest(scope: &Scope, sandbox: &Sandbox) -> Option<Held> {
    let id = SandboxId::new(&sandbox.namespace, &sandbox.id).ok()?;
    if !scope.store_root.exists() {
        return None;
    }
    turns::newest(&scope.store().ok()?.sandbox(&id)).ok()?
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
