//! Terminals, with a pty whose slave the test holds.

use nix::sys::termios;

use super::*;

struct Terminal {
    io: ProcessIo,
    slave: File,
    client_in: File,
    client_out: File,
}

fn terminal(bed: &Bed) -> Terminal {
    let (stdin, stdout) = (bed.fifo("in"), bed.fifo("out"));
    let client_out = client_reader(&stdout);
    let mut config = config(&stdin, &stdout, "");
    config.terminal = true;
    let io = bed.open_for(&config, None).unwrap();
    assert!(io.is_terminal() && io.take_child_fds().is_none());
    io.resize(80, 25).unwrap();
    let (master, slave) = pty();
    let mut raw = termios::tcgetattr(&slave).unwrap();
    termios::cfmakeraw(&mut raw);
    termios::tcsetattr(&slave, termios::SetArg::TCSANOW, &raw).unwrap();
    io.attach_console(master).unwrap();
    Terminal {
        io,
        slave,
        client_in: client_writer(&stdin),
        client_out,
    }
}

fn size(slave: &File) -> (u16, u16) {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize.
    unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(slave),
            libc::TIOCGWINSZ,
            &raw mut size,
        )
    };
    (size.ws_col, size.ws_row)
}

#[test]
fn a_terminal_carries_both_ways_and_its_size() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_in,
        client_out,
    } = terminal(&bed);
    assert_eq!(size(&slave), (80, 25));
    io.resize(132, 50).unwrap();
    assert_eq!(size(&slave), (132, 50));
    (&client_in).write_all(b"ls").unwrap();
    assert_eq!(read_exactly(&slave, 2), b"ls");
    (&slave).write_all(b"files").unwrap();
    assert_eq!(read_exactly(&client_out, 5), b"files");
    assert!(io.stdio_pipes().unwrap().is_empty());

    (&slave).write_all(b"logout").unwrap();
    drop(slave);
    io.leader_exited();
    assert_eq!(read_to_end(&client_out), b"logout");
    io.finish(LIMIT);
}

#[test]
fn much_goes_through_a_terminal_both_ways() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_in,
        client_out,
    } = terminal(&bed);
    let bytes = noise(2 << 20, 21);
    let sender = write_all(client_in, bytes.clone());
    let reader = slave.try_clone().unwrap();
    let echo = thread::spawn(move || {
        let mut chunk = [0; 1000];
        loop {
            match (&reader).read(&mut chunk) {
                Ok(n) if n > 0 => (&reader).write_all(&chunk[..n]).unwrap(),
                _ => return,
            }
        }
    });
    assert!(read_exactly(&client_out, bytes.len()) == bytes);
    let client_in = joined(sender);
    io.close_stdin();
    drop(client_in); // hangs up: the echo ends
    joined(echo);
}

#[test]
fn a_process_may_close_its_terminal_and_open_it_again() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_in,
        client_out,
    } = terminal(&bed);
    let name = fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&slave)
    ));
    (&slave).write_all(b"a").unwrap();
    assert_eq!(read_exactly(&client_out, 1), b"a");
    drop(slave);
    assert_asleep(&bed.pump);
    assert!(open_and_empty(&client_out), "the leader is still there");
    (&client_in).write_all(b"typed\n").unwrap();
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(name.unwrap())
        .unwrap();
    assert_eq!(read_exactly(&slave, 6), b"typed\n");
    (&slave).write_all(b"b").unwrap();
    assert_eq!(read_exactly(&client_out, 1), b"b");
    drop(slave);
    io.leader_exited();
    assert_eq!(read_to_end(&client_out), b"");
}

#[test]
fn a_rollback_gives_the_client_another_terminal_unnoticed() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_in,
        client_out,
    } = terminal(&bed);
    (&slave).write_all(b"old").unwrap();
    assert_eq!(read_exactly(&client_out, 3), b"old");
    drop(slave);
    let (master, slave) = pty();
    io.attach_console(master).unwrap();
    assert_eq!(size(&slave), (80, 25));
    (&slave).write_all(b"new").unwrap();
    assert_eq!(read_exactly(&client_out, 3), b"new");
    (&client_in).write_all(b"x\n").unwrap();
    assert_eq!(read_exactly(&slave, 2), b"x\n");
    io.leader_exited();
    drop(slave);
    assert_eq!(
        read_to_end(&client_out),
        b"x\r\n",
        "the line discipline's echo, and the end"
    );
}

#[test]
fn the_end_of_input_hangs_a_terminal_up() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_in,
        client_out,
    } = terminal(&bed);
    (&slave).write_all(b"prompt").unwrap();
    drop(client_in);
    assert_eq!(read_exactly(&client_out, 6), b"prompt");
    assert!(
        !has_event(&slave, PollFlags::POLLIN),
        "the client may come back"
    );
    io.close_stdin();
    let event = wait_event(&slave, PollFlags::POLLIN, "the hang-up");
    assert!(event.contains(PollFlags::POLLHUP));
    assert_eq!(read_to_end(&client_out), b"");
}

#[test]
fn a_background_process_on_a_terminal_does_not_keep_the_client_waiting() {
    let bed = Bed::new();
    let Terminal {
        io,
        slave,
        client_out,
        ..
    } = terminal(&bed);
    (&slave).write_all(b"bye").unwrap();
    io.leader_exited();
    assert_eq!(read_to_end(&client_out), b"bye");
    assert!(io.is_live());
    let slave = write_all(slave, noise(200_000, 3));
    wait_for("its output to go to nowhere", || slave.is_finished());
    io.finish(LIMIT);
    drop(joined(slave));
    wait_for("the end", || !io.is_live());
}

#[test]
fn a_logger_gets_a_terminals_output_on_stdout() {
    let bed = Bed::new();
    let out = bed.path("out");
    let script = bed.path("logger.sh");
    fs::write(&script, format!("exec 5>&-; cat <&3 > {}", out.display())).unwrap();
    let mut config = config("", &format!("binary:///bin/sh?{}", script.display()), "");
    config.terminal = true;
    let io = bed.open_for(&config, None).unwrap();
    let (master, slave) = pty();
    io.attach_console(master).unwrap();
    (&slave).write_all(b"hello").unwrap();
    wait_for("the log", || {
        fs::read(&out).is_ok_and(|log| log == b"hello")
    });
    drop(slave);
}

#[test]
fn a_console_socket_receives_a_terminal_and_cleans_up() {
    let base = tempfile::tempdir().unwrap();
    // Below a directory of names as long as they may be, too.
    for below in ["short".to_owned(), format!("{0}/{0}", "x".repeat(90))] {
        receives_a_terminal_and_cleans_up(&base.path().join(below));
    }
}

fn receives_a_terminal_and_cleans_up(base: &Path) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let socket = ConsoleSocket::new_in(base).unwrap();
    assert!(socket.path().as_os_str().len() < 100);
    let dir = fs::canonicalize(socket.path().parent().unwrap()).unwrap();
    assert_eq!(dir.parent(), Some(base));
    let mode = std::os::unix::fs::PermissionsExt::mode(&dir.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
    let send = |fd: OwnedFd| {
        let stream = std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
        let raw = [std::os::fd::AsRawFd::as_raw_fd(&fd)];
        let rights = [ControlMessage::ScmRights(&raw)];
        let name = [io::IoSlice::new(b"/dev/ptmx")];
        let stream = std::os::fd::AsRawFd::as_raw_fd(&stream);
        sendmsg::<()>(stream, &name, &rights, MsgFlags::empty(), None).unwrap();
    };
    let (master, slave) = pty();
    send(master);
    let master = socket.receive(LIMIT).unwrap();
    nix::unistd::write(&master, b"x\n").unwrap();
    assert_eq!(read_exactly(&slave, 2), b"x\n");

    send(File::open("/dev/null").unwrap().into());
    assert!(socket.receive(LIMIT).is_err(), "no terminal");
    let error = socket.receive(Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    drop(socket);
    assert!(!dir.exists());
}
