//! The runtime's own log: one file per call, so that two calls never read each other's errors.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// More than this is not read: a message for a person, from a program we do not control.
const MAX_LOG: u64 = 256 * 1024;

/// So many lines before the last one are told.
const MOST_BEFORE: usize = 3;

/// A log file that is gone when this value is.
pub(super) struct LogFile(PathBuf);

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

impl LogFile {
    pub(super) fn new(dir: &Path, verb: &str) -> io::Result<Self> {
        let file = tempfile::Builder::new()
            .prefix(&format!(".{verb}-"))
            .suffix(".log")
            .tempfile_in(dir)?;
        let (_, path) = file.keep().map_err(|e| e.error)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The message of the last line whose level is `error` or `fatal`, if there is one, and those before
    /// it: what happened within the sandbox (`nsexec`) is told there, and what became of it last.
    pub(super) fn errors(&self) -> Option<String> {
        let mut text = Vec::new();
        File::open(&self.0)
            .ok()?
            .take(MAX_LOG)
            .read_to_end(&mut text)
            .ok()?;
        errors(&String::from_utf8_lossy(&text))
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        // A left-over log in the shim's own directory goes with that directory.
        let _ = fs::remove_file(&self.0);
    }
}

fn errors(text: &str) -> Option<String> {
    let mut all = text
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .filter(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg.trim().to_owned());
    let last = all.next()?;
    let before: Vec<_> = all.take(MOST_BEFORE).collect();
    if before.is_empty() {
        return Some(last);
    }
    Some(format!("{last} (before that: {})", before.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::errors;

    #[test]
    fn the_last_error_line_is_the_message() {
        // As written by runc 1.1.15 with a missing rootfs.
        let text = concat!(
            r#"{"level":"warning","msg":"lstat /x: no such file","time":"2026-11-23T10:00:00Z"}"#,
            "\n",
            r#"{"level":"error","msg":"runc create failed: invalid rootfs\n","time":"x"}"#,
            "\nnot json\n",
            r#"{"level":"info","msg":"after"}"#,
        );
        assert_eq!(errors(text).unwrap(), "runc create failed: invalid rootfs");
        assert_eq!(errors(""), None);
    }

    #[test]
    fn what_happened_before_is_told_too() {
        let line =
            |level: &str, msg: &str| format!("{{\"level\":\"{level}\",\"msg\":\"{msg}\"}}\n");
        let mut text = line("error", "0") + &line("error", "1") + &line("error", "2");
        text += &line("fatal", "nsexec-0[7]: failed to setns");
        text += &line("error", "runc exec failed: connection reset by peer");
        assert_eq!(
            errors(&text).unwrap(),
            "runc exec failed: connection reset by peer (before that: nsexec-0[7]: failed to setns; 2; 1)"
        );
    }
}
