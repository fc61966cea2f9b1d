//! What checkpoints and restores need.

use super::*;

#[test]
fn stdio_pipes_are_named_as_the_process_sees_them() {
    let bed = Bed::new();
    let path = bed.fifo("in");
    let io = bed.open(&path, "", "");
    let process = start(&io);
    let inode = |file: &File| std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    let expected: Vec<StdioPipe> = [&process.stdin, &process.stdout, &process.stderr]
        .into_iter()
        .zip(0..)
        .map(|(file, fd)| StdioPipe {
            fd,
            inode: inode(file),
        })
        .collect();
    assert_eq!(io.stdio_pipes().unwrap(), expected);
    let link = fs::read_link(format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&process.stdout)
    ));
    assert_eq!(
        link.unwrap().to_str().unwrap(),
        format!("pipe:[{}]", expected[1].inode)
    );
    drop(process.stdout);
    wait_for("the end of stdout", || io.stdio_pipes().unwrap().len() == 2);
}

#[test]
fn unread_input_can_be_seen_without_being_taken() {
    let bed = Bed::new();
    let path = bed.fifo("in");
    let io = bed.open(&path, "", "");
    let process = start(&io);
    assert_eq!(io.pending_stdin().unwrap(), b"");
    let bytes = noise(200_000, 11); // the pipe, the buffer and the FIFO
    let client = write_all(client_writer(&path), bytes.clone());
    wait_for("a full pipe", || queued(&process.stdin) == 65536);
    for _ in 0..2 {
        assert!(io.pending_stdin().unwrap() == bytes[..65536]);
    }
    assert_eq!(read_exactly(&process.stdin, 10), &bytes[..10]);
    wait_for("a full pipe", || queued(&process.stdin) >= 65526);
    let pending = io.pending_stdin().unwrap();
    assert!(bytes[10..].starts_with(&pending) && pending.len() >= 65526);
    assert!(read_exactly(&process.stdin, bytes.len() - 10) == bytes[10..]);
    joined(client);
}

#[test]
fn a_frozen_process_has_its_full_pipes_emptied_and_nothing_is_lost() {
    let bed = Bed::new();
    let (out, err) = (bed.fifo("out"), bed.fifo("err"));
    let (out_client, err_client) = (client_reader(&out), client_reader(&err));
    let io = bed.open("", &out, &err);
    let process = start(&io);
    let sent = write_until_stuck(&bed, &process.stdout, &out);
    (&process.stderr).write_all(b"few").unwrap();
    assert!(queued(&process.stdout) > 60_000);
    io.drain_frozen().unwrap();
    assert_eq!((queued(&process.stdout), queued(&process.stderr)), (0, 0));
    assert_eq!(read_exactly(&err_client, 3), b"few");
    (&process.stdout).write_all(b"after").unwrap();
    drop(process);
    let got = read_to_end(&out_client);
    assert!(got == [&sent[..], b"after"].concat());
}

#[test]
fn a_rollback_in_place_is_invisible_to_the_client() {
    let bed = Bed::new();
    let (stdin, stdout) = (bed.fifo("in"), bed.fifo("out"));
    let client_out = client_reader(&stdout);
    let io = bed.open(&stdin, &stdout, "");
    let client_in = client_writer(&stdin);
    let old = start(&io);
    (&client_in).write_all(b"taken").unwrap();
    assert_eq!(read_exactly(&old.stdin, 5), b"taken");
    let unread = noise(150_000, 17); // the pipe, the shim's buffer, the FIFO
    let client = write_all(client_in, unread.clone());
    wait_for("unread input everywhere", || {
        let core = bed.pump.lock();
        queued(&old.stdin) == 65536 && core.flows.values().any(|flow| flow.buffer.room() == 0)
    });
    let pending = io.pending_stdin().unwrap();
    (&old.stdout).write_all(b"before ").unwrap();
    io.drain_frozen().unwrap();

    io.replace_pipes().unwrap();
    drop(old);
    io.preload_stdin(&pending);
    let new = start(&io);
    assert!(read_exactly(&new.stdin, unread.len()) == unread);
    let client_in = joined(client);
    (&new.stdout).write_all(b"after").unwrap();
    assert_eq!(read_exactly(&client_out, 12), b"before after");
    assert!(open_and_empty(&client_out), "no end of file in between");
    drop((new, client_in));
    io.finish(LIMIT);
    assert_eq!(read_to_end(&client_out), b"");
}

#[test]
fn a_restored_process_reads_its_old_input_first_and_then_its_end() {
    let bed = Bed::new();
    let io = bed.open("", "", "");
    io.preload_stdin(&noise(100_000, 13)); // more than a pipe holds
    let process = start(&io);
    assert!(read_to_end(&process.stdin) == noise(100_000, 13));
}

#[test]
fn a_restored_background_process_has_the_orphan_sink_and_an_open_stdin() {
    let bed = Bed::new();
    let path = bed.fifo("init");
    let init = bed.open("", &path, "");
    let client = client_reader(&path);
    let _init_process = start(&init);
    let io = ProcessIo::open_orphan(&bed.pump, &context(init.orphan_sink())).unwrap();
    io.preload_stdin(b"old");
    let process = start(&io);
    assert_eq!(read_exactly(&process.stdin, 3), b"old");
    assert!(open_and_empty(&process.stdin));
    (&process.stderr).write_all(b"hello").unwrap();
    assert_eq!(read_exactly(&client, 5), b"hello");
    assert_eq!(io.stdio_pipes().unwrap().len(), 3);
    drop(process);
    wait_for("the end", || !io.is_live());
}

#[test]
fn a_restored_background_process_keeps_its_file_and_an_open_stdin() {
    let bed = Bed::new();
    let init = bed.open("", &bed.fifo("init"), "");
    let _init_process = start(&init);
    let uri = format!("file://{}", bed.path("log").display());
    let io = ProcessIo::open_leftover(
        &bed.pump,
        &config("", &uri, ""),
        &context(init.orphan_sink()),
    )
    .unwrap();
    let process = start(&io);
    assert!(open_and_empty(&process.stdin));
    (&process.stdout).write_all(b"more").unwrap();
    wait_for("the log", || fs::read(bed.path("log")).unwrap() == b"more");
    assert_asleep(&bed.pump);
    assert!(open_and_empty(&process.stdin));
    assert_eq!(io.stdio_pipes().unwrap().len(), 3);
    drop(process);
    wait_for("the end", || !io.is_live());
}

#[test]
fn pipes_belong_to_the_containers_user() {
    let bed = Bed::new();
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let mut context = context(None);
    (context.uid, context.gid) = (1234, 5678);
    let io = ProcessIo::open(&bed.pump, &config("", "", ""), &context).unwrap();
    let process = start(&io);
    for file in [&process.stdin, &process.stdout, &process.stderr] {
        let meta = file.metadata().unwrap();
        let owner = |meta| {
            (
                std::os::unix::fs::MetadataExt::uid(meta),
                std::os::unix::fs::MetadataExt::gid(meta),
            )
        };
        assert_eq!(owner(&meta), (1234, 5678));
    }
}
