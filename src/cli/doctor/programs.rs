//! The programs that crab runs: CRIU, runc, crun. They are found on the PATH of this command; a shim has
//! containerd's.

use std::path::{Path, PathBuf};

use super::{
    Check, Host, Verdict, cgroups, kernel,
    run::{Answer, ask},
};
use crate::{
    cgroup::{Layout, Survey},
    runtime::{criu_version, on_path},
};

/// From this kernel on, CRIU before [`SOCKETS`] cannot dump sockets of the internet's protocols.
const CHANGED: (u32, u32) = (6, 16);
const SOCKETS: (u32, u32) = (4, 2);
/// Older ones of runc were not tried.
const OLDEST_RUNC: (u32, u32) = (1, 1);

pub(super) fn checks(host: &Host) -> Vec<Check> {
    let criu = criu_version::program();
    let mut all = vec![
        version_of_criu(host, criu.as_deref()),
        check_of_criu(host, criu.as_deref()),
    ];
    all.extend(runtimes(host));
    all
}

fn version_of_criu(host: &Host, program: Option<&Path>) -> Check {
    let check = Check::needed(
        "criu",
        "CRIU",
        "cannot run: nothing else dumps and restores processes",
    );
    let Some(program) = program else {
        return check.is(Verdict::Missing, "not on PATH");
    };
    let check = check.fact("path", program.to_string_lossy());
    match said(program, &["--version"]) {
        Ok(text) => of_criu(check, &text, program, &kernel::running(host)),
        Err(e) => check.is(Verdict::Missing, e),
    }
}

/// `text` begins with `Version: 4.2.1`.
fn of_criu(check: Check, text: &str, program: &Path, running: &str) -> Check {
    let version = text.lines().find_map(|line| line.strip_prefix("Version:"));
    let Some(version) = version.map(str::trim) else {
        return check.is(
            Verdict::Missing,
            format!("{} is no CRIU", program.display()),
        );
    };
    let check = check.fact("version", version);
    let found = format!("{version}, {}", program.display());
    let is_old = kernel::version(version).is_none_or(|its| its < SOCKETS);
    match is_old && kernel::version(running).is_some_and(|its| its >= CHANGED) {
        true => Check {
            without:
                "before 4.2 on kernel 6.16 or newer, turns with internet sockets keep files alone"
                    .into(),
            ..check
        }
        .is(Verdict::Limited, found),
        false => check.is(Verdict::Ok, found),
    }
}

fn check_of_criu(host: &Host, program: Option<&Path>) -> Check {
    let check = Check::needed(
        "criu_check",
        "criu check",
        "cannot run: CRIU lacks something of the kernel",
    );
    match program {
        None => check.is(Verdict::Unknown, "there is no CRIU to ask"),
        Some(_) if !host.is_root => check.cannot_tell(),
        Some(program) => check.tried("passes", said(program, &["check"]).map(drop)),
    }
}

/// What a program says when it is asked; else what went wrong.
fn said(program: &Path, args: &[&str]) -> Result<String, String> {
    let named = |why: String| format!("{} {}: {why}", program.display(), args.join(" "));
    let answer = ask(program, args).map_err(|e| named(e.to_string()))?;
    match answer.status.success() {
        true => Ok(answer.out),
        false => Err(named(complaint(&answer))),
    }
}

/// The last line that says what is wrong.
fn complaint(answer: &Answer) -> String {
    let lines = || answer.err.lines().chain(answer.out.lines());
    // It goes on after that, and some are no errors.
    let error = lines().rfind(|line| line.contains("Error") && !line.contains("RLIMIT_NOFILE"));
    let line = error.or_else(|| lines().next_back());
    line.map_or_else(|| answer.status.to_string(), str::to_owned)
}

/// A runtime that there may be.
struct Candidate {
    name: &'static str,
    what: String,
    program: Option<PathBuf>,
    is_configured: bool,
}

fn candidates(configured: &Path) -> Vec<Candidate> {
    let mut all: Vec<_> = ["runc", "crun"]
        .map(|name| (name, configured.file_name().is_some_and(|its| its == name)))
        .map(|(name, is_configured)| Candidate {
            name,
            what: name.to_owned(),
            program: match is_configured {
                true => on_path(configured),
                false => on_path(name.as_ref()),
            },
            is_configured,
        })
        .into();
    if !all.iter().any(|its| its.is_configured) {
        all.push(Candidate {
            name: "runtime",
            what: configured.display().to_string(),
            program: on_path(configured),
            is_configured: true,
        });
    }
    all
}

fn runtimes(host: &Host) -> Vec<Check> {
    let configured = &host.config.runtime;
    let layout = Survey::of(&host.root).ok().and_then(|survey| survey.layout);
    let all = candidates(configured).into_iter();
    all.map(|its| {
        let without = match its.is_configured {
            true => "cannot run: it starts the sandboxes".to_owned(),
            false => format!(
                "nothing is lost: {} starts the sandboxes",
                configured.display()
            ),
        };
        let check = Check {
            is_needed: its.is_configured,
            ..Check::new(its.name, &its.what, &without)
        };
        match &its.program {
            None if its.is_configured && configured.components().count() > 1 => {
                let found = format!("there is no {}", configured.display());
                check.is(Verdict::Missing, found)
            }
            None => check.is(Verdict::Missing, "not on PATH"),
            Some(program) => match said(program, &["--version"]) {
                Ok(text) => of_runtime(check, &text, program, layout),
                Err(e) => check.is(Verdict::Missing, e),
            },
        }
    })
    .collect()
}

/// `text` begins with `runc version 1.1.15`; crun's lists what it was built with.
fn of_runtime(check: Check, text: &str, program: &Path, layout: Option<Layout>) -> Check {
    let line = text.lines().next().unwrap_or_default();
    let version = line.rsplit(' ').next().unwrap_or_default();
    let is_crun = line.starts_with("crun");
    let check = check
        .fact("path", program.to_string_lossy())
        .fact("version", version);
    let found = format!("{version}, {}", program.display());
    // What crun cannot do is as good as no crun only for who has no other.
    let cannot = match check.is_needed {
        true => Verdict::Missing,
        false => Verdict::Limited,
    };
    if is_crun && layout == Some(Layout::Hybrid) {
        let why = format!(
            "{found}; it starts nothing where cgroups are {}",
            cgroups::name(layout)
        );
        return check.is(cannot, why);
    }
    if is_crun && !text.split_whitespace().any(|word| word == "+CRIU") {
        return check.is(cannot, format!("{found}; built without CRIU"));
    }
    let is_old =
        line.starts_with("runc") && kernel::version(version).is_none_or(|its| its < OLDEST_RUNC);
    match is_old {
        true => check.is(Verdict::Limited, format!("{found}; not tried before 1.1")),
        false => check.is(Verdict::Ok, found),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn an_old_criu_is_limited_on_a_new_kernel_alone() {
        for (version, running, verdict) in [
            ("4.2.1", "6.18.44", Verdict::Ok),
            ("4.1.1", "6.18.44", Verdict::Limited),
            ("4.1.1", "6.12.48+deb13-cloud-amd64", Verdict::Ok),
            ("5.0", "6.18.44", Verdict::Ok),
        ] {
            let text = format!("Version: {version}\nGitID: x\n");
            let check = of_criu(
                Check::needed("criu", "", ""),
                &text,
                Path::new("/criu"),
                running,
            );
            assert_eq!(check.verdict, verdict, "{version} on {running}");
            assert_eq!(check.facts["version"], version);
        }
        let check = of_criu(
            Check::needed("criu", "", ""),
            "hello\n",
            Path::new("/criu"),
            "6.18",
        );
        assert_eq!(
            (check.found.as_str(), check.verdict),
            ("/criu is no CRIU", Verdict::Missing)
        );
    }

    const CRUN: &str = "crun version 1.21\ncommit: x\n+SYSTEMD +CRIU +YAJL\n";

    #[test]
    fn crun_is_of_use_where_it_starts_something_and_knows_criu() {
        let verdict = |text: &str, layout, is_needed| {
            let check = Check {
                is_needed,
                ..Check::new("crun", "", "")
            };
            of_runtime(check, text, Path::new("/crun"), Some(layout)).verdict
        };
        let without = CRUN.replace("+CRIU ", "");
        for (text, layout, needed, spare) in [
            (CRUN, Layout::V2, Verdict::Ok, Verdict::Ok),
            (CRUN, Layout::Hybrid, Verdict::Missing, Verdict::Limited),
            (&without, Layout::V2, Verdict::Missing, Verdict::Limited),
        ] {
            assert_eq!(
                (verdict(text, layout, true), verdict(text, layout, false)),
                (needed, spare)
            );
        }
    }

    #[test]
    fn versions_of_runc_are_compared_as_numbers() {
        for (version, verdict) in [
            ("1.1.15+ds1", Verdict::Ok),
            ("1.10.0", Verdict::Ok),
            ("1.0.3", Verdict::Limited),
            ("2.0", Verdict::Ok),
        ] {
            let check = Check::new("runc", "", "");
            let text = format!("runc version {version}\ncommit: x\n");
            let check = of_runtime(check, &text, Path::new("/runc"), Some(Layout::Hybrid));
            assert_eq!(
                (check.verdict, &check.facts["version"]),
                (verdict, &version.into())
            );
        }
    }

    #[test]
    fn the_configured_runtime_is_among_them_under_whatever_name() {
        let named = |configured: &str| {
            let all = candidates(Path::new(configured));
            let is = all.iter().find(|its| its.is_configured).unwrap();
            (all.len(), is.name, is.what.clone())
        };
        assert_eq!(named("runc"), (2, "runc", "runc".into()));
        assert_eq!(named("/opt/crun"), (2, "crun", "crun".into()));
        assert_eq!(named("/opt/youki"), (3, "runtime", "/opt/youki".into()));
        let all = candidates(Path::new("/opt/nowhere/crun"));
        assert_eq!(all[1].program, None, "not another one of the same name");
    }

    #[test]
    fn the_error_is_picked_out_of_what_follows_it() {
        let answer = |err: &str| Answer {
            status: ExitStatusExt::from_raw(1 << 8),
            out: String::new(),
            err: err.to_owned(),
        };
        let said = "Error (criu/util.c:1): Can't setup RLIMIT_NOFILE\n\
                    Error (criu/cr-check.c:9): no /proc/self/pagemap\nWarn (x): y";
        assert!(complaint(&answer(said)).ends_with("no /proc/self/pagemap"));
        assert_eq!(complaint(&answer("it is broken")), "it is broken");
        assert_eq!(complaint(&answer("")), "exit status: 1");
    }
}
