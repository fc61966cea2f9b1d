//! The network of a sandbox: how it is configured, and how much has passed through it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sched::CloneFlags,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
    },
};
use parking_lot::Mutex;

use super::{
    proc_fs::{Digest, Dir, ProcessError, digest},
    traveller::visit,
};

/// One network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) configuration: Digest,
    pub(super) traffic: Traffic,
}

/// What the network stack of a namespace counted; all only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Traffic {
    /// TCP connections that somebody made to a listener here.
    pub(super) passive: u64,
    /// TCP segments and UDP datagrams, in and out.
    packets: [u64; 4],
}

/// Reads what /proc says of the network namespace of a process. `configuration`: it is known to be that one.
pub(super) fn read(dir: &Dir, configuration: Option<Digest>) -> Result<Network, ProcessError> {
    let configuration = match configuration {
        Some(known) => known,
        None => configured(dir)?,
    };
    Ok(Network {
        configuration,
        traffic: traffic(dir)?,
    })
}

fn configured(dir: &Dir) -> Result<Digest, ProcessError> {
    let mut text = String::new();
    for file in ["net/route", "net/if_inet6", "net/fib_trie"] {
        text += &dir.text_if_any(file)?.unwrap_or_default();
    }
    // Names alone: the numbers behind them count packets.
    for line in dir.text_if_any("net/dev")?.unwrap_or_default().lines() {
        text += line.split(':').next().unwrap_or_default();
        text.push('\n');
    }
    Ok(digest(text.as_bytes()))
}

/// The counters of the network namespace of a process.
pub(super) fn traffic(dir: &Dir) -> Result<Traffic, ProcessError> {
    let snmp = dir.record_if_any("net/snmp")?.unwrap_or_default();
    let field = |protocol: &str, name: &str| {
        let mut lines = snmp.lines().filter(|line| line.starts_with(protocol));
        let (names, values) = (lines.next()?, lines.next()?);
        let column = names.split(' ').position(|field| field == name)?;
        values.split(' ').nth(column)?.parse().ok()
    };
    let number = |protocol, name| field(protocol, name).unwrap_or(0);
    Ok(Traffic {
        passive: number("Tcp:", "PassiveOpens"),
        packets: [
            number("Tcp:", "InSegs"),
            number("Tcp:", "OutSegs"),
            number("Udp:", "InDatagrams"),
            number("Udp:", "OutDatagrams"),
        ],
    })
}

/// The groups of messages (`enum rtnetlink_groups`) of which at least one comes when what [`configured`] reads
/// changes: links, addresses, routes of IPv4 and the rules that split its tables, next hops.
const GROUPS: [u32; 7] = [
    1,  // RTNLGRP_LINK
    5,  // RTNLGRP_IPV4_IFADDR
    7,  // RTNLGRP_IPV4_ROUTE
    8,  // RTNLGRP_IPV4_RULE
    9,  // RTNLGRP_IPV6_IFADDR
    12, // RTNLGRP_IPV6_IFINFO
    32, // RTNLGRP_NEXTHOP
];

/// Whether somebody has configured a network namespace since it was first watched.
///
/// The kernel tells whoever listens there, within the call that changes something. A namespace lives as long
/// as it is watched, so its name is that of no other.
#[derive(Debug)]
pub(super) struct Watched {
    /// As the link in /proc/PID/ns names it.
    name: String,
    /// None once there was a message, or one was lost.
    listener: Mutex<Option<OwnedFd>>,
}

impl Watched {
    /// Begins with the namespace of a process.
    pub(super) fn begin(pid: i32) -> Result<Self, ProcessError> {
        let name = Dir::open(pid)?.link("ns/net")?;
        let listener =
            visit(pid, CloneFlags::CLONE_NEWNET, "network namespace", listen)?.answer()?;
        Ok(Self {
            name,
            listener: Mutex::new(Some(listener)),
        })
    }

    /// Whether nobody has configured the namespace of this name since.
    pub(super) fn is_unchanged(&self, name: &str) -> bool {
        if self.name != name {
            return false;
        }
        let mut listener = self.listener.lock();
        let quiet = listener.as_ref().is_some_and(|socket| {
            let heard = recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT);
            heard == Err(Errno::EAGAIN)
        });
        if !quiet {
            // Nor does it fill with more of them.
            *listener = None;
        }
        quiet
    }
}

fn listen() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let groups = GROUPS.iter().fold(0, |all, group| all | 1 << (group - 1));
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}
