//! How processes start: init, execs, and both from images.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use containerd_shim::protos::{
    api::ExecProcessRequest,
    events::task::{TaskExecAdded, TaskExecStarted, TaskOOM, TaskStart},
};
use serde_json::{Map, Value};
use time::OffsetDateTime;

use super::{
    artefacts,
    container::{Container, Place},
    create::Remains,
    error::{Context, Kind, Result, ShimError},
    events::TaskEvent,
    io::{ConsoleSocket, IoContext, ProcessIo, StdioConfig},
    process::Process,
    reaper::{Exit, Watch, lists_children},
    restore::{self, Source},
    state::{Phase, Request},
};
use crate::{
    config::OrphanOutput,
    coordinator::freeze::Freeze,
    runtime::{self, Stdio, runc},
    sandbox,
};

/// How long the runtime may take to send a terminal's master.
const CONSOLE_LIMIT: Duration = Duration::from_secs(30);
/// What containerd is told of a process that could not be started.
const NOT_STARTED: u32 = 255;

/// Opens the client's side of a process's stdio and makes the process's pipes.
pub fn open_io(container: &Container, process: &Process) -> Result<Arc<ProcessIo>> {
    let reaper = Arc::clone(container.host.reaper());
    let spawner = move |command| reaper.spawn_detached(command);
    let id = match process.exec_id.as_str() {
        "" => container.sandbox.id(),
        exec_id => exec_id,
    };
    let orphan = match container.config.orphan_output {
        OrphanOutput::Log if !process.exec_id.is_empty() => {
            container.init.io().and_then(|io| io.orphan_sink())
        }
        _ => None,
    };
    let context = IoContext {
        namespace: container.sandbox.namespace(),
        container_id: id,
        uid: container.config.io_uid,
        gid: container.config.io_gid,
        spawner: &spawner,
        orphan,
    };
    let io = ProcessIo::open(container.host.pump(), &process.stdio, &context)
        .context(&container.sandbox)?;
    if process.exec_id.is_empty() && container.recovers() {
        io.hold();
    }
    Ok(Arc::new(io))
}

/// The ends that the runtime gets, and the socket to wait at if it is a terminal.
pub fn runtime_stdio(
    container: &Container,
    io: &ProcessIo,
) -> Result<(Stdio, Option<ConsoleSocket>)> {
    let wrong = format_args!("{}: stdio", container.sandbox);
    if io.is_terminal() {
        let socket = ConsoleSocket::new_in(container.run_dir.path()).context(wrong)?;
        return Ok((Stdio::Console(socket.path().to_owned()), Some(socket)));
    }
    let fds = io.take_child_fds().ok_or_else(|| {
        ShimError::new(
            Kind::Failed,
            format!("{wrong}: used up by an earlier start"),
        )
    })?;
    Ok((Stdio::Fds(fds), None))
}

/// Lets the bytes flow.
pub fn attach(container: &Container, io: &ProcessIo, socket: Option<ConsoleSocket>) -> Result<()> {
    let wrong = format_args!("{}: stdio", container.sandbox);
    match socket {
        Some(socket) => {
            let master = socket.receive(CONSOLE_LIMIT).context(wrong)?;
            io.attach_console(master).context(wrong)
        }
        None => io.start().context(wrong),
    }
}

/// Create, up to the point where init waits for Start.
///
/// Where it boots on the files of a checkpoint, what is kept beside them comes back, too.
pub fn create_init(container: &Arc<Container>) -> Result<()> {
    let source = container.source.as_ref();
    let saved = source.and_then(Source::bundle);
    let created = match &saved {
        Some(saved) => artefacts::put_files_back(container, saved),
        None => Ok(()),
    }
    .and_then(|()| boot(container))
    .and_then(|()| match &saved {
        Some(saved) => {
            artefacts::put_limits_back(container, saved).inspect_err(|_| discard(container))
        }
        None => Ok(()),
    });
    created.map_err(|e| match source {
        Some(source) => source.way_out(e),
        None => e,
    })
}

fn boot(container: &Arc<Container>) -> Result<()> {
    let io = open_io(container, &container.init)?;
    let (stdio, socket) = runtime_stdio(container, &io)?;
    let pid_file = container.bundle.join("init.pid");
    let watch = container.host.reaper().watch();
    container
        .runtime
        .create(runtime::Create {
            id: container.sandbox.id(),
            bundle: &container.bundle,
            pid_file: &pid_file,
            stdio,
            no_pivot_root: container.config.no_pivot_root,
            no_new_keyring: container.config.no_new_keyring,
        })
        // A runtime that died half-way may have left a container behind.
        .inspect_err(|_| discard(container))
        .context(&container.sandbox)?;
    let begun = attach(container, &io, socket).and_then(|()| {
        container.init.set_io(io);
        adopt_init(container, &pid_file, watch)
    });
    begun.inspect_err(|_| discard(container))
}

/// Removes whatever the runtime knows of a container that did not come to be.
pub fn discard(container: &Container) {
    if let Err(e) = container.runtime.delete(container.sandbox.id(), true) {
        log::warn!("{}: {e}", container.sandbox);
    }
}

/// init has a pid: from now on its end is noticed, and it has a cgroup.
pub fn adopt_init(container: &Arc<Container>, pid_file: &Path, watch: Watch) -> Result<()> {
    let pid = runc::read_pid(pid_file).context(&container.sandbox)?;
    let target = container.host.target(pid).ok();
    container.init.has_pid(pid, target);
    match container.host.cgroup(pid) {
        Ok(cgroup) => {
            // Whoever cleans up after this shim must find it, whatever the runtime then knows.
            Remains::add_cgroup(&container.run_dir, cgroup.directories())
                .context(format_args!("{}: note its cgroup", container.sandbox))?;
            let events = Arc::clone(&container.events);
            let id = container.sandbox.id().to_owned();
            let oom = cgroup.watch_oom(Box::new(move || {
                events.send(TaskEvent::Oom(TaskOOM {
                    container_id: id.clone(),
                    ..Default::default()
                }));
            }));
            let freezable = Arc::clone(&cgroup).freezable();
            let mut place = container.place.write();
            let freeze = match &*place {
                Some(former) => Freeze::succeed(&former.freeze, freezable),
                None => Freeze::new(freezable),
            };
            *place = Some(Arc::new(Place {
                cgroup,
                freeze,
                oom,
            }));
        }
        // An init that is gone already has no cgroup; its exit follows.
        Err(e) if e.is_gone() => {}
        Err(e) => return Err(e).context(&container.sandbox),
    }
    let this = Arc::clone(container);
    let exited = move |exit| {
        let reaper = Arc::clone(this.host.reaper());
        reaper.follow(move || this.init_exited(exit));
    };
    // One that may come back keeps the pid that the client was told.
    let lingers = container.recovers() && pid == container.init.pid() && lists_children();
    match lingers {
        true => watch.claim_lingering(pid, exited),
        false => watch.claim(pid, exited),
    }
    Ok(())
}

/// Start of init.
pub fn start_init(container: &Arc<Container>) -> Result<i32> {
    let _alone = container.alone(Request::Start)?;
    let _starting = Starting::new(container);
    let writer = container.writer().map_err(|e| {
        // A kill that came while it waited.
        container.kill_restored();
        match &container.source {
            Some(source) => source.way_out(e),
            None => e,
        }
    })?;
    match container.source.as_ref().filter(|source| !source.boots()) {
        None => container
            .runtime
            .start(container.sandbox.id())
            .context(&container.sandbox)?,
        Some(source) => {
            let restored = restore::restore(container, source);
            container.kill_restored();
            restored.map_err(|e| source.way_out(e))?;
        }
    }
    container.disarm(writer.as_ref());
    let pid = container.init.pid();
    let event = TaskEvent::Start(TaskStart {
        container_id: container.sandbox.id().to_owned(),
        pid: pid as u32,
        ..Default::default()
    });
    container.enter_phase(Phase::Running, event);
    container.protect(writer);
    Ok(pid)
}

/// Holds back the report of init's end until its start has been told.
struct Starting<'a>(&'a Container);

impl<'a> Starting<'a> {
    fn new(container: &'a Container) -> Self {
        container.inner.lock().starting = true;
        Self(container)
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.init_told();
    }
}

/// Exec: remembers a process to start.
pub fn add_exec(container: &Container, request: &ExecProcessRequest) -> Result<()> {
    let exec_id = sandbox::check("exec id", &request.exec_id)?;
    let spec = request.spec.as_ref().map_or(&[][..], |s| &s.value);
    let invalid = |e: serde_json::Error| {
        let text = format!("{}: exec {exec_id}: process: {e}", container.sandbox);
        ShimError::new(Kind::InvalidArgument, text)
    };
    let mut spec: Map<String, Value> = serde_json::from_slice(spec).map_err(invalid)?;
    spec.insert("terminal".to_owned(), Value::Bool(request.terminal));
    let stdio = StdioConfig {
        terminal: request.terminal,
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
    };
    let spec = serde_json::to_vec(&spec).map_err(invalid)?;
    let process = Process::new(&exec_id, stdio, spec);
    {
        let mut inner = container.inner.lock();
        inner.phase.allows(Request::Exec)?;
        if inner.execs.contains_key(&exec_id) {
            let text = format!("exec {exec_id} in {} exists already", container.sandbox);
            return Err(ShimError::new(Kind::AlreadyExists, text));
        }
        inner.execs.insert(exec_id.clone(), process);
        // Before the lock is gone: nobody can start it before it was told.
        container.events.send(TaskEvent::ExecAdded(TaskExecAdded {
            container_id: container.sandbox.id().to_owned(),
            exec_id,
            ..Default::default()
        }));
    }
    Ok(())
}

/// Start of an exec.
pub fn start_exec(container: &Arc<Container>, exec_id: &str) -> Result<i32> {
    let process = container.process(exec_id)?;
    process.begin()?;
    let entering = container.doors.enter(exec_id, is_turn(container, &process));
    {
        let mut inner = container.inner.lock();
        let ready = match inner.phase.allows(Request::Exec) {
            Ok(()) if inner.init_gone => Err(ShimError::new(
                Kind::FailedPrecondition,
                format!("{}: init has ended", container.sandbox),
            )),
            ready => ready.map_err(Into::into),
        };
        if let Err(e) = ready {
            drop(inner);
            process.not_begun();
            if entering.failed() {
                container.turn_ended();
            }
            return Err(e);
        }
        inner.running_execs += 1;
    }
    match run_exec(container, &process) {
        Ok((pid, watch)) => {
            if entering.started() {
                container.turn_ended();
            }
            container
                .events
                .send(TaskEvent::ExecStarted(TaskExecStarted {
                    container_id: container.sandbox.id().to_owned(),
                    exec_id: exec_id.to_owned(),
                    pid: pid as u32,
                    ..Default::default()
                }));
            // Only now: its exit must be told after its start.
            let this = Arc::clone(container);
            watch.claim(pid, move |exit| {
                let reaper = Arc::clone(this.host.reaper());
                reaper.follow(move || this.exec_exited(&process, exit));
            });
            Ok(pid)
        }
        Err(e) => {
            if let Some(io) = process.take_io() {
                io.finish(Duration::ZERO);
            }
            process.ended(Exit {
                pid: 0,
                status: NOT_STARTED,
                at: OffsetDateTime::now_utc(),
            });
            if entering.failed() {
                container.turn_ended();
            }
            container.exec_is_over();
            Err(e)
        }
    }
}

/// Whether this exec counts as a turn (D3).
fn is_turn(container: &Container, process: &Process) -> bool {
    let args: Vec<String> = serde_json::from_slice::<Value>(&process.spec)
        .ok()
        .and_then(|spec| serde_json::from_value(spec["args"].clone()).ok())
        .unwrap_or_default();
    container.health_check.as_ref() != Some(&args) && container.config.is_turn(&args)
}

/// A runtime may die after it has started the process: nobody would ever see or end that.
fn end_half_started(container: &Container, pid_file: &Path) {
    let Ok(pid) = runc::read_pid(pid_file) else {
        return;
    };
    if let Ok(target) = container.host.target(pid)
        && target.signal(libc::SIGKILL).is_ok()
    {
        log::warn!(
            "{}: ended process {pid} of a failed exec",
            container.sandbox
        );
    }
}

fn run_exec(container: &Arc<Container>, process: &Arc<Process>) -> Result<(i32, Watch)> {
    let step = format_args!("{}: exec {}", container.sandbox, process.exec_id).to_string();
    let io = open_io(container, process)?;
    process.set_io(Arc::clone(&io));
    let (stdio, socket) = runtime_stdio(container, &io)?;
    let pid_file = container
        .run_dir
        .path()
        .join(format!("{}.pid", process.exec_id));
    let spec_file = container
        .run_dir
        .path()
        .join(format!("{}.json", process.exec_id));
    fs::write(&spec_file, &process.spec).context(&step)?;
    let watch = container.host.reaper().watch();
    let done = container.runtime.exec(runtime::Exec {
        id: container.sandbox.id(),
        process: &spec_file,
        pid_file: &pid_file,
        stdio,
    });
    if done.is_err() {
        end_half_started(container, &pid_file);
    }
    let pid = done.and_then(|()| runc::read_pid(&pid_file));
    for file in [&spec_file, &pid_file] {
        match fs::remove_file(file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                log::warn!("{step}: cannot remove {file:?}: {e}");
            }
            _ => {}
        }
    }
    let pid = pid.context(&step)?;
    process.has_pid(pid, container.host.target(pid).ok());
    if let Err(e) = attach(container, &io, socket) {
        // Nobody would ever see or end it.
        let _ = process.signal(libc::SIGKILL);
        return Err(e);
    }
    Ok((pid, watch))
}
