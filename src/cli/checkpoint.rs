//! `crab checkpoint`: a restore point now, as somebody asked for it.

use std::process::ExitCode;

use anyhow::bail;

use super::{Scope, log, print, progress::Progress, term::print_json};
use crate::{
    control::{
        api::CheckpointRequest,
        client::{self, ControlError},
    },
    shim::run_dir::RunDir,
    store::JournalLine,
};

pub(super) fn run(
    scope: &Scope,
    word: &str,
    request: CheckpointRequest,
) -> anyhow::Result<ExitCode> {
    if !request.name.is_empty() {
        crate::sandbox::check("name", &request.name)?;
    }
    let sandbox = scope.find(word)?;
    let prove = request.prove;
    let progress = Progress::begin(format!("checkpoint of {sandbox}"));
    let answer = client::checkpoint(RunDir::of(&sandbox).path(), &sandbox, request);
    drop(progress);
    let answer = answer.map_err(|e| match e {
        ControlError::NotRunning(_) => {
            anyhow::anyhow!("{e}, and a checkpoint is of what runs: start it first")
        }
        e => e.into(),
    })?;
    let proved = answer.not_proved.is_empty();
    if scope.json {
        let mut line: serde_json::Map<_, _> = serde_json::from_str(&answer.line)?;
        if prove {
            line.insert("proved".into(), proved.into());
        }
        print_json(&line)?;
    } else {
        let line: JournalLine = serde_json::from_str(&answer.line)?;
        print(&log::describe(&line))?;
    }
    if !proved {
        bail!(
            "{sandbox}: the checkpoint is kept, and not proved: {}",
            answer.not_proved
        );
    }
    Ok(ExitCode::SUCCESS)
}
