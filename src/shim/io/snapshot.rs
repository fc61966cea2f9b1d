//! What checkpoints and restores ask of a process's stdio.

use std::{io, os::fd::AsFd, time::Instant};

use super::{ProcessIo, StdioPipe, Stream, buffer::BOUND, flow::Role, pipes};

impl ProcessIo {
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

    /// When the client last sent input; None once there is none to come. As long as two answers
    /// are equal, nothing has come in between.
    pub fn input_mark(&self) -> Option<Instant> {
        let state = self.state.lock();
        let core = self.pump.lock();
        let flow = core.flows.get(&state.stdin?)?;
        // What waits here has yet to reach the process.
        let waits = !flow.buffer.is_empty();
        (waits || !flow.ended).then(|| {
            if waits {
                Instant::now()
            } else {
                flow.last_read
            }
        })
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
}
