use std::{
    collections::BTreeSet,
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
};

use nix::poll::{PollFd, PollFlags, poll};

use super::{
    snapshot::has_posix_locks,
    sockets::{local_addresses, look_at},
    *,
};

fn process(pid: i32, kinds: &[Kind]) -> Process {
    let kinds = (0..).zip(kinds.iter().cloned());
    Process {
        host_pid: 1000 + pid,
        pid,
        name: format!("p{pid}"),
        is_init: pid == 1,
        descriptors: kinds.map(|(fd, kind)| Descriptor { fd, kind }).collect(),
        ..Process::default()
    }
}

fn sandbox(processes: Vec<Process>) -> Snapshot {
    Snapshot {
        processes,
        addresses: vec![([127, 0, 0, 0].into(), 8), ([10, 9, 9, 2].into(), 32)],
        queues: Vec::new(),
    }
}

fn slave(index: u32) -> Kind {
    Kind::Terminal {
        is_master: false,
        index,
    }
}

fn master(index: u32) -> Kind {
    Kind::Terminal {
        is_master: true,
        index,
    }
}

fn deleted(links: u32) -> Kind {
    Kind::Deleted {
        path: "/lib/x.so".into(),
        links,
    }
}

fn inet(local: &str, peer: Option<&str>) -> Kind {
    let address = |text: &str| Address::from(text.parse::<std::net::SocketAddr>().unwrap());
    let local = address(local);
    Kind::Socket(Socket {
        domain: match local.ip {
            std::net::IpAddr::V4(_) => libc::AF_INET,
            std::net::IpAddr::V6(_) => libc::AF_INET6,
        },
        kind: libc::SOCK_STREAM,
        protocol: libc::IPPROTO_TCP,
        local: Some(local),
        peer: peer.map(address),
        ..Socket::default()
    })
}

fn family(domain: i32) -> Kind {
    Kind::Socket(Socket {
        domain,
        ..Socket::default()
    })
}

fn anonymous(name: &str) -> Kind {
    Kind::Anonymous(name.into())
}

/// What is said of a sandbox with these processes; empty if it is fine.
fn said(snapshot: &Snapshot) -> String {
    match judge(snapshot) {
        Verdict::Fine => String::new(),
        Verdict::FilesOnly(reasons) | Verdict::Refuse(reasons) => reasons.to_string(),
    }
}

#[test]
fn what_cannot_come_back_is_named_and_all_else_is_fine() {
    let init = || process(1, &[Kind::Plain, slave(7), slave(7)]);
    let table: &[(&str, Vec<Kind>)] = &[
        ("", vec![Kind::Plain]),
        // Its own terminal, one of tmux beside it, and init's, which the shim makes anew.
        ("", vec![master(3), slave(3), slave(7)]),
        ("terminal of an exec", vec![slave(4)]),
        ("terminal of an exec", vec![master(3), slave(4)]),
        ("", vec![deleted(0)]),
        ("\"/lib/x.so\"", vec![deleted(1)]),
        ("", vec![Kind::Memory("/memfd:x".into())]),
        (
            "",
            vec![
                anonymous("eventfd"),
                Kind::Watches(Vec::new()),
                anonymous("pidfd"),
            ],
        ),
        ("\"/db-shm\"", vec![Kind::LockedAndMapped("/db-shm".into())]),
        ("io_uring", vec![anonymous("io_uring")]),
        ("\"userfaultfd\"", vec![anonymous("userfaultfd")]),
        ("\"landlock-ruleset\"", vec![anonymous("landlock-ruleset")]),
        ("message queue \"/q\"", vec![Kind::Queue("/q".into())]),
        (
            "no mount of the sandbox",
            vec![Kind::Outside("/dev/null".into())],
        ),
        ("", vec![family(libc::AF_UNIX), family(libc::AF_NETLINK)]),
        ("AF 40", vec![family(libc::AF_VSOCK)]),
        (
            "",
            vec![
                inet("127.0.0.1:80", None),
                inet("127.3.2.1:80", Some("127.0.0.1:9")),
            ],
        ),
        (
            "",
            vec![
                inet("0.0.0.0:80", None),
                inet("224.0.0.1:80", None),
                inet("255.255.255.255:68", None),
            ],
        ),
        ("", vec![inet("10.9.9.2:80", Some("1.2.3.4:80"))]),
        ("10.9.9.3:80", vec![inet("10.9.9.3:80", None)]),
        // CRIU binds these whether the address is there or not.
        ("", vec![inet("[fd00::1]:80", None)]),
    ];
    for (wanted, kinds) in table {
        let found = said(&sandbox(vec![init(), process(5, kinds)]));
        assert_eq!(found.is_empty(), wanted.is_empty(), "{kinds:?}: {found}");
        assert!(found.contains(wanted), "{kinds:?}: {found}");
        assert!(
            found.is_empty() || found.starts_with("process 5 (\"p5\", host pid 1005) "),
            "{found}"
        );
    }
}

#[test]
fn a_process_in_an_unusual_place_is_named() {
    type Change = fn(&mut Process);
    let change: &[(&str, Change)] = &[
        ("", |_| {}),
        ("is being traced", |p| p.tracer = 9),
        ("user namespace", |p| p.own_users = true),
        ("/memfd:prog", |p| {
            p.program = Some(Kind::Memory("/memfd:prog".into()))
        }),
        ("\"/lib/x.so\"", |p| p.program = Some(deleted(1))),
        ("\"/lib/x.so\"", |p| p.others.push(deleted(2))),
        ("", |p| p.program = Some(deleted(0))),
    ];
    for (wanted, change) in change {
        let mut one = process(5, &[]);
        change(&mut one);
        let found = said(&sandbox(vec![process(1, &[]), one]));
        assert_eq!(found.is_empty(), wanted.is_empty(), "{found}");
        assert!(found.contains(wanted), "{found}");
    }
}

#[test]
fn a_message_queue_counts_though_nobody_has_it_open() {
    let mut snapshot = sandbox(vec![process(1, &[])]);
    snapshot.queues.push("q".into());
    assert!(said(&snapshot).contains("(/q)"));
}

#[test]
fn without_lo_a_socket_of_the_loopback_cannot_come_back() {
    let mut snapshot = sandbox(vec![process(1, &[inet("127.0.0.1:80", None)])]);
    assert_eq!(said(&snapshot), "");
    snapshot.addresses.clear();
    assert!(said(&snapshot).contains("127.0.0.1:80"));
}

#[test]
fn a_connection_that_waits_is_named_with_its_port() {
    let Kind::Socket(mut socket) = inet("127.0.0.1:80", None) else {
        panic!()
    };
    socket.waiting = 1;
    let snapshot = sandbox(vec![process(1, &[Kind::Socket(socket)])]);
    assert!(snapshot.has_waiting_connection());
    assert!(said(&snapshot).contains("port 80"));
}

#[test]
fn an_end_whose_other_nobody_has_leads_outside_until_it_is_closed() {
    let end = |local: &str, peer: &str, is_open, unconfirmed| {
        let Kind::Socket(mut socket) = inet(local, Some(peer)) else {
            panic!()
        };
        socket.is_open = is_open;
        socket.unconfirmed = unconfirmed;
        Kind::Socket(socket)
    };
    let here = || end("127.0.0.1:80", "127.0.0.1:90", true, 7);
    let there = end("127.0.0.1:90", "127.0.0.1:80", true, 0);
    let both = sandbox(vec![process(1, &[here()]), process(2, &[there])]);
    assert!(!both.has_lone_end() && !both.has_outside_tcp() && both.has_data_under_way());
    let one = sandbox(vec![process(1, &[here()])]);
    assert!(one.has_lone_end() && one.has_outside_tcp());
    // The other has sent all and closed it: nothing is lost with it.
    let left = end("127.0.0.1:80", "127.0.0.1:90", false, 0);
    let closed = sandbox(vec![process(1, &[left])]);
    assert!(!closed.has_lone_end() && !closed.has_outside_tcp() && !closed.has_data_under_way());
    // What is on its way to somewhere else is not waited for.
    let away = sandbox(vec![process(
        1,
        &[end("10.9.9.2:80", "10.9.9.3:90", true, 7)],
    )]);
    assert!(away.has_outside_tcp() && !away.has_lone_end() && !away.has_data_under_way());
}

#[test]
fn a_socket_tells_what_it_has_not_been_confirmed() {
    use std::io::Write;

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let look = |socket: &TcpStream| look_at(&socket.try_clone().unwrap().into());
    assert_eq!(
        (look(&client).unconfirmed, look(&client).is_open),
        (0, true)
    );
    client.set_nonblocking(true).unwrap();
    // More than both sides' buffers take.
    let bytes = vec![0; 64 << 20];
    assert!(client.write(&bytes).unwrap() < bytes.len());
    assert!(look(&client).unconfirmed > 0);
    assert_eq!(look(&server).unconfirmed, 0);
    drop(server);
    // What was not read when it was closed resets the connection: once no child that another test
    // starts has it, and once the packet has come.
    let mut told = [PollFd::new(client.as_fd(), PollFlags::empty())];
    assert_eq!(poll(&mut told, 30_000u16).unwrap(), 1);
    assert!(!look(&client).is_open);
}

#[test]
fn a_connection_through_a_lo_that_is_down_is_named() {
    let Kind::Socket(mut socket) = inet("127.0.0.1:80", Some("127.0.0.1:90")) else {
        panic!()
    };
    socket.is_cut_off = true;
    assert!(said(&sandbox(vec![process(1, &[Kind::Socket(socket)])])).contains("port 80"));
}

#[test]
fn posix_locks_are_read_from_fdinfo() {
    // As shown by kernel 6.18.
    let posix = "pos:\t0\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 27 00:30:1452 120 120\n";
    let flock = "pos:\t0\nflags:\t02\nlock:\t1: FLOCK  ADVISORY  WRITE 27 00:30:1452 0 EOF\n";
    assert!(has_posix_locks(posix) && !has_posix_locks(flock) && !has_posix_locks("pos:\t0\n"));
}

#[test]
fn many_reasons_are_few_words() {
    let kinds: Vec<Kind> = (0..10).map(|n| Kind::Outside(format!("/x{n}"))).collect();
    let found = said(&sandbox(vec![process(1, &kinds)]));
    assert!(
        found.ends_with("; and 7 more") && !found.contains("/x3"),
        "{found}"
    );
    // The same cause twice is one.
    let twice = said(&sandbox(vec![process(
        1,
        &[anonymous("io_uring"), anonymous("io_uring")],
    )]));
    assert!(!twice.contains(';'), "{twice}");
}

#[test]
fn a_connection_to_elsewhere_is_told_from_one_inside() {
    let outside = |kind| sandbox(vec![process(1, &[kind])]).has_outside_tcp();
    assert!(!outside(inet("127.0.0.1:80", None)));
    assert!(!outside(inet("127.0.0.1:80", Some("127.0.0.1:9"))));
    assert!(!outside(inet(
        "[::ffff:127.0.0.1]:80",
        Some("[::ffff:127.0.0.1]:9")
    )));
    assert!(outside(inet("10.9.9.2:80", Some("1.2.3.4:80"))));
    assert!(outside(inet("[fd00::1]:80", Some("[fd00::2]:80"))));
}

/// As shown by kernel 6.18.
const FIB_TRIE: &str = "Main:
  +-- 0.0.0.0/1 2 0 2
     +-- 10.9.9.0/24 2 0 2
        |-- 10.9.9.0
           /24 link UNICAST
        |-- 10.9.9.2
           /32 host LOCAL
        |-- 10.9.9.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
";

#[test]
fn the_kernels_local_addresses_are_read() {
    let found = local_addresses(FIB_TRIE);
    let wanted = [
        ([10, 9, 9, 2], 32),
        ([10, 9, 9, 255], 32),
        ([127, 0, 0, 0], 8),
        ([127, 0, 0, 1], 32),
    ];
    assert_eq!(found, wanted.map(|(ip, length)| (ip.into(), length)));
    assert_eq!(local_addresses(""), []);
}

#[test]
fn this_process_is_read_as_it_is() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    let file = std::fs::File::create(&gone).unwrap();
    std::fs::hard_link(&gone, dir.path().join("other")).unwrap();
    std::fs::remove_file(&gone).unwrap();
    let me = std::process::id() as i32;
    let found = Snapshot::read(&BTreeSet::from([me]), me).unwrap();
    let [process] = found.processes.as_slice() else {
        panic!("{found:?}");
    };
    let kinds: Vec<&Kind> = process.descriptors.iter().map(|d| &d.kind).collect();
    let socket = |kind: &&&Kind| matches!(kind, Kind::Socket(s) if s.local == Some(listener.local_addr().unwrap().into()));
    assert!(kinds.iter().any(|k| socket(&k)), "{kinds:?}");
    assert!(kinds.iter().any(
        |kind| matches!(kind, Kind::Socket(s) if s.is_connected_tcp()
        && s.local == Some(stream.local_addr().unwrap().into()))
    ));
    assert!(kinds.contains(&&Kind::Deleted {
        path: gone.to_string_lossy().into_owned(),
        links: 1
    }));
    assert!(said(&found).contains(&*gone.to_string_lossy()));
    drop((file, stream));
}

#[test]
fn criu_s_log_is_put_into_words_with_the_process_that_it_names() {
    let log = "(00.041661) Error (criu/sk-unix.c:479): unix: Dangling connection 72195\n\
               (00.041690) Error (criu/cr-dump.c:1545): Dump files (pid: 1005) failed with -1";
    let snapshot = sandbox(vec![process(1, &[]), process(5, &[])]);
    let text = explain(log, Some(&snapshot)).unwrap();
    assert!(
        text.starts_with("process 5 (\"p5\", host pid 1005): a unix socket"),
        "{text}"
    );
    assert!(explain(log, None).unwrap().starts_with("a unix socket"));
    assert_eq!(explain("all is well", Some(&snapshot)), None);
}
