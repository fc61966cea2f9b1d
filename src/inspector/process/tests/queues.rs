//! Data that is put into what a process holds.

use std::os::unix::net::UnixDatagram;

use super::*;

/// Puts something into a sleeping actor's descriptor 50; returns the verdict.
fn put(setup: &str, from_outside: impl FnOnce(&Actor)) -> Verdict {
    let actor = Actor::asleep(setup);
    let baseline = actor.baseline();
    assert_eq!(
        acquittals(&actor.judge(&baseline, &actor.facts())),
        [Acquittal::NotRun]
    );
    from_outside(&actor);
    actor.judge(&baseline, &actor.facts())
}

fn python(actor: &Actor, code: &str) {
    actor.enter(&["python3", "-c", &format!("import os, socket, sys\n{code}")]);
}

#[test]
fn data_queued_to_a_sleeping_process_is_a_change() {
    let udp = "s = socket.socket(2, 2); s.bind(('127.0.0.1', 7000)); os.dup2(s.fileno(), 50)";
    let listen =
        "s = socket.socket(); s.bind(('127.0.0.1', 7000)); s.listen(); os.dup2(s.fileno(), 50)";
    let unix = "s = socket.socket(1, 1); s.bind('\\0crab'); s.listen(); os.dup2(s.fileno(), 50)";
    let send_udp = "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 7000))";
    let connect = "s = socket.socket(); s.connect(('127.0.0.1', 7000)); s.send(b'x')";
    let connect_unix = "s = socket.socket(1, 1); s.connect('\\0crab')";
    let first = format!("{udp}; {send_udp}");
    let table: &[(&str, &str)] = &[
        (udp, send_udp),
        // A second datagram of the same length.
        (&first, send_udp),
        (listen, connect),
        (unix, connect_unix),
    ];
    for (setup, code) in table {
        let verdict = put(setup, |actor| python(actor, code));
        assert!(blamed_descriptor(&verdict) >= 3, "{setup}");
    }
}

#[test]
fn bytes_in_a_pipe_or_terminal_of_a_sleeping_process_are_a_change() {
    let pipe = "r, w = os.pipe(); os.dup2(r, 50); os.close(r)";
    let verdict = put(pipe, |actor| write_through(actor.pid(), 50, b"x"));
    assert!(blamed_descriptor(&verdict) >= 3);
    let fifo = "os.mkfifo('f'); os.dup2(os.open('f', os.O_RDWR), 50)";
    let verdict = put(fifo, |actor| fs::write(actor.path("f"), "x").unwrap());
    assert!(blamed_descriptor(&verdict) >= 3);
    // Written to the terminal, read by whoever holds its other end.
    let terminal = "import pty; m, s = pty.openpty(); os.dup2(m, 50); os.dup2(s, 51); import tty; tty.setraw(s)";
    let verdict = put(terminal, |actor| write_through(actor.pid(), 51, b"x"));
    assert!(blamed_descriptor(&verdict) >= 3);
    let watch = "n = libc.inotify_init(); libc.inotify_add_watch(n, os.environb[b'DIR'], 0x100); os.dup2(n, 50)";
    let verdict = put(watch, |actor| fs::write(actor.path("new"), "").unwrap());
    assert!(blamed_descriptor(&verdict) >= 3);
}

#[test]
fn what_an_exec_sets_for_a_pipe_or_terminal_is_a_change() {
    let terminal = "import pty; m, s = pty.openpty(); os.dup2(s, 50)";
    for command in [
        &["stty", "-F", "TTY", "raw"][..],
        &["stty", "-F", "TTY", "rows", "7"],
    ] {
        let verdict = put(terminal, |actor| {
            let path = format!("/proc/{}/fd/50", actor.pid());
            let words = command.iter().map(|word| word.replace("TTY", &path));
            let words: Vec<String> = words.collect();
            let done = Command::new(&words[0]).args(&words[1..]).status().unwrap();
            assert!(done.success());
        });
        assert!(blamed_descriptor(&verdict) >= 3, "{command:?}");
    }
    let pipe = "r, w = os.pipe(); os.dup2(r, 50); os.close(r)";
    let verdict = put(pipe, |actor| {
        let file = fs::File::open(format!("/proc/{}/fd/50", actor.pid())).unwrap();
        let size = nix::fcntl::FcntlArg::F_SETPIPE_SZ(8192);
        nix::fcntl::fcntl(&file, size).unwrap();
    });
    assert!(blamed_descriptor(&verdict) >= 3);
}

/// The count of bytes is the same, the bytes are others.
#[test]
fn bytes_exchanged_in_a_pipe_of_a_sleeping_process_are_a_change() {
    let pipe = "r, w = os.pipe(); os.write(w, b'abc'); os.dup2(r, 50); os.close(r)";
    let verdict = put(pipe, |actor| {
        read_through(actor.pid(), 50, 1);
        write_through(actor.pid(), 50, b"x");
    });
    assert_eq!(blamed_descriptor(&verdict), 50);
}

#[test]
fn a_pipe_that_was_filled_and_emptied_again_is_none() {
    let pipe = "r, w = os.pipe(); os.dup2(r, 50); os.close(r)";
    let verdict = put(pipe, |actor| {
        write_through(actor.pid(), 50, b"x");
        read_through(actor.pid(), 50, 1);
    });
    assert_eq!(acquittals(&verdict), [Acquittal::NotRun]);
}

/// Of unix datagrams only the first one's length shows: then an exec's use of sockets counts.
#[test]
fn a_datagram_behind_another_is_not_missed() {
    let setup = "s = socket.socket(1, 2); s.bind('s'); s.setblocking(True)";
    let actor = Actor::asleep(setup);
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to(b"x", actor.path("s")).unwrap();
    let baseline = actor.baseline();
    sender.send_to(b"y", actor.path("s")).unwrap();
    let mut facts = actor.facts();
    facts.others = Others::SOCK;
    assert!(blamed_descriptor(&actor.judge(&baseline, &facts)) >= 3);
    let plain = Actor::asleep("s = socket.socket(); p, q = socket.socketpair()");
    let baseline = plain.baseline();
    let mut facts = plain.facts();
    facts.others = Others::SOCK;
    assert_eq!(
        acquittals(&plain.judge(&baseline, &facts)),
        [Acquittal::NotRun]
    );
}

/// In and out again, by a process that shows nothing else.
#[test]
fn a_message_through_a_pipe_is_seen_however_it_was_written() {
    type Writer = (&'static str, fn(&Actor));
    let writers: [Writer; 2] = [
        ("write", |actor| write_through(actor.pid(), 50, b"x")),
        ("splice", |actor| {
            let code = format!(
                "import os\np, q = os.pipe(); os.write(q, b'x')\n\
                 os.splice(p, os.open('/proc/{}/fd/50', 1), 1)",
                actor.pid()
            );
            let done = Command::new("python3")
                .args(["-c", &code])
                .status()
                .unwrap();
            assert!(done.success());
        }),
    ];
    for setup in [
        "r, w = os.pipe(); os.dup2(r, 50); os.close(r)",
        "os.mkfifo('f'); f = os.open('f', os.O_RDWR); os.dup2(f, 50); os.close(f)",
    ] {
        for (how, write) in writers {
            let actor = Actor::ready(setup, "os.read(50, 1)");
            let baseline = actor.baseline();
            write(&actor);
            actor.go();
            let why = reasons(&actor.judge(&baseline, &actor.facts()));
            assert_eq!(why, [What::PipeMoved { fd: 50 }], "{setup} {how}");
        }
    }
}

/// The writer's end does not take anything in.
#[test]
fn what_others_write_to_a_log_pipe_is_not_held_against_its_writer() {
    let setup = "r, w = os.pipe(); os.dup2(w, 50); os.close(w); pid = os.fork()\n\
        if pid == 0:\n  libc.prctl(1, 9, 0, 0, 0); os.close(50); name('child'); select.select([], [], [])\n\
        os.close(r); time.sleep(0.05)";
    let actor = Actor::ready(setup, "pass");
    let baseline = actor.baseline();
    write_through(actor.pid(), 50, b"log\n");
    actor.go();
    // The pipe holds four bytes more now: that is the change, not that somebody wrote.
    let why = reasons(&actor.judge(&baseline, &actor.facts()));
    assert!(
        matches!(why[..], [What::Descriptor { fd: 50, .. }]),
        "{why:?}"
    );
    read_through(actor.pid(), 50, 4);
    assert_eq!(
        acquittals(&actor.judge(&baseline, &actor.facts())),
        [Acquittal::ConsistentCut]
    );
    let text = fs::read_to_string(format!("/proc/{0}/task/{0}/children", actor.pid())).unwrap();
    let child = text.trim().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::SIGKILL).unwrap();
}

#[test]
fn who_read_may_have_read_a_message() {
    let read = "open('/proc/self/stat').read()";
    let setups = [
        ("terminal", "import pty; m, s = pty.openpty()"),
        ("inotify", "n = libc.inotify_init()"),
        ("unknown", "m = os.memfd_create('x')"),
    ];
    for (what, setup) in setups {
        let actor = Actor::ready(setup, read);
        let baseline = actor.baseline();
        assert!(
            actor.judge(&baseline, &actor.facts()).is_unchanged(),
            "{what}"
        );
        actor.go();
        let why = reasons(&actor.judge(&baseline, &actor.facts()));
        assert!(
            matches!(why[..], [What::MayHaveRead(kind)] if kind.contains(what)),
            "{why:?}"
        );
    }
    // A call that returns nothing takes nothing.
    let actor = Actor::ready(
        "import pty; m, s = pty.openpty(); n = open('/dev/null')",
        "n.read()",
    );
    let baseline = actor.baseline();
    actor.go();
    let verdict = actor.judge(&baseline, &actor.facts());
    assert_eq!(acquittals(&verdict), [Acquittal::ConsistentCut]);
    let actor = Actor::ready("", "open('/proc/self/stat').read()");
    let baseline = actor.baseline();
    actor.go();
    let mut facts = actor.facts();
    facts.others = Others::SHM;
    assert_eq!(
        reasons(&actor.judge(&baseline, &facts)),
        [What::MayHaveRead("shared memory")]
    );
    // An exec's own sockets, pipes and memory are nobody else's.
    facts.others = Others::SOCK.with(Others::PIPE).with(Others::MEMORY);
    let verdict = actor.judge(&baseline, &facts);
    assert_eq!(acquittals(&verdict), [Acquittal::ConsistentCut]);
    let mut facts = actor.facts();
    facts.client_bytes = 1;
    assert_eq!(
        reasons(&actor.judge(&baseline, &facts)),
        [What::MayHaveRead("the client")]
    );
}

#[test]
fn a_timer_is_not_a_queue() {
    // timerfd_create and timerfd_settime: every millisecond.
    let setup = "t = libc.syscall(283, 1, 0); b = struct.pack('qqqq', 0, 10**6, 0, 10**6)\n\
        assert libc.syscall(286, t, 0, b, None) == 0";
    let actor = Actor::asleep(setup);
    let baseline = actor.baseline();
    std::thread::sleep(Duration::from_millis(20));
    let links: Vec<_> = actor.snapshot().processes[0]
        .table
        .all
        .iter()
        .map(|one| one.target.clone())
        .collect();
    assert!(
        links.contains(&"anon_inode:[timerfd]".to_owned()),
        "{links:?}"
    );
    assert_eq!(
        acquittals(&actor.judge(&baseline, &actor.facts())),
        [Acquittal::NotRun]
    );
}
