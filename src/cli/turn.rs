//! `crab turn`: whoever runs the agent says that a turn is over.

use std::process::ExitCode;

use super::{Scope, log, print, term::print_json};
use crate::{control::client, shim::run_dir::RunDir, store::JournalLine};

pub(super) fn run(scope: &Scope, word: &str) -> anyhow::Result<ExitCode> {
    let sandbox = scope.find(word)?;
    let line = client::turn(RunDir::of(&sandbox).path(), &sandbox)?;
    let line: JournalLine = serde_json::from_str(&line)?;
    if scope.json {
        print_json(&line)?;
    } else {
        print(&log::describe(&line))?;
    }
    Ok(ExitCode::SUCCESS)
}
