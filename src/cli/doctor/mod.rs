//! `crab doctor`: what this host offers, and what crab does without it (D16).
//!
//! Each probe tries the thing itself where that is cheap and leaves nothing behind.

mod bpf;
mod cgroups;
mod files;
#[cfg(test)]
mod fixture;
mod kernel;
mod memory;
mod programs;
mod rights;
mod run;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::bail;
use serde_json::{Map, Value, json};

use super::{
    print,
    term::{Cell, Colour, print_json, table},
};
use crate::config::Config;

/// What becomes of turns where nothing tells what they changed.
const EVERY_TURN: &str = "each turn counts as changed: a full checkpoint after each";
const CANNOT_TELL: &str = "only root can tell";

/// How well a host offers something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Ok,
    /// Not all of it.
    Limited,
    Missing,
    /// Nobody but root can tell.
    Unknown,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        }
    }
}

/// One thing that a host offers or not.
#[derive(Debug, Clone)]
struct Check {
    /// Its name in JSON, for good.
    name: &'static str,
    what: String,
    found: String,
    verdict: Verdict,
    /// What crab does without it, or where it is limited.
    without: String,
    /// Without it crab cannot run.
    is_needed: bool,
    /// More of what was found, for programs.
    facts: Map<String, Value>,
}

impl Check {
    fn new(name: &'static str, what: &str, without: &str) -> Self {
        Self {
            name,
            what: what.to_owned(),
            found: String::new(),
            verdict: Verdict::Unknown,
            without: without.to_owned(),
            is_needed: false,
            facts: Map::new(),
        }
    }

    fn needed(name: &'static str, what: &str, without: &str) -> Self {
        Self {
            is_needed: true,
            ..Self::new(name, what, without)
        }
    }

    fn is(self, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            verdict,
            found: found.into(),
            ..self
        }
    }

    /// Of what is tried: there, or not, and why.
    fn tried(self, there: &str, result: Result<(), String>) -> Self {
        match result {
            Ok(()) => self.is(Verdict::Ok, there),
            Err(why) => self.is(Verdict::Missing, why),
        }
    }

    fn cannot_tell(self) -> Self {
        self.is(Verdict::Unknown, CANNOT_TELL)
    }

    fn fact(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    fn colour(&self) -> Colour {
        match (self.verdict, self.is_needed) {
            (Verdict::Ok, _) => Colour::Good,
            (Verdict::Missing, true) => Colour::Bad,
            (Verdict::Limited | Verdict::Missing, _) => Colour::Warning,
            (Verdict::Unknown, _) => Colour::Faint,
        }
    }
}

/// The host that is looked at.
struct Host {
    /// Where its files are; `/` but in tests.
    root: PathBuf,
    is_root: bool,
    config: Config,
}

impl Host {
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A text of the kernel's, or of a configuration, without blanks around it; none if there is no such
    /// file.
    fn text(&self, path: &str) -> io::Result<Option<String>> {
        match fs::read(self.at(path)) {
            Ok(text) => Ok(Some(String::from_utf8_lossy(&text).trim().to_owned())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io::Error::new(e.kind(), format!("{path}: {e}"))),
        }
    }
}

pub(super) fn run(config: Config, json: bool) -> anyhow::Result<ExitCode> {
    let host = Host {
        root: "/".into(),
        is_root: nix::unistd::geteuid().is_root(),
        config,
    };
    let checks = examine(&host);
    match json {
        true => print_json(&object(&host, &checks))?,
        false => show(&host, &checks)?,
    }
    let missing: Vec<_> = checks.iter().filter(|its| cannot_do_without(its)).collect();
    if !missing.is_empty() {
        let named = missing
            .iter()
            .map(|its| format!("{} ({})", its.what, its.found));
        let named: Vec<_> = named.collect();
        bail!("crab cannot run here: {}", named.join("; "));
    }
    Ok(ExitCode::SUCCESS)
}

fn examine(host: &Host) -> Vec<Check> {
    let areas = [
        kernel::checks(host),
        bpf::checks(host),
        cgroups::checks(host),
        memory::checks(host),
        rights::checks(host),
        programs::checks(host),
        files::checks(host),
    ];
    areas.concat()
}

fn cannot_do_without(check: &Check) -> bool {
    check.is_needed && check.verdict == Verdict::Missing
}

/// None if it hangs on what only root can tell.
fn can_run(checks: &[Check]) -> Option<bool> {
    let is_open = |its: &Check| its.is_needed && its.verdict == Verdict::Unknown;
    match (
        checks.iter().any(cannot_do_without),
        checks.iter().any(is_open),
    ) {
        (true, _) => Some(false),
        (false, true) => None,
        (false, false) => Some(true),
    }
}

fn object(host: &Host, checks: &[Check]) -> Value {
    let of_check = |its: &Check| {
        json!({
            "found": its.found, "verdict": its.verdict.name(), "needed": its.is_needed,
            "without": its.without, "facts": its.facts,
        })
    };
    let by_name: Map<_, _> = checks
        .iter()
        .map(|its| (its.name.to_owned(), of_check(its)))
        .collect();
    json!({
        "can_run": can_run(checks), "root": host.is_root, "version": env!("CARGO_PKG_VERSION"),
        "checks": by_name,
    })
}

fn show(host: &Host, checks: &[Check]) -> anyhow::Result<()> {
    let head =
        ["WHAT", "FOUND", "VERDICT", "WITHOUT IT"].map(|text| Cell::new(text, Colour::Strong));
    let row = |its: &Check| {
        [
            its.what.as_str().into(),
            its.found.as_str().into(),
            Cell::new(its.verdict.name(), its.colour()),
            its.without.as_str().into(),
        ]
    };
    let rows: Vec<_> = [head].into_iter().chain(checks.iter().map(row)).collect();
    table(&rows)?;
    if !host.is_root {
        print("Some of it only root can tell: sudo crab doctor")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(verdict: Verdict, is_needed: bool) -> Check {
        Check {
            is_needed,
            ..Check::new("x", "x", "nothing").is(verdict, "y")
        }
    }

    #[test]
    fn only_what_is_needed_and_missing_keeps_crab_from_running() {
        use Verdict::{Limited, Missing, Ok, Unknown};
        for (checks, expected) in [
            (
                vec![
                    (Ok, true),
                    (Limited, true),
                    (Missing, false),
                    (Unknown, false),
                ],
                Some(true),
            ),
            (
                vec![(Ok, true), (Missing, true), (Unknown, true)],
                Some(false),
            ),
            (vec![(Ok, true), (Unknown, true)], None),
        ] {
            let checks: Vec<_> = checks
                .into_iter()
                .map(|(v, needed)| check(v, needed))
                .collect();
            assert_eq!(can_run(&checks), expected);
        }
    }

    #[test]
    fn every_check_has_a_name_of_its_own_and_says_what_happens_without_it() {
        let (_dir, host) = fixture::fake(&[]);
        let checks = examine(&host);
        let object = object(&host, &checks);
        let by_name = object["checks"].as_object().unwrap();
        assert_eq!(by_name.len(), checks.len());
        for (name, check) in by_name {
            for field in ["found", "verdict", "without"] {
                assert!(
                    !check[field].as_str().unwrap().is_empty(),
                    "{name}: {check}"
                );
            }
            let without = check["without"].as_str().unwrap();
            // Whoever reads it in a table sees it as a whole.
            assert!(without.chars().count() <= 110, "{name}: {without}");
            let fatal = without.starts_with("cannot run");
            assert!(
                check["needed"].as_bool().unwrap() || !fatal,
                "{name}: {without}"
            );
        }
        assert!(object["root"].as_bool().unwrap());
    }
}
