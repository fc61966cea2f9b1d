//! `crab log`: the turns of a sandbox, newest last.

use std::process::ExitCode;

use super::{Scope, print, printable, turns};
use crate::store::{Action, JournalLine};

pub(super) fn run(scope: &Scope, word: &str) -> anyhow::Result<ExitCode> {
    let sandbox = scope.find(word)?;
    let journal = scope.store()?.sandbox(&sandbox).journal()?;
    for line in &journal.lines {
        if scope.json {
            print(&serde_json::to_string(line)?)?;
        } else {
            print(&describe(line))?;
        }
    }
    for broken in &journal.broken {
        eprintln!(
            "crab: {sandbox}: line {} of the journal cannot be read: {}",
            broken.number, broken.reason
        );
    }
    Ok(match journal.broken.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// One turn in one line.
pub(super) fn describe(line: &JournalLine) -> String {
    let action = match line.action {
        Action::Skip if turns::is_none(line) => "none",
        Action::Skip if line.trigger.is_way_back() && line.checkpoint.is_some() => "back",
        // Not protected: the note says why.
        Action::Skip => "-",
        Action::Files => "files",
        Action::Full => "full",
    };
    let digest = line
        .checkpoint
        .map_or_else(|| "-".into(), |d| d.hex()[..12].to_owned());
    let durable = line
        .durable_us
        .map_or_else(|| "-".into(), |us| format!("{:.0} ms", us as f64 / 1000.0));
    let note = line.note.as_deref().unwrap_or_default();
    let text = format!(
        "{:>5}  {digest:12}  {action:5}  {:>9}  frozen {:>4.0} ms  durable {durable:>7}  {}",
        line.turn,
        bytes(line.bytes_written),
        line.freeze_us as f64 / 1000.0,
        printable(&note.replace('\n', "; ")),
    );
    text.trim_end().to_owned()
}

/// A size for people.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = n as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{size:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 40), "3.0 TiB");
    }
}
