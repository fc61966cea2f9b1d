//! `crab turn`: whoever runs the agent says that a turn is over.

use std::process::ExitCode;

use super::{Scope, log, print, progress::Progress, term::print_json};
use crate::{
    control::client::{self, ControlError},
    shim::run_dir::RunDir,
    store::JournalLine,
};

pub(super) fn run(scope: &Scope, word: &str) -> anyhow::Result<ExitCode> {
    let sandbox = scope.find(word)?;
    let progress = Progress::begin(format!("turn of {sandbox}"));
    let line = client::turn(RunDir::of(&sandbox).path(), &sandbox);
    drop(progress);
    let line = line.map_err(|e| match e {
        ControlError::NotRunning(_) => {
            anyhow::anyhow!("{e}, and a turn is of what runs: start it first")
        }
        e => e.into(),
    })?;
    let line: JournalLine = serde_json::from_str(&line)?;
    if scope.json {
        print_json(&line)?;
    } else {
        print(&log::describe(&line))?;
    }
    Ok(ExitCode::SUCCESS)
}
