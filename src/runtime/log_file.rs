//! The runtime's own log: one file per call, so that two calls never read each other's errors.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// More than this is not read: a message for a person, from a program we do not control.
const MAX_LOG: u64 = 256 * 1024;

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

    /// The message of the last line whose level is `error`, if there is one.
    pub(super) fn last_error(&self) -> Option<String> {
        let mut text = Vec::new();
        File::open(&self.0)
            .ok()?
            .take(MAX_LOG)
            .read_to_end(&mut text)
            .ok()?;
        last_error(&String::from_utf8_lossy(&text))
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        // A left-over log in the shim's own directory goes with that directory.
        let _ = fs::remove_file(&self.0);
    }
}

fn last_error(text: &str) -> Option<String> {
    text.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::last_error;

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
        assert_eq!(
            last_error(text).unwrap(),
            "runc create failed: invalid rootfs"
        );
        assert_eq!(last_error(""), None);
    }
}
