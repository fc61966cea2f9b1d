//! What root may do here.

use super::{Check, Host, Verdict};

/// Of linux/capability.h: name, bit, and whether crab cannot do without. `CAP_SYS_ADMIN` stands for the
/// last three.
const WANTED: [(&str, u32, Weight); 6] = [
    ("CAP_SYS_ADMIN", 21, Weight::Needed),
    ("CAP_SYS_PTRACE", 19, Weight::Needed),
    ("CAP_SYS_RESOURCE", 24, Weight::Missed),
    ("CAP_CHECKPOINT_RESTORE", 40, Weight::Implied),
    ("CAP_BPF", 39, Weight::Implied),
    ("CAP_PERFMON", 38, Weight::Implied),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Weight {
    Needed,
    Missed,
    Implied,
}

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let check = Check::needed(
        "capabilities",
        "capabilities",
        "without CAP_SYS_RESOURCE turns with processes of other users than root keep files alone",
    );
    // Of somebody else, what root could have.
    let line = match host.is_root {
        true => "CapEff",
        false => "CapBnd",
    };
    let text = host.text("/proc/self/status").ok().flatten();
    vec![match text.as_deref().and_then(|text| set(text, line)) {
        Some(set) => of_set(check, set),
        None => check.is(Verdict::Unknown, "/proc/self/status does not say"),
    }]
}

/// The hexadecimal set of that name in /proc/PID/status.
fn set(status: &str, name: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    u64::from_str_radix(line?.trim(), 16).ok()
}

fn of_set(check: Check, set: u64) -> Check {
    let lacks = |(_, bit, _): &&(&str, u32, Weight)| set >> bit & 1 == 0;
    let lacking: Vec<_> = WANTED.iter().filter(lacks).collect();
    let has = |weight| lacking.iter().any(|(_, _, its)| *its == weight);
    let verdict = match (has(Weight::Needed), has(Weight::Missed)) {
        (true, _) => Verdict::Missing,
        (_, true) => Verdict::Limited,
        _ => Verdict::Ok,
    };
    let names: Vec<&str> = lacking.iter().map(|(name, ..)| *name).collect();
    let found = match names.is_empty() {
        true => "all".to_owned(),
        false => format!("not {}", names.join(", ")),
    };
    let check = check.is(verdict, found).fact("missing", names);
    match verdict {
        Verdict::Missing => Check {
            without: "cannot run: CRIU needs CAP_SYS_ADMIN and CAP_SYS_PTRACE".into(),
            ..check
        },
        _ => check,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::fixture::fake;

    #[test]
    fn what_is_missing_is_named_and_weighed() {
        for (mask, found, verdict) in [
            ("000001ffffffffff", "all", Verdict::Ok),
            ("000001fffeffffff", "not CAP_SYS_RESOURCE", Verdict::Limited),
            (
                "000000ffffffffff",
                "not CAP_CHECKPOINT_RESTORE",
                Verdict::Ok,
            ),
            ("000001ffffdfffff", "not CAP_SYS_ADMIN", Verdict::Missing),
        ] {
            let status = format!("Name:\tcrab\nCapEff:\t{mask}\nCapBnd:\t0\n");
            let (_dir, host) = fake(&[("/proc/self/status", Some(&status))]);
            let check = checks(&host).remove(0);
            assert_eq!((check.found.as_str(), check.verdict), (found, verdict));
        }
        let (_dir, host) = fake(&[]);
        assert_eq!(checks(&host)[0].verdict, Verdict::Unknown);
    }
}
