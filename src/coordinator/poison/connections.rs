//! Where the sandbox's TCP connections lead, and what is under way in them.

use std::collections::HashSet;

use super::{Snapshot, Socket};

impl Snapshot {
    /// Whether a TCP connection leads to somewhere else than into the sandbox itself: to another address, or
    /// to an end that none of its processes has.
    pub fn has_outside_tcp(&self) -> bool {
        let is_outside = |socket: &Socket| !socket.peer.is_some_and(|peer| peer.is_loopback());
        self.connections().any(is_outside) || self.has_lone_end()
    }

    /// Whether a connection through `lo` has one end alone in the sandbox's processes. The other may be another
    /// container's, or the kernel's: of a process that has closed it, or has ended, with data still to be
    /// sent. That is in no image, and passes as the data arrives.
    pub fn has_lone_end(&self) -> bool {
        let ends: HashSet<_> = self.connections().map(|s| (s.local, s.peer)).collect();
        self.connections().any(|socket| {
            socket.is_open
                && socket.peer.is_some_and(|peer| peer.is_loopback())
                && !ends.contains(&(socket.peer, socket.local))
        })
    }

    /// Whether data is on its way between the sandbox's own processes, or waits to be sent.
    pub fn has_data_under_way(&self) -> bool {
        self.connections().any(|socket| {
            socket.unconfirmed > 0 && socket.peer.is_some_and(|peer| peer.is_loopback())
        })
    }

    /// Whether a connection waits to be accepted. CRIU cannot dump it; a moment later it may be.
    pub fn has_waiting_connection(&self) -> bool {
        self.sockets().any(|socket| socket.waiting > 0)
    }

    fn connections(&self) -> impl Iterator<Item = &Socket> {
        self.sockets().filter(|socket| socket.is_connected_tcp())
    }
}
