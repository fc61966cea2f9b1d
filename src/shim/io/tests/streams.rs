//! Plain pipes and FIFOs.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

#[test]
fn bytes_go_both_ways_and_ends_of_file_too() {
    let bed = Bed::new();
    let (stdin, stdout) = (bed.fifo("in"), bed.fifo("out"));
    let client_out = client_reader(&stdout);
    let io = bed.open(&stdin, &format!("fifo://{stdout}"), "");
    let Process {
        stdin, mut stdout, ..
    } = {
        let client_in = client_writer(bed.path("in"));
        let process = start(&io);
        (&client_in).write_all(b"ping").unwrap();
        assert_eq!(read_exactly(&process.stdin, 4), b"ping");
        (&process.stdout).write_all(b"pong").unwrap();
        assert_eq!(read_exactly(&client_out, 4), b"pong");
        io.close_stdin();
        assert!(
            open_and_empty(&process.stdin),
            "the client still has it open"
        );
        (&client_in).write_all(b"last").unwrap();
        drop(client_in);
        process
    };
    assert_eq!(read_to_end(&stdin), b"last");
    stdout.write_all(b"bye").unwrap();
    drop((stdin, stdout));
    assert_eq!(read_to_end(&client_out), b"bye");
    io.leader_exited();
    io.finish(LIMIT);
    assert!(!io.is_live());
}

#[test]
fn a_client_may_leave_stdin_and_come_back_until_close_io() {
    let bed = Bed::new();
    let path = bed.fifo("in");
    let io = bed.open(&path, "", "");
    let process = start(&io);
    for word in [b"one", b"two"] {
        client_writer(&path).write_all(word).unwrap();
        assert_eq!(read_exactly(&process.stdin, 3), word);
    }
    assert!(open_and_empty(&process.stdin));
    assert_asleep(&bed.pump);
    io.close_stdin();
    assert_eq!(read_to_end(&process.stdin), b"");
}

#[test]
fn empty_streams_are_an_end_of_file_and_a_drain() {
    let bed = Bed::new();
    let io = bed.open("", "", "");
    let process = start(&io);
    assert_eq!(read_to_end(&process.stdin), b"");
    let writer = write_all(process.stdout, noise(1 << 20, 1));
    wait_for("the output to vanish", || writer.is_finished());
    for file in [&process.stdin, &process.stderr] {
        let kind = std::os::unix::fs::FileTypeExt::is_fifo(&file.metadata().unwrap().file_type());
        assert!(kind, "CRIU can only dump pipes");
    }
}

#[test]
fn a_client_that_does_not_read_blocks_only_its_own_stream() {
    let bed = Bed::new();
    let (stuck, busy) = (bed.fifo("stuck"), bed.fifo("busy"));
    let (stuck_client, busy_client) = (client_reader(&stuck), client_reader(&busy));
    let stuck_io = bed.open("", &stuck, "");
    let stuck_process = start(&stuck_io);
    let sent = write_until_stuck(&bed, &stuck_process.stdout, &stuck);
    assert!(sent.len() <= 4 * 64 * 1024, "unbounded: {}", sent.len());

    let io = bed.open("", &busy, "");
    let bytes = noise(50 << 20, 3);
    let writer = write_all(start(&io).stdout, bytes.clone());
    let got = read_exactly(&busy_client, bytes.len());
    assert!(got == bytes, "50 MB arrived changed");
    joined(writer);
    io.finish(LIMIT);

    assert_asleep(&bed.pump);
    drop(stuck_process);
    assert!(read_to_end(&stuck_client) == sent);
    stuck_io.finish(LIMIT);
}

#[test]
fn huge_input_waits_for_a_slow_process() {
    let bed = Bed::new();
    let path = bed.fifo("in");
    let io = bed.open(&path, "", "");
    let process = start(&io);
    let bytes = noise(8 << 20, 5);
    let client = write_all(client_writer(&path), bytes.clone());
    wait_for("a full pipe", || queued(&process.stdin) > 60_000);
    assert!(!client.is_finished());
    let got = read_exactly(&process.stdin, bytes.len());
    assert!(got == bytes);
    drop(joined(client));
    io.close_stdin();
    assert_eq!(read_to_end(&process.stdin), b"");
}

#[test]
fn a_reader_may_leave_and_come_back_and_misses_nothing() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let io = bed.open("", &path, "");
    let process = start(&io);
    let first = client_reader(&path);
    (&process.stdout).write_all(b"one").unwrap();
    assert_eq!(read_exactly(&first, 3), b"one");
    drop(first);
    (&process.stdout).write_all(b"two").unwrap();
    wait_for("the process's pipe to be emptied", || {
        queued(&process.stdout) == 0
    });
    let second = client_reader(&path);
    (&process.stdout).write_all(b"three").unwrap();
    drop(process);
    assert_eq!(read_to_end(&second), b"twothree");
}

#[test]
fn a_reader_that_comes_after_the_exit_still_gets_everything() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let io = bed.open("", &path, "");
    let bytes = noise(150_000, 9); // more than the FIFO holds
    let writer = write_all(start(&io).stdout, bytes.clone());
    drop(joined(writer));
    io.leader_exited();
    wait_for("a full buffer", || {
        let core = bed.pump.lock();
        core.flows.values().any(|flow| flow.buffer.room() == 0)
    });
    assert!(read_to_end(&client_reader(&path)) == bytes);

    // The same with so little that all of it lies in the FIFO.
    let small = bed.fifo("small");
    let io = bed.open("", &small, "");
    (&start(&io).stdout).write_all(b"tiny").unwrap();
    wait_for("the FIFO to linger", || {
        let core = bed.pump.lock();
        core.flows.is_empty() && core.sinks.values().any(|sink| sink.lingering.is_some())
    });
    let finisher = thread::spawn(move || io.finish(LIMIT));
    assert_eq!(read_to_end(&client_reader(&small)), b"tiny");
    joined(finisher);
}

#[test]
fn finish_gives_up_soon_on_a_client_that_never_reads() {
    // With little, all of it lies in the FIFO; with much, the FIFO, the buffer and the pipe are full.
    for size in [4, 150_000] {
        let bed = Bed::new();
        let path = bed.fifo("out");
        let io = bed.open("", &path, "");
        let writer = write_all(start(&io).stdout, noise(size, 3));
        io.leader_exited();
        let begun = Instant::now();
        io.finish(LIMIT);
        let took = begun.elapsed();
        assert!(took < LIMIT / 4, "{size} bytes: {took:?}");
        drop(joined(writer));
        wait_for("nothing to be left", || bed.pump.lock().is_empty());
    }
}

#[test]
fn input_for_a_process_that_closed_its_stdin_is_discarded_at_no_cost() {
    let bed = Bed::new();
    let path = bed.fifo("in");
    let io = bed.open(&path, "", "");
    let Process { stdin, stdout, .. } = start(&io);
    let client = client_writer(&path);
    (&client).write_all(b"x").unwrap();
    assert_eq!(read_exactly(&stdin, 1), b"x");
    drop(stdin);
    let client = write_all(client, noise(1 << 20, 2));
    wait_for("the input to be discarded", || client.is_finished());
    let client = joined(client);
    assert_asleep(&bed.pump);
    drop((client, stdout));
}

#[test]
fn output_before_start_and_both_streams_into_one_fifo_arrive() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let io = bed.open("", &path, &path);
    let client = client_reader(&path);
    let [_, stdout, stderr] = io.take_child_fds().unwrap().map(File::from);
    (&stdout).write_all(b"early").unwrap();
    assert!(!has_event(&client, PollFlags::POLLIN));
    io.start().unwrap();
    assert_eq!(read_exactly(&client, 5), b"early");
    drop(stdout);
    (&stderr).write_all(b"late").unwrap();
    assert_eq!(read_exactly(&client, 4), b"late");
    drop(stderr);
    assert_eq!(read_to_end(&client), b"");
}

/// Descriptors are counted in a process of its own, where no other test opens any.
#[test]
fn descriptors_do_not_leak() {
    const CHILD: &str = "CRAB_TEST_LEAKS";
    if std::env::var_os(CHILD).is_none() {
        let name = thread::current().name().unwrap().to_owned();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--test-threads=1"])
            .env(CHILD, "1")
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let bed = Bed::new();
    let (stdin, stdout, file) = (bed.fifo("in"), bed.fifo("out"), bed.path("log"));
    let file = format!("file://{}", file.display());
    // Else its coming is waited for, in each round.
    let _client = client_reader(&stdout);
    let mut before = 0;
    for round in 0..200 {
        if round == 10 {
            before = count();
        }
        let io = bed.open(&stdin, &stdout, &file);
        match round % 4 {
            0 => drop(io), // the spawn failed
            1 => {
                // a background process outlives everything
                let process = start(&io);
                drop(io);
                drop(process);
            }
            2 => {
                let process = start(&io);
                (&process.stderr).write_all(b"x").unwrap();
                drop(process);
                io.finish(LIMIT);
            }
            _ => {
                io.take_child_fds();
                io.replace_pipes().unwrap();
                drop(start(&io));
                io.finish(LIMIT);
            }
        }
        drop(ProcessIo::open_orphan(&bed.pump, &context(None)).unwrap());
        let mut io = config("", "", "");
        io.terminal = true;
        let io = bed.open_for(&io, None).unwrap();
        let (master, slave) = pty();
        io.attach_console(master).unwrap();
        drop(slave);
        io.leader_exited();
        io.finish(LIMIT);
        wait_for("the streams to end", || bed.pump.lock().is_empty());
    }
    assert_eq!(count(), before);
}

#[test]
fn what_a_process_has_written_is_with_the_client_before_its_end_is_told() {
    let bed = Bed::new();
    for round in 0..200 {
        let path = bed.fifo(&format!("out-{round}"));
        let client = client_reader(&path);
        let io = bed.open("", &path, "");
        let process = start(&io);
        let bytes = noise(40_000, round);
        (&process.stdout).write_all(&bytes).unwrap();
        drop(process);
        io.leader_exited();
        io.deliver();
        let there = pipes::queued(client.as_fd()).unwrap();
        assert_eq!(there, bytes.len(), "round {round}");
    }
}

#[test]
fn an_end_is_told_though_a_client_does_not_read_or_somebody_goes_on_writing() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let client = client_reader(&path);
    let io = bed.open("", &path, "");
    let process = start(&io);
    let writer = write_all(process.stdout, noise(1 << 20, 1));
    io.leader_exited();
    io.deliver();
    let reader = thread::spawn(move || read_to_end(&client).len());
    writer.join().unwrap();
    assert_eq!(reader.join().unwrap(), 1 << 20);
    io.finish(LIMIT);
}

#[test]
fn a_client_that_opens_its_fifo_late_is_waited_for() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let is_coming = Arc::new(AtomicBool::new(false));
    let late = thread::spawn({
        let (path, is_coming) = (path.clone(), Arc::clone(&is_coming));
        move || {
            thread::sleep(Duration::from_millis(50));
            is_coming.store(true, Ordering::SeqCst);
            client_reader(path)
        }
    });
    let io = bed.open("", &path, "");
    assert!(is_coming.load(Ordering::SeqCst), "it was not waited for");
    // And has a writer: what is not there yet is no end.
    let client = late.join().unwrap();
    assert!(open_and_empty(&client));
    let process = start(&io);
    (&process.stdout).write_all(b"late").unwrap();
    assert_eq!(read_exactly(&client, 4), b"late");
}
