//! Each acquittal and each reason.

use super::*;

const READS_PROC: &str = "for i in range(20): open('/proc/self/stat').read(); time.sleep(0.001)";

#[test]
fn who_sleeps_has_not_run() {
    let actor = Actor::asleep("");
    let baseline = actor.baseline();
    let verdict = actor.judge(&baseline, &actor.facts());
    assert_eq!(acquittals(&verdict), [Acquittal::NotRun]);
}

#[test]
fn who_polls_and_reads_its_own_proc_is_a_consistent_cut() {
    let actor = Actor::ready("", READS_PROC);
    let baseline = actor.baseline();
    actor.go();
    let (now, facts) = (actor.snapshot(), actor.facts());
    let verdict = baseline.verdict(&now, &facts, (&no_registers, &no_marks), &settings());
    assert_eq!(acquittals(&verdict), [Acquittal::ConsistentCut]);
    let strict = Settings {
        consistent_cut: false,
        ..settings()
    };
    let verdict = baseline.verdict(&now, &facts, (&no_registers, &no_marks), &strict);
    assert!(matches!(reasons(&verdict)[..], [What::Ran(time)] if !time.is_zero()));
}

#[test]
fn who_has_read_is_named_and_who_has_not_is_not() {
    let sleeps = Actor::ready("", "time.sleep(0.01)");
    let reads = Actor::ready("", READS_PROC);
    for (actor, expected) in [(sleeps, None), (reads, Some("ready"))] {
        let mut baseline = actor.baseline();
        actor.go();
        let reader = |baseline: &Baseline| {
            let found = baseline.reader().unwrap();
            found.map(|(_, comm)| comm.to_owned())
        };
        assert_eq!(reader(&baseline).as_deref(), expected);
        // What counts as the dump's is not what it knew when it was dumped.
        let now = actor.snapshot();
        let settled = baseline.settle(now, &actor.facts(), &no_marks, &settings(), None);
        assert_eq!(settled, Settled::Yes);
        assert_eq!(reader(&baseline).as_deref(), expected);
        let reader = baseline.reader().unwrap();
        assert!(reader.is_none_or(|(pid, _)| pid == actor.pid()));
    }
}

#[test]
fn every_flag_speaks_against_it_whether_it_ran_or_not() {
    let asleep = Actor::asleep("");
    let polls = Actor::ready("", READS_PROC);
    let baselines = [asleep.baseline(), polls.baseline()];
    polls.go();
    for bit in 0..32 {
        for (actor, baseline) in [&asleep, &polls].into_iter().zip(&baselines) {
            let mut facts = actor.facts();
            facts.did.insert(actor.pid(), Did(1 << bit));
            let why = reasons(&actor.judge(baseline, &facts));
            assert!(matches!(why[..], [What::Did(_)]), "{bit}: {why:?}");
        }
    }
    let why = reasons(&asleep.judge(&baselines[0], &KernelFacts::default()));
    assert_eq!(why, [What::NotWatched]);
}

#[test]
fn another_processes_flag_changes_the_sandbox() {
    let (one, two) = (Actor::asleep(""), Actor::asleep(""));
    let pids = [one.pid(), two.pid()];
    let baseline = baseline(&pids, no_registers);
    let mut facts = facts(&pids);
    let now = Snapshot::take(&pids, &no_registers).unwrap();
    let verdict = baseline.verdict(&now, &facts, (&no_registers, &no_marks), &settings());
    assert_eq!(acquittals(&verdict), [Acquittal::NotRun; 2]);
    facts.did.insert(pids[1], Did::SEND);
    let verdict = baseline.verdict(&now, &facts, (&no_registers, &no_marks), &settings());
    let Verdict::Changed { why } = verdict else {
        panic!("{verdict:?}");
    };
    assert_eq!(why.len(), 1);
    assert_eq!(why[0].pid, pids[1]);
    assert!(
        why[0]
            .to_string()
            .ends_with("\"ready\": sent data on a socket"),
        "{}",
        why[0]
    );
}

#[test]
fn processes_that_come_and_go_are_named() {
    let actor = Actor::asleep("");
    let other = Actor::asleep("");
    let baseline = actor.baseline();
    let both = Snapshot::take(&[other.pid(), actor.pid()], &no_registers).unwrap();
    let facts = facts(&[actor.pid(), other.pid()]);
    let judge = |now: &Snapshot| {
        let verdict = baseline.verdict(now, &facts, (&no_registers, &no_marks), &settings());
        let Verdict::Changed { why } = verdict else {
            panic!("{verdict:?}");
        };
        why.into_iter()
            .map(|reason| (reason.pid, reason.what))
            .collect::<Vec<_>>()
    };
    let judged = judge(&both);
    assert!(judged.contains(&(other.pid(), What::Created)), "{judged:?}");
    let mut gone = Command::new("true").spawn().unwrap();
    let dead = gone.id().cast_signed();
    gone.wait().unwrap();
    let now = Snapshot::take(&[actor.pid(), dead], &no_registers).unwrap();
    assert_eq!(judge(&now), [(dead, What::Created)]);
    let pid = actor.pid();
    drop(actor);
    let now = Snapshot::take(&[pid], &no_registers).unwrap();
    assert!(judge(&now).contains(&(pid, What::Gone)));
}

#[test]
fn another_process_with_the_same_number_is_not_the_same() {
    let actor = Actor::asleep("");
    let baseline = actor.baseline();
    let mut now = actor.snapshot();
    now.processes[0].tasks[0].start += 1;
    let why = reasons(&baseline.verdict(
        &now,
        &actor.facts(),
        (&no_registers, &no_marks),
        &settings(),
    ));
    assert_eq!(why, [What::Gone, What::Created]);
    let mut now = actor.snapshot();
    now.processes[0].inner_pid += 1;
    let why = reasons(&baseline.verdict(
        &now,
        &actor.facts(),
        (&no_registers, &no_marks),
        &settings(),
    ));
    assert_eq!(why, [What::Gone, What::Created]);
}

/// What it has set up, what it does, and what is to be blamed.
type Deed = (&'static str, String, fn(&What) -> bool);

/// What a process does itself, with no flag of BPF: what is blamed.
#[test]
fn what_a_process_did_shows_without_the_kernels_flags() {
    let blocked = "lambda: select.select([], [], [])";
    let table: &[Deed] = &[
        ("", "os.write(os.open('/dev/null', 1), b'x')".into(), |what| {
            matches!(what, What::Wrote | What::Descriptor { .. })
        }),
        ("fd = os.open('/dev/null', 1)", "os.write(fd, b'x')".into(), |what| *what == What::Wrote),
        ("", format!("threading.Thread(target={blocked}, daemon=True).start()"), |what| {
            *what == What::Threads
        }),
        ("", "pid = os.fork()\nif pid == 0: os._exit(0)\nos.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)".into(), |what| {
            *what == What::Children
        }),
        ("", "os.chdir('/')".into(), |what| matches!(what, What::Attribute(k) if k.contains("working directory"))),
        ("", "os.umask(0o7)".into(), |what| matches!(what, What::Attribute(k) if k.contains("masks"))),
        ("", "os.setsid()".into(), |what| matches!(what, What::Attribute(k) if k.contains("session"))),
        ("", "libc.unshare(0x04000000)".into(), |what| matches!(what, What::Attribute("namespaces"))),
        ("", "os.nice(3)".into(), |what| matches!(what, What::Attribute("scheduling"))),
        ("fd = os.open('/etc/passwd', 0)", "os.read(fd, 5)".into(), |what| {
            matches!(what, What::Descriptor { target, .. } if target == "/etc/passwd")
        }),
        ("fd = os.open('/etc/passwd', 0)", "fcntl.flock(fd, fcntl.LOCK_SH)".into(), |what| {
            matches!(what, What::Descriptor { target, .. } if target == "/etc/passwd")
        }),
        ("fd = os.open('/etc/passwd', 0)", "os.close(fd)".into(), |what| {
            matches!(what, What::Descriptor { target, .. } if target == "/etc/passwd")
        }),
        ("fd = os.eventfd(0)", "libc.eventfd_write(fd, ctypes.c_ulong(3))".into(), |what| {
            matches!(what, What::Descriptor { target, .. } if target.contains("eventfd"))
        }),
        ("", "t = time.thread_time()\nwhile time.thread_time() < t + 3: pass".into(), |what| {
            matches!(what, What::Ran(time) if *time > Duration::from_secs(2))
        }),
    ];
    let run = |(setup, action, expected): &Deed| {
        let actor = Actor::ready(setup, action);
        let baseline = actor.baseline();
        actor.go();
        let why = reasons(&actor.judge(&baseline, &actor.facts()));
        assert!(why.iter().any(expected), "{action}: {why:?}");
    };
    for row in table {
        run(row);
    }
}

/// What others do to a process that sleeps on.
#[test]
fn what_is_done_to_a_sleeping_process_shows() {
    let table: &[(&[&str], &str)] = &[
        (&["renice", "-n", "5", "-p", "PID"], "scheduling"),
        (&["prlimit", "--nofile=100:100", "--pid", "PID"], "limits"),
        (
            &["sh", "-c", "echo 500 > /proc/PID/oom_score_adj"],
            "oom_score_adj",
        ),
        (&["taskset", "-pc", "0", "PID"], "masks"),
        (&["kill", "-STOP", "PID"], "state"),
    ];
    for (command, expected) in table {
        let actor = Actor::asleep("");
        let baseline = actor.baseline();
        let pid = actor.pid().to_string();
        let words: Vec<_> = command
            .iter()
            .map(|word| word.replace("PID", &pid))
            .collect();
        let done = Command::new(&words[0]).args(&words[1..]).output().unwrap();
        assert!(done.status.success(), "{words:?}");
        let changed = || match actor.judge(&baseline, &actor.facts()) {
            Verdict::Changed { why } => why
                .iter()
                .any(|one| matches!(one.what, What::Attribute(kind) if kind.contains(expected))),
            Verdict::Unchanged { .. } => false,
        };
        eventually(changed);
    }
}

#[test]
fn what_happens_to_the_whole_sandbox_shows() {
    let make = "import ctypes; libc = ctypes.CDLL(None); assert libc.semget(0x77, 1, 0o1600) >= 0";
    let table: &[(&[&str], &str)] = &[
        (&["mount", "-t", "tmpfs", "none", "/mnt"], "mounts changed"),
        (&["hostname", "other"], "host name changed"),
        (&["python3", "-c", make], "SysV IPC changed"),
        (
            &["ip", "address", "add", "10.9.8.7/32", "dev", "lo"],
            "network interfaces or routes changed",
        ),
        (
            &["ip", "link", "set", "lo", "down"],
            "network interfaces or routes changed",
        ),
    ];
    for (command, expected) in table {
        let actor = Actor::asleep("");
        let baseline = actor.baseline();
        actor.enter(command);
        let why = reasons(&actor.judge(&baseline, &actor.facts()));
        assert_eq!(why, [What::Sandbox(expected)]);
    }
}

#[test]
fn a_settled_baseline_takes_in_what_ran_after_the_thaw() {
    let actor = Actor::ready("", READS_PROC);
    let mut baseline = actor.baseline();
    actor.go();
    let facts = actor.facts();
    let mut sent = facts.clone();
    sent.did.insert(actor.pid(), Did::SEND);
    let settled = baseline.settle(actor.snapshot(), &sent, &no_marks, &settings(), Some(7));
    assert!(matches!(settled, Settled::No(_)), "{settled:?}");
    assert_eq!(
        acquittals(&actor.judge(&baseline, &facts)),
        [Acquittal::ConsistentCut]
    );
    assert!(!baseline.quick(7, &facts, &settings()), "not settled");
    let mut running = actor.snapshot();
    running.processes[0].tasks[0].state = b'R';
    assert_eq!(
        baseline.settle(running, &facts, &no_marks, &settings(), Some(7)),
        Settled::NotYet
    );
    let settled = baseline.settle(actor.snapshot(), &facts, &no_marks, &settings(), Some(7));
    assert_eq!(settled, Settled::Yes);
    assert_eq!(
        acquittals(&actor.judge(&baseline, &facts)),
        [Acquittal::NotRun]
    );
}

#[test]
fn a_thaw_is_not_settled_by_who_moved_data() {
    let table = [
        ("fd = os.open('/dev/null', 1)", "os.write(fd, b'x')"),
        ("", "os.open('/dev/null', 1)"),
        (
            "",
            "t = time.thread_time()\nwhile time.thread_time() < t + 3: pass",
        ),
    ];
    for (setup, action) in table {
        let actor = Actor::ready(setup, action);
        let mut baseline = actor.baseline();
        actor.go();
        let settled = baseline.settle(
            actor.snapshot(),
            &actor.facts(),
            &no_marks,
            &settings(),
            None,
        );
        assert!(matches!(settled, Settled::No(_)), "{action}: {settled:?}");
    }
}

#[test]
fn a_quick_look_needs_the_same_cpu_time_and_no_event() {
    let actor = Actor::asleep("");
    let mut baseline = actor.baseline();
    let facts = actor.facts();
    let settled = baseline.settle(actor.snapshot(), &facts, &no_marks, &settings(), Some(1000));
    assert_eq!(settled, Settled::Yes);
    assert!(baseline.quick(1000, &facts, &settings()));
    assert!(!baseline.quick(1001, &facts, &settings()));
    let spoilt: [fn(&mut KernelFacts); 6] = [
        |facts| {
            facts
                .did
                .values_mut()
                .for_each(|did| *did = Did::GOT_SIGNAL)
        },
        |facts| facts.did.clear(),
        |facts| facts.others = Others::SOCK,
        |facts| facts.orphans_touched = true,
        |facts| facts.client_bytes = 1,
        |facts| facts.memory_reached = true,
    ];
    for spoil in spoilt {
        let mut facts = facts.clone();
        spoil(&mut facts);
        assert!(!baseline.quick(1000, &facts, &settings()), "{facts:?}");
    }
    let strict = Settings {
        consistent_cut: false,
        ..settings()
    };
    assert!(!baseline.quick(1000, &facts, &strict));
    // A packet from somewhere, with nobody running in the sandbox's cgroup.
    let send = "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', 9))";
    actor.enter(&["python3", "-c", send]);
    assert!(!baseline.quick(1000, &facts, &settings()));
}
