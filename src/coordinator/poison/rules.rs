//! The rules. Each was found by an experiment with CRIU 4.2.1, runc 1.1.15 and kernel 6.18, and
//! has an end-to-end test with the real thing (`integration/e2e/test_poison.py`).

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    Reasons, Verdict,
    snapshot::{Kind, Process, Snapshot},
    sockets::Socket,
};

/// What CRIU can dump of those that have no file.
const ANONYMOUS: &[&str] = &[
    "eventfd",
    "eventpoll",
    "fanotify",
    "signalfd",
    "timerfd",
    "pidfd",
    "bpf-map",
];

/// Which families of sockets CRIU knows.
const FAMILIES: &[i32] = &[
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_PACKET,
    libc::AF_NETLINK,
];

/// Whether the processes can be dumped and, once dumped, restored.
pub fn judge(snapshot: &Snapshot) -> Verdict {
    let mut reasons = Reasons::default();
    let terminals = Terminals::of(snapshot);
    for process in &snapshot.processes {
        let mut say = |what: String| reasons.add(format!("{} {what}", who(process)));
        of_process(process, &mut say);
        let all = process.descriptors.iter().map(|d| &d.kind);
        for kind in all.chain(&process.others).chain(&process.program) {
            if let Some(what) = of_kind(kind) {
                say(what);
            }
        }
        for descriptor in &process.descriptors {
            match &descriptor.kind {
                Kind::Terminal {
                    is_master: false,
                    index,
                } if terminals.has_nobody(*index) => say(TERMINAL.into()),
                Kind::Socket(socket) => {
                    if let Some(what) = of_socket(socket, snapshot) {
                        say(what);
                    }
                }
                _ => {}
            }
        }
    }
    if let [name, ..] = snapshot.queues.as_slice() {
        reasons.add(format!(
            "there is a POSIX message queue (/{name}), which CRIU cannot dump: remove it (mq_unlink)"
        ));
    }
    match reasons.is_empty() {
        true => Verdict::Fine,
        false => Verdict::FilesOnly(reasons),
    }
}

pub(super) fn who(process: &Process) -> String {
    let Process {
        pid,
        name,
        host_pid,
        ..
    } = process;
    format!("process {pid} ({name:?}, host pid {host_pid})")
}

fn of_process(process: &Process, say: &mut impl FnMut(String)) {
    if process.tracer != 0 {
        // CRIU tries for ten seconds, and may fail to let go of those that it has.
        say(
            "is being traced (strace, gdb), so that CRIU cannot attach to it: end the tracer"
                .into(),
        );
    }
    if process.own_users {
        say(
            "is in a user namespace of its own (bubblewrap, a browser's sandbox), which CRIU \
             cannot dump: end it"
                .into(),
        );
    }
    // Dumped with exit code 0; the restore says "No entry for reg-file-ID".
    if let Some(Kind::Memory(name)) = &process.program {
        say(format!(
            "runs a program that is no file ({name:?}), which CRIU dumps and can never restore: \
             start it from a file"
        ));
    }
}

/// What is wrong with something open, mapped or executed, whoever has it.
fn of_kind(kind: &Kind) -> Option<String> {
    match kind {
        Kind::Deleted { path, links } if *links > 0 => Some(format!(
            "uses the deleted file {path:?}, which still has another name or comes from the \
             image, and CRIU cannot keep it: restart the process"
        )),
        Kind::Queue(name) => Some(format!(
            "has the POSIX message queue {name:?} open, which CRIU cannot dump: close it"
        )),
        Kind::Anonymous(name) if !ANONYMOUS.contains(&name.as_str()) => Some(match name.as_str() {
            "io_uring" => "uses io_uring, which CRIU cannot dump: switch it off in the program \
                           (node: UV_USE_IO_URING=0)"
                .into(),
            name => format!("has an open {name:?}, which CRIU cannot dump"),
        }),
        // Dumped and restored with exit code 0, and without the locks: CRIU locks before it closes
        // the descriptor through which it has mapped the file, and that drops a process's locks.
        Kind::LockedAndMapped(path) => Some(format!(
            "holds a POSIX lock on {path:?}, which it has also mapped (SQLite's WAL does that), \
             and CRIU loses such locks: close the database, or use locking_mode=exclusive"
        )),
        Kind::Outside(path) => Some(format!(
            "has {path:?} open, which is in no mount of the sandbox, so that CRIU cannot find it"
        )),
        _ => None,
    }
}

/// Dumped with exit code 0, or refused with "Only one slave external peer is allowed"; the restore
/// says "No task found with sid".
const TERMINAL: &str = "holds on to the terminal of an exec that has ended, which cannot be \
                        restored: start it with its input and output somewhere else (nohup, \
                        setsid, >file </dev/null), or in tmux";

/// Which pseudoterminals have somebody at the other end that a restore brings back.
struct Terminals {
    /// The masters are in the sandbox: tmux, script, sshd.
    inside: BTreeSet<u32>,
    /// init's own, whose master the shim makes anew.
    of_init: BTreeSet<u32>,
}

impl Terminals {
    fn of(snapshot: &Snapshot) -> Self {
        let ends = |wanted: bool, of_init: bool| {
            let processes = snapshot.processes.iter();
            let all = processes.filter(move |p| !of_init || p.is_init);
            let ends = all.flat_map(|process| &process.descriptors);
            ends.filter_map(move |descriptor| match descriptor.kind {
                Kind::Terminal { is_master, index } if is_master == wanted => Some(index),
                _ => None,
            })
        };
        Self {
            inside: ends(true, false).collect(),
            of_init: ends(false, true).collect(),
        }
    }

    fn has_nobody(&self, index: u32) -> bool {
        !self.inside.contains(&index) && !self.of_init.contains(&index)
    }
}

fn of_socket(socket: &Socket, snapshot: &Snapshot) -> Option<String> {
    if !FAMILIES.contains(&socket.domain) {
        let family = socket.domain;
        return Some(format!(
            "has a socket of a family (AF {family}) that CRIU does not know"
        ));
    }
    if socket.waiting > 0 {
        let port = socket.local.map_or(0, |local| local.port);
        return Some(format!(
            "has not accepted a connection to its port {port} for a while, and CRIU cannot dump \
             one that waits"
        ));
    }
    // Dumped with exit code 0; the restore says "Can't connect inet socket back".
    if socket.is_cut_off {
        let port = socket.local.map_or(0, |local| local.port);
        return Some(format!(
            "has a connection inside the sandbox (port {port}), and the interface lo is down, so \
             that it cannot be restored"
        ));
    }
    // Dumped with exit code 0; the restore says "Can't bind inet socket". For IPv6 CRIU binds
    // whether the address is there or not.
    let local = socket
        .local
        .as_ref()
        .filter(|_| socket.domain == libc::AF_INET)?;
    let IpAddr::V4(ip) = local.ip else {
        return None;
    };
    let is_there = ip.is_unspecified()
        || ip.is_multicast()
        || ip.is_broadcast()
        || snapshot.addresses.iter().any(|(network, length)| {
            let shift = 32 - u32::from(*length).min(32);
            let prefix = |ip: std::net::Ipv4Addr| u64::from(u32::from(ip)) >> shift;
            prefix(*network) == prefix(ip)
        });
    (!is_there).then(|| {
        let port = local.port;
        format!(
            "has a socket at {ip}:{port}, an address that the sandbox no longer has (is the \
             interface down?), so that the socket cannot be restored"
        )
    })
}
