//! runc's and crun's command line.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use super::{
    Checkpoint, Create, Ended, Exec, OciRuntime, Restore, RuntimeError, Spawner, Stdio, calls,
    criu_version, empty_tar,
    log_file::LogFile,
    prepare::{die_with_parent, inherit, neutral_oom_score, without_huge_pages},
};

/// What any other call than a dump may take. A hung runtime must not hang the shim for ever.
const LIMIT: Duration = Duration::from_secs(120);
/// So often runc may fail to seal its copy of itself.
const COPIES: usize = 5;
/// See [`Runc::detach`].
const CRIU_ROOT: &str = "criu-root";
/// As much of stderr as goes into an error.
const MAX_STDERR: u64 = 16 * 1024;

/// The real runtime.
pub struct Runc {
    /// Name on PATH, or absolute path.
    pub binary: String,
    /// `--root`: where the runtime keeps its state.
    pub root: PathBuf,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
    /// Where its logs go for the time of a call.
    pub log_dir: PathBuf,
    /// Dumps build on each other, and what it starts has no transparent huge pages.
    pub incremental: bool,
    /// Who starts processes.
    pub spawner: Arc<dyn Spawner>,
}

impl Runc {
    fn is_crun(&self) -> bool {
        is_crun(Path::new(&self.binary))
    }

    /// For the time of a restore runc binds the root file system to a directory within its own state.
    /// If it was killed then, whoever removes that state, as runc itself does without a look, would
    /// remove the sandbox's files.
    fn detach(&self, id: &str) -> Result<(), RuntimeError> {
        let path = self.root.join(id).join(CRIU_ROOT);
        match umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
            Err(e) => Err(RuntimeError::File {
                what: "cannot unmount what a restore has left at",
                path,
                source: e.into(),
            }),
        }
    }

    fn command(&self, log: &LogFile, verb: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root);
        command.arg("--log").arg(log.path());
        command.args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.arg(verb);
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::null());
        // What cleans up goes on.
        if !matches!(verb, "kill" | "delete") {
            die_with_parent(&mut command);
        }
        if self.incremental && matches!(verb, "create" | "exec" | "restore") {
            without_huge_pages(&mut command);
        }
        command
    }

    fn error(&self, verb: &'static str, source: io::Error) -> RuntimeError {
        RuntimeError::Spawn {
            runtime: self.binary.clone(),
            verb,
            source,
        }
    }

    /// Has CRIU's version answered for below a HOME of CRIU.
    fn answer_for_criu(&self, home: &Path) -> Result<(), RuntimeError> {
        criu_version::install(home, &*self.spawner).map_err(|source| RuntimeError::File {
            what: "cannot write what CRIU answers to",
            path: home.to_owned(),
            source,
        })
    }

    /// Runs one verb; `prepare` adds its arguments.
    ///
    /// stderr goes to a file when `stdio` doesn't take it: a pipe would have to be read while the
    /// runtime runs, and detached children may hold it open for ever.
    fn run(
        &self,
        verb: &'static str,
        limit: Duration,
        stdio: Option<Stdio>,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<(), RuntimeError> {
        self.run_by(verb, stdio, prepare, |command| {
            self.spawner.run(command, limit)
        })
    }

    /// As [`Runc::run`], for what enters a container: runc does that in a copy of itself, and if it
    /// cannot seal that, it is asked again.
    fn enter(
        &self,
        verb: &'static str,
        stdio: &Stdio,
        prepare: impl Fn(&mut Command),
    ) -> Result<(), RuntimeError> {
        let mut tries = 1..=COPIES;
        loop {
            let stdio = stdio.try_clone().map_err(|e| self.error(verb, e))?;
            let done = self.run(verb, LIMIT, Some(stdio), &prepare);
            let is_last = tries.next() == Some(COPIES);
            match done {
                Err(e) if e.is_unsealed_copy() && !is_last => log::info!("{e}; once more"),
                done => return done,
            }
        }
    }

    fn run_by(
        &self,
        verb: &'static str,
        stdio: Option<Stdio>,
        prepare: impl FnOnce(&mut Command),
        spawn: impl FnOnce(Command) -> io::Result<Ended>,
    ) -> Result<(), RuntimeError> {
        let log = LogFile::new(&self.log_dir, verb).map_err(|e| RuntimeError::File {
            what: "cannot make a log file in",
            path: self.log_dir.clone(),
            source: e,
        })?;
        let mut command = self.command(&log, verb);
        let mut stderr = tempfile::tempfile_in(&self.log_dir).map_err(|e| self.error(verb, e))?;
        command.stderr(stderr.try_clone().map_err(|e| self.error(verb, e))?);
        match stdio {
            Some(Stdio::Fds([stdin, stdout, err])) => {
                command.stdin(stdin).stdout(stdout).stderr(err);
            }
            Some(Stdio::Console(socket)) => {
                command.arg("--console-socket").arg(socket);
            }
            None => {}
        }
        prepare(&mut command);
        let full = match spawn(command) {
            Ok(Ended::Exited(0)) => return Ok(()),
            Ok(Ended::Exited(code)) => match log.errors() {
                Some(message) => message,
                None => format!("exit status {code}: {}", tail(&mut stderr)),
            },
            Ok(Ended::Signaled(signal)) => format!(
                "killed by signal {signal}: {}",
                log.errors().unwrap_or_else(|| tail(&mut stderr))
            ),
            Err(e) => return Err(self.error(verb, e)),
        };
        // runc begins many of its messages in the same way as ours do.
        let message = full.strip_prefix(&format!("runc {verb} failed: "));
        Err(RuntimeError::Refused {
            runtime: self.binary.clone(),
            verb,
            message: message.unwrap_or(&full).to_owned(),
        })
    }
}

/// Whether a binary is crun, going by its name: it knows fewer flags.
pub fn is_crun(binary: &Path) -> bool {
    let name = binary.file_name();
    name.is_some_and(|name| name.to_string_lossy().starts_with("crun"))
}

/// The end of what a command wrote to stderr.
fn tail(file: &mut File) -> String {
    let mut text = Vec::new();
    let read = file
        .metadata()
        .and_then(|m| file.seek(io::SeekFrom::Start(m.len().saturating_sub(MAX_STDERR))))
        .and_then(|_| file.take(MAX_STDERR).read_to_end(&mut text));
    match read {
        Ok(0) => "it said nothing".into(),
        Ok(_) => String::from_utf8_lossy(&text).trim().to_owned(),
        Err(e) => format!("its stderr cannot be read: {e}"),
    }
}

fn flag(command: &mut Command, on: bool, name: &str) {
    if on {
        command.arg(name);
    }
}

fn option(command: &mut Command, name: &str, value: impl AsRef<OsStr>) {
    command.arg(name).arg(value);
}

impl OciRuntime for Runc {
    fn create(&self, args: Create<'_>) -> Result<(), RuntimeError> {
        self.enter("create", &args.stdio, |c| {
            option(c, "--bundle", args.bundle);
            option(c, "--pid-file", args.pid_file);
            flag(c, args.no_pivot_root, "--no-pivot");
            flag(c, args.no_new_keyring, "--no-new-keyring");
            c.arg(args.id);
        })
    }

    fn start(&self, id: &str) -> Result<(), RuntimeError> {
        self.run("start", LIMIT, None, |c| {
            c.arg(id);
        })
    }

    fn exec(&self, args: Exec<'_>) -> Result<(), RuntimeError> {
        self.enter("exec", &args.stdio, |c| {
            option(c, "--process", args.process);
            option(c, "--pid-file", args.pid_file);
            c.args(["--detach", args.id]);
        })
    }

    fn kill_all(&self, id: &str, signal: i32) -> Result<(), RuntimeError> {
        self.run("kill", LIMIT, None, |c| {
            c.args(["--all", id, &signal.to_string()]);
        })
    }

    fn delete(&self, id: &str, force: bool) -> Result<(), RuntimeError> {
        self.detach(id)?;
        let done = self.run("delete", LIMIT, None, |c| {
            flag(c, force, "--force");
            c.arg(id);
        });
        match done {
            // runc itself forgets a container that a checkpoint has stopped.
            Err(e) if e.is_unknown_container() => Ok(()),
            done => done,
        }
    }

    /// `delete` would also remove the cgroup, and with it the sandbox's statistics and the number by
    /// which the inspector knows it. Both runc and crun keep all that they know of a container in
    /// one directory, and are asked about it no more.
    fn forget(&self, id: &str) -> Result<(), RuntimeError> {
        self.detach(id)?;
        let dir = self.root.join(id);
        match fs::remove_dir_all(&dir) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RuntimeError::File {
                what: "cannot remove the runtime's state in",
                path: dir,
                source,
            }),
            _ => Ok(()),
        }
    }

    fn end_calls(&self, id: &str) -> Result<(), RuntimeError> {
        calls::end(&self.root, id).map_err(|source| RuntimeError::File {
            what: "cannot end calls of the runtime with --root",
            path: self.root.clone(),
            source,
        })
    }

    fn checkpoint(
        &self,
        id: &str,
        args: &Checkpoint,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), RuntimeError> {
        if let Some(home) = &args.home {
            self.answer_for_criu(home)?;
        }
        let spawn = |command| self.spawner.run_unless(command, args.limit, stop);
        let prepare = |c: &mut Command| {
            option(c, "--image-path", &args.image_path);
            option(c, "--work-path", &args.work_path);
            flag(c, args.pre_dump, "--pre-dump");
            if let Some(parent) = &args.parent_path {
                option(c, "--parent-path", parent);
            }
            flag(c, args.leave_running, "--leave-running");
            flag(c, args.tcp_established, "--tcp-established");
            flag(c, args.external_unix_sockets, "--ext-unix-sk");
            flag(c, args.shell_job, "--shell-job");
            flag(c, args.file_locks, "--file-locks");
            for namespace in &args.empty_namespaces {
                option(c, "--empty-ns", namespace);
            }
            if let Some(mode) = &args.cgroups_mode {
                option(c, "--manage-cgroups-mode", mode);
            }
            if let Some(home) = &args.home {
                find_below(c, home);
            }
            calls::mark(c, &self.root, id);
            c.arg(id);
        };
        self.run_by("checkpoint", None, prepare, spawn)
    }

    fn restore(&self, args: Restore<'_>) -> Result<(), RuntimeError> {
        if let Some(home) = &args.home {
            self.answer_for_criu(home)?;
        }
        self.run("restore", LIMIT, Some(args.stdio), |c| {
            option(c, "--bundle", args.bundle);
            option(c, "--image-path", args.image_path);
            option(c, "--work-path", args.work_path);
            option(c, "--pid-file", args.pid_file);
            c.arg("--detach");
            if !self.is_crun() {
                // crun has neither: nobody is made a subreaper, and it always pivots.
                c.arg("--no-subreaper");
                flag(c, args.no_pivot_root, "--no-pivot");
            }
            flag(c, args.tcp_established, "--tcp-established");
            flag(c, args.shell_job, "--shell-job");
            flag(c, args.file_locks, "--file-locks");
            if let Some(home) = &args.home {
                find_below(c, home);
            }
            inherit(c, args.extra_fds);
            neutral_oom_score(c);
            calls::mark(c, &self.root, args.id);
            c.arg(args.id);
        })
    }

    fn update(&self, id: &str, resources: &[u8]) -> Result<(), RuntimeError> {
        let mut file = tempfile::Builder::new()
            .prefix(".resources-")
            .tempfile_in(&self.log_dir)
            .map_err(|e| self.error("update", e))?;
        file.write_all(resources)
            .map_err(|e| self.error("update", e))?;
        self.run("update", LIMIT, None, |c| {
            option(c, "--resources", file.path());
            c.arg(id);
        })
    }

    fn is_incremental(&self) -> bool {
        self.incremental
    }
}

/// Has a runtime find CRIU's options, and what we have put before CRIU and tar, below a HOME of CRIU.
fn find_below(command: &mut Command, home: &Path) {
    command.env("HOME", home);
    command.envs(empty_tar::path(home).map(|path| ("PATH", path)));
}

/// Reads the pid that a runtime has written.
///
/// # Errors
/// When the file is missing or holds no positive number.
pub fn read_pid(path: &Path) -> Result<i32, RuntimeError> {
    let wrong = |source| RuntimeError::File {
        what: "cannot read the pid file",
        path: path.to_owned(),
        source,
    };
    let text = fs::read_to_string(path).map_err(wrong)?;
    match text.trim().parse() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(wrong(io::Error::other(format!("{text:?} is no pid")))),
    }
}

#[cfg(test)]
mod tests;
