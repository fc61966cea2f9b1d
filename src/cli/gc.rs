//! `crab gc`: space that nothing needs.
//!
//! A running sandbox's shim is the one writer of its checkpoints, and collects after its turns; here
//! such a sandbox is passed over. The turns that a container keeps may be set by its annotations,
//! which nobody knows here: so none goes unless `--keep` says so, or a limit of the configuration
//! demands it.

use std::{
    collections::{BTreeMap, HashSet},
    env,
    process::{Command, ExitCode},
};

use anyhow::{Context, bail};

use super::{
    Scope, print,
    progress::Progress,
    term::{bytes, complain, print_json},
};
use crate::{
    sandbox::SandboxId,
    store::{Freed, Retention, Store, StoreError},
};

pub(super) fn run(
    scope: &Scope,
    word: Option<&str>,
    keep: Option<u32>,
    gone: bool,
) -> anyhow::Result<ExitCode> {
    let store = scope.store()?;
    store.tidy()?;
    let mut sandboxes = match word {
        Some(word) => vec![scope.find(word)?],
        None => store.sandboxes()?,
    };
    sandboxes.retain(|s| scope.has(s.namespace()));
    let progress = Progress::begin("collecting");
    let mut known = Known::default();
    let mut failed = 0;
    for (n, sandbox) in sandboxes.iter().enumerate() {
        progress.say(format!("{sandbox}, {} of {}", n + 1, sandboxes.len()));
        let is_gone = match gone {
            true => known.is_gone(sandbox),
            false => Ok(false),
        };
        let done = is_gone.and_then(|is_gone| {
            match is_gone {
                true => store.remove(sandbox).map(|freed| (freed, true)),
                false => collect(scope, &store, sandbox, keep).map(|freed| (freed, false)),
            }
            .map_err(anyhow::Error::from)
        });
        match done {
            Ok((freed, removed)) => say(scope, sandbox, &freed, removed)?,
            Err(e) => {
                let running = matches!(e.downcast_ref(), Some(StoreError::Locked { .. }));
                refuse(scope, sandbox, &e, running)?;
                failed += usize::from(!running);
            }
        }
    }
    if failed > 0 {
        bail!("{failed} sandbox(es) could not be collected");
    }
    Ok(ExitCode::SUCCESS)
}

fn collect(
    scope: &Scope,
    store: &Store,
    sandbox: &SandboxId,
    keep: Option<u32>,
) -> Result<Freed, StoreError> {
    let writer = store.writer(sandbox)?;
    let keep = keep.map_or(usize::MAX, |keep| {
        usize::try_from(keep).unwrap_or(usize::MAX)
    });
    let retention = Retention {
        keep,
        sandbox_limit: scope.sandbox_limit,
        store_limit: None,
    };
    let mut freed = writer.retain(&retention)?;
    let limit = scope.store_limit.unwrap_or(u64::MAX);
    let more = writer.shrink(|| Ok(store.size()?.saturating_sub(limit)))?;
    freed.turns.extend(more.turns);
    freed.bytes += more.bytes;
    Ok(freed)
}

fn say(scope: &Scope, sandbox: &SandboxId, freed: &Freed, removed: bool) -> anyhow::Result<()> {
    if scope.json {
        let object = serde_json::json!({
            "sandbox": sandbox.id(), "namespace": sandbox.namespace(), "turns": freed.turns,
            "freed_bytes": freed.bytes, "removed": removed, "skipped": null,
        });
        return print_json(&object);
    }
    let size = bytes(freed.bytes);
    let turns = freed.turns.len();
    print(&match removed {
        true => format!("{sandbox}  removed, {size} freed"),
        false => format!("{sandbox}  {size} freed, {turns} checkpoint(s) let go"),
    })?;
    Ok(())
}

fn refuse(
    scope: &Scope,
    sandbox: &SandboxId,
    error: &anyhow::Error,
    running: bool,
) -> anyhow::Result<()> {
    let why = match running {
        true => "its shim is running, and collects by itself after its turns".to_owned(),
        false => format!("{error:#}"),
    };
    if scope.json {
        let object = serde_json::json!({
            "sandbox": sandbox.id(), "namespace": sandbox.namespace(), "turns": [],
            "freed_bytes": 0, "removed": false, "skipped": why,
        });
        return print_json(&object);
    }
    match running {
        true => print(&format!("{sandbox}  passed over: {why}"))?,
        false => complain(&format!("{sandbox}: {why}")),
    }
    Ok(())
}

/// The containers that there are, of each namespace that was asked for.
#[derive(Default)]
struct Known(BTreeMap<String, HashSet<String>>);

impl Known {
    fn is_gone(&mut self, sandbox: &SandboxId) -> anyhow::Result<bool> {
        let namespace = sandbox.namespace();
        if !self.0.contains_key(namespace) {
            let list = containers(namespace)?;
            self.0.insert(namespace.to_owned(), list);
        }
        let list = self.0.get(namespace);
        Ok(list.is_some_and(|list| !list.contains(sandbox.id())))
    }
}

/// Docker's own socket on this host.
const DOCKER: &str = "unix:///var/run/docker.sock";

/// The ids of all containers of a namespace. Docker's own list, if they are Docker's: it takes a
/// stopped container away from containerd. An error where whoever answers may be another daemon than theirs.
fn containers(namespace: &str) -> anyhow::Result<HashSet<String>> {
    if namespace == "moby" {
        return words(&mut docker(env::var("DOCKER_HOST").ok()));
    }
    // A namespace that containerd does not know is empty for it.
    if !words(Command::new("ctr").args(["namespaces", "list", "--quiet"]))?.contains(namespace) {
        bail!(
            "containerd knows no namespace {namespace:?}; if another containerd made the sandbox, name its socket in \
             CONTAINERD_ADDRESS"
        );
    }
    words(Command::new("ctr").args(["--namespace", namespace, "containers", "list", "--quiet"]))
}

/// Asks a daemon of this host, whatever its user's DOCKER_HOST (`host`) and contexts say: the checkpoints are of this host.
fn docker(host: Option<String>) -> Command {
    let host = host.filter(|host| host.starts_with("unix://"));
    let mut command = Command::new("docker");
    command
        .args(["--host", host.as_deref().unwrap_or(DOCKER)])
        .args(["ps", "--all", "--quiet", "--no-trunc"])
        .env_remove("DOCKER_HOST")
        .env_remove("DOCKER_CONTEXT");
    command
}

/// The words that a program prints.
fn words(command: &mut Command) -> anyhow::Result<HashSet<String>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot run {program}, which knows what is gone"))?;
    if !output.status.success() {
        bail!(
            "{program} does not say which containers there are: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_other_hosts_docker_is_asked() {
        let asked = |host: Option<&str>| {
            let command = docker(host.map(str::to_owned));
            let words: Vec<_> = command
                .get_args()
                .take(2)
                .map(|word| word.to_owned())
                .collect();
            words.join(" ".as_ref())
        };
        let ours = format!("--host {DOCKER}");
        assert_eq!(asked(None), *ours);
        assert_eq!(asked(Some("tcp://10.0.0.1:2375")), *ours);
        assert_eq!(asked(Some("ssh://elsewhere")), *ours);
        assert_eq!(
            asked(Some("unix:///run/second.sock")),
            "--host unix:///run/second.sock"
        );
    }
}
