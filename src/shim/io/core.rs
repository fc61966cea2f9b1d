//! All flows and sinks of a pump, and the rules by which they end.
//!
//! Nothing in here blocks: every descriptor is non-blocking, and files are written by the pump
//! after it has let go of the lock around this.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::{
    flow::{Flow, FlowId, Next, QUIET, Role, Unwritten},
    pipes,
    sink::{Kind, Sink, SinkId},
};

/// Numbers are never used twice, so that a late event cannot hit the wrong stream.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// A write that the pump has to do without the lock.
pub(super) struct FileJob {
    pub(super) flow: FlowId,
    pub(super) sink: SinkId,
    pub(super) file: Arc<OwnedFd>,
    pub(super) bytes: Unwritten,
}

/// The state behind the pump's lock.
#[derive(Default)]
pub(super) struct Core {
    pub(super) flows: HashMap<FlowId, Flow>,
    pub(super) sinks: HashMap<SinkId, Sink>,
    ready: VecDeque<FlowId>,
    pub(super) running: bool,
    pub(super) stopping: bool,
    pub(super) waiters: usize,
}

impl Core {
    pub(super) fn add_flow(&mut self, flow: Flow) -> FlowId {
        let id = FlowId(next_id());
        self.flows.insert(id, flow);
        id
    }

    pub(super) fn add_sink(&mut self, sink: Sink) -> SinkId {
        let id = SinkId(next_id());
        self.sinks.insert(id, sink);
        id
    }

    /// Makes `sink` the flow's own.
    pub(super) fn own(&mut self, flow: FlowId, sink: SinkId) {
        if let (Some(f), Some(s)) = (self.flows.get_mut(&flow), self.sinks.get_mut(&sink)) {
            f.sink = Some(sink);
            f.owns = true;
            s.users.push(flow);
            s.owners += 1;
        }
    }

    pub(super) fn enqueue(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id)
            && !std::mem::replace(&mut flow.queued, true)
        {
            self.ready.push_back(id);
        }
    }

    pub(super) fn next_ready(&mut self) -> Option<FlowId> {
        let id = self.ready.pop_front()?;
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.queued = false;
        }
        Some(id)
    }

    pub(super) fn ready_count(&self) -> usize {
        self.ready.len()
    }

    /// Whether a flow has something to move, or to end.
    pub(super) fn has_more(&self, id: FlowId) -> bool {
        let flow = self.flows.get(&id).filter(|flow| flow.active);
        flow.is_some_and(|flow| flow.quiet_since().is_none())
    }

    /// A flow's source has something, or has ended.
    pub(super) fn source_event(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.readable = true;
            self.enqueue(id);
        }
    }

    /// A sink has room, or its reader has gone.
    pub(super) fn sink_event(&mut self, id: SinkId, reader_gone: bool) {
        let Some(sink) = self.sinks.get_mut(&id) else {
            return;
        };
        match sink.kind {
            Kind::Stdin | Kind::Logger if reader_gone => {
                sink.complain(&io::ErrorKind::BrokenPipe.into());
                self.remove_sink(id);
            }
            _ => self.writable(id),
        }
    }

    fn console_of(&self, output: FlowId) -> Option<SinkId> {
        self.sinks
            .iter()
            .find(|(_, sink)| matches!(sink.kind, Kind::Console { output: o } if o == output))
            .map(|(&id, _)| id)
    }

    fn writable(&mut self, id: SinkId) {
        if let Some(sink) = self.sinks.get_mut(&id) {
            sink.writable = true;
            for user in sink.users.clone() {
                self.enqueue(user);
            }
        }
    }

    /// Gives one flow its turn.
    pub(super) fn service(&mut self, id: FlowId, scratch: &mut [u8]) -> Option<FileJob> {
        let flow = self.flows.get_mut(&id)?;
        let sink_id = flow.sink.filter(|sink| self.sinks.contains_key(sink));
        flow.sink = sink_id;
        let sink = sink_id.and_then(|sink| self.sinks.get_mut(&sink));
        match flow.step(sink, scratch) {
            Next::Wait => {}
            Next::Again => self.enqueue(id),
            Next::Close => self.close_flow(id),
            Next::SinkGone(error) => {
                if let Some(sink) = sink_id.and_then(|sink| self.sinks.get_mut(&sink)) {
                    sink.complain(&error);
                }
                sink_id.into_iter().for_each(|sink| self.remove_sink(sink));
            }
            Next::WriteFile(bytes) => {
                let sink_id = sink_id?;
                let file = self.sinks.get(&sink_id)?.fd.clone();
                self.flows.get_mut(&id)?.in_flight = true;
                return Some(FileJob {
                    flow: id,
                    sink: sink_id,
                    file,
                    bytes,
                });
            }
        }
        None
    }

    pub(super) fn file_written(&mut self, flow: FlowId, sink: SinkId, result: io::Result<()>) {
        if let (Err(error), Some(sink)) = (result, self.sinks.get_mut(&sink)) {
            sink.complain(&error);
        }
        if let Some(flow) = self.flows.get_mut(&flow) {
            flow.in_flight = false;
        }
        self.enqueue(flow);
    }

    /// Removes a flow; its own sink is closed with the last flow that was opened with it.
    pub(super) fn close_flow(&mut self, id: FlowId) {
        self.release_sink(id);
        if let Some(flow) = self.flows.remove(&id)
            && flow.role == Role::Console
            && let Some(sink) = self.console_of(id)
        {
            self.remove_sink(sink);
        }
    }

    fn release_sink(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else {
            return;
        };
        let owned = std::mem::take(&mut flow.owns);
        let Some(sink_id) = flow.sink.take() else {
            return;
        };
        let Some(sink) = self.sinks.get_mut(&sink_id) else {
            return;
        };
        sink.users.retain(|user| *user != id);
        sink.owners -= usize::from(owned);
        if !owned || sink.owners > 0 {
            return;
        }
        if let Kind::Console { output } = sink.kind {
            // As with Go's shim, the end of a terminal's input hangs the terminal up.
            if let Some(output) = self.flows.get_mut(&output) {
                output.hung_up = true;
            }
            self.enqueue(output);
        }
        if self.sinks.get_mut(&sink_id).is_none_or(Sink::close) {
            self.remove_sink(sink_id);
        } else {
            self.orphan_users(sink_id);
        }
    }

    /// Closes a sink for good; whoever still writes to it writes to nowhere.
    pub(super) fn remove_sink(&mut self, id: SinkId) {
        self.orphan_users(id);
        self.sinks.remove(&id);
    }

    fn orphan_users(&mut self, id: SinkId) {
        let users = self
            .sinks
            .get_mut(&id)
            .map(|sink| std::mem::take(&mut sink.users))
            .unwrap_or_default();
        for user in users {
            if let Some(flow) = self.flows.get_mut(&user) {
                flow.sink = None;
                flow.owns = false;
            }
            self.enqueue(user);
        }
    }

    /// Delete: takes the client away from an output. If it has not ended, a background process
    /// holds it: it goes on to a file or logger of its own, else to the orphan sink.
    pub(super) fn retire_output(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(&id) else {
            return;
        };
        if flow.ended || !flow.active {
            return self.close_flow(id);
        }
        let own = flow.sink.and_then(|sink| self.sinks.get(&sink));
        if own.is_some_and(Sink::outlives_delete) {
            return;
        }
        self.release_sink(id);
        if let Some(flow) = self.flows.get_mut(&id) {
            let lost = flow.buffer.take().len();
            if lost > 0 {
                log::debug!("{lost} bytes of output that nobody read are dropped");
            }
        }
        self.borrow(id);
        self.enqueue(id);
    }

    /// Delete: gives up on a FIFO that is full and that nobody reads.
    pub(super) fn abandon_if_unread(&mut self, id: SinkId) {
        if self
            .sinks
            .get_mut(&id)
            .is_some_and(Sink::is_full_and_unread)
        {
            self.remove_sink(id);
        }
    }

    /// Sends a background process's output to the orphan sink, if that is still open.
    pub(super) fn borrow(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id)
            && let Some(orphan) = flow.orphan
            && let Some(sink) = self.sinks.get_mut(&orphan)
            && sink.lingering.is_none()
        {
            flow.sink = Some(orphan);
            sink.users.push(id);
        }
    }

    /// Delete: takes the client away from an input. The process's end stays open for as long as
    /// somebody could read from it.
    pub(super) fn retire_input(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else {
            return;
        };
        let sink = flow.sink.and_then(|sink| self.sinks.get(&sink));
        let to_pipe = sink.is_some_and(|sink| {
            matches!(sink.kind, Kind::Stdin) && !pipes::reader_gone(sink.fd.as_fd())
        });
        flow.keepalive = None;
        flow.source = None;
        if to_pipe && flow.active {
            return self.enqueue(id);
        }
        // A terminal is not hung up by Delete: forget the sink without the rule for its end.
        if let Some(sink) = flow.sink.take() {
            self.remove_sink(sink);
        }
        self.close_flow(id);
    }

    /// Looks after what no event announces; says when to look again.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Duration> {
        let lingering = self
            .sinks
            .iter()
            .filter(|(_, sink)| sink.lingering.is_some());
        let read: Vec<SinkId> = lingering
            .filter(|(_, sink)| sink.may_vanish())
            .map(|(&id, _)| id)
            .collect();
        read.into_iter().for_each(|id| self.remove_sink(id));

        // A terminal whose leader has gone ends for its client, as with Go's shim, although a
        // background process may hold it.
        let mut next = self
            .sinks
            .values()
            .filter_map(|sink| sink.next_look(now))
            .min();
        let mut abandoned = Vec::new();
        for (&id, flow) in &self.flows {
            if flow.role != Role::Console
                || flow.exited.is_none()
                || flow.sink.is_none()
                || !flow.owns
            {
                continue;
            }
            let left = flow.quiet_since().map_or(QUIET, |since| {
                QUIET.saturating_sub(now.saturating_duration_since(since))
            });
            match left.is_zero() {
                true => abandoned.push(id),
                false => next = Some(next.map_or(left, |next| next.min(left))),
            }
        }
        abandoned.into_iter().for_each(|id| self.retire_output(id));
        next
    }

    /// The process's own end of a live stdin pipe.
    pub(super) fn stdin_pipe(&self, flow: FlowId) -> Option<&Sink> {
        let sink = self.sinks.get(&self.flows.get(&flow)?.sink?)?;
        matches!(sink.kind, Kind::Stdin).then_some(sink)
    }

    /// Puts a new sink behind a flow that alone uses its own; the old one is closed, and that is
    /// no end of anything.
    pub(super) fn replace_own(&mut self, flow: FlowId, sink: Sink) {
        if let Some(old) = self.flows.get_mut(&flow).and_then(|flow| flow.sink.take()) {
            self.sinks.remove(&old);
        }
        let sink = self.add_sink(sink);
        self.own(flow, sink);
    }

    /// Is nothing left open?
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.sinks.is_empty()
    }

    /// The inode of a flow's pipe.
    pub(super) fn source_inode(&self, flow: FlowId) -> io::Result<Option<u64>> {
        match self.flows.get(&flow) {
            Some(Flow {
                role: Role::Output,
                source: Some(source),
                ..
            }) => pipes::inode(source.as_fd()).map(Some),
            _ => Ok(None),
        }
    }
}
