//! What every verb works with: where things are, and which sandbox a word means.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use super::{docker, term::printable};
use crate::{
    control::client,
    sandbox::SandboxId,
    shim::run_dir::{RUN, RunDir},
    store::Store,
};

/// What every verb works with.
pub(super) struct Scope {
    pub(super) namespace: Option<String>,
    pub(super) json: bool,
    pub(super) store_root: PathBuf,
    /// How large the checkpoints of all sandboxes, and of one, may be.
    pub(super) store_limit: Option<u64>,
    pub(super) sandbox_limit: Option<u64>,
}

impl Scope {
    /// Where checkpoints are. Makes nothing: a store that is not there is an error.
    pub(super) fn store(&self) -> anyhow::Result<Store> {
        match self.store_if_any()? {
            Some(store) => Ok(store),
            None => bail!(
                "there is no store {}: no sandbox of this host has been checkpointed yet (or `store` \
                 in /etc/crab/config.toml names another place)",
                self.store_root.display()
            ),
        }
    }

    /// The same, for who can do without.
    pub(super) fn store_if_any(&self) -> anyhow::Result<Option<Store>> {
        let exists = self.store_root.try_exists();
        let exists =
            exists.with_context(|| format!("checkpoint store {}", self.store_root.display()))?;
        match exists {
            true => Ok(Some(
                Store::open(&self.store_root).context("checkpoint store")?,
            )),
            false => Ok(None),
        }
    }

    /// Whether a sandbox is in the namespace that was asked for.
    pub(super) fn has(&self, namespace: &str) -> bool {
        self.namespace.as_deref().is_none_or(|n| n == namespace)
    }

    /// A sandbox by its id, Docker name, or a prefix of its id: one that runs, or one with checkpoints.
    pub(super) fn find(&self, word: &str) -> anyhow::Result<SandboxId> {
        let run = Path::new(RUN);
        let mut known: Vec<SandboxId> = run_dirs(run)
            .into_iter()
            .filter(|(sandbox, run_dir)| client::is_running(run_dir, sandbox))
            .map(|(sandbox, _)| sandbox)
            .collect();
        if let Some(store) = self.store_if_any()? {
            known.extend(store.sandboxes()?);
        }
        known.sort();
        known.dedup();
        known.retain(|s| self.has(s.namespace()));
        // A name of Docker's may look like the beginning of another one's id.
        if !known.iter().any(|sandbox| sandbox.id() == word)
            && let Some(id) = docker::id_of(word)
            && let Ok(sandbox) = pick(&known, &id)
        {
            return Ok(sandbox);
        }
        match pick(&known, word) {
            Ok(sandbox) => Ok(sandbox),
            Err(None) => bail!(self.unknown(word)),
            Err(Some(several)) => bail!(
                "{} is ambiguous: {several}. Say more of the id, or the namespace with -n",
                printable(word)
            ),
        }
    }

    fn unknown(&self, word: &str) -> String {
        let place = match &self.namespace {
            Some(namespace) => format!(" in the namespace {}", printable(namespace)),
            None => String::new(),
        };
        format!(
            "no sandbox {}{place}: neither running under crab nor in the store {} (crab ps lists those \
             that run)",
            printable(word),
            self.store_root.display()
        )
    }
}

/// The run directories below `run`, also of sandboxes that run no more.
pub(super) fn run_dirs(run: &Path) -> Vec<(SandboxId, PathBuf)> {
    let mut found = Vec::new();
    for namespace in names(&RunDir::all(run)) {
        for id in names(&RunDir::all(run).join(&namespace)) {
            if let Ok(sandbox) = SandboxId::new(&namespace, &id) {
                let dir = RunDir::below(run, &sandbox).path().to_owned();
                found.push((sandbox, dir));
            }
        }
    }
    found
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The one sandbox that a word means; None if there is none, else the list of candidates.
fn pick(known: &[SandboxId], word: &str) -> Result<SandboxId, Option<String>> {
    /// As many candidates are named.
    const NAMED: usize = 5;
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
            let mut names: Vec<String> = several.iter().map(ToString::to_string).collect();
            let more = names.len().saturating_sub(NAMED);
            names.truncate(NAMED);
            let mut names = names.join(", ");
            if more > 0 {
                names += &format!(" and {more} more");
            }
            Err(Some(names))
        }
    }
}

/// A word of the form SANDBOX or SANDBOX@WHICH.
pub(super) fn split_at(word: &str) -> (&str, Option<&str>) {
    match word.split_once('@') {
        Some((sandbox, which)) => (sandbox, Some(which)),
        None => (word, None),
    }
}

/// Accepts a sandbox without a turn.
pub(super) fn sandbox(word: &str) -> Result<String, String> {
    match split_at(word) {
        ("", _) => Err("say which sandbox (crab ps lists those that run)".into()),
        (_, None) => Ok(word.to_owned()),
        (sandbox, Some(_)) => Err(format!(
            "this is about all of a sandbox, not one turn: say {}",
            printable(sandbox)
        )),
    }
}

/// Accepts a sandbox, with or without a turn or name.
pub(super) fn sandbox_or_turn(word: &str) -> Result<String, String> {
    match split_at(word) {
        ("", _) => Err("say which sandbox: SANDBOX, SANDBOX@TURN or SANDBOX@NAME".into()),
        (sandbox, Some("")) => Err(format!(
            "say which turn: {0}@TURN or {0}@NAME, or {0} alone for the newest checkpoint",
            printable(sandbox)
        )),
        _ => Ok(word.to_owned()),
    }
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
    fn many_candidates_are_counted_instead_of_named() {
        let known: Vec<_> = (10..30)
            .map(|n| SandboxId::new("a", &format!("c{n}")).unwrap())
            .collect();
        let said = pick(&known, "c").unwrap_err().unwrap();
        assert_eq!(said, "a/c10, a/c11, a/c12, a/c13, a/c14 and 15 more");
    }

    #[test]
    fn what_is_no_sandbox_is_wrong_usage() {
        assert!(sandbox("").is_err() && sandbox("@7").is_err() && sandbox("c1@7").is_err());
        assert!(sandbox("c1").is_ok() && sandbox_or_turn("c1").is_ok());
        assert!(sandbox_or_turn("c1@7").is_ok() && sandbox_or_turn("c1@name").is_ok());
        assert!(sandbox_or_turn("c1@").is_err() && sandbox_or_turn("@7").is_err());
    }

    #[test]
    fn a_store_that_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let scope = Scope {
            namespace: None,
            json: false,
            store_root: dir.path().join("store"),
            store_limit: None,
            sandbox_limit: None,
        };
        assert!(scope.store_if_any().unwrap().is_none());
        assert!(scope.store().unwrap_err().to_string().contains("no store"));
        assert!(!scope.store_root.exists());
    }
}
