//! The `crab` command: a thin client of running shims, and of the store when none runs (D14).
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage.

mod docker;
mod engine;
mod gc;
mod log;
mod ps;
mod restore;
mod rollback;
mod turn;
mod turns;
mod verify;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

use crate::{
    config::{self, Config},
    control::{api::CheckpointRequest, client},
    sandbox::SandboxId,
    shim::run_dir::{RUN, RunDir},
    store::Store,
};

/// Restore points for agent sandboxes.
#[derive(Parser)]
#[command(version, about, disable_help_subcommand = true)]
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
    /// List the sandboxes that run under crab, and whether they are protected
    Ps,
    /// Show the turns of a sandbox
    Log {
        /// Container id, a unique prefix of it, or a Docker name
        sandbox: String,
    },
    /// Take a checkpoint of a running sandbox now
    Checkpoint {
        /// Container id, a unique prefix of it, or a Docker name
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
    /// End the turn under way now, as the end of its last exec would: for an agent's framework that
    /// knows better. Nothing is kept of a turn that changed nothing (crab checkpoint always keeps one)
    Turn {
        /// Container id, a unique prefix of it, or a Docker name
        sandbox: String,
    },
    /// Make a stopped container's next start restore a checkpoint instead of booting
    Restore {
        /// SANDBOX, SANDBOX@TURN or SANDBOX@NAME; without @ the newest checkpoint. For a turn that
        /// changed nothing, that is the checkpoint before it. On a checkpoint without processes the
        /// start boots
        sandbox: String,
        /// Take it back: the next start boots
        #[arg(long, conflicts_with = "start")]
        cancel: bool,
        /// Also start it, through containerd or Docker
        #[arg(long)]
        start: bool,
    },
    /// Take a running sandbox back to one of its checkpoints, in place
    Rollback {
        /// SANDBOX@TURN or SANDBOX@NAME
        #[arg(value_parser = rollback::target)]
        sandbox: String,
    },
    /// Check the checkpoints of one sandbox, or of all, against their digests
    Verify {
        /// Container id, a unique prefix of it, or a Docker name; with @TURN or @NAME one checkpoint
        sandbox: Option<String>,
    },
    /// Show the host's budget for checkpoints, who has it, and who waits for it
    Engine {
        /// In Prometheus' text format, for its node exporter's textfile collector
        #[arg(long, conflicts_with = "json")]
        prometheus: bool,
    },
    /// Free the space of what no checkpoint needs any more. Running sandboxes do so themselves
    Gc {
        /// Container id, a unique prefix of it, or a Docker name; without it, all
        sandbox: Option<String>,
        /// Let all checkpoints go but the newest N, the newest one with processes, the armed one, and
        /// those with a name
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        keep: Option<u32>,
        /// Remove everything about sandboxes whose container is gone
        #[arg(long)]
        gone: bool,
    },
}

/// What every verb works with.
struct Scope {
    namespace: Option<String>,
    json: bool,
    store_root: PathBuf,
    /// How large the checkpoints of all sandboxes, and of one, may be.
    store_limit: Option<u64>,
    sandbox_limit: Option<u64>,
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let args = Args::parse();
    match run(args) {
        Ok(code) => code,
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("crab: {}", printable(&format!("{e:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("only root may see checkpoints, which hold the memory of sandboxes: use sudo");
    }
    let config = Config::load(Path::new(config::FILE), None, std::iter::empty())?;
    let context = Scope {
        namespace: args.namespace,
        json: args.json,
        store_root: config.store,
        store_limit: config.store_limit,
        sandbox_limit: config.sandbox_limit,
    };
    match args.verb {
        Verb::Ps => ps::run(&context),
        Verb::Log { sandbox } => log::run(&context, &sandbox),
        Verb::Checkpoint {
            sandbox,
            name,
            prove,
            or_files,
        } => checkpoint(
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
    }
}

impl Scope {
    fn store(&self) -> anyhow::Result<Store> {
        Store::open(&self.store_root).context("checkpoint store")
    }

    /// A sandbox by its id, Docker name, or a prefix of its id: one that runs, or one with checkpoints.
    fn find(&self, word: &str) -> anyhow::Result<SandboxId> {
        let mut known: Vec<SandboxId> = client::list(Path::new(RUN))
            .0
            .iter()
            .filter_map(|s| SandboxId::new(&s.namespace, &s.id).ok())
            .collect();
        if self.store_root.exists() {
            known.extend(self.store()?.sandboxes()?);
        }
        known.sort();
        known.dedup();
        known.retain(|s| {
            let wanted = self.namespace.as_deref();
            wanted.is_none_or(|n| n == s.namespace())
        });
        // A name of Docker's may look like the beginning of another one's id.
        if !known.iter().any(|sandbox| sandbox.id() == word)
            && let Some(id) = docker::id_of(word)
            && let Ok(sandbox) = pick(&known, &id)
        {
            return Ok(sandbox);
        }
        match pick(&known, word) {
            Err(None) => {}
            Ok(sandbox) => return Ok(sandbox),
            Err(Some(several)) => bail!(
                "{} is ambiguous: {}. Say more of the id, or the namespace with -n",
                printable(word),
                several
            ),
        }
        bail!(
            "no sandbox {}: neither running under crab nor in the store {} (crab ps lists those \
             that run)",
            printable(word),
            self.store_root.display()
        )
    }
}

/// The one sandbox that a word means; None if there is none, else the list of candidates.
fn pick(known: &[SandboxId], word: &str) -> Result<SandboxId, Option<String>> {
    if word.is_empty() {
        return Err(None);
    }
    let exact: Vec<&SandboxId> = known.iter().filter(|s| s.id() == word).collect();
    let found = if exact.is_empty() {
        known.iter().filter(|s| s.id().starts_with(word)).collect()
    } else {
        exact
    };
    match found.as_slice() {
        [] => Err(None),
        [one] => Ok((*one).clone()),
        several => {
            let names: Vec<String> = several.iter().map(ToString::to_string).collect();
            Err(Some(names.join(", ")))
        }
    }
}

fn checkpoint(context: &Scope, word: &str, request: CheckpointRequest) -> anyhow::Result<ExitCode> {
    if !request.name.is_empty() {
        crate::sandbox::check("name", &request.name)?;
    }
    let sandbox = context.find(word)?;
    let prove = request.prove;
    let answer = client::checkpoint(RunDir::of(&sandbox).path(), &sandbox, request)?;
    let proved = answer.not_proved.is_empty();
    if context.json && prove {
        let mut line: serde_json::Map<_, _> = serde_json::from_str(&answer.line)?;
        line.insert("proved".into(), proved.into());
        print(&serde_json::to_string(&line)?)?;
    } else if context.json {
        print(&answer.line)?;
    } else {
        let line: crate::store::JournalLine = serde_json::from_str(&answer.line)?;
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

/// A word of the form SANDBOX or SANDBOX@WHICH.
fn split_at(word: &str) -> (&str, Option<&str>) {
    match word.split_once('@') {
        Some((sandbox, which)) => (sandbox, Some(which)),
        None => (word, None),
    }
}

/// The first line of each, in one.
fn first_line(notes: &[String]) -> String {
    let lines = notes.iter().filter_map(|note| note.lines().next());
    lines.collect::<Vec<_>>().join("; ")
}

/// One line to stdout.
fn print(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}

/// Text from a sandbox or a user, safe for a terminal (D19).
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' => "\n".to_owned(),
            c if c.is_control() => c.escape_default().to_string(),
            c => c.to_string(),
        })
        .collect()
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.downcast_ref::<io::Error>()
        .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exact_id_wins_over_a_prefix() {
        let known: Vec<SandboxId> = [("a", "web"), ("a", "web2"), ("b", "db")]
            .map(|(n, i)| SandboxId::new(n, i).unwrap())
            .into();
        assert_eq!(pick(&known, "web").unwrap().id(), "web");
        assert_eq!(pick(&known, "d").unwrap().id(), "db");
        assert_eq!(pick(&known, "we").unwrap_err().unwrap(), "a/web, a/web2");
        assert_eq!(pick(&known, "x").unwrap_err(), None);
        assert_eq!(pick(&known, "").unwrap_err(), None);
    }

    #[test]
    fn terminal_escapes_are_shown_not_sent() {
        assert_eq!(printable("a\x1b[31mb"), "a\\u{1b}[31mb");
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
