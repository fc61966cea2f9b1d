//! The stdio of one process, as the task service sees it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    IoContext, IoError, Pump, SinkHandle, StdioConfig, StdioPipe, Stream, binary,
    buffer::BOUND,
    console::WindowSize,
    core::Core,
    flow::{Flow, FlowId, QUIET, Role},
    pipes,
    sink::{Sink, SinkId},
    target::{self, Target},
};

/// The stdio of one process: init or an exec. All methods may be called from any thread.
///
/// Dropping it is `finish` without any patience; streams of background processes live on.
pub struct ProcessIo {
    pump: Arc<Pump>,
    terminal: bool,
    owner: (u32, u32),
    orphan: Option<SinkId>,
    /// The client's targets of stdout and stderr, in this order.
    sinks: [Option<SinkId>; 2],
    logger: Option<u32>,
    state: Mutex<State>,
}

/// Locked before the pump's core, never after.
#[derive(Default)]
struct State {
    stdin: Option<FlowId>,
    outputs: [Option<FlowId>; 2],
    child: Option<[OwnedFd; 3]>,
    size: Option<WindowSize>,
    finished: bool,
}

impl State {
    fn flows(&self) -> impl Iterator<Item = FlowId> + use<> {
        let [stdout, stderr] = self.outputs;
        [self.stdin, stdout, stderr].into_iter().flatten()
    }
}

impl ProcessIo {
    /// Opens the client's side, starts its logger if it wants one, and makes the process's pipes.
    ///
    /// Nothing moves before [`Self::start`] (or [`Self::attach_console`]).
    pub fn open(
        pump: &Arc<Pump>,
        config: &StdioConfig,
        context: &IoContext<'_>,
    ) -> Result<Self, IoError> {
        let input = target::open_input(&config.stdin)?;
        let targets = targets(config)?;
        let opened = open_sinks(&targets, context)?;

        let mut process = Self::new(pump, context, config.terminal);
        process.logger = opened.logger;
        let mut core = pump.lock();
        let shared = targets[0] == targets[1] && opened.second.is_none();
        let first = opened.first.map(|sink| core.add_sink(sink));
        let second = opened.second.map(|sink| core.add_sink(sink));
        process.sinks = [first, if shared { first } else { second }];
        let state = process.state.get_mut();
        let mut flow = Flow::new(Role::Input, None);
        flow.ended = input.is_none();
        if let Some(input) = input {
            flow.source = Some(input.reader);
            flow.keepalive = Some(input.keepalive);
        }
        state.stdin = Some(core.add_flow(flow));
        let roles: &[Role] = match config.terminal {
            true => &[Role::Console],
            false => &[Role::Output, Role::Output],
        };
        for (i, role) in roles.iter().enumerate() {
            let mut flow = Flow::new(*role, None);
            flow.orphan = process.orphan;
            let id = core.add_flow(flow);
            state.outputs[i] = Some(id);
            if let Some(sink) = process.sinks[i] {
                core.own(id, sink);
            }
        }
        drop(core);
        if !config.terminal {
            process.replace_pipes()?;
        }
        Ok(process)
    }

    /// For a restored background process whose client is long gone: three pipes, output to the
    /// orphan sink, a stdin that stays open until nobody could read it.
    pub fn open_orphan(pump: &Arc<Pump>, context: &IoContext<'_>) -> Result<Self, IoError> {
        let process = Self::new(pump, context, false);
        process.state.lock().finished = true;
        process.replace_pipes()?;
        Ok(process)
    }

    fn new(pump: &Arc<Pump>, context: &IoContext<'_>, terminal: bool) -> Self {
        Self {
            pump: pump.clone(),
            terminal,
            owner: (context.uid, context.gid),
            orphan: context.orphan.as_ref().map(|handle| handle.0),
            sinks: [None, None],
            logger: None,
            state: Mutex::default(),
        }
    }

    /// New pipes behind the same client's side, for a rollback in place: the client notices
    /// nothing. What was read from the old pipes is still delivered.
    ///
    /// Call it before the old processes are killed, so that their end is not taken for the
    /// stream's; then [`Self::take_child_fds`], restore, [`Self::start`]. Nothing moves in
    /// between. Streams that had ended already come back as those of a background process. No
    /// effect with a terminal.
    pub fn replace_pipes(&self) -> Result<(), IoError> {
        if self.terminal {
            return Ok(());
        }
        let mut pairs = Vec::with_capacity(3);
        for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
            let (ours, theirs) = self.make_pipe(stream).map_err(IoError::system("pipe"))?;
            pairs.push((ours, theirs));
        }
        let mut state = self.state.lock();
        let mut core = self.pump.lock();
        let mut child = Vec::with_capacity(3);
        for (i, (ours, theirs)) in pairs.into_iter().enumerate() {
            match i.checked_sub(1) {
                None => self.renew_stdin(&mut state, &mut core, ours),
                Some(output) => self.renew_output(&mut state.outputs[output], &mut core, ours),
            }
            child.push(theirs);
        }
        state.child = child.try_into().ok();
        Ok(())
    }

    fn make_pipe(&self, stream: Stream) -> io::Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = pipes::pipe()?;
        let (ours, theirs) = match stream {
            Stream::Stdin => (writer, reader),
            _ => (reader, writer),
        };
        pipes::set_nonblocking(ours.as_fd())?;
        pipes::give_to(theirs.as_fd(), self.owner.0, self.owner.1)?;
        Ok((ours, theirs))
    }

    fn renew_stdin(&self, state: &mut State, core: &mut Core, pipe: OwnedFd) {
        let alive = state.stdin.filter(|id| core.flows.contains_key(id));
        let id = alive.unwrap_or_else(|| {
            let mut flow = Flow::new(Role::Input, None);
            // After Delete nobody knows whether more would have come; before, it had ended.
            flow.ended = !state.finished;
            core.add_flow(flow)
        });
        core.replace_stdin(id, pipe);
        if let Some(flow) = core.flows.get_mut(&id) {
            flow.active = false;
        }
        state.stdin = Some(id);
    }

    fn renew_output(&self, slot: &mut Option<FlowId>, core: &mut Core, pipe: OwnedFd) {
        let alive = slot.filter(|id| core.flows.contains_key(id));
        let id = alive.unwrap_or_else(|| {
            let mut flow = Flow::new(Role::Output, None);
            flow.orphan = self.orphan;
            let id = core.add_flow(flow);
            core.borrow(id);
            id
        });
        if let Some(flow) = core.flows.get_mut(&id) {
            flow.source = Some(pipe);
            flow.registered = false;
            flow.readable = false;
            flow.ended = false;
            flow.exited = None;
            flow.active = false;
        }
        *slot = Some(id);
    }

    /// The process's ends of stdin, stdout and stderr, close-on-exec, for whoever spawns it. They
    /// are given once per pipe, and not with a terminal.
    pub fn take_child_fds(&self) -> Option<[OwnedFd; 3]> {
        self.state.lock().child.take()
    }

    /// Bytes begin to move. Call it after the spawn, when the shim's copies of the process's ends
    /// are closed. With a terminal it has no effect.
    pub fn start(&self) -> Result<(), IoError> {
        let mut state = self.state.lock();
        // Never taken: never spawned. The streams end at once.
        state.child = None;
        if self.terminal {
            return Ok(());
        }
        self.activate(&state, &mut self.pump.lock())
    }

    fn activate(&self, state: &State, core: &mut Core) -> Result<(), IoError> {
        for flow in state.flows() {
            (self.pump.activate(core, flow)).map_err(IoError::system("epoll"))?;
        }
        self.pump.wake();
        Ok(())
    }

    /// Terminal: bytes begin to move between the master and the client.
    pub fn attach_console(&self, master: OwnedFd) -> Result<(), IoError> {
        let prepare = || {
            pipes::set_nonblocking(master.as_fd())?;
            master.try_clone()
        };
        let writer = prepare().map_err(IoError::system("terminal"))?;
        let state = self.state.lock();
        if let Some(size) = state.size
            && let Err(error) = size.apply(master.as_fd())
        {
            log::warn!("terminal size: {error}");
        }
        let mut core = self.pump.lock();
        let [Some(output), _] = state.outputs else {
            return Ok(());
        };
        if let Some(flow) = core.flows.get_mut(&output) {
            flow.source = Some(master);
        }
        // A terminal without input is not one whose input has ended.
        match state.stdin {
            Some(input) if core.flows.get(&input).is_some_and(|flow| !flow.ended) => {
                let sink = core.add_sink(Sink::console(writer, output));
                core.own(input, sink);
            }
            Some(input) => core.close_flow(input),
            None => {}
        }
        self.activate(&state, &mut core)
    }

    /// CloseIO: end of file for the process as soon as the client has closed its end too. With a
    /// terminal this hangs it up, as Go's shim does.
    pub fn close_stdin(&self) {
        let state = self.state.lock();
        let mut core = self.pump.lock();
        if let Some(flow) = state.stdin.and_then(|id| core.flows.get_mut(&id)) {
            flow.keepalive = None;
        }
    }

    /// Sets a terminal's size in characters, now or once its master is attached. Without a
    /// terminal it has no effect.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        let size = WindowSize { width, height };
        let mut state = self.state.lock();
        state.size = Some(size);
        let core = self.pump.lock();
        let master = state.outputs[0]
            .and_then(|id| core.flows.get(&id))
            .filter(|flow| flow.role == Role::Console)
            .and_then(|flow| flow.source.as_ref());
        master.map_or(Ok(()), |master| size.apply(master.as_fd()))
    }

    /// The process itself has exited. What lies in the pipes is still delivered; a terminal that
    /// nobody has open ends.
    pub fn leader_exited(&self) {
        let state = self.state.lock();
        let mut core = self.pump.lock();
        Self::mark_exited(&state, &mut core);
        drop(core);
        self.pump.wake();
    }

    fn mark_exited(state: &State, core: &mut Core) {
        for id in state.outputs.into_iter().flatten() {
            if let Some(flow) = core.flows.get_mut(&id) {
                flow.exited.get_or_insert_with(Instant::now);
                // A terminal: look again, its end now counts.
                flow.readable |= flow.role == Role::Console && flow.active;
                core.enqueue(id);
            }
        }
    }

    /// Delete: waits for the end of the outputs, at most `limit`, then closes the client's side.
    ///
    /// It does not wait for a background process that holds a pipe and has been silent for
    /// 200 ms: such a stream goes on, to its own file or logger, else to the orphan sink.
    pub fn finish(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let (stdin, outputs) = {
            let mut state = self.state.lock();
            state.child = None;
            if std::mem::replace(&mut state.finished, true) {
                return;
            }
            Self::mark_exited(&state, &mut self.pump.lock());
            (state.stdin, state.outputs)
        };
        self.pump.wake();
        let outputs: Vec<FlowId> = outputs.into_iter().flatten().collect();
        let mut core = self.pump.lock();
        // 1. Until every output has ended or is a silent background process's.
        loop {
            let now = Instant::now();
            let left = outputs.iter().filter_map(|id| core.flows.get(id));
            let quiet: Vec<Option<Instant>> = left
                .filter(|flow| flow.active)
                .map(|flow| flow.quiet_since().map(|since| since + QUIET))
                .collect();
            let until = match quiet.iter().flatten().max() {
                _ if quiet.is_empty() => break,
                Some(&silent) if quiet.iter().all(Option::is_some) => silent.min(deadline),
                _ => deadline,
            };
            if now >= until {
                break;
            }
            self.pump.wait(&mut core, until);
        }
        outputs.iter().for_each(|id| core.retire_output(*id));
        // 2. Until a reader has come for what lies in a FIFO.
        let lingers = |core: &Core, id: &SinkId| {
            (core.sinks.get(id)).is_some_and(|sink| sink.lingering.is_some())
        };
        let own: Vec<SinkId> = self.sinks.into_iter().flatten().collect();
        self.pump.wake();
        while own.iter().any(|id| lingers(&core, id)) && Instant::now() < deadline {
            self.pump.wait(&mut core, deadline);
        }
        for id in own {
            if (core.sinks.get(&id)).is_some_and(|sink| sink.owners == 0) {
                core.remove_sink(id);
            }
        }
        stdin.into_iter().for_each(|id| core.retire_input(id));
        drop(core);
        self.pump.wake();
    }

    /// Where background processes of this container may write once their own target is gone:
    /// this process's stdout. None when that is nowhere.
    pub fn orphan_sink(&self) -> Option<SinkHandle> {
        self.sinks[0].map(SinkHandle)
    }

    /// Does any stream still live, be it a background process's after [`Self::finish`]? As long
    /// as one does, this `ProcessIo` is needed for checkpoints.
    pub fn is_live(&self) -> bool {
        let state = self.state.lock();
        let core = self.pump.lock();
        state.flows().any(|id| core.flows.contains_key(&id))
    }

    /// The live pipes between shim and process, none for a terminal. An input that has ended is
    /// not among them: CRIU restores such a pipe, and what is left in it, by itself.
    pub fn stdio_pipes(&self) -> io::Result<Vec<StdioPipe>> {
        let state = self.state.lock();
        let core = self.pump.lock();
        let mut found = Vec::new();
        if let Some(sink) = state.stdin.and_then(|id| core.stdin_pipe(id)) {
            let inode = pipes::inode(sink.fd.as_fd())?;
            found.push((Stream::Stdin, inode));
        }
        for (stream, id) in [Stream::Stdout, Stream::Stderr]
            .into_iter()
            .zip(state.outputs)
        {
            if let Some(inode) = id.map_or(Ok(None), |id| core.source_inode(id))? {
                found.push((stream, inode));
            }
        }
        let pipe = |(stream, inode): (Stream, u64)| StdioPipe {
            fd: stream.fd(),
            inode,
        };
        Ok(found.into_iter().map(pipe).collect())
    }

    /// What lies in the process's stdin pipe, unread, without consuming it. Ask while it is
    /// frozen. Empty for a terminal, and for an input that has ended.
    pub fn pending_stdin(&self) -> io::Result<Vec<u8>> {
        let pipe = {
            let state = self.state.lock();
            let core = self.pump.lock();
            let sink = state.stdin.and_then(|id| core.stdin_pipe(id));
            sink.map(|sink| sink.fd.clone())
        };
        pipe.map_or(Ok(Vec::new()), |pipe| pipes::peek(pipe.as_fd()))
    }

    /// While the process is frozen: takes all output out of its pipes, so that it counts as
    /// written before the checkpoint. It is delivered as ever. Fails if output keeps coming.
    pub fn drain_frozen(&self) -> io::Result<()> {
        let mut scratch = vec![0; BOUND];
        let state = self.state.lock();
        for id in state.outputs.into_iter().flatten() {
            let mut core = self.pump.lock();
            if let Some(flow) = core.flows.get_mut(&id) {
                let capacity = match (flow.role, &flow.source) {
                    (Role::Output, Some(source)) => pipes::capacity(source.as_fd())?,
                    _ => BOUND,
                };
                flow.drain(&mut scratch, capacity)?;
                core.enqueue(id);
            }
        }
        self.pump.wake();
        Ok(())
    }

    /// Restore: the first bytes that the process will read, before anything from the client.
    /// Call it before [`Self::start`].
    pub fn preload_stdin(&self, bytes: &[u8]) {
        let state = self.state.lock();
        let mut core = self.pump.lock();
        if let Some(flow) = state.stdin.and_then(|id| core.flows.get_mut(&id)) {
            let later = flow.buffer.take();
            flow.buffer.push(bytes);
            flow.buffer.push(&later);
        }
    }

    /// Was a terminal asked for?
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The pid of the logger, a child of the shim that containerd knows nothing of. It ends by
    /// itself when its streams do.
    pub fn logger_pid(&self) -> Option<u32> {
        self.logger
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.finish(Duration::ZERO);
        // What was never started has no process behind it.
        let mut core = self.pump.lock();
        for id in self.state.get_mut().flows() {
            if core.flows.get(&id).is_some_and(|flow| !flow.active) {
                core.close_flow(id);
            }
        }
    }
}

/// Both outputs' targets. As with Go's shim, a file or logger for stdout serves stderr too unless
/// that has a file of its own; a terminal has one output.
fn targets(config: &StdioConfig) -> Result<[Target; 2], IoError> {
    let stdout = Target::parse(Stream::Stdout, &config.stdout)?;
    if config.terminal {
        return Ok([stdout, Target::Nowhere]);
    }
    let stderr = Target::parse(Stream::Stderr, &config.stderr)?;
    let stderr = match (&stdout, stderr) {
        (Target::Binary(uri), Target::Binary(_) | Target::Nowhere) => Target::Binary(uri.clone()),
        (Target::File(path), Target::Nowhere) => Target::File(path.clone()),
        (_, stderr) => stderr,
    };
    Ok([stdout, stderr])
}

struct Opened {
    first: Option<Sink>,
    second: Option<Sink>,
    logger: Option<u32>,
}

fn open_sinks(targets: &[Target; 2], context: &IoContext<'_>) -> Result<Opened, IoError> {
    let [stdout, stderr] = targets;
    let mut opened = Opened {
        first: target::open_output(Stream::Stdout, stdout)?,
        second: match stdout == stderr {
            true => None,
            false => target::open_output(Stream::Stderr, stderr)?,
        },
        logger: None,
    };
    let (stream, uri) = match (stdout, stderr) {
        (Target::Binary(uri), _) => (Stream::Stdout, uri),
        (_, Target::Binary(uri)) => (Stream::Stderr, uri),
        _ => return Ok(opened),
    };
    let started =
        binary::start(uri, context, binary::READY_LIMIT).map_err(|source| IoError::Logger {
            stream,
            path: uri.path.clone(),
            source,
        })?;
    let label = |stream| format!("{stream} logger {}", uri.path.display());
    opened.logger = Some(started.pid);
    if matches!(stdout, Target::Binary(_)) {
        opened.first = Some(Sink::logger(started.stdout, label(Stream::Stdout)));
    }
    if matches!(stderr, Target::Binary(_)) {
        opened.second = Some(Sink::logger(started.stderr, label(Stream::Stderr)));
    }
    Ok(opened)
}
