//! Real processes stand for a sandbox; what BPF would tell is made up.
//!
//! They need root (namespaces, other processes' descriptors), and no cgroup.

mod attacks;
mod compare;
mod limits;
mod marks;
mod network;
mod queues;
mod rest;
mod rules;
mod taken_over;
mod traveller;

use std::{
    fs,
    io::{Read as _, Write as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::*;

/// Does `setup`, then waits for `trigger` to exist (looking, not reading), does `action`, and
/// blocks for good. Its name tells how far it is: names are not compared.
const ACTOR: &str = r#"
import ctypes, fcntl, mmap, os, select, signal, socket, struct, sys, termios, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 9, 0, 0, 0)  # never outlives the test
def name(text): libc.prctl(15, text.encode(), 0, 0, 0)
setup, action, trigger = sys.argv[1:4]
# The loopback interface goes up.
fcntl.ioctl(socket.socket(2, 2), 0x8914, struct.pack("16sH22x", b"lo", 0x49))
action = compile(action, "action", "exec")
exec(setup)
name("ready")
if trigger:
    while not os.path.exists(trigger): time.sleep(0.005)
    exec(action)
    name("done")
while True: select.select([], [], [])
"#;

/// A process of its own namespaces, killed in the end.
pub(super) struct Actor {
    pub(super) child: Child,
    directory: tempfile::TempDir,
}

impl Actor {
    /// One that sleeps after `setup`.
    pub(super) fn asleep(setup: &str) -> Self {
        Self::start(setup, None)
    }

    /// One that does `action` on [`Actor::go`], and looks for that until then.
    pub(super) fn ready(setup: &str, action: &str) -> Self {
        Self::start(setup, Some(action))
    }

    fn start(setup: &str, action: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let trigger = action
            .map(|_| directory.path().join("go"))
            .unwrap_or_default();
        let child = Command::new("unshare")
            .args([
                "--mount",
                "--net",
                "--ipc",
                "--uts",
                "--propagation",
                "private",
            ])
            .args(["python3", "-c", ACTOR, setup, action.unwrap_or_default()])
            .arg(&trigger)
            .current_dir(&directory)
            .env("DIR", directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Not the tests' own: in a file its offset moves with whatever they print.
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let actor = Self { child, directory };
        actor.wait_for("ready");
        actor
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The action, until it has blocked for good.
    pub(super) fn go(&self) {
        fs::write(self.path("go"), "").unwrap();
        self.wait_for("done");
    }

    fn wait_for(&self, name: &str) {
        let asleep = || {
            let text = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
            text.contains(&format!("({name}) S"))
        };
        eventually(asleep);
    }

    /// Runs a program within the actor's namespaces.
    pub(super) fn enter(&self, arguments: &[&str]) {
        let done = Command::new("nsenter")
            .args(["-t", &self.pid().to_string(), "-m", "-n", "-i", "-u"])
            .args(arguments)
            .status()
            .unwrap();
        assert!(done.success(), "{arguments:?}");
    }

    /// The baseline: at a moment when it sleeps.
    pub(super) fn baseline(&self) -> Baseline {
        baseline(&[self.pid()], no_registers)
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot::take(&[self.pid()], &no_registers).unwrap()
    }

    /// Facts of a sandbox in which nothing was seen.
    pub(super) fn facts(&self) -> KernelFacts {
        facts(&[self.pid()])
    }

    pub(super) fn judge(&self, baseline: &Baseline, facts: &KernelFacts) -> Verdict {
        baseline.verdict(
            &baseline.look(&[self.pid()], &no_registers).unwrap(),
            facts,
            (&no_registers, &no_marks),
            &settings(),
        )
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

pub(super) fn facts(pids: &[i32]) -> KernelFacts {
    KernelFacts {
        did: pids.iter().map(|&pid| (pid, Did::default())).collect(),
        ..KernelFacts::default()
    }
}

/// Python uses more CPU time than a server, and the machine is slow. Without (b), so that the
/// reasons are those of the rule that is tested.
pub(super) fn settings() -> Settings {
    Settings {
        compare_memory: false,
        cpu_floor: Duration::from_secs(2),
        ..Settings::default()
    }
}

pub(super) fn baseline(pids: &[i32], registers: fn(i32) -> Option<u64>) -> Baseline {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Baseline::take(pids, "/nonexistent".as_ref(), &registers) {
            Ok(baseline) => return baseline,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}

pub(super) fn eventually(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// By which rule each process was acquitted.
#[track_caller]
pub(super) fn acquittals(verdict: &Verdict) -> Vec<Acquittal> {
    match verdict {
        Verdict::Unchanged { by } => by.iter().map(|(_, _, rule)| *rule).collect(),
        Verdict::Changed { why } => panic!("changed: {why:?}"),
    }
}

#[track_caller]
pub(super) fn reasons(verdict: &Verdict) -> Vec<What> {
    match verdict {
        Verdict::Changed { why } => {
            assert!(!why.is_empty());
            why.iter().map(|reason| reason.what.clone()).collect()
        }
        Verdict::Unchanged { by } => panic!("acquitted: {by:?}"),
    }
}

/// The number of the descriptor that is blamed.
#[track_caller]
pub(super) fn blamed_descriptor(verdict: &Verdict) -> i32 {
    match reasons(verdict)[..] {
        [What::Descriptor { fd, .. }] => fd,
        ref other => panic!("{other:?}"),
    }
}

/// Bytes through a descriptor that another process has open, by opening it anew.
pub(super) fn write_through(pid: i32, fd: i32, bytes: &[u8]) {
    let path = format!("/proc/{pid}/fd/{fd}");
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
}

/// Takes some of them out again.
pub(super) fn read_through(pid: i32, fd: i32, count: usize) {
    let mut file = fs::File::open(format!("/proc/{pid}/fd/{fd}")).unwrap();
    file.read_exact(&mut vec![0; count]).unwrap();
}
