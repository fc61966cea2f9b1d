//! Making a process's stdio: the client's side opened, the process's pipes made.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use parking_lot::Mutex;

use super::{
    IoContext, IoError, ProcessIo, Pump, StdioConfig, Stream, binary,
    core::Core,
    flow::{Flow, FlowId, Role},
    pipes,
    process::State,
    sink::Sink,
    target::{self, Target},
};

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

    /// For a restored background process whose client is long gone: [`Self::open_leftover`] with
    /// nowhere of its own to write to.
    pub fn open_orphan(pump: &Arc<Pump>, context: &IoContext<'_>) -> Result<Self, IoError> {
        Self::open_leftover(pump, &StdioConfig::default(), context)
    }

    /// For a restored background process, the state after [`Self::finish`]: three pipes, output
    /// to the file or logger that it had, else to the orphan sink, and a stdin that stays open
    /// until nobody could read it. (`config.stdin` has no meaning here; a FIFO would have none
    /// without its client.)
    pub fn open_leftover(
        pump: &Arc<Pump>,
        config: &StdioConfig,
        context: &IoContext<'_>,
    ) -> Result<Self, IoError> {
        let config = StdioConfig {
            terminal: false,
            stdin: String::new(),
            ..config.clone()
        };
        let process = Self::open(pump, &config, context)?;
        let mut state = process.state.lock();
        let mut core = pump.lock();
        state.finished = true;
        if let Some(flow) = state.stdin.and_then(|id| core.flows.get_mut(&id)) {
            flow.ended = false;
        }
        for (id, own) in state.outputs.into_iter().zip(process.sinks) {
            if let (Some(id), None) = (id, own) {
                core.borrow(id);
            }
        }
        drop((core, state));
        Ok(process)
    }

    fn new(pump: &Arc<Pump>, context: &IoContext<'_>, terminal: bool) -> Self {
        Self {
            pump: Arc::clone(pump),
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
    /// between. Streams that had ended already come back as those of a background process. With a
    /// terminal it has no effect: there, [`Self::attach_console`] takes the new master.
    pub fn replace_pipes(&self) -> Result<(), IoError> {
        self.switch_to(self.make_pipes()?);
        Ok(())
    }

    /// The part of [`Self::replace_pipes`] that may fail, and changes nothing.
    pub fn make_pipes(&self) -> Result<NewPipes, IoError> {
        let mut pairs = Vec::with_capacity(3);
        let streams = [Stream::Stdin, Stream::Stdout, Stream::Stderr];
        for stream in streams.into_iter().filter(|_| !self.terminal) {
            pairs.push(self.make_pipe(stream).map_err(IoError::system("pipe"))?);
        }
        Ok(NewPipes(pairs))
    }

    /// The part of [`Self::replace_pipes`] that does it.
    pub fn switch_to(&self, NewPipes(pairs): NewPipes) {
        if self.terminal {
            return;
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
        core.replace_own(id, Sink::stdin(pipe));
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
            flow.replace_source(pipe);
        }
        *slot = Some(id);
    }
}

/// Pipes that are to take the place of others: our end and the process's, for each stream.
pub struct NewPipes(Vec<(OwnedFd, OwnedFd)>);

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
