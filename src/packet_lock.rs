//! Keeps the kernel from moving data along the TCP connections of a sandbox that stands still.
//!
//! A frozen process moves nothing, but the kernel goes on for it: an acknowledgement that was put off is
//! sent after 40 ms and lets the other side send what had to wait, and what was lost is sent again. CRIU
//! reads one end of a connection after the other. What arrives in between is in the image of one end, and
//! not yet sent in that of the other; such a connection stands still for ever after the restore. And a
//! restore makes one end after the other: what the first one had still to send is sent at once, to a port
//! where nobody is yet, and the answer to that ends the connection.
//!
//! So nothing passes through the namespace's `lo` meanwhile. What is dropped is sent again, as after any
//! loss. CRIU's own lock (iptables or nftables) would stay behind if CRIU is killed, costs 25 to 70 ms,
//! and does nothing at the restore into a namespace that has a path (`empty_ns` alone locks there). This
//! one ends with its owner. Kernel 6.4 (`BPF_PROG_TYPE_NETFILTER`).

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
};

use libbpf_rs::{Link, NetfilterOpts, Object, ObjectBuilder};
use nix::sched::{CloneFlags, setns};
use parking_lot::Mutex;

/// The compiled program.
static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/packet_lock.bpf.o"));

/// `NFPROTO_IPV4` and `NFPROTO_IPV6` of linux/netfilter.h.
const FAMILIES: [i32; 2] = [2, 10];
/// `NF_INET_LOCAL_OUT`.
const LOCAL_OUT: i32 = 3;
/// Before connection tracking (-200) sees anything. Two programs of one namespace may not have the same
/// priority (EBUSY): in a pod its containers share it.
const PRIORITIES: std::ops::Range<i32> = -1_000..-990;

/// As long as it lives, nothing passes through `lo`.
#[derive(Debug)]
pub struct PacketLock {
    _links: Vec<Link>,
}

impl PacketLock {
    /// Locks a network namespace, as in `/proc/PID/ns/net`.
    ///
    /// The host's own is refused: others than the sandbox would suffer.
    pub fn of(netns: &Path) -> Result<Self, String> {
        let named = |e: io::Error| format!("{}: {e}", netns.display());
        if is_ours(netns).map_err(named)? {
            return Err("it shares the host's network".into());
        }
        let namespace = File::open(netns).map_err(named)?;
        let program = program()?;
        // The thread ends in that namespace, so that no other of the shim's is ever there.
        let thread = thread::Builder::new().name("packets".into());
        let links = thread::scope(|scope| {
            let attached = thread.spawn_scoped(scope, || {
                setns(&namespace, CloneFlags::CLONE_NEWNET)
                    .map_err(|e| format!("{}: setns: {e}", netns.display()))?;
                attach(&program.lock())
            });
            let attached = attached.map_err(named)?;
            attached
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(Self { _links: links })
    }

    /// Locks the namespace that a restore will be made into, if there are connections among the images.
    ///
    /// If it cannot be locked, the restore may still be a good one: nothing was under way in any dump
    /// that was made on a host like this.
    pub fn for_restore(images: &Path, netns: &Result<PathBuf, String>) -> Option<Self> {
        let is_stream = |name: &OsStr| name.as_encoded_bytes().starts_with(b"tcp-stream-");
        let mut entries = fs::read_dir(images).into_iter().flatten().flatten();
        if !entries.any(|entry| is_stream(&entry.file_name())) {
            return None;
        }
        let locked = netns.as_deref().map_err(Clone::clone).and_then(Self::of);
        locked
            .inspect_err(|why| log::info!("{}: packets are not held back: {why}", images.display()))
            .ok()
    }

    /// Whether this host can; what has to be done once is done.
    pub fn prepare() -> Result<(), String> {
        program().map(drop)
    }
}

/// Whether a namespace is that of the caller.
fn is_ours(netns: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let identity = |path: &Path| fs::metadata(path).map(|of| (of.dev(), of.ino()));
    Ok(identity(netns)? == identity(Path::new("/proc/self/ns/net"))?)
}

/// Loaded once, at the first need: libbpf reads the kernel's types for it.
fn program() -> Result<&'static Mutex<Object>, String> {
    static LOADED: OnceLock<Result<Mutex<Object>, String>> = OnceLock::new();
    let load = || {
        // It says on stderr what it tries.
        libbpf_rs::set_print(None);
        let opened = ObjectBuilder::default().open_memory(PROGRAM);
        opened
            .and_then(|open| open.load())
            .map(Mutex::new)
            .map_err(|e| format!("this kernel cannot hold packets back: {e:#}"))
    };
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn attach(object: &Object) -> Result<Vec<Link>, String> {
    let program = object.progs_mut().next().ok_or("no program")?;
    let attach = |protocol_family| {
        let mut failed = None;
        for priority in PRIORITIES {
            let options = NetfilterOpts {
                protocol_family,
                hooknum: LOCAL_OUT,
                priority,
                ..Default::default()
            };
            match program.attach_netfilter_with_opts(options) {
                Err(e) => failed = Some(e),
                attached => return attached,
            }
        }
        Err(failed.unwrap_or_else(|| io::Error::other("no priority").into()))
    };
    let links: Result<_, libbpf_rs::Error> = FAMILIES.into_iter().map(attach).collect();
    links.map_err(|e| format!("cannot hold packets back: {e:#}"))
}
