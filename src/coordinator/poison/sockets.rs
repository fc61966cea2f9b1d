//! What a socket is, asked of the kernel through a copy of its descriptor.

use std::{
    ffi::CStr,
    mem::{MaybeUninit, size_of},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

/// A socket, as far as the rules care.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Socket {
    /// `AF_…`.
    pub domain: i32,
    /// `SOCK_…`.
    pub kind: i32,
    /// `IPPROTO_…`.
    pub protocol: i32,
    /// Where it is bound, if it is an inet socket that is.
    pub local: Option<Address>,
    /// To whom it is connected, if it is an inet socket that is.
    pub peer: Option<Address>,
    /// How many connections wait to be accepted, if it is a listening TCP socket.
    pub waiting: u32,
    /// Bytes that it has sent or will send, and whose arrival is not confirmed, if it is a TCP connection.
    pub unconfirmed: u32,
    /// Whether it is a TCP connection whose other end has not closed it.
    pub is_open: bool,
    /// Whether it is connected through an `lo` that is down.
    pub is_cut_off: bool,
}

/// An internet address and port. An IPv4 address in IPv6's clothes is an IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// The port.
    pub port: u16,
}

impl Address {
    /// Whether nothing but this very network namespace is there.
    pub fn is_loopback(&self) -> bool {
        self.ip.is_loopback()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self {
            ip: address.ip().to_canonical(),
            port: address.port(),
        }
    }
}

impl Socket {
    /// Whether it is a TCP connection.
    pub fn is_connected_tcp(&self) -> bool {
        self.is_inet() && self.kind == libc::SOCK_STREAM && self.peer.is_some()
    }

    /// Whether it speaks IP.
    pub fn is_inet(&self) -> bool {
        matches!(self.domain, libc::AF_INET | libc::AF_INET6)
    }
}

/// Asks the kernel. What it does not say is 0 or none.
pub(super) fn look_at(socket: &OwnedFd) -> Socket {
    let number = |option| option_of(socket, option).unwrap_or_default();
    let mut found = Socket {
        domain: number(libc::SO_DOMAIN),
        kind: number(libc::SO_TYPE),
        protocol: number(libc::SO_PROTOCOL),
        ..Socket::default()
    };
    if found.is_inet() {
        found.local = address(socket, libc::getsockname).filter(|a| a.port != 0);
        found.peer = address(socket, libc::getpeername);
        let through_lo = found.peer.is_some_and(|peer| peer.is_loopback());
        found.is_cut_off = through_lo && is_down(socket, c"lo");
        if found.is_connected_tcp() {
            found.unconfirmed = unconfirmed(socket);
            found.is_open = OPEN.contains(&tcp_info(socket).tcpi_state);
        } else if found.kind == libc::SOCK_STREAM && number(libc::SO_ACCEPTCONN) != 0 {
            // The kernel counts those in this field (`tcp_get_info`).
            found.waiting = tcp_info(socket).tcpi_unacked;
        }
    }
    found
}

/// Whether an interface of the socket's network namespace is down.
fn is_down(socket: &OwnedFd, interface: &CStr) -> bool {
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(interface.to_bytes()) {
        *to = *from as libc::c_char;
    }
    // SAFETY: the request is a valid ifreq with a terminated name, and outlives the call.
    let done = unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCGIFFLAGS as _,
            &raw mut request,
        )
    };
    // SAFETY: the kernel has filled in the flags when the call succeeds.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    done == 0 && libc::c_int::from(flags) & libc::IFF_UP == 0
}

/// `TCP_ESTABLISHED`, `TCP_FIN_WAIT1` and `TCP_FIN_WAIT2` of linux/tcp_states.h: the peer's FIN has not come.
const OPEN: [u8; 3] = [1, 4, 5];

fn unconfirmed(socket: &OwnedFd) -> u32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: this request (SIOCOUTQ) writes one int.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if done == 0 { bytes as u32 } else { 0 }
}

/// All zeroes if the kernel does not say.
fn tcp_info(socket: &OwnedFd) -> libc::tcp_info {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the structure, and none if it fails.
    unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        );
    }
    // SAFETY: zeroed, then perhaps written; plain numbers all.
    unsafe { info.assume_init() }
}

fn option_of(socket: &OwnedFd, option: i32) -> Option<i32> {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: all options asked for here are one int; the kernel writes at most `length` bytes.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    (done == 0).then_some(value)
}

type AddressCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn address(socket: &OwnedFd, call: AddressCall) -> Option<Address> {
    let mut storage = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the storage.
    let done = unsafe {
        call(
            socket.as_raw_fd(),
            storage.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if done != 0 {
        return None;
    }
    // SAFETY: zeroed, then written; plain numbers all.
    let storage = unsafe { storage.assume_init() };
    let address: SocketAddr = match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is a sockaddr_in, which fits into a storage.
            let v4 = unsafe { *(&raw const storage).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            (ip, u16::from_be(v4.sin_port)).into()
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is a sockaddr_in6, which fits into a storage.
            let v6 = unsafe { *(&raw const storage).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            (ip, u16::from_be(v6.sin6_port)).into()
        }
        _ => return None,
    };
    Some(address.into())
}

/// The local addresses in the text of `/proc/PID/net/fib_trie`, each with the length of its
/// prefix: `127.0.0.0/8` makes all of them local, as long as `lo` is up.
pub(super) fn local_addresses(fib_trie: &str) -> Vec<(Ipv4Addr, u8)> {
    let mut found = Vec::new();
    let mut address = None;
    for line in fib_trie.lines() {
        let line = line.trim_start();
        if let Some(text) = line.strip_prefix("|-- ") {
            address = text.trim().parse().ok();
        } else if let (Some(address), Some((prefix, kind))) = (address, line.split_once(' '))
            // A broadcast address can be bound, too.
            && (kind.contains("LOCAL") || kind.contains("BROADCAST"))
            && let Some(length) = prefix.strip_prefix('/').and_then(|p| p.parse().ok())
            && !found.contains(&(address, length))
        {
            found.push((address, length));
        }
    }
    found
}
