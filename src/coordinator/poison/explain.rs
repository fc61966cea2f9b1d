//! What CRIU's log means, in words that a user can act on.

use super::Snapshot;

/// A cause, by what CRIU's log says.
struct Known {
    /// Part of a line of the log.
    said: &'static str,
    /// What it means.
    means: &'static str,
}

/// As found with CRIU 4.2.1.
const KNOWN: &[Known] = &[
    Known {
        said: "unix: Dangling connection",
        means: "a unix socket is connected to a server outside of the sandbox (a socket bound in \
                from the host), which CRIU cannot dump: close the connection",
    },
    Known {
        said: "Can't dump half of stream unix connection",
        means: "a unix socket is connected to a server outside of the sandbox (a socket bound in \
                from the host), which CRIU cannot dump: close the connection",
    },
    Known {
        said: "without peer",
        means: "a unix socket is connected to a server outside of the sandbox (a socket bound in \
                from the host), which CRIU cannot dump: close the connection",
    },
    Known {
        // The kernel counts an accepted connection to the network of who has connected.
        said: "unix: Unix socket",
        means: "a unix socket is connected to a client outside of the sandbox (which came in by a \
                socket's file), and CRIU cannot dump it: close the connection",
    },
    Known {
        said: "fsnotify: \tCan't dump that handle",
        means: "a file that is watched (inotify; tail -f, a development server) cannot be found \
                again by CRIU: end the watching process",
    },
    Known {
        said: "Use link-remap option",
        means: "a deleted file is still in use and has another name, or comes from the image; \
                CRIU cannot keep it: restart the process that uses it",
    },
    Known {
        said: "Can't dump ghost file",
        means: "a deleted file that is still in use is too large for a checkpoint: restart the \
                process that uses it",
    },
    Known {
        said: "Can't get rlimit",
        means: "a process belongs to another user than root, and crab's shim lacks \
                CAP_SYS_RESOURCE, without which CRIU cannot dump it",
    },
    Known {
        said: "Can't dump nested pid namespace",
        means: "a process is in a pid namespace of its own, which CRIU cannot dump: end it",
    },
    Known {
        said: "mqueue isn't empty",
        means: "there is a POSIX message queue, which CRIU cannot dump: remove it (mq_unlink)",
    },
    Known {
        said: "Can't lookup mount=",
        means: "a process has a file open that is in no mount of the sandbox",
    },
    Known {
        said: "TCP socket",
        means: "there is an open TCP connection, and the client has not asked for those to be \
                kept (--tcp-established)",
    },
];

/// What the end of CRIU's log means; none if it says nothing that is known. Names the process
/// where the log does.
pub fn explain(log: &str, snapshot: Option<&Snapshot>) -> Option<String> {
    let known = KNOWN.iter().find(|known| log.contains(known.said))?;
    let culprit = snapshot.and_then(|snapshot| culprit(log, snapshot));
    Some(match culprit {
        Some(process) => format!("{process}: {}", known.means),
        None => known.means.to_owned(),
    })
}

/// CRIU logs "Dump files (pid: 4668) failed", with the pid that it sees itself: the host's.
fn culprit(log: &str, snapshot: &Snapshot) -> Option<String> {
    let (_, after) = log.split_once("(pid: ")?;
    let (pid, _) = after.split_once(')')?;
    let pid: i32 = pid.parse().ok()?;
    let found = snapshot.processes.iter().find(|p| p.host_pid == pid)?;
    Some(super::rules::who(found))
}
