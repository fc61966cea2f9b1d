//! `crab restore`: arm a dead container, so that its next start goes back (D13).

use std::{
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, bail};

use super::{
    Scope, first_line, print,
    progress::Progress,
    scope::split_at,
    term::{one_line, print_json},
    turns::{self, Held},
};
use crate::{
    control::client,
    sandbox::{SandboxId, TurnNo},
    shim::run_dir::RunDir,
    store::{Facts, Kind, SandboxWriter, StoreError},
};

/// How long to wait for a dying shim.
const LOCK_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn run(
    scope: &Scope,
    word: &str,
    cancel: bool,
    start: bool,
) -> anyhow::Result<ExitCode> {
    let (word, which) = split_at(word);
    let sandbox = scope.find(word)?;
    refuse_if_alive(&sandbox)?;
    let writer = writer(scope, &sandbox)?;
    if cancel {
        writer.disarm()?;
        say(scope, &sandbox, None)?;
        return Ok(ExitCode::SUCCESS);
    }
    let held = turns::find(&writer, which)?;
    let turn = held.by;
    let progress = Progress::begin(format!("verifying {sandbox}@{turn}"));
    let faults = writer.verify(turn)?;
    drop(progress);
    if let Some(fault) = faults.first() {
        bail!(
            "the checkpoint of turn {turn} is broken ({fault}): nothing was changed; crab verify \
             {} shows which ones are whole",
            sandbox.id()
        );
    }
    let checkpoint = writer.get(turn)?;
    let with_processes = match checkpoint.has_processes() {
        true => None,
        false => writer.newest_with_processes()?,
    };
    writer.arm(turn)?;
    // The shim takes the lock when it starts.
    drop(writer);
    let armed = Armed {
        held,
        facts: checkpoint.manifest.facts,
        with_processes: with_processes.map(|checkpoint| checkpoint.turn()),
    };
    say(scope, &sandbox, Some(&armed))?;
    if start {
        start_it(&sandbox)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The right to write the sandbox's checkpoints. A shim whose container has just died may still
/// have it for the moment that its last cut takes.
fn writer(scope: &Scope, sandbox: &SandboxId) -> anyhow::Result<SandboxWriter> {
    let _progress = Progress::begin(format!("waiting for the shim of {sandbox} to end"));
    match scope.store()?.writer_within(sandbox, LOCK_LIMIT) {
        Err(e @ StoreError::Locked { .. }) => bail!(
            "{e}: its shim, or another crab. Wait until it has ended, or end it, and try again"
        ),
        writer => Ok(writer?),
    }
}

fn refuse_if_alive(sandbox: &SandboxId) -> anyhow::Result<()> {
    let state = client::state(RunDir::of(sandbox).path(), sandbox)?;
    if state.is_some_and(|state| state.phase != "stopped") {
        bail!(
            "{sandbox} is running: stop or kill it first, or take it back as it runs: crab rollback \
             {}@TURN",
            sandbox.id()
        );
    }
    Ok(())
}

/// What the next start goes back to.
struct Armed {
    held: Held,
    facts: Facts,
    /// Of a checkpoint without processes: the newest turn that has some.
    with_processes: Option<TurnNo>,
}

fn say(scope: &Scope, sandbox: &SandboxId, armed: Option<&Armed>) -> anyhow::Result<()> {
    if scope.json {
        let object = serde_json::json!({
            "namespace": sandbox.namespace(), "id": sandbox.id(),
            "armed": armed.map(|armed| armed.held.by), "turn": armed.map(|armed| armed.held.turn),
            "kind": armed.map(|armed| armed.facts.kind),
            "notes": armed.map(|armed| &armed.facts.notes),
            "with_processes": armed.and_then(|armed| armed.with_processes),
        });
        return print_json(&object);
    }
    let what = armed.map_or_else(|| "boots".to_owned(), |armed| armed.describe(sandbox));
    print(&format!("{sandbox}: the next start {what}"))?;
    Ok(())
}

impl Armed {
    fn describe(&self, sandbox: &SandboxId) -> String {
        let Held { turn, by } = self.held;
        let unchanged = match turn == by {
            true => String::new(),
            false => format!(", since which turn {turn} changed nothing"),
        };
        if self.facts.kind == Kind::Full {
            return format!("restores turn {by}{unchanged}");
        }
        let lacks = one_line(&first_line(&self.facts.notes));
        let instead = match self.with_processes {
            Some(other) => format!(
                "The newest turn with processes is {other}: crab restore {}@{other}",
                sandbox.id()
            ),
            None => "No turn has processes".to_owned(),
        };
        format!("boots on the files of turn {by}{unchanged}, {lacks}. {instead}")
    }
}

/// Asks whoever owns the container to start it.
fn start_it(sandbox: &SandboxId) -> anyhow::Result<()> {
    let _progress = Progress::begin(format!("starting {sandbox}"));
    let mut command = match sandbox.namespace() {
        "moby" => {
            let mut command = Command::new("docker");
            command.args(["start", sandbox.id()]);
            command
        }
        namespace => {
            // A task that has died must go before another one can come. Without one this fails, and the
            // start tells what else is wrong.
            let mut delete = Command::new("ctr");
            delete.args(["-n", namespace, "task", "delete", sandbox.id()]);
            let _ = delete.output();
            let mut command = Command::new("ctr");
            command.args(["-n", namespace, "task", "start", "-d", sandbox.id()]);
            command
        }
    };
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}; {sandbox} is armed, start it yourself"))?;
    if !output.status.success() {
        bail!(
            "{program} could not start {sandbox}, which stays armed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
