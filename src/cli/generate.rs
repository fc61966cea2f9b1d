//! Completions for shells, and manual pages: both made from what the command line accepts.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use clap::Command;
use clap_complete::Shell;

/// The script that teaches a shell the command line.
pub(super) fn completions(mut command: Command, shell: Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "crab", &mut script);
    std::io::stdout().lock().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// `crab.1`, and `crab-VERB.1` for each verb, into a directory.
pub(super) fn man(mut command: Command, dir: &Path) -> anyhow::Result<ExitCode> {
    let make = || format!("cannot write manual pages to {}", dir.display());
    fs::create_dir_all(dir).with_context(make)?;
    command.build();
    page(&command, dir).with_context(make)?;
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        page(verb, dir).with_context(make)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn page(command: &Command, dir: &Path) -> anyhow::Result<()> {
    let page = clap_mangen::Man::new(command.clone()).manual("crab");
    let mut file = File::create(dir.join(page.get_filename()))?;
    page.render(&mut file)?;
    file.flush()?;
    Ok(())
}
