//! Calls of the runtime that a dead shim has left under way.
//!
//! A runtime lives on when the shim that has called it is killed, and would write down and start
//! what somebody else is just cleaning up. So does CRIU, its child: the one that dumps freezes the
//! sandbox again when its processes die under it.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The variable that marks the children of a call.
const MARK: &str = "CRAB_RUNTIME_CALL";
/// How long a killed call may take to be gone.
const LIMIT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(2);

/// Marks a call's children, which have its environment, as those of a call about `id`.
pub(super) fn mark(command: &mut Command, root: &Path, id: &str) {
    command.env(MARK, root.join(id));
}

/// Kills every call about a container, and returns when they are gone. They are known by their
/// command lines, of which both `root` and `id` are words, and their children by their [`mark`]. A
/// process in a sandbox that marks itself so is killed if it can be seen from here: its own loss.
pub(super) fn end(root: &Path, id: &str) -> io::Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let calls = find(root, id)?;
        for pid in &calls {
            match kill(Pid::from_raw(*pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(e) => return Err(e.into()),
            }
        }
        if calls.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            let text = format!("a killed call of the runtime (pid {calls:?}) is not gone");
            return Err(io::Error::other(text));
        }
        thread::sleep(PAUSE);
    }
}

fn find(root: &Path, id: &str) -> io::Result<Vec<i32>> {
    let is_call = |cmdline: &[u8]| {
        let mut words = cmdline.split(|byte| *byte == 0);
        let follows = words.any(|word| word == b"--root");
        follows
            && words.next() == Some(root.as_os_str().as_bytes())
            && words.any(|word| word == id.as_bytes())
    };
    let mut found = Vec::new();
    let marked = [MARK.as_bytes(), b"=", root.join(id).as_os_str().as_bytes()].concat();
    let is_marked = |environ: &[u8]| environ.split(|byte| *byte == 0).any(|word| word == marked);
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that has ended has none: it need not be reaped to be gone.
        let read = |file| fs::read(entry.path().join(file)).unwrap_or_default();
        if is_call(&read("cmdline")) || is_marked(&read("environ")) {
            found.push(pid);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_call_about_one_container_is_ended_and_no_other() {
        let root = tempfile::tempdir().unwrap();
        let call = |id: &str| {
            let script = "read line";
            let mut command = Command::new("sh");
            command.args(["-c", script, "--root"]).arg(root.path());
            command.args(["restore", id]).stdin(Stdio::piped());
            command.spawn().unwrap()
        };
        let (mut one, mut other) = (call("c1"), call("c12"));
        let started = |pid: u32, id: &str| {
            let end = Instant::now() + Duration::from_secs(20);
            while !find(root.path(), id).unwrap().contains(&(pid as i32)) {
                assert!(Instant::now() < end, "it does not start");
                thread::yield_now();
            }
        };
        started(one.id(), "c1");
        started(other.id(), "c12");
        end(root.path(), "c1").unwrap();
        assert!(!one.wait().unwrap().success());
        assert_eq!(find(root.path(), "c12").unwrap(), [other.id() as i32]);
        drop(other.stdin.take());
        other.wait().unwrap();
    }

    #[test]
    fn a_calls_child_that_outlives_it_is_ended_and_no_others() {
        let root = tempfile::tempdir().unwrap();
        let child = |id: &str| {
            let mut command = Command::new("sh");
            mark(&mut command, root.path(), id);
            command.args(["-c", "read line"]).stdin(Stdio::piped());
            command.spawn().unwrap()
        };
        // spawn() returns when the program has been executed.
        let (mut one, mut other) = (child("c1"), child("c12"));
        assert_eq!(find(root.path(), "c1").unwrap(), [one.id() as i32]);
        end(root.path(), "c1").unwrap();
        assert!(!one.wait().unwrap().success());
        assert_eq!(find(root.path(), "c12").unwrap(), [other.id() as i32]);
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}
