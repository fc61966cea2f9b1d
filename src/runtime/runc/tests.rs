//! With a runtime that is a script.

use std::os::{fd::OwnedFd, unix::process::ExitStatusExt};

use super::*;

/// Fails for the first FAILS calls, as runc 1.1.15 does that cannot seal its copy.
const RUNC: &str = r#"#!/bin/sh
echo call >>DIR/calls
[ "$(wc -l <DIR/calls)" -gt FAILS ] && exec echo ran
log=$4
echo '{"level":"error","msg":"nsexec-0[7]: could not ensure we are a cloned binary: WHY"}' >>"$log"
echo '{"level":"error","msg":"exec failed: unable to start container process: read init-p: connection reset by peer"}' >>"$log"
exit 1
"#;

struct Directly;

impl Spawner for Directly {
    fn run(&self, mut command: Command, _: Duration) -> io::Result<Ended> {
        let status = command.status()?;
        Ok(match status.code() {
            Some(code) => Ended::Exited(code),
            None => Ended::Signaled(status.signal().unwrap_or_default()),
        })
    }

    fn run_unless(&self, _: Command, _: Duration, _: &dyn Fn() -> bool) -> io::Result<Ended> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// How an exec ends, what it writes to its stdout, and how often runc was called.
fn exec(fails: usize, why: &str) -> (Result<(), RuntimeError>, String, usize) {
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("runc");
    let script = RUNC.replace("DIR", &dir.path().to_string_lossy());
    let script = script.replace("FAILS", &fails.to_string());
    // By another process: a child of another test may hold what this one has open for writing.
    let write = r#"printf %s "$1" >"$2"; chmod 755 "$2""#;
    let mut sh = Command::new("sh");
    sh.args(["-c", write, "sh", &script.replace("WHY", why)]);
    assert!(sh.arg(&binary).status().unwrap().success());
    let runc = Runc {
        binary: binary.to_string_lossy().into_owned(),
        root: dir.path().to_owned(),
        systemd_cgroup: false,
        incremental: false,
        log_dir: dir.path().to_owned(),
        spawner: Arc::new(Directly),
    };
    let out = dir.path().join("out");
    let file = || OwnedFd::from(File::create(&out).unwrap());
    let done = runc.exec(Exec {
        id: "c",
        process: Path::new("/process.json"),
        pid_file: Path::new("/pid"),
        stdio: Stdio::Fds([file(), file(), file()]),
    });
    let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
    let said = fs::read_to_string(&out).unwrap();
    (done, said, calls.lines().count())
}

#[test]
fn a_copy_that_cannot_be_sealed_is_made_again() {
    let (done, said, calls) = exec(2, "Device or resource busy");
    done.unwrap();
    assert_eq!((&*said, calls), ("ran\n", 3));
    let (done, _, calls) = exec(99, "Device or resource busy");
    assert!(done.unwrap_err().is_unsealed_copy());
    assert_eq!(calls, COPIES);
}

#[test]
fn whatever_else_fails_is_not_done_again() {
    let (done, _, calls) = exec(1, "No space left on device");
    let text = done.unwrap_err().to_string();
    assert!(
        text.contains("connection reset") && text.contains("No space"),
        "{text}"
    );
    assert_eq!(calls, 1);
}
