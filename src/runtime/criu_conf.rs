//! Options of CRIU that runc has no flag for.
//!
//! They go through `$HOME/.criu/default.conf`, with HOME set for that one call: CRIU 4.1 crashes
//! on `network-lock` in the file of the `org.criu.config` annotation, 4.2 takes both, and the
//! annotation stays free for the user.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::empty_tar;

/// CRIU's file of options below HOME.
const CONF: &str = ".criu/default.conf";

/// Deleted files up to this size (bytes) are kept inside the image.
pub const GHOST_LIMIT: u64 = 256 << 20;

/// Options of one call of CRIU.
#[derive(Debug, Clone, Default)]
pub struct CriuConf {
    lines: Vec<String>,
}

impl CriuConf {
    /// Options for a dump of a frozen container.
    ///
    /// Locking the network costs 60–70 ms of iptables. The container is frozen, so `lock_network`
    /// matters only when established connections to the outside must survive.
    pub fn for_dump(lock_network: bool) -> Self {
        let mut lines = vec![format!("ghost-limit {GHOST_LIMIT}")];
        if !lock_network {
            lines.push("network-lock skip".into());
        }
        Self { lines }
    }

    /// Has the kernel tell from this dump on which pages are written to, for a later one to build upon.
    pub fn tracking_memory(mut self) -> Self {
        self.lines.push("track-mem".into());
        self
    }

    /// Options for a restore. `close_tcp` gives established connections an error instead of a
    /// peer that has long moved on; `script` is run at CRIU's stages, also when every task is
    /// restored and none has been let go yet.
    pub fn for_restore(close_tcp: bool, script: Option<&Path>) -> Self {
        let mut lines = vec!["network-lock skip".to_owned()];
        if close_tcp {
            lines.push("tcp-close".into());
        }
        if let Some(script) = script {
            lines.push(format!("action-script {}", script.display()));
        }
        Self { lines }
    }

    /// Adds to options that [`CriuConf::write`] has written where watched files are, which CRIU
    /// could not find by itself.
    pub fn add_watched(home: &Path, paths: &[PathBuf]) -> io::Result<()> {
        let watched = paths.iter().map(|path| ("irmap-scan-path", &**path));
        add(home, watched)
    }

    /// Adds a script that is run at CRIU's stages.
    pub fn add_script(home: &Path, script: &Path) -> io::Result<()> {
        add(home, [("action-script", script)].into_iter())
    }

    /// Writes the options below `home`, and what else a dump finds there, and returns it, to be passed as
    /// HOME.
    pub fn write(&self, home: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(home.join(CONF).parent().unwrap_or(home))?;
        empty_tar::install(home)?;
        fs::write(home.join(CONF), self.lines.join("\n") + "\n")?;
        Ok(home.to_owned())
    }
}

fn add<'a>(home: &Path, options: impl Iterator<Item = (&'a str, &'a Path)>) -> io::Result<()> {
    let mut file = fs::File::options().append(true).open(home.join(CONF))?;
    for (option, path) in options {
        writeln!(file, "{option} {}", path.display())?;
    }
    Ok(())
}

/// The last lines of CRIU's log that say what went wrong.
///
/// Lines marked `Error` come first, since CRIU goes on logging its clean-up after them. The error
/// about RLIMIT_NOFILE is harmless and left out (FACTS: CAP_SYS_RESOURCE).
pub fn log_tail(log: &Path) -> String {
    const LINES: usize = 8;
    let Ok(text) = fs::read(log) else {
        return format!("(no CRIU log at {})", log.display());
    };
    let start = text.len().saturating_sub(64 * 1024);
    let text = String::from_utf8_lossy(&text[start..]);
    let errors: Vec<&str> = text
        .lines()
        .filter(|l| l.contains("Error (") && !l.contains("RLIMIT_NOFILE"))
        .collect();
    let all: Vec<&str> = text.lines().collect();
    let pick = if errors.is_empty() { &all } else { &errors };
    pick[pick.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_before_the_chatter_after_them() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        let mut text = String::from(
            "(00.001) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self\n\
             (00.100) Error (criu/sk-unix.c:12): Can't dump half of stream unix connection.\n",
        );
        for i in 0..50 {
            text += &format!("(00.2{i:02}) Unlock network\n");
        }
        fs::write(&log, text).unwrap();
        let tail = log_tail(&log);
        assert!(tail.contains("half of stream unix"), "{tail}");
        assert!(!tail.contains("RLIMIT"), "{tail}");
    }
}
