//! Names: which sandbox, which turn.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// containerd's own limit for identifiers (`pkg/identifiers`).
const MAX_ID: usize = 76;

/// A name that was not a valid containerd identifier.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what} {value:?} is not a valid identifier: use 1 to {MAX_ID} letters and digits, \
     with '.', '_' or '-' between them"
)]
pub struct BadName {
    what: &'static str,
    value: String,
}

/// One sandbox: a container id within a containerd namespace.
///
/// Both halves are checked when the value is made, so they are safe to use as a single path
/// component.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct SandboxId {
    namespace: String,
    id: String,
}

impl SandboxId {
    /// Checks both names by containerd's rule for identifiers.
    pub fn new(namespace: &str, id: &str) -> Result<Self, BadName> {
        Ok(Self {
            namespace: check("namespace", namespace)?,
            id: check("container id", id)?,
        })
    }

    /// The containerd namespace (`default`, `moby`, `k8s.io`, …).
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The container's id within its namespace.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.id)
    }
}

/// The number of a turn of one sandbox, counted from 1.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct TurnNo(pub u64);

impl TurnNo {
    /// The turn after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for TurnNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for TurnNo {
    type Err = std::num::ParseIntError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self)
    }
}

/// Checks one identifier by the rule `[A-Za-z0-9]+([._-]+[A-Za-z0-9]+)*` and its length.
pub fn check(what: &'static str, value: &str) -> Result<String, BadName> {
    let bytes = value.as_bytes();
    let inner = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let ends = bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric);
    if ends && bytes.len() <= MAX_ID && bytes.iter().all(inner) {
        Ok(value.to_owned())
    } else {
        Err(BadName {
            what,
            value: value.chars().take(MAX_ID + 4).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            "a-",
            "a b",
            "é",
            "a\n",
            &"a".repeat(77),
        ] {
            assert!(SandboxId::new("default", bad).is_err(), "{bad:?}");
            assert!(SandboxId::new(bad, "a").is_err(), "{bad:?}");
        }
        for good in ["a", "k8s.io", "a_b-c.d", &"a".repeat(76)] {
            assert!(SandboxId::new(good, good).is_ok(), "{good:?}");
        }
    }
}
