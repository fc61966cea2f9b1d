//! The `crab` command: a thin client of running shims, and of the store when none runs (D14).
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

mod checkpoint;
mod diff;
mod docker;
mod doctor;
mod engine;
#[cfg(test)]
mod fixture;
mod gc;
mod generate;
mod log;
mod progress;
mod ps;
mod restore;
mod rollback;
mod scope;
mod show;
mod term;
mod turn;
mod turns;
mod verify;

use std::{
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::bail;
use clap::{CommandFactory, Parser, Subcommand};

use scope::Scope;
use term::print;

use crate::{
    config::{self, Config},
    control::api::CheckpointRequest,
};

/// Restore points for agent sandboxes
///
/// SANDBOX is a container's id, a unique prefix of it, or its Docker name. A checkpoint is
/// SANDBOX@TURN or SANDBOX@NAME; crab log lists the turns.
#[derive(Parser)]
#[command(
    name = "crab",
    version,
    disable_help_subcommand = true,
    max_term_width = 80,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage."
)]
struct Args {
    /// The containerd namespace (Docker's is moby) [default: whichever has the sandbox]
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// One JSON object, or one a line
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// List the sandboxes that run under crab, and who is protected
    ///
    /// PROTECTED is yes; files, where the processes could not be kept; behind, where the newest turn
    /// is not kept, but an earlier one; no; or ?, where the shim does not answer. TURN is the newest
    /// turn that can be gone back to, AGE how long ago it ended, and NOTE what is wrong.
    Ps,
    /// Show the turns of a sandbox, the newest last
    ///
    /// A line is: the turn; its checkpoint ("let go" if it is no longer kept); what crab did (full,
    /// files, none for a turn that changed nothing, back for a rollback, - for a turn that is not
    /// protected); what changed; what was written; how long the sandbox stood still; and in
    /// parentheses names, "armed", and "head" where the sandbox does not go on from the newest one.
    Log {
        /// Container id, a unique prefix of it, or a Docker name
        #[arg(value_parser = scope::sandbox)]
        sandbox: String,
        /// Only the newest N turns
        #[arg(long, value_name = "N")]
        last: Option<usize>,
    },
    /// Show one checkpoint
    ///
    /// What it holds, what its turn changed, what it takes, what it continues and what continues it,
    /// why it is kept, and whether a trial restore has proved it.
    Show {
        /// SANDBOX, SANDBOX@TURN or SANDBOX@NAME; without @ the checkpoint that it goes on from
        #[arg(value_parser = scope::sandbox_or_turn)]
        sandbox: String,
    },
    /// List the files that differ between two checkpoints
    ///
    /// Each line has a letter (A added, M modified, T of another kind, D deleted), the kind, the path,
    /// and of what was there before, what differs. It is made from the store alone, which has what
    /// differs from the image: a file of the image that was replaced as a whole counts as added.
    Diff {
        /// SANDBOX@TURN or SANDBOX@NAME; without @ the checkpoint that it goes on from
        #[arg(value_name = "A", value_parser = scope::sandbox_or_turn)]
        before: String,
        /// The same, or @TURN or @NAME of the same sandbox
        #[arg(value_name = "B", value_parser = diff::other)]
        after: String,
    },
    /// Take a checkpoint of a running sandbox now
    Checkpoint {
        /// Container id, a unique prefix of it, or a Docker name
        #[arg(value_parser = scope::sandbox)]
        sandbox: String,
        /// Keep the checkpoint under this name
        #[arg(long)]
        name: Option<String>,
        /// Also try whether it can be restored: beside the running sandbox, which notices nothing,
        /// and before any process runs
        #[arg(long)]
        prove: bool,
        /// If the processes cannot be kept, keep the files alone instead of failing. A start boots on
        /// them
        #[arg(long)]
        or_files: bool,
    },
    /// End the turn under way now, as the end of its last exec would
    ///
    /// For an agent's framework that knows better. Nothing is kept of a turn that changed nothing;
    /// crab checkpoint always keeps one.
    Turn {
        /// Container id, a unique prefix of it, or a Docker name
        #[arg(value_parser = scope::sandbox)]
        sandbox: String,
    },
    /// Arm a stopped container: its next start restores a checkpoint
    ///
    /// Whoever starts it, files and processes come back instead of a boot. For a turn that changed
    /// nothing, they are those of the checkpoint before it. On a checkpoint without processes the
    /// start boots.
    Restore {
        /// SANDBOX, SANDBOX@TURN or SANDBOX@NAME; without @ the newest checkpoint
        #[arg(value_parser = scope::sandbox_or_turn)]
        sandbox: String,
        /// Take it back: the next start boots
        #[arg(long, conflicts_with = "start")]
        cancel: bool,
        /// Also start it, through containerd or Docker
        #[arg(long)]
        start: bool,
    },
    /// Take a running sandbox back to one of its checkpoints, in place
    ///
    /// Its files and processes are what they were then. Its clients see the same container, and
    /// execs that run end with 137. Nothing is deleted: later turns can be gone back to as well.
    Rollback {
        /// SANDBOX@TURN or SANDBOX@NAME
        #[arg(value_parser = rollback::target)]
        sandbox: String,
    },
    /// Check checkpoints against their digests
    ///
    /// Those of one sandbox, or of all; without @ every byte of their packs as well.
    Verify {
        /// Container id, a unique prefix of it, or a Docker name; with @TURN or @NAME one checkpoint
        #[arg(value_parser = scope::sandbox_or_turn)]
        sandbox: Option<String>,
    },
    /// Show the host's budget for checkpoints
    ///
    /// What may be written, who has it, and who waits for it.
    Engine {
        /// In Prometheus' text format, for its node exporter's textfile collector
        #[arg(long, conflicts_with = "json")]
        prometheus: bool,
    },
    /// Say what this host offers, and what crab does without it
    ///
    /// A line for each thing: what was found, whether that is ok, limited, missing, or unknown, and
    /// what crab does without it. Fails if crab cannot run here. What only root can tell is unknown to
    /// others.
    Doctor,
    /// Free the space of what no checkpoint needs any more
    ///
    /// Running sandboxes do so themselves, and are passed over.
    Gc {
        /// Container id, a unique prefix of it, or a Docker name; without it, all
        #[arg(value_parser = scope::sandbox)]
        sandbox: Option<String>,
        /// Let all checkpoints go but the newest N, the newest one with processes, the armed one, and
        /// those with a name
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        keep: Option<u32>,
        /// Remove everything about sandboxes whose container is gone
        #[arg(long)]
        gone: bool,
    },
    /// Print the script that completes this command in a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages
    #[command(hide = true)]
    Man {
        /// Into this directory
        dir: PathBuf,
    },
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            term::complain(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.verb {
        Verb::Completions { shell } => return generate::completions(Args::command(), shell),
        Verb::Man { dir } => return generate::man(Args::command(), &dir),
        _ => {}
    }
    if !nix::unistd::geteuid().is_root() && !matches!(args.verb, Verb::Doctor) {
        bail!("only root may see checkpoints, which hold the memory of sandboxes: use sudo");
    }
    let config = Config::load(Path::new(config::FILE), None, std::iter::empty())?;
    if matches!(args.verb, Verb::Doctor) {
        return doctor::run(config, args.json);
    }
    let context = Scope {
        namespace: args.namespace,
        json: args.json,
        store_root: config.store,
        store_limit: config.store_limit,
        sandbox_limit: config.sandbox_limit,
    };
    match args.verb {
        Verb::Ps => ps::run(&context),
        Verb::Log { sandbox, last } => log::run(&context, &sandbox, last),
        Verb::Show { sandbox } => show::run(&context, &sandbox),
        Verb::Diff { before, after } => diff::run(&context, &before, &after),
        Verb::Checkpoint {
            sandbox,
            name,
            prove,
            or_files,
        } => checkpoint::run(
            &context,
            &sandbox,
            CheckpointRequest {
                name: name.unwrap_or_default(),
                prove,
                or_files,
                ..Default::default()
            },
        ),
        Verb::Turn { sandbox } => turn::run(&context, &sandbox),
        Verb::Restore {
            sandbox,
            cancel,
            start,
        } => restore::run(&context, &sandbox, cancel, start),
        Verb::Rollback { sandbox } => rollback::run(&context, &sandbox),
        Verb::Verify { sandbox } => verify::run(&context, sandbox.as_deref()),
        Verb::Engine { prometheus } => engine::run(&context, &config.engine.limits(), prometheus),
        Verb::Gc {
            sandbox,
            keep,
            gone,
        } => gc::run(&context, sandbox.as_deref(), keep, gone),
        // Done above: they need no rights.
        Verb::Completions { .. } | Verb::Man { .. } | Verb::Doctor => Ok(ExitCode::SUCCESS),
    }
}

/// The first line of each, in one.
fn first_line(notes: &[String]) -> String {
    let lines = notes.iter().filter_map(|note| note.lines().next());
    lines.collect::<Vec<_>>().join("; ")
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn help_fits_80_columns_and_each_verb_has_a_line() {
        let mut command = Args::command();
        command.build();
        let summary = command.render_help().to_string();
        for verb in command.get_subcommands_mut() {
            let help = verb.render_long_help().to_string();
            let short = verb.render_help().to_string();
            for line in help.lines().chain(short.lines()).chain(summary.lines()) {
                assert!(line.chars().count() <= 80, "{line}");
            }
            let name = verb.get_name();
            let begins = |line: &&str| line.trim_start().starts_with(&format!("{name} "));
            let line = summary.lines().find(begins);
            // One that goes on in a second line is too long to be read at a glance.
            let about = verb
                .get_about()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert_eq!(
                line.is_some_and(|line| line.ends_with(&about)),
                !verb.is_hide_set(),
                "{name}: {summary}"
            );
        }
    }

    #[test]
    fn every_verb_has_a_manual_page() {
        let dir = tempfile::tempdir().unwrap();
        generate::man(Args::command(), dir.path()).unwrap();
        let page = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("crab.1").contains("crab\\-show(1)"));
        for verb in Args::command().get_subcommands() {
            if !verb.is_hide_set() {
                assert!(page(&format!("crab-{}.1", verb.get_name())).contains(".SH SYNOPSIS"));
            }
        }
    }
}
