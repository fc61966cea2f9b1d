//! The kernel: its version, what it is locked down against, what it lists.

use nix::sys::utsname::uname;

use super::{Check, EVERY_TURN, Host, Verdict};
use crate::shim::reaper;

/// The first kernel with `openat2`, without which no file of a sandbox is read.
const OLDEST: (u32, u32) = (5, 6);
/// What crab is built and tested for.
const MACHINE: &str = "x86_64";

pub(super) fn checks(host: &Host) -> Vec<Check> {
    vec![release(host), lockdown(host), children()]
}

/// Major and minor of a release such as `6.18.44-cloud`.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}

/// The kernel's release; empty if it does not say.
pub(super) fn running(host: &Host) -> String {
    let text = host.text("/proc/sys/kernel/osrelease");
    text.ok().flatten().unwrap_or_default()
}

fn release(host: &Host) -> Check {
    let release = running(host);
    let machine = uname().map_or_else(
        |_| "unknown".to_owned(),
        |its| its.machine().to_string_lossy().into_owned(),
    );
    judged(&release, &machine)
}

fn judged(release: &str, machine: &str) -> Check {
    let (major, minor) = OLDEST;
    let without =
        format!("cannot run before {major}.{minor}; not tried on other machines than {MACHINE}");
    let check = Check::needed("kernel", "kernel", &without)
        .fact("release", release)
        .fact("machine", machine);
    let found = format!("{release} {machine}");
    match version(release) {
        Some(version) if version < OLDEST => check.is(Verdict::Missing, found),
        Some(_) if machine == MACHINE => check.is(Verdict::Ok, found),
        _ => check.is(Verdict::Limited, found),
    }
}

fn lockdown(host: &Host) -> Check {
    let without = format!("with confidentiality, {EVERY_TURN}");
    let check = Check::new("lockdown", "lockdown", &without);
    match host.text("/sys/kernel/security/lockdown") {
        Ok(None) => check.is(Verdict::Ok, "none").fact("mode", "none"),
        Ok(Some(text)) => {
            let mode = chosen(&text);
            let verdict = match mode {
                // That of `integrity` forbids to write to kernel memory, which crab never does.
                "none" | "integrity" => Verdict::Ok,
                _ => Verdict::Limited,
            };
            check.is(verdict, mode).fact("mode", mode)
        }
        Err(_) if !host.is_root => check.cannot_tell(),
        Err(e) => check.is(Verdict::Unknown, e.to_string()),
    }
}

/// The word in brackets: `none [integrity] confidentiality`.
fn chosen(text: &str) -> &str {
    let mut words = text.split_whitespace();
    let in_brackets = words.find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    in_brackets.unwrap_or(text)
}

fn children() -> Check {
    let check = Check::needed(
        "proc_children",
        "list of children",
        "cannot run: CRIU finds a sandbox's processes by /proc/PID/task/TID/children",
    );
    match reaper::lists_children() {
        true => check.is(Verdict::Ok, "yes"),
        false => check.is(Verdict::Missing, "no CONFIG_PROC_CHILDREN"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::fixture::fake;

    #[test]
    fn releases_of_distributions_are_understood() {
        for (release, expected) in [
            ("6.18.44", Some((6, 18))),
            ("6.12.48+deb13-cloud-amd64", Some((6, 12))),
            ("6.16-rc3", Some((6, 16))),
            ("5.15.0-113-generic", Some((5, 15))),
            ("", None),
            ("linux", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }

    #[test]
    fn an_old_kernel_is_none_and_another_machine_is_not_tried() {
        let verdict = |release, machine| judged(release, machine).verdict;
        assert_eq!(verdict("6.18.44", "x86_64"), Verdict::Ok);
        assert_eq!(verdict("5.4.0-42-generic", "x86_64"), Verdict::Missing);
        assert_eq!(verdict("6.18.44", "aarch64"), Verdict::Limited);
        assert_eq!(verdict("", "x86_64"), Verdict::Limited);
    }

    #[test]
    fn the_mode_of_lockdown_is_the_one_in_brackets() {
        for (text, mode, verdict) in [
            (None, "none", Verdict::Ok),
            (
                Some("[none] integrity confidentiality\n"),
                "none",
                Verdict::Ok,
            ),
            (
                Some("none [integrity] confidentiality\n"),
                "integrity",
                Verdict::Ok,
            ),
            (
                Some("none integrity [confidentiality]\n"),
                "confidentiality",
                Verdict::Limited,
            ),
        ] {
            let (_dir, host) = fake(&[("/sys/kernel/security/lockdown", text)]);
            let check = lockdown(&host);
            assert_eq!((check.found.as_str(), check.verdict), (mode, verdict));
        }
    }
}
