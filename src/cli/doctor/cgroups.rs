//! Cgroups: how they are laid out, what can be limited, and whether one can be frozen.

use std::collections::BTreeSet;

use super::{Check, EVERY_TURN, Host, Verdict};
use crate::cgroup::{Layout, Survey};

/// What clients limit, and read.
const WANTED: [&str; 3] = ["cpu", "memory", "pids"];

const BY_V1: &str = "turns with stopped processes (^Z) keep files alone";
const NO_FREEZE: &str = "cannot run: a checkpoint would be of no one moment";

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let survey = Survey::of(&host.root).map_err(|e| e.to_string());
    vec![layout(&survey), freezer(&survey)]
}

pub(super) fn name(layout: Option<Layout>) -> &'static str {
    match layout {
        Some(Layout::V1) => "v1",
        Some(Layout::Hybrid) => "hybrid",
        Some(Layout::V2) => "v2",
        None => "none",
    }
}

fn layout(survey: &Result<Survey, String>) -> Check {
    let check = Check::needed("cgroups", "cgroup v2", NO_FREEZE);
    let survey = match survey {
        Ok(survey) => survey,
        Err(e) => return check.is(Verdict::Missing, e),
    };
    let list = |names: &BTreeSet<String>| Vec::from_iter(names.iter().cloned());
    let both: BTreeSet<_> = survey.v1.union(&survey.v2).cloned().collect();
    let lacking: Vec<_> = WANTED
        .into_iter()
        .filter(|name| !both.contains(*name))
        .collect();
    let (verdict, without) = match survey.layout {
        None => (Verdict::Missing, NO_FREEZE.to_owned()),
        Some(Layout::V1) => (Verdict::Limited, format!("{EVERY_TURN}; {BY_V1}")),
        Some(Layout::Hybrid) => {
            let without = format!("with v1 beside it {BY_V1}, and crun starts nothing");
            (Verdict::Limited, without)
        }
        Some(Layout::V2) if !lacking.is_empty() => {
            let without = "sandboxes cannot be limited by what is missing";
            (Verdict::Limited, without.to_owned())
        }
        Some(Layout::V2) => (Verdict::Ok, EVERY_TURN.to_owned()),
    };
    let mut found = name(survey.layout).to_owned();
    if !lacking.is_empty() {
        found += &format!(" without {}", lacking.join(", "));
    }
    Check { without, ..check }
        .is(verdict, found)
        .fact("layout", name(survey.layout))
        .fact("v1", list(&survey.v1))
        .fact("v2", list(&survey.v2))
}

fn freezer(survey: &Result<Survey, String>) -> Check {
    let check = Check::needed("freezer", "freezer", NO_FREEZE);
    match survey {
        Ok(survey) if survey.freezes => check.is(Verdict::Ok, "yes"),
        Ok(_) => check.is(Verdict::Missing, "no cgroup can be frozen"),
        Err(e) => check.is(Verdict::Missing, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survey(layout: Option<Layout>, v1: &[&str], v2: &[&str]) -> Result<Survey, String> {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Ok(Survey {
            layout,
            v1: set(v1),
            v2: set(v2),
            freezes: layout.is_some(),
        })
    }

    #[test]
    fn each_layout_has_its_verdict() {
        let all = ["cpu", "memory", "pids"];
        for (found, said, verdict) in [
            (survey(Some(Layout::V2), &[], &all), "v2", Verdict::Ok),
            (
                survey(Some(Layout::V2), &[], &["cpu"]),
                "v2 without memory, pids",
                Verdict::Limited,
            ),
            (
                survey(Some(Layout::Hybrid), &all, &[]),
                "hybrid",
                Verdict::Limited,
            ),
            (survey(Some(Layout::V1), &all, &[]), "v1", Verdict::Limited),
            (
                survey(None, &[], &[]),
                "none without cpu, memory, pids",
                Verdict::Missing,
            ),
            (Err("no /proc".into()), "no /proc", Verdict::Missing),
        ] {
            let check = layout(&found);
            assert_eq!((check.found.as_str(), check.verdict), (said, verdict));
            assert_eq!(
                freezer(&found).verdict == Verdict::Ok,
                verdict != Verdict::Missing
            );
        }
    }
}
