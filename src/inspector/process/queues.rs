//! How much waits in the kernel's queues of one pipe, terminal or socket.

use std::{
    mem::{MaybeUninit, size_of},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
};

/// What a queue holds: numbers that are equal if nothing was put in or taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Queue {
    pub(super) amounts: Vec<i64>,
    /// What others can set for it without a trace.
    settings: Vec<i64>,
    /// Whether whatever is put in changes `amounts`.
    pub(super) exact: bool,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            amounts: Vec::new(),
            settings: Vec::new(),
            exact: true,
        }
    }
}

/// An ioctl that counts bytes; -1 where there is no such thing (a listening socket).
fn count(fd: &OwnedFd, request: libc::Ioctl) -> i64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: all requests used here (FIONREAD, TIOCOUTQ = SIOCOUTQ) write one int.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut bytes) };
    if done < 0 { -1 } else { i64::from(bytes) }
}

/// Bytes that wait to be read.
pub(super) fn held(fd: &OwnedFd) -> Queue {
    Queue {
        amounts: vec![count(fd, libc::FIONREAD)],
        ..Queue::default()
    }
}

/// What a pipe holds, and how much it can.
pub(super) fn pipe(fd: &OwnedFd) -> Queue {
    let room = fcntl(fd, FcntlArg::F_GETPIPE_SZ).map_or(-1, i64::from);
    Queue {
        settings: vec![room],
        ..held(fd)
    }
}

/// A terminal keeps about this many bytes that a count of them shows (N_TTY_BUF_SIZE is 4096).
const TERMINAL_SHOWS: i64 = 4000;

/// What waits in a terminal, its settings and its size.
pub(super) fn terminal(fd: &OwnedFd) -> Queue {
    let (input, output) = (count(fd, libc::FIONREAD), count(fd, libc::TIOCOUTQ));
    let mut settings = Vec::new();
    let mut termios = MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: tcgetattr writes one termios.
    if unsafe { libc::tcgetattr(fd.as_raw_fd(), termios.as_mut_ptr()) } == 0 {
        // SAFETY: zeroed, then written; integers all.
        let termios = unsafe { termios.assume_init() };
        let flags = [
            termios.c_iflag,
            termios.c_oflag,
            termios.c_cflag,
            termios.c_lflag,
        ];
        settings.extend(flags.map(i64::from));
        settings.extend(termios.c_cc.map(i64::from));
    }
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one winsize.
    if unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) } == 0 {
        // SAFETY: zeroed, then written; integers all.
        let size = unsafe { size.assume_init() };
        settings.extend([size.ws_row, size.ws_col].map(i64::from));
    }
    Queue {
        amounts: vec![input, output],
        settings,
        exact: input < TERMINAL_SHOWS,
    }
}

/// `SK_MEMINFO_VARS` of linux/sock_diag.h.
const MEMINFO: usize = 9;
/// Of these: received, to be sent, queued for sending, dropped. The others are buffer sizes and
/// caches.
const MEMINFO_USED: [usize; 4] = [0, 2, 5, 8];

/// Reads the queues of a socket.
pub(super) fn socket(fd: &OwnedFd) -> Result<Queue, Errno> {
    let number = |name| -> Result<i32, Errno> {
        let [word] = option::<1>(fd, libc::SOL_SOCKET, name).ok_or_else(Errno::last)?;
        Ok(word.cast_signed())
    };
    let family = number(libc::SO_DOMAIN)?;
    let stream = number(libc::SO_TYPE)? == libc::SOCK_STREAM;
    let listens = number(libc::SO_ACCEPTCONN)? != 0;
    // TIOCOUTQ is SIOCOUTQ.
    let mut amounts = vec![count(fd, libc::FIONREAD), count(fd, libc::TIOCOUTQ)];
    let readiness = readiness(fd)?;
    amounts.push(i64::from(readiness));
    let memory = option::<MEMINFO>(fd, libc::SOL_SOCKET, libc::SO_MEMINFO).unwrap_or([0; MEMINFO]);
    amounts.extend(MEMINFO_USED.map(|index| i64::from(memory[index])));
    let inet = family == libc::AF_INET || family == libc::AF_INET6;
    if inet && stream {
        amounts.extend(tcp_info(fd));
    }
    Ok(Queue {
        amounts,
        settings: Vec::new(),
        // Received datagrams and raw packets are charged to the receiver, so `memory` counts them
        // all. A unix datagram is charged to its sender, and only the first one's length is
        // shown; of a unix listener only whether somebody waits. An empty queue hides nothing.
        exact: inet
            || (family == libc::AF_UNIX && stream && !listens)
            || (family == libc::AF_UNIX && readiness & libc::POLLIN == 0),
    })
}

/// What poll() says at this moment.
fn readiness(fd: &OwnedFd) -> Result<i16, Errno> {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN | libc::POLLPRI | libc::POLLOUT | libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one entry, which lives on; does not wait.
    Errno::result(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// Of `struct tcp_info`: state, and as 32-bit words (linux/tcp.h) unacked (a listener's backlog),
/// bytes acked and bytes received, which only grow.
fn tcp_info(fd: &OwnedFd) -> Vec<i64> {
    const WORDS: usize = 64;
    /// tcpi_unacked follows eight bytes and four words.
    const UNACKED: usize = 6;
    /// tcpi_bytes_acked and tcpi_bytes_received: 64 bits each, behind pacing_rate.
    const BYTES: usize = 30;
    let Some(words) = option::<WORDS>(fd, libc::IPPROTO_TCP, libc::TCP_INFO) else {
        return vec![-1];
    };
    let state = words[0] & 0xff;
    let mut numbers = vec![i64::from(state), i64::from(words[UNACKED])];
    numbers.extend(words[BYTES..BYTES + 4].iter().map(|&word| i64::from(word)));
    numbers
}

/// Whether a socket is a unix socket.
pub(super) fn is_unix(fd: &OwnedFd) -> bool {
    option::<1>(fd, libc::SOL_SOCKET, libc::SO_DOMAIN) == Some([libc::AF_UNIX.cast_unsigned()])
}

/// A socket option that is a row of 32-bit words; what the kernel leaves out is zero.
fn option<const N: usize>(fd: &OwnedFd, level: i32, name: i32) -> Option<[u32; N]> {
    let mut words = MaybeUninit::<[u32; N]>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of::<[u32; N]>()).ok()?;
    // SAFETY: the kernel writes at most `length` bytes into `words`, which has as many.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            words.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    // SAFETY: zeroed before, and any bits are valid integers.
    (done == 0).then(|| unsafe { words.assume_init() })
}
