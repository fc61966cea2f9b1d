//! The stdio of one process, as the task service sees it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    IoError, Pump, SinkHandle,
    console::WindowSize,
    core::Core,
    flow::{FlowId, QUIET, Role},
    pipes,
    sink::{Sink, SinkId},
};

/// How long Delete keeps output for a client that has no reader on its FIFO. Clients begin to open theirs
/// before they ask for the process; on a busy machine a short-lived process may end before that is done.
const READER_GRACE: Duration = Duration::from_secs(1);

/// How long the report of an exit waits for what the process has written to be where the client reads it. Longer
/// only if the client does not read, or a background process never stops writing.
const DELIVERY: Duration = Duration::from_millis(50);

/// The stdio of one process: init or an exec. All methods may be called from any thread.
///
/// Dropping it is `finish` without any patience; streams of background processes live on.
pub struct ProcessIo {
    pub(super) pump: Arc<Pump>,
    pub(super) terminal: bool,
    /// User and group of the process's ends.
    pub(super) owner: (u32, u32),
    pub(super) orphan: Option<SinkId>,
    /// The client's targets of stdout and stderr, in this order.
    pub(super) sinks: [Option<SinkId>; 2],
    pub(super) logger: Option<u32>,
    pub(super) state: Mutex<State>,
}

/// Locked before the pump's core, never after.
#[derive(Default)]
pub(super) struct State {
    pub(super) stdin: Option<FlowId>,
    pub(super) outputs: [Option<FlowId>; 2],
    /// The process's ends, until somebody spawns it.
    pub(super) child: Option<[OwnedFd; 3]>,
    /// Whether copies of them stay here.
    holds: bool,
    held: Vec<OwnedFd>,
    size: Option<WindowSize>,
    /// Deleted: only background processes are left.
    pub(super) finished: bool,
}

impl State {
    fn flows(&self) -> impl Iterator<Item = FlowId> + use<> {
        let [stdout, stderr] = self.outputs;
        [self.stdin, stdout, stderr].into_iter().flatten()
    }
}

impl ProcessIo {
    /// The process's ends of stdin, stdout and stderr, close-on-exec, for whoever spawns it. They
    /// are given once per pipe, and not with a terminal.
    pub fn take_child_fds(&self) -> Option<[OwnedFd; 3]> {
        let mut state = self.state.lock();
        let child = state.child.take()?;
        if state.holds {
            let copies: io::Result<Vec<OwnedFd>> = child.iter().map(OwnedFd::try_clone).collect();
            state.held = copies.unwrap_or_else(|e| {
                log::warn!("streams end with their process: {e}");
                Vec::new()
            });
        }
        Some(child)
    }

    /// Keeps the process's ends open here as well: that all its processes are gone is no end of its
    /// streams, until [`Self::leader_exited`]. Before they are taken; a terminal needs none of it.
    pub fn hold(&self) {
        self.state.lock().holds = true;
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

    /// Terminal: bytes begin to move between the master and the client. After a rollback in
    /// place, the restored process's master takes the old one's place.
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
            flow.replace_source(master);
        }
        // A terminal without input is not one whose input has ended.
        match state.stdin {
            Some(input) if core.flows.get(&input).is_some_and(|flow| !flow.ended) => {
                core.replace_own(input, Sink::console(writer, output));
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
        let mut state = self.state.lock();
        state.held.clear();
        let mut core = self.pump.lock();
        Self::mark_exited(&state, &mut core);
        drop(core);
        self.pump.wake();
    }

    /// After [`Self::leader_exited`], before the client is told: what the process has written is handed on to where
    /// the client reads it. containerd's client closes its end as soon as it hears of the exit, and on a busy
    /// machine that was before the pump had come to the last lines.
    pub fn deliver(&self) {
        let outputs = self.state.lock().outputs;
        let deadline = Instant::now() + DELIVERY;
        let mut core = self.pump.lock();
        while outputs.iter().flatten().any(|id| core.has_more(*id)) && Instant::now() < deadline {
            self.pump.wait(&mut core, deadline);
        }
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
            state.held.clear();
            if std::mem::replace(&mut state.finished, true) {
                return;
            }
            Self::mark_exited(&state, &mut self.pump.lock());
            (state.stdin, state.outputs)
        };
        self.pump.wake();
        let outputs: Vec<FlowId> = outputs.into_iter().flatten().collect();
        let own: Vec<SinkId> = self.sinks.into_iter().flatten().collect();
        let grace = deadline.min(Instant::now() + READER_GRACE);
        let mut core = self.pump.lock();
        // 1. Until every output has ended or is a silent background process's.
        loop {
            let now = Instant::now();
            if now >= grace {
                own.iter().for_each(|id| core.abandon_if_unread(*id));
                self.pump.wake();
            }
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
            self.pump.wait(
                &mut core,
                if now < grace { until.min(grace) } else { until },
            );
        }
        outputs.iter().for_each(|id| core.retire_output(*id));
        // 2. Until a reader has come for what lies in a FIFO.
        let lingers = |core: &Core, id: &SinkId| {
            (core.sinks.get(id)).is_some_and(|sink| sink.lingering.is_some())
        };
        self.pump.wake();
        while own.iter().any(|id| lingers(&core, id)) && Instant::now() < grace {
            self.pump.wait(&mut core, grace);
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
