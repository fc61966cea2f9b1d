//! `crab engine`: the host's budget for checkpoints, who has it, and who waits for it.

use std::{fmt::Write, path::Path, process::ExitCode, time::Duration};

use anyhow::Context;

use super::{
    Scope, print,
    term::{bytes, print_json, table},
};
use crate::{
    engine::{Class, Limits, Phase, Report, Row, Terms, Work, other_versions},
    shim::run_dir::RUN,
};

pub(super) fn run(scope: &Scope, limits: &Limits, prometheus: bool) -> anyhow::Result<ExitCode> {
    let at = Path::new(RUN);
    let unreadable = || format!("cannot read the engine's state below {RUN}");
    let report = Report::read(at, limits, &Terms::default()).with_context(unreadable)?;
    let report = Report {
        other_versions: other_versions(at).with_context(unreadable)?,
        // Nobody has asked yet: all is there.
        ..report.unwrap_or_else(|| Report::of_nobody(limits))
    };
    if prometheus {
        print(exposition(limits, &report).trim_end())?;
    } else if scope.json {
        print_json(&json(limits, &report))?;
    } else {
        show(limits, &report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(limits: &Limits, report: &Report) -> anyhow::Result<()> {
    let rate = limits.rate.map(|rate| format!("{}/s", bytes(rate.get())));
    let tokens = match report.tokens {
        None => "any number".to_owned(),
        Some(level) => signed(level),
    };
    table(&[
        ["rate", rate.as_deref().unwrap_or("unlimited")].map(str::to_owned),
        ["burst".into(), bytes(limits.burst)],
        ["tokens".into(), tokens],
        [
            "dumps".into(),
            format!(
                "{} of {}, or {} if somebody waits",
                report.dumps,
                limits.dumps,
                limits.pressing_dumps()
            ),
        ],
        [
            "undrained".into(),
            format!("{} of {}", bytes(report.undrained), bytes(limits.undrained)),
        ],
        ["idle".into(), format!("{} sandbox(es)", report.idle)],
    ])?;
    for warning in warnings(report) {
        print(&warning)?;
    }
    if report.members.is_empty() {
        return Ok(());
    }
    print("")?;
    let head = [
        "PID", "SANDBOX", "STATE", "CLASS", "FOR", "SINCE", "TOKENS", "CAPTURED",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(report.members.iter().map(row));
    table(&rows)
}

fn row(its: &Row) -> [String; 8] {
    [
        its.pid.to_string(),
        its.name.clone(),
        match its.is_overdue {
            true => format!("{}, overdue", phase(its.phase)),
            false => phase(its.phase).to_owned(),
        },
        class(its.class).to_owned(),
        work(its.work).to_owned(),
        format!("{:.1} s", its.age.as_secs_f64()),
        bytes(its.tokens),
        bytes(its.staged),
    ]
}

/// What somebody should look into.
fn warnings(report: &Report) -> Vec<String> {
    let mut found = Vec::new();
    if report.is_damaged {
        found.push("the bucket's word is damaged: it counts as empty".to_owned());
    }
    if report.others_limits > 0 {
        found.push(format!(
            "{} sandbox(es) go by other limits: their shims were started with another configuration",
            report.others_limits
        ));
    }
    for other in &report.other_versions {
        found.push(format!(
            "another version of crab runs beside, with a budget of its own ({other}): as long as the \
             containers that it has started run"
        ));
    }
    if report.sums.forced > 0 {
        found.push(format!(
            "{} checkpoint(s) have gone beyond the budget, after a wait that was too long",
            report.sums.forced
        ));
    }
    found
}

fn json(limits: &Limits, report: &Report) -> serde_json::Value {
    let member = |its: &Row| {
        serde_json::json!({
            "pid": its.pid, "sandbox": its.name, "state": phase(its.phase),
            "class": class(its.class), "for": work(its.work),
            "since_us": micros(its.age), "tokens": its.tokens, "captured": its.staged,
            "overdue": its.is_overdue,
        })
    };
    let members: Vec<_> = report.members.iter().map(member).collect();
    let sums = &report.sums;
    serde_json::json!({
        "rate": limits.rate, "burst": limits.burst, "tokens": report.tokens,
        "dumps": report.dumps, "dumps_limit": limits.dumps,
        "dumps_limit_waited_for": limits.pressing_dumps(),
        "undrained": report.undrained, "undrained_limit": limits.undrained,
        "idle": report.idle, "members": members, "warnings": warnings(report),
        "grants": sums.grants, "forced": sums.forced, "granted_bytes": sums.granted,
        "written_bytes": sums.written, "waited_us": sums.waited_micros,
    })
}

/// The text format of <https://prometheus.io/docs/instrumenting/exposition_formats/>.
fn exposition(limits: &Limits, report: &Report) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, values: &[(&str, f64)]| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP crab_engine_{name} {help}");
        let _ = writeln!(text, "# TYPE crab_engine_{name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "crab_engine_{name}{labels} {value}");
        }
    };
    let waiting = |wanted: Class| {
        let waits =
            |its: &&Row| its.class == wanted && matches!(its.phase, Phase::Waiting | Phase::Passed);
        report.members.iter().filter(waits).count() as f64
    };
    if let (Some(rate), Some(tokens)) = (limits.rate, report.tokens) {
        let rate = rate.get() as f64;
        metric(
            "rate_bytes_per_second",
            "gauge",
            "Configured rate.",
            &[("", rate)],
        );
        metric(
            "burst_bytes",
            "gauge",
            "Configured burst.",
            &[("", limits.burst as f64)],
        );
        let help = "Bytes that could be written now, negative for a debt.";
        metric("tokens_bytes", "gauge", help, &[("", tokens as f64)]);
    }
    metric(
        "dumps",
        "gauge",
        "Dumps that run.",
        &[("", report.dumps as f64)],
    );
    let help = "Dumps that may run at once, twice as many if somebody waits for them.";
    metric("dumps_limit", "gauge", help, &[("", limits.dumps.into())]);
    let help = "Bytes that are captured and not on disk.";
    metric(
        "undrained_bytes",
        "gauge",
        help,
        &[("", report.undrained as f64)],
    );
    let help = "Bytes that may be captured and not on disk.";
    metric(
        "undrained_limit_bytes",
        "gauge",
        help,
        &[("", limits.undrained as f64)],
    );
    let queue = [
        ("{class=\"urgent\"}", waiting(Class::Urgent)),
        ("{class=\"normal\"}", waiting(Class::Normal)),
    ];
    metric("queue", "gauge", "Sandboxes that wait.", &queue);
    let sums = &report.sums;
    metric(
        "grants_total",
        "counter",
        "Checkpoints that were let begin.",
        &[("", sums.grants as f64)],
    );
    let help = "Of them beyond the budget, after a wait that was too long.";
    metric("forced_total", "counter", help, &[("", sums.forced as f64)]);
    let help = "Bytes that were expected to be written.";
    metric(
        "granted_bytes_total",
        "counter",
        help,
        &[("", sums.granted as f64)],
    );
    let help = "Bytes that were written.";
    metric(
        "written_bytes_total",
        "counter",
        help,
        &[("", sums.written as f64)],
    );
    let waited = Duration::from_micros(sums.waited_micros).as_secs_f64();
    metric(
        "waited_seconds_total",
        "counter",
        "Time that was waited.",
        &[("", waited)],
    );
    text
}

fn signed(level: i64) -> String {
    let size = bytes(level.unsigned_abs());
    match level {
        0.. => size,
        _ => format!("-{size}, a debt"),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Idle => "idle",
        Phase::Waiting => "waiting",
        Phase::Passed => "passed",
        Phase::Working => "capturing",
        Phase::Draining => "draining",
    }
}

fn class(class: Class) -> &'static str {
    match class {
        Class::Urgent => "urgent",
        Class::Normal => "normal",
    }
}

fn work(work: Work) -> &'static str {
    match work {
        Work::Files => "files",
        Work::Dump => "dump",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{Caller, Member, Request},
        slot_lock::SlotLock,
    };

    const LIMITS: Limits = Limits {
        rate: std::num::NonZeroU64::new(1 << 20),
        burst: 1 << 20,
        dumps: 2,
        undrained: 1 << 30,
    };

    /// The report while `a` captures and `b` waits.
    fn busy() -> Report {
        let dir = tempfile::tempdir().unwrap();
        let join = |name| Member::join(dir.path(), name, LIMITS, Terms::default());
        let [mut a, mut b] = ["default/a", "default/b"].map(join);
        let request = Request {
            work: Work::Dump,
            tokens: 64 << 20,
            staged: 100 << 20,
            expected: Duration::from_secs(1),
        };
        let caller = Caller::new();
        let _grant = a
            .acquire(&request, &caller, Duration::from_secs(20))
            .unwrap();
        std::thread::scope(|scope| {
            let caller = Caller::new();
            let its = std::sync::Arc::clone(&caller);
            scope.spawn(move || drop(b.acquire(&request, &its, Duration::from_secs(60))));
            let end = std::time::Instant::now() + Duration::from_secs(20);
            let report = loop {
                let report = Report::read(dir.path(), &LIMITS, &Terms::default());
                let report = report.unwrap().unwrap();
                if report.members.len() == 2 || std::time::Instant::now() > end {
                    break report;
                }
                std::thread::yield_now();
            };
            caller.give_up();
            report
        })
    }

    #[test]
    fn who_has_the_budget_comes_before_who_waits_for_it() {
        let report = busy();
        let said: Vec<_> = report
            .members
            .iter()
            .map(row)
            .map(|row| row[1..5].join(" "))
            .collect();
        assert_eq!(
            said,
            [
                "default/a capturing normal dump",
                "default/b waiting normal dump"
            ]
        );
        assert_eq!((report.dumps, report.idle, report.others_limits), (1, 0, 0));
        assert_eq!(report.undrained, 100 << 20);
        let object = json(&LIMITS, &report);
        assert!(object["tokens"].as_i64().unwrap() < 0, "{object}");
        assert_eq!(object["members"][0]["pid"], std::process::id());
        assert_eq!(object["grants"], 1);
        assert_eq!(object["warnings"].as_array().unwrap().len(), 0);
    }

    #[test]
    fn every_metric_has_help_a_type_and_a_number() {
        let text = exposition(&LIMITS, &busy());
        assert!(
            text.contains("\ncrab_engine_queue{class=\"normal\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("\ncrab_engine_granted_bytes_total 67108864\n"),
            "{text}"
        );
        let mut lines = text.lines().peekable();
        while let Some(help) = lines.next() {
            let name = help
                .strip_prefix("# HELP ")
                .unwrap()
                .split(' ')
                .next()
                .unwrap();
            let kind = lines.next().unwrap();
            let kind = kind.strip_prefix(&format!("# TYPE {name} ")).unwrap();
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            let mut values = 0;
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (metric, value) = line.rsplit_once(' ').unwrap();
                assert_eq!(metric.split('{').next(), Some(name));
                value.parse::<f64>().unwrap();
                values += 1;
            }
            assert!(values > 0, "{name}");
        }
    }

    #[test]
    fn other_limits_are_said() {
        let report = Report {
            others_limits: 2,
            ..Report::of_nobody(&LIMITS)
        };
        assert!(warnings(&report)[0].starts_with("2 sandbox(es) go by other limits"));
    }

    #[test]
    fn another_version_that_runs_beside_is_said_and_one_that_ran_is_not() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["engine.v1", "engine.v0", "engine.v7"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let open = |name| std::fs::File::create(dir.path().join(name)).unwrap();
        let claim = |name| SlotLock::claim(open(name), [5]).unwrap().unwrap();
        let (_ours, _theirs) = (claim("engine.v1"), claim("engine.v7"));
        let report = Report {
            other_versions: other_versions(dir.path()).unwrap(),
            ..Report::of_nobody(&LIMITS)
        };
        assert_eq!(report.other_versions, ["engine.v7"]);
        assert!(warnings(&report)[0].contains("(engine.v7)"));
        assert!(other_versions(&dir.path().join("none")).unwrap().is_empty());
    }
}
