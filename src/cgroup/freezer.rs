//! Freezing and thawing a cgroup, and knowing that it is frozen.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use super::{Cgroup, CgroupError};

/// First wait between two looks at the state; a small cgroup freezes within it.
const FIRST_WAIT: Duration = Duration::from_micros(200);
/// Longest wait between two looks.
const LAST_WAIT: Duration = Duration::from_millis(5);
/// After so many looks a v1 cgroup is thawed for a moment: while new tasks keep appearing in
/// it, the kernel can stay FREEZING for ever, and only a fresh start helps (runc's
/// `cgroups/fs/freezer.go` found the same).
const LOOKS_PER_START: u32 = 24;

/// What the freezer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerState {
    /// No task of the cgroup runs.
    Frozen,
    /// Asked to freeze; some task may still run.
    Freezing,
    /// Running.
    Thawed,
}

impl fmt::Display for FreezerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Frozen => "FROZEN",
            Self::Freezing => "FREEZING",
            Self::Thawed => "THAWED",
        })
    }
}

impl Cgroup {
    /// Freezes every task of the cgroup and returns once the kernel confirms it.
    ///
    /// When that takes longer than `timeout` (a task in an uninterruptible wait), the cgroup is
    /// thawed again and the error says so. On any other error it is thawed too, as far as that
    /// is possible.
    pub fn freeze(&self, timeout: Duration) -> Result<(), CgroupError> {
        let freezer = Freezer::of(self)?;
        let result = freezer.freeze(timeout);
        if result.is_err()
            && let Err(e) = freezer.request(false)
            && !e.is_gone()
        {
            log::error!("after a failed freeze: {e}");
        }
        result
    }

    /// Lets the tasks run. Returns when the request is made; waking takes the kernel microseconds.
    ///
    /// An error whose [`CgroupError::is_gone`] holds means that there is nothing left to thaw.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        Freezer::of(self)?.request(false)
    }

    /// What the freezer says now.
    pub fn state(&self) -> Result<FreezerState, CgroupError> {
        Freezer::of(self)?.state()
    }
}

/// The two freezers' files.
enum Freezer {
    V1 { state: PathBuf },
    V2 { freeze: PathBuf, events: PathBuf },
}

impl Freezer {
    fn of(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        if let Some(dir) = cgroup.v1_dir("freezer") {
            let state = dir.join("freezer.state");
            Ok(Self::V1 { state })
        } else if let Some(dir) = cgroup.unified_dir() {
            Ok(Self::V2 {
                freeze: dir.join("cgroup.freeze"),
                events: dir.join("cgroup.events"),
            })
        } else {
            Err(CgroupError::NoController {
                controller: "freezer",
                path: cgroup.label(),
            })
        }
    }

    fn freeze(&self, timeout: Duration) -> Result<(), CgroupError> {
        let v1 = matches!(self, Self::V1 { .. });
        let start = Instant::now();
        let last = until_frozen(v1, timeout, |f| self.request(f), || self.state())?;
        match last {
            FreezerState::Frozen => Ok(()),
            state => Err(CgroupError::NotFrozen {
                path: self.state_file().to_owned(),
                state,
                waited: start.elapsed(),
            }),
        }
    }

    fn request(&self, frozen: bool) -> Result<(), CgroupError> {
        let (path, value, action) = match (self, frozen) {
            (Self::V1 { state }, true) => (state, "FROZEN", "write FROZEN to"),
            (Self::V1 { state }, false) => (state, "THAWED", "write THAWED to"),
            (Self::V2 { freeze, .. }, true) => (freeze, "1", "write 1 to"),
            (Self::V2 { freeze, .. }, false) => (freeze, "0", "write 0 to"),
        };
        // Not fs::write: it would create the file where there is none.
        fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| std::io::Write::write_all(&mut file, value.as_bytes()))
            .map_err(|e| CgroupError::io(action, path, e))
    }

    fn state(&self) -> Result<FreezerState, CgroupError> {
        match self {
            Self::V1 { state } => v1_state(state, &read(state)?),
            Self::V2 { freeze, events } => v2_state(events, &read(freeze)?, &read(events)?),
        }
    }

    fn state_file(&self) -> &Path {
        match self {
            Self::V1 { state } => state,
            Self::V2 { events, .. } => events,
        }
    }
}

/// Asks for the freeze and looks until it is there or `timeout` has passed; the last state seen.
fn until_frozen(
    v1: bool,
    timeout: Duration,
    request: impl Fn(bool) -> Result<(), CgroupError>,
    look: impl Fn() -> Result<FreezerState, CgroupError>,
) -> Result<FreezerState, CgroupError> {
    let start = Instant::now();
    let mut wait = FIRST_WAIT;
    request(true)?;
    for looks in 1u32.. {
        let state = look()?;
        let left = timeout.saturating_sub(start.elapsed());
        if state == FreezerState::Frozen || left.is_zero() {
            return Ok(state);
        }
        thread::sleep(wait.min(left));
        wait = (wait * 2).min(LAST_WAIT);
        if v1 {
            if looks % LOOKS_PER_START == 0 {
                request(false)?;
                thread::sleep(FIRST_WAIT);
                wait = FIRST_WAIT;
            }
            // The kernel's document: while it says FREEZING, FROZEN must be written again.
            request(true)?;
        }
    }
    look()
}

fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|e| CgroupError::io("read", path, e))
}

fn v1_state(path: &Path, text: &str) -> Result<FreezerState, CgroupError> {
    match text.trim_end() {
        "FROZEN" => Ok(FreezerState::Frozen),
        "FREEZING" => Ok(FreezerState::Freezing),
        "THAWED" => Ok(FreezerState::Thawed),
        _ => Err(unexpected(path, text)),
    }
}

/// `frozen` in cgroup.events is what is; cgroup.freeze is only what was asked for.
fn v2_state(events: &Path, asked: &str, text: &str) -> Result<FreezerState, CgroupError> {
    let frozen = text.lines().find_map(|l| l.strip_prefix("frozen "));
    match (frozen, asked.trim_end()) {
        (Some("1"), _) => Ok(FreezerState::Frozen),
        (Some("0"), "1") => Ok(FreezerState::Freezing),
        (Some("0"), _) => Ok(FreezerState::Thawed),
        _ => Err(unexpected(events, text)),
    }
}

fn unexpected(path: &Path, text: &str) -> CgroupError {
    CgroupError::Unexpected {
        path: path.to_owned(),
        text: text.chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Runs `until_frozen` against a kernel that freezes at the look of that number.
    fn requests(v1: bool, frozen_at: usize) -> Vec<bool> {
        let (asked, looks) = (RefCell::new(Vec::new()), RefCell::new(0));
        let request = |frozen| {
            asked.borrow_mut().push(frozen);
            Ok(())
        };
        let look = || {
            *looks.borrow_mut() += 1;
            Ok(match *looks.borrow() >= frozen_at {
                true => FreezerState::Frozen,
                false => FreezerState::Freezing,
            })
        };
        let last = until_frozen(v1, Duration::from_secs(60), request, look).unwrap();
        assert_eq!(last, FreezerState::Frozen);
        asked.into_inner()
    }

    #[test]
    fn v1_is_asked_again_at_every_look_and_v2_once() {
        assert_eq!(requests(true, 1), [true]);
        assert_eq!(requests(true, 4), [true; 4]);
        assert_eq!(requests(false, 4), [true]);
    }

    #[test]
    fn freezing_that_persists_is_started_afresh() {
        let asked = requests(true, LOOKS_PER_START as usize + 1);
        let thaws = asked.iter().filter(|frozen| !**frozen).count();
        assert_eq!((thaws, asked.last()), (1, Some(&true)));
        assert!(requests(false, LOOKS_PER_START as usize + 1).len() == 1);
    }
}
