//! What tells of changes: BPF, and the kernel's description of its types.

use rustix::mount::{FsOpenFlags, fsopen};

use super::{Check, EVERY_TURN, Host, Verdict};
use crate::{
    inspector::offers::{self, Offers},
    packet_lock::PacketLock,
};

/// Where a host usually has it. crab mounts one of its own.
const USUAL: &str = "/sys/fs/bpf";

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let offers = Offers::of_kernel();
    let chosen = match host.is_root {
        true => Some(offers::chosen().map(|set| set.name())),
        false => None,
    };
    vec![
        types(&offers),
        tracepoints(host, &offers, &without("tp_btf", chosen.as_ref())),
        functions(host, &offers, &without("fentry", chosen.as_ref())),
        compiler(host),
        file_system(host),
        inspector(chosen),
        packet_lock(host),
    ]
}

fn types(offers: &Result<Offers, String>) -> Check {
    let check = Check::new("btf", "kernel's types (BTF)", EVERY_TURN);
    match offers {
        Ok(_) => check.is(Verdict::Ok, "yes"),
        Err(e) => check.is(Verdict::Missing, e),
    }
}

/// What becomes of turns without one set of probes.
fn without(set: &str, chosen: Option<&Result<&str, String>>) -> String {
    match chosen {
        Some(Ok(other)) if *other != set => {
            format!("nothing is lost: {other} tells of every change")
        }
        _ => EVERY_TURN.to_owned(),
    }
}

fn tracepoints(host: &Host, offers: &Result<Offers, String>, without: &str) -> Check {
    let check = Check::new("tp_btf", "tracepoints (tp_btf)", without);
    match offers {
        Err(_) => check.is(Verdict::Missing, "unknown without types"),
        Ok(_) if !host.is_root => check.cannot_tell(),
        Ok(offers) => {
            let (all, refused) = offers.tracepoints();
            of_tracepoints(check, all.len(), &refused)
        }
    }
}

fn of_tracepoints(check: Check, all: usize, refused: &[(&str, String)]) -> Check {
    let names: Vec<&str> = refused.iter().map(|(name, _)| *name).collect();
    let check = check.fact("missing", names.clone());
    match refused.first() {
        None => check.is(Verdict::Ok, format!("all {all}")),
        Some((_, why)) => check.is(
            Verdict::Missing,
            format!("not {} ({why})", names.join(", ")),
        ),
    }
}

fn functions(host: &Host, offers: &Result<Offers, String>, without: &str) -> Check {
    let check = Check::new("fentry", "kernel functions (fentry)", without);
    match offers {
        Err(_) => check.is(Verdict::Missing, "unknown without types"),
        Ok(_) if !host.is_root => check.cannot_tell(),
        Ok(offers) => check.tried("yes", offers.functions()),
    }
}

fn compiler(host: &Host) -> Check {
    let check = Check::new("bpf_jit", "BPF compiler", EVERY_TURN);
    match host.is_root.then(offers::compiles) {
        None => check.cannot_tell(),
        Some(Ok(true)) => check.is(Verdict::Ok, "on"),
        Some(Ok(false)) => check.is(Verdict::Missing, "off (net.core.bpf_jit_enable)"),
        Some(Err(e)) => check.is(Verdict::Missing, format!("no BPF: {e}")),
    }
}

fn file_system(host: &Host) -> Check {
    let check = Check::new("bpffs", "BPF file system", EVERY_TURN);
    let mounted = match host.text("/proc/self/mountinfo") {
        Ok(Some(text)) => text.contains(&format!(" {USUAL} ")),
        _ => false,
    };
    let found = match mounted {
        true => format!("mounted at {USUAL}"),
        false => format!("not mounted at {USUAL}; crab mounts its own"),
    };
    let check = check.fact("mounted", mounted);
    match host
        .is_root
        .then(|| fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC))
    {
        None => check.cannot_tell(),
        Some(Ok(_)) => check.is(Verdict::Ok, found),
        Some(Err(e)) => check.is(Verdict::Missing, e.to_string()),
    }
}

/// Apart from the rest: it needs no more than kernel 6.4.
fn packet_lock(host: &Host) -> Check {
    let without = "no processes are kept while data is under way in TCP connections between them";
    let check = Check::new("packet_lock", "packets held back (netfilter)", without);
    match host.is_root.then(PacketLock::prepare) {
        None => check.cannot_tell(),
        Some(result) => check.tried("yes", result),
    }
}

/// All of it together.
fn inspector(chosen: Option<Result<&'static str, String>>) -> Check {
    let check = Check::new("inspector", "crab's BPF programs", EVERY_TURN);
    match chosen {
        None => check.cannot_tell(),
        Some(Ok(set)) => check
            .is(Verdict::Ok, format!("can be loaded: {set}"))
            .fact("probes", set),
        Some(Err(e)) => check.is(Verdict::Missing, e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tracepoints_that_are_missing_are_named() {
        let new = || Check::new("tp_btf", "", "");
        let all = of_tracepoints(new(), 11, &[]);
        assert_eq!((all.found.as_str(), all.verdict), ("all 11", Verdict::Ok));
        let refused = ["ctime_ns_xchg", "ctime_xchg_skip"].map(|name| (name, "no".to_owned()));
        let some = of_tracepoints(new(), 11, &refused);
        assert_eq!(some.found, "not ctime_ns_xchg, ctime_xchg_skip (no)");
        assert_eq!(some.verdict, Verdict::Missing);
        assert_eq!(some.facts["missing"][1], "ctime_xchg_skip");
    }

    #[test]
    fn what_is_not_chosen_is_not_missed() {
        let said = |set, chosen| without(set, Some(&chosen));
        assert!(said("fentry", Ok("tp_btf")).starts_with("nothing is lost: tp_btf"));
        assert_eq!(said("tp_btf", Ok("tp_btf")), EVERY_TURN);
        assert_eq!(said("fentry", Err("neither".into())), EVERY_TURN);
    }

    #[test]
    fn what_the_loader_says_is_the_verdict() {
        assert_eq!(inspector(None).verdict, Verdict::Unknown);
        assert_eq!(inspector(Some(Ok("tp_btf"))).facts["probes"], "tp_btf");
        let check = inspector(Some(Err("no such tracepoint".into())));
        assert_eq!(
            (check.found.as_str(), check.verdict),
            ("no such tracepoint", Verdict::Missing)
        );
    }
}
