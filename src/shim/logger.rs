//! The shim's log: the FIFO that containerd reads.
//!
//! A log that blocks would stop the shim whenever containerd is away for long: lines that don't
//! fit are dropped, and counted.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    sync::atomic::{AtomicU64, Ordering},
};

use log::{Level, LevelFilter, Log, Metadata, Record};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

struct Logger {
    fifo: File,
    dropped: AtomicU64,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        let chatter = record.target().starts_with("ttrpc") && record.level() > Level::Warn;
        if chatter || !self.enabled(record.metadata()) {
            return;
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let note = match dropped {
            0 => String::new(),
            n => format!(" dropped={n}"),
        };
        let now = OffsetDateTime::now_utc()
            .format(&Rfc3339)
            .unwrap_or_default();
        let level = match record.level() {
            Level::Warn => "warning".to_owned(),
            level => level.as_str().to_lowercase(),
        };
        let text = record.args().to_string();
        let line = format!("time=\"{now}\" level={level}{note} msg={text:?}\n");
        if (&self.fifo).write_all(line.as_bytes()).is_err() {
            self.dropped.fetch_add(dropped + 1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// Logs to the FIFO `log` in the current directory, which is the bundle.
pub fn init(debug: bool) -> anyhow::Result<()> {
    // Read and write: opening never waits for a reader, and writing never raises SIGPIPE.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("log")?;
    log::set_boxed_logger(Box::new(Logger {
        fifo,
        dropped: AtomicU64::new(0),
    }))?;
    log::set_max_level(if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
    Ok(())
}
