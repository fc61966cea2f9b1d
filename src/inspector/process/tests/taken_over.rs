//! What is not asked again of a process that has not run.

use super::*;
use crate::inspector::process::{proc_fs::Dir, snapshot::Process};

/// Other namespaces, and bytes read from a file.
const MOVES: &str = "import ctypes\nassert libc.unshare(0x04000000) == 0\nopen(__import__('os').devnull).read()\nopen('/proc/self/status').read()";

fn look(baseline: &Baseline, actor: &Actor) -> Process {
    let now = baseline.look(&[actor.pid()], &no_registers).unwrap();
    now.find(actor.pid()).unwrap().clone()
}

#[test]
fn of_who_has_not_run_it_is_what_a_whole_reading_finds() {
    let actor = Actor::asleep("");
    let baseline = actor.baseline();
    let whole = actor.snapshot();
    let whole = whole.find(actor.pid()).unwrap();
    let now = look(&baseline, &actor);
    assert_eq!(now.own, whole.own);
    assert_eq!(now.io, whole.io);
    assert_eq!(now.attributes, whole.attributes);
}

#[test]
fn of_who_has_not_run_it_is_what_the_baseline_has() {
    let (actor, other) = (Actor::asleep(""), Actor::asleep(""));
    let mut baseline = actor.baseline();
    let foreign = other.snapshot().find(other.pid()).unwrap().own.clone();
    for process in &mut baseline.snapshot.processes {
        process.own = foreign.clone();
        process.io = None;
    }
    let now = look(&baseline, &actor);
    assert_eq!(now.own, foreign);
    assert!(now.io.is_none());
}

#[test]
fn of_who_has_run_it_is_asked_again() {
    let actor = Actor::ready("", MOVES);
    let baseline = actor.baseline();
    let before = baseline.snapshot.find(actor.pid()).unwrap();
    actor.go();
    let now = look(&baseline, &actor);
    assert_ne!(now.own, before.own);
    assert!(now.io.unwrap().read > before.io.unwrap().read);
    let whole = actor.snapshot();
    assert_eq!(now.own, whole.find(actor.pid()).unwrap().own);
}

#[test]
fn of_who_runs_all_the_while_it_is_asked_again() {
    let actor = Actor::ready("", "name('done')\nwhile True: pass");
    let mut baseline = actor.baseline();
    fs::write(actor.path("go"), "").unwrap();
    let runs = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", actor.pid())).unwrap();
        stat.contains("(done) R")
    };
    eventually(runs);
    // As if it had come as far as it is now: the progress at the end alone tells.
    let own = actor.snapshot().find(actor.pid()).unwrap().own.clone();
    for process in &mut baseline.snapshot.processes {
        process.io = None;
    }
    for _ in 0..20 {
        let tasks = actor.snapshot().find(actor.pid()).unwrap().tasks.clone();
        baseline.snapshot.processes[0].tasks = tasks;
        let now = look(&baseline, &actor);
        assert_eq!(now.own, own);
        assert!(now.io.is_some(), "taken over from before it ran");
    }
}

#[test]
fn a_record_longer_than_a_page_is_read_to_its_end() {
    let actor = Actor::asleep("os.setgroups(range(100000, 102500))");
    let dir = Dir::open(actor.pid()).unwrap();
    let record = dir.record("status").unwrap();
    assert!(record.len() > 3 * 4096, "{}", record.len());
    // The other lines count what it does.
    let groups = |text: &str| {
        text.lines()
            .find(|line| line.starts_with("Groups:"))
            .map(str::to_owned)
    };
    assert_eq!(groups(&record), groups(&dir.text("status").unwrap()));
    let last = record
        .strip_suffix('\n')
        .and_then(|text| text.lines().last());
    assert!(last.is_some_and(|line| line.starts_with("nonvoluntary_ctxt_switches:")));
}
