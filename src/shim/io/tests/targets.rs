//! Files and loggers.

use std::{
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::shim::io::target::{LoggerUri, Target};

/// Writes a shell script. It is run through `sh`: executing a file that was just written can
/// fail with ETXTBSY while another test's fork holds it open.
fn script(bed: &Bed, text: &str) -> String {
    let path = bed.path("logger.sh");
    fs::write(&path, text).unwrap();
    let path = path.display().to_string().replace('/', "%2F");
    format!("binary:///bin/sh?{path}")
}

#[test]
fn a_file_is_made_with_its_directories_and_appended_to() {
    let bed = Bed::new();
    let log = bed.path("a/b/log");
    let uri = format!("file://{}?ignored=1", log.display());
    for _ in 0..2 {
        let io = bed.open("", &uri, "");
        let process = start(&io);
        (&process.stdout).write_all(b"out ").unwrap();
        wait_for("the first half", || {
            fs::read(&log).unwrap().ends_with(b"out ")
        });
        (&process.stderr).write_all(b"err ").unwrap();
        drop(process);
        io.finish(LIMIT);
    }
    assert_eq!(fs::read_to_string(&log).unwrap(), "out err out err ");
    assert_eq!(log.metadata().unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn much_output_reaches_a_file_whole() {
    let bed = Bed::new();
    let uri = format!("file://{}", bed.path("log").display());
    let io = bed.open("", &uri, "");
    let bytes = noise(5 << 20, 6);
    let process = start(&io);
    let writer = write_all(process.stdout, bytes.clone());
    drop((joined(writer), process.stderr));
    io.finish(LIMIT);
    assert!(fs::read(bed.path("log")).unwrap() == bytes);
}

#[test]
fn a_plain_path_may_be_a_regular_file_but_nothing_stranger() {
    let bed = Bed::new();
    let file = bed.path("file");
    fs::write(&file, "old ").unwrap();
    let io = bed.open("/dev/null", file.to_str().unwrap(), "/dev/null");
    let process = start(&io);
    assert_eq!(read_to_end(&process.stdin), b"");
    (&process.stdout).write_all(b"new").unwrap();
    drop(process);
    io.finish(LIMIT);
    assert_eq!(fs::read_to_string(&file).unwrap(), "old new");

    for (stdin, stdout, stderr, named) in [
        ("", "/no/such", "", ["stdout", "/no/such"]),
        ("", "", "/dev/zero", ["stderr", "/dev/zero"]),
        (file.to_str().unwrap(), "", "", ["stdin", "not a FIFO"]),
    ] {
        let error = bed.open_for(&config(stdin, stdout, stderr), None);
        let error = error.err().unwrap().to_string();
        assert!(named.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn a_logger_gets_its_arguments_its_environment_and_both_streams() {
    let bed = Bed::new();
    let dir = bed.dir.path().display();
    let uri = script(
        &bed,
        &format!(
            "cd {dir}; echo \"$CONTAINER_ID $CONTAINER_NAMESPACE $HOME $# $2\" > said
             exec 5>&-; cat <&4 > err & cat <&3 > out; wait; touch done"
        ),
    ) + "&key=v%201";
    let io = bed.open("", &uri, &uri);
    assert!(io.logger_pid().is_some());
    assert_eq!(
        fs::read_to_string(bed.path("said")).unwrap(),
        "c1 ns  3 key\n"
    );
    let process = start(&io);
    let bytes = noise(300_000, 8);
    let writer = write_all(process.stdout, bytes.clone());
    (&process.stderr).write_all(b"oops").unwrap();
    drop((joined(writer), process.stderr));
    io.finish(LIMIT);
    wait_for("the logger's end", || bed.path("done").exists());
    assert!(fs::read(bed.path("out")).unwrap() == bytes);
    assert_eq!(fs::read(bed.path("err")).unwrap(), b"oops");
}

#[test]
fn a_logger_that_does_not_start_is_an_error_that_names_it() {
    let bed = Bed::new();
    let error = bed.open_for(&config("", "binary:///no/logger", ""), None);
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("/no/logger") && error.contains("stdout"),
        "{error}"
    );

    let died = script(&bed, "exit 1").replace("binary:", "binary-v2:");
    let error = bed
        .open_for(&config("", &died, ""), None)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("/bin/sh") && error.contains("ready"),
        "{error}"
    );

    // One that never says that it is ready is killed.
    let uri = LoggerUri {
        path: "/bin/sleep".into(),
        args: vec!["1000".into()],
        strict_ready: false,
    };
    let pid = AtomicU32::new(0);
    let spawner = |command| spawn(command).inspect(|id| pid.store(*id, Ordering::SeqCst));
    let mut context = context(None);
    context.spawner = &spawner;
    let error = binary::start(&uri, &context, Duration::from_millis(500))
        .err()
        .unwrap();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let pid = pid.into_inner();
    wait_for("its end", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z"))
    });
}

#[test]
fn a_dying_logger_neither_blocks_nor_kills_the_process() {
    let bed = Bed::new();
    let io = bed.open("", &script(&bed, "exec 5>&-; exit 0"), "");
    let writer = write_all(start(&io).stdout, noise(1 << 20, 1));
    wait_for("the output to be given up", || writer.is_finished());
    joined(writer);
}

#[test]
fn a_logger_serves_background_processes_after_delete() {
    let bed = Bed::new();
    let out = bed.path("out");
    let uri = script(&bed, &format!("exec 5>&-; cat <&3 > {}", out.display()));
    let io = bed.open("", &uri, "");
    let process = start(&io);
    io.leader_exited();
    io.finish(LIMIT);
    (&process.stdout).write_all(b"later").unwrap();
    drop(process);
    wait_for("the log", || {
        fs::read(&out).is_ok_and(|log| log == b"later")
    });
}

#[test]
fn a_logger_for_stderr_alone_leaves_stdout_where_it_is() {
    let uri = "binary:///bin/l";
    let parse = |uri| Target::parse(Stream::Stderr, uri).unwrap();
    assert!(matches!(parse(uri), Target::Binary(_)));
    let bed = Bed::new();
    let (path, err) = (bed.fifo("out"), bed.path("err"));
    let uri = script(&bed, &format!("exec 5>&-; cat <&4 > {}", err.display()));
    let io = bed.open("", &path, &uri);
    let client = client_reader(&path);
    let process = start(&io);
    (&process.stdout).write_all(b"out").unwrap();
    (&process.stderr).write_all(b"err").unwrap();
    drop(process);
    assert_eq!(read_to_end(&client), b"out");
    wait_for("the log", || fs::read(&err).is_ok_and(|log| log == b"err"));
}
