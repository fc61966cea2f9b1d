//! `crab rollback`: a running sandbox goes back in place (D13).

use std::process::ExitCode;

use anyhow::Context;
use serde_json::Value;

use super::{Scope, print, progress::Progress, scope::split_at, term::print_json, turns};
use crate::{
    control::client::{self, ControlError},
    shim::run_dir::RunDir,
};

/// Accepts what says where to go.
pub(super) fn target(word: &str) -> Result<String, String> {
    match split_at(word) {
        (sandbox, Some(which)) if !sandbox.is_empty() && !which.is_empty() => Ok(word.to_owned()),
        _ => Err(
            "say where to go back to: SANDBOX@TURN or SANDBOX@NAME (crab log SANDBOX lists \
                  the turns)"
                .into(),
        ),
    }
}

pub(super) fn run(scope: &Scope, word: &str) -> anyhow::Result<ExitCode> {
    let (word, which) = split_at(word);
    let sandbox = scope.find(word)?;
    let held = turns::find(&scope.store()?.sandbox(&sandbox), which)?;
    let run_dir = RunDir::of(&sandbox);
    let progress = Progress::begin(format!("rollback of {sandbox} to turn {}", held.by));
    let report = client::rollback(run_dir.path(), &sandbox, held.by);
    drop(progress);
    let report = report.map_err(|e| match e {
        ControlError::NotRunning(_) => anyhow::anyhow!(
            "{e}, and only what runs is rolled back: crab restore {}@{} --start",
            sandbox.id(),
            held.turn
        ),
        e => e.into(),
    })?;
    let mut report: Value = serde_json::from_str(&report).context("the shim's answer")?;
    if scope.json {
        report["namespace"] = sandbox.namespace().into();
        report["id"] = sandbox.id().into();
        report["asked"] = serde_json::to_value(held.turn)?;
        print_json(&report)?;
        return Ok(ExitCode::SUCCESS);
    }
    let millis = |us: &Value| us.as_f64().unwrap_or_default() / 1000.0;
    let steps = report["steps_us"].as_object().into_iter().flatten();
    let steps: Vec<String> = steps
        .map(|(step, us)| format!("{step} {:.0}", millis(us)))
        .collect();
    let unchanged = match held.turn == held.by {
        true => String::new(),
        false => format!(", since which turn {} changed nothing", held.turn),
    };
    print(&format!(
        "{sandbox}: back from turn {} to turn {}{unchanged}; it goes on as turn {} after {:.0} ms ({})",
        report["from"],
        held.by,
        report["turn"],
        millis(&report["total_us"]),
        steps.join(", "),
    ))?;
    Ok(ExitCode::SUCCESS)
}
