//! One stream on its way from a source to a sink.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::libc;

use super::{
    buffer::Buffer,
    pipes::{self, Moved},
    sink::{Sink, SinkId, Wrote},
};

/// How long a pipe must have been silent, after its process's exit, before whoever still holds it
/// counts as a background process.
pub(super) const QUIET: Duration = Duration::from_millis(200);

/// A flow's number, unique in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct FlowId(pub(super) u64);

/// What a flow reads from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The client's FIFO.
    Input,
    /// A process's pipe.
    Output,
    /// A pty's master. Nobody having the slave open is an end only after the leader's exit.
    Console,
}

/// One stream.
pub(super) struct Flow {
    pub(super) role: Role,
    pub(super) source: Option<OwnedFd>,
    /// Our own writer of the client's stdin FIFO, until CloseIO.
    pub(super) keepalive: Option<OwnedFd>,
    pub(super) registered: bool,
    /// Started; until then nothing moves.
    pub(super) active: bool,
    pub(super) readable: bool,
    /// The source has ended: flush, then close the sink.
    pub(super) ended: bool,
    /// Read what is there, then end.
    pub(super) hung_up: bool,
    pub(super) exited: Option<Instant>,
    pub(super) last_read: Instant,
    pub(super) buffer: Buffer,
    /// The pump is writing bytes of this flow to a file; they precede the buffer.
    pub(super) in_flight: bool,
    pub(super) sink: Option<SinkId>,
    /// Opened with the sink, rather than a borrower.
    pub(super) owns: bool,
    pub(super) queued: bool,
    /// Where a background process's output goes after Delete.
    pub(super) orphan: Option<SinkId>,
}

/// What a flow needs next.
pub(super) enum Next {
    /// Nothing until an event comes.
    Wait,
    /// Another turn.
    Again,
    /// Source ended and flushed, or neither source nor sink: remove it.
    Close,
    /// The sink is dead.
    SinkGone(io::Error),
    /// These bytes are to be written without the lock.
    WriteFile(Unwritten),
}

/// Bytes on their way to a file.
pub(super) enum Unwritten {
    /// The first n bytes of the scratch buffer.
    Scratch(usize),
    /// What had been buffered.
    Buffered(Vec<u8>),
}

impl Flow {
    pub(super) fn new(role: Role, source: Option<OwnedFd>) -> Self {
        Self {
            role,
            source,
            keepalive: None,
            registered: false,
            active: false,
            readable: false,
            ended: false,
            hung_up: false,
            exited: None,
            last_read: Instant::now(),
            buffer: Buffer::default(),
            in_flight: false,
            sink: None,
            owns: false,
            queued: false,
            orphan: None,
        }
    }

    /// Goes on with another source, once it is started again.
    pub(super) fn replace_source(&mut self, source: OwnedFd) {
        self.source = Some(source);
        self.registered = false;
        self.active = false;
        self.readable = false;
        self.ended = false;
        self.hung_up = false;
        self.exited = None;
    }

    /// Since when nothing has come, provided that nothing waits to be moved, not even something
    /// that the pump has yet to notice.
    pub(super) fn quiet_since(&self) -> Option<Instant> {
        let idle = !self.ended
            && !self.readable
            && !self.in_flight
            && self.buffer.is_empty()
            && (self.source.as_ref()).is_none_or(|source| pipes::silent(source.as_fd()));
        idle.then(|| {
            self.exited
                .map_or(self.last_read, |exit| exit.max(self.last_read))
        })
    }

    /// Moves what can be moved in one turn of bounded length.
    pub(super) fn step(&mut self, sink: Option<&mut Sink>, scratch: &mut [u8]) -> Next {
        if !self.active || self.in_flight {
            return Next::Wait;
        }
        let Some(sink) = sink else {
            self.buffer.take();
            return self.discard(scratch);
        };
        // What waits goes first. While the sink is stuck, the buffer may still fill up.
        while !self.buffer.is_empty() {
            match sink.write(self.buffer.bytes()) {
                Wrote::Bytes(n) => self.buffer.consume(n),
                Wrote::Blocked => return self.fill(scratch),
                Wrote::Gone(error) => return Next::SinkGone(error),
                Wrote::Unlocked => {
                    return Next::WriteFile(Unwritten::Buffered(self.buffer.take()));
                }
            }
        }
        if self.ended {
            return Next::Close;
        }
        let n = match self.read(scratch) {
            Some(n) => n,
            None if self.ended => return Next::Close,
            None => return Next::Wait,
        };
        if sink.is_file() {
            return Next::WriteFile(Unwritten::Scratch(n));
        }
        let mut rest = &scratch[..n];
        while !rest.is_empty() {
            match sink.write(rest) {
                Wrote::Bytes(n) => rest = &rest[n..],
                Wrote::Gone(error) => return Next::SinkGone(error),
                Wrote::Blocked | Wrote::Unlocked => {
                    self.buffer.push(rest);
                    break;
                }
            }
        }
        Next::Again
    }

    fn fill(&mut self, scratch: &mut [u8]) -> Next {
        let room = self.buffer.room().min(scratch.len());
        if room == 0 && self.hung_up {
            self.end(); // what else it says is not worth keeping its terminal open
        }
        if room == 0 || self.ended {
            return Next::Wait;
        }
        match self.read(&mut scratch[..room]) {
            Some(n) => {
                self.buffer.push(&scratch[..n]);
                Next::Again
            }
            None => Next::Wait,
        }
    }

    fn discard(&mut self, scratch: &mut [u8]) -> Next {
        if self.ended || self.source.is_none() {
            return Next::Close;
        }
        match self.read(scratch) {
            Some(_) => Next::Again,
            None if self.ended => Next::Close,
            None => Next::Wait,
        }
    }

    /// Reads once. None: nothing there, or `ended` is now set and the source closed.
    fn read(&mut self, into: &mut [u8]) -> Option<usize> {
        if !self.readable {
            if self.hung_up {
                self.end();
            }
            return None;
        }
        let source = self.source.as_ref()?;
        match pipes::read(source.as_fd(), into) {
            Ok(Moved::Bytes(n)) => {
                self.last_read = Instant::now();
                return Some(n);
            }
            Ok(Moved::Blocked) => {
                self.readable = false;
                if self.hung_up {
                    self.end();
                }
            }
            Ok(Moved::End) => self.end(),
            Err(error) if self.role == Role::Console => {
                self.readable = false;
                if self.exited.is_some() || self.hung_up || error.raw_os_error() != Some(libc::EIO)
                {
                    self.end();
                }
            }
            Err(error) => {
                log::warn!("a stream ends early: {error}");
                self.end();
            }
        }
        None
    }

    fn end(&mut self) {
        self.ended = true;
        self.source = None;
        self.keepalive = None;
    }

    /// Takes in all that lies in the source now, beyond the buffer's bound; at most `limit` bytes.
    pub(super) fn drain(&mut self, scratch: &mut [u8], limit: usize) -> io::Result<()> {
        let Some(source) = &self.source else {
            return Ok(());
        };
        let mut total = 0;
        loop {
            match pipes::read(source.as_fd(), scratch) {
                Ok(Moved::Bytes(n)) => {
                    self.buffer.push(&scratch[..n]);
                    self.last_read = Instant::now();
                    total += n;
                }
                // The end is for the pump to see.
                Ok(Moved::Blocked | Moved::End) => return Ok(()),
                Err(error)
                    if self.role == Role::Console && error.raw_os_error() == Some(libc::EIO) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            if total > limit {
                return Err(io::Error::other(
                    "output keeps coming: the process is not frozen",
                ));
            }
        }
    }
}
