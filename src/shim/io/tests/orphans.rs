//! Background processes: their streams outlive their process's Delete (D12).

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// An exec whose leader has gone and whose background process holds `Process`.
fn deleted(bed: &Bed, config: &StdioConfig, orphan: Option<SinkHandle>) -> (ProcessIo, Process) {
    let io = bed.open_for(config, orphan).unwrap();
    let process = start(&io);
    io.leader_exited();
    let begun = Instant::now();
    io.finish(LIMIT);
    assert!(
        begun.elapsed() < LIMIT / 2,
        "waited for a background process"
    );
    (io, process)
}

#[test]
fn a_background_process_writes_to_inits_stdout_once_its_client_is_gone() {
    let bed = Bed::new();
    let (init_path, exec_path, in_path) = (bed.fifo("init"), bed.fifo("exec"), bed.fifo("in"));
    let init = bed.open("", &init_path, "");
    let init_client = client_reader(&init_path);
    let init_process = start(&init);

    let exec_client = client_reader(&exec_path);
    let exec = bed.open_for(
        &config(&in_path, &exec_path, &exec_path),
        init.orphan_sink(),
    );
    let exec = exec.unwrap();
    let process = start(&exec);
    (&process.stdout).write_all(b"for the client").unwrap();
    exec.leader_exited();
    exec.finish(LIMIT);
    assert_eq!(read_to_end(&exec_client), b"for the client");

    assert_eq!(exec.stdio_pipes().unwrap().len(), 3, "all live on");
    assert!(open_and_empty(&process.stdin), "it could wait for input");
    (&process.stdout).write_all(b"out").unwrap();
    assert_eq!(read_exactly(&init_client, 3), b"out");
    (&process.stderr).write_all(b"err").unwrap();
    assert_eq!(read_exactly(&init_client, 3), b"err");
    (&init_process.stdout).write_all(b"init").unwrap();
    assert_eq!(read_exactly(&init_client, 4), b"init");

    drop(process.stdin);
    wait_for("its stdin to be given up", || {
        exec.stdio_pipes().unwrap().len() == 2
    });
    drop(exec);
    (&process.stdout).write_all(b"still").unwrap();
    assert_eq!(read_exactly(&init_client, 5), b"still");

    // Init's end is the end for its client, whatever borrows its stdout.
    drop(init_process);
    assert_eq!(read_to_end(&init_client), b"");
    init.finish(LIMIT);
    let writer = write_all(process.stdout, noise(1 << 20, 4));
    wait_for("the output to go to nowhere", || writer.is_finished());
}

#[test]
fn without_an_orphan_sink_the_output_goes_to_nowhere() {
    let bed = Bed::new();
    let path = bed.fifo("out");
    let (io, process) = deleted(&bed, &config("", &path, ""), None);
    let writer = write_all(process.stdout, noise(1 << 20, 4));
    wait_for("the output to vanish", || writer.is_finished());
    drop((joined(writer), process.stderr));
    wait_for("the end", || !io.is_live());
}

#[test]
fn a_file_goes_on_after_delete() {
    let bed = Bed::new();
    let init = bed.open("", &bed.fifo("init"), "");
    let _init_process = start(&init);
    let uri = format!("file://{}", bed.path("log").display());
    let (io, process) = deleted(&bed, &config("", &uri, &uri), init.orphan_sink());
    (&process.stdout).write_all(b"later").unwrap();
    drop(process);
    wait_for("the end", || !io.is_live());
    assert_eq!(fs::read(bed.path("log")).unwrap(), b"later");
}

#[test]
fn a_chatty_background_process_delays_delete_up_to_the_limit_only() {
    const DELAY: Duration = Duration::from_millis(500);
    // A machine that stands still for 200 ms makes it a silent one, and finish returns early: once
    // in a while, and not every time.
    let waited = (0..10).any(|_| {
        let bed = Bed::new();
        let path = bed.fifo("out");
        let client = client_reader(&path);
        let io = bed.open("", &path, "");
        let Process { mut stdout, .. } = start(&io);
        let over = Arc::new(AtomicBool::new(false));
        let silence = Arc::clone(&over);
        let chatter = thread::spawn(move || {
            while !silence.load(Ordering::SeqCst) {
                stdout.write_all(b"x").unwrap();
                thread::sleep(Duration::from_millis(5));
            }
        });
        io.leader_exited();
        let begun = Instant::now();
        io.finish(DELAY);
        let took = begun.elapsed();
        assert!(!chatter.is_finished() && took < LIMIT / 2, "took {took:?}");
        assert!(!read_to_end(&client).is_empty());
        over.store(true, Ordering::SeqCst);
        joined(chatter);
        took >= DELAY
    });
    assert!(waited, "it was taken for a silent one ten times");
}
