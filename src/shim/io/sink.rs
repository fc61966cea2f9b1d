//! Where bytes go: a client's FIFO, a file, a logger, or a process's input.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::libc;

use super::{
    flow::FlowId,
    pipes::{self, Moved},
};

/// A sink's number, unique in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SinkId(pub(super) u64);

/// A target that may serve the streams of other processes too, once these have lost their own.
///
/// It does not keep the target open: when its owner is done, borrowers go to nowhere.
#[derive(Debug, Clone)]
pub struct SinkHandle(pub(super) SinkId);

/// What a sink is; decides how it ends.
pub(super) enum Kind {
    /// A client's FIFO. Our own reader lets clients leave and come back without an EPIPE.
    Fifo { keepalive: Option<OwnedFd> },
    /// Written by the pump without its lock, since a disk may stall.
    File,
    /// A logger's pipe.
    Logger,
    /// The write end of a process's stdin.
    Stdin,
    /// A pty's master; `output` is the flow that reads from it.
    Console { output: FlowId },
}

/// One open target.
pub(super) struct Sink {
    pub(super) kind: Kind,
    pub(super) fd: Arc<OwnedFd>,
    label: String,
    pub(super) writable: bool,
    pub(super) registered: bool,
    /// Every flow that writes here.
    pub(super) users: Vec<FlowId>,
    /// How many of them were opened with it: after the last one, it is closed.
    pub(super) owners: usize,
    /// Closed, but a reader has yet to come for what lies in the FIFO.
    pub(super) lingering: Option<Instant>,
    complained: bool,
}

/// What became of one attempt to write.
pub(super) enum Wrote {
    Bytes(usize),
    Blocked,
    /// Nobody will ever read this.
    Gone(io::Error),
    /// To be written by the pump, without its lock.
    Unlocked,
}

impl Sink {
    fn new(kind: Kind, fd: OwnedFd, label: String) -> Self {
        Self {
            kind,
            fd: Arc::new(fd),
            label,
            writable: true,
            registered: false,
            users: Vec::new(),
            owners: 0,
            lingering: None,
            complained: false,
        }
    }

    pub(super) fn fifo(keepalive: OwnedFd, writer: OwnedFd, label: String) -> Self {
        let keepalive = Some(keepalive);
        Self::new(Kind::Fifo { keepalive }, writer, label)
    }

    pub(super) fn file(file: OwnedFd, label: String) -> Self {
        Self::new(Kind::File, file, label)
    }

    pub(super) fn logger(pipe: OwnedFd, label: String) -> Self {
        Self::new(Kind::Logger, pipe, label)
    }

    pub(super) fn stdin(pipe: OwnedFd) -> Self {
        Self::new(Kind::Stdin, pipe, "the process's stdin".to_owned())
    }

    pub(super) fn console(master: OwnedFd, output: FlowId) -> Self {
        Self::new(Kind::Console { output }, master, "the terminal".to_owned())
    }

    /// May streams of background processes go on writing here after their process's Delete?
    pub(super) fn outlives_delete(&self) -> bool {
        matches!(self.kind, Kind::File | Kind::Logger)
    }

    pub(super) fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Wrote {
        if self.is_file() {
            return Wrote::Unlocked;
        }
        if !self.writable {
            return Wrote::Blocked;
        }
        match pipes::write(self.fd.as_fd(), bytes) {
            Ok(Moved::Bytes(n)) => Wrote::Bytes(n),
            Ok(_) => {
                self.writable = false;
                Wrote::Blocked
            }
            // As Go's shim has it: temporary, a process may open the terminal again.
            Err(error)
                if matches!(self.kind, Kind::Console { .. })
                    && error.raw_os_error() == Some(libc::EIO) =>
            {
                self.writable = false;
                Wrote::Blocked
            }
            Err(error) => Wrote::Gone(error),
        }
    }

    /// Says once per sink that output is being lost.
    pub(super) fn complain(&mut self, error: &io::Error) {
        let expected = matches!(self.kind, Kind::Stdin | Kind::Console { .. });
        if !expected && !std::mem::replace(&mut self.complained, true) {
            log::warn!("output to {} is being lost: {error}", self.label);
        }
    }

    /// Lets go of the client. False: the FIFO holds bytes that nobody has come to read yet; they
    /// would vanish with the last descriptor.
    pub(super) fn close(&mut self) -> bool {
        if let Kind::Fifo { keepalive } = &mut self.kind {
            *keepalive = None;
            if !self.may_vanish() {
                self.lingering.get_or_insert_with(Instant::now);
                return false;
            }
        }
        true
    }

    /// Is this a FIFO with no room left and no reader? Lets go of our own reader to find out.
    pub(super) fn is_full_and_unread(&mut self) -> bool {
        match &mut self.kind {
            Kind::Fifo { keepalive } if !self.writable => {
                *keepalive = None;
                pipes::reader_gone(self.fd.as_fd())
            }
            _ => false,
        }
    }

    /// Would closing a lingering sink lose nothing?
    pub(super) fn may_vanish(&self) -> bool {
        !pipes::reader_gone(self.fd.as_fd()) || pipes::queued(self.fd.as_fd()).is_ok_and(|n| n == 0)
    }

    /// How long until a lingering sink is to be looked at again: a FIFO does not tell its writer
    /// that a reader has opened it.
    pub(super) fn next_look(&self, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.lingering?);
        Some((age / 8).clamp(Duration::from_millis(5), Duration::from_millis(250)))
    }
}
