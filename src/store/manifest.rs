//! What one checkpoint says about itself.

use std::{fs, path::Path};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use time::OffsetDateTime;

use super::{
    Digest, StoreError,
    digest::{hex, unhex},
};
use crate::sandbox::{SandboxId, TurnNo};

/// The format that this version writes. A change that an older reader would misunderstand counts
/// it up; a new field that it may ignore does not.
pub const FORMAT: u32 = 1;
/// Larger manifests are refused, to write and to read.
pub(super) const MAX_MANIFEST: u64 = 64 << 20;

/// Everything that is known about one checkpoint. Complete in itself: reading it needs no other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the version that wrote it.
    pub format: u32,
    /// The sandbox's containerd namespace.
    pub namespace: String,
    /// The sandbox's container id.
    pub id: String,
    /// Which turn.
    pub turn: TurnNo,
    /// What the caller knew.
    #[serde(flatten)]
    pub facts: Facts,
    /// What the store holds of it.
    pub contents: Contents,
}

/// What only the maker of a checkpoint knows about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// The checkpoint that this one continues; none for the first.
    pub parent: Option<TurnNo>,
    /// The time of the cut.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// What can be restored.
    pub kind: Kind,
    /// How many processes are in the image; 0 without one.
    pub processes: u64,
    /// The turn in which the processes were dumped, if it is an earlier one: since then they have done
    /// nothing that anybody could have noticed.
    #[serde(default)]
    pub processes_of: Option<TurnNo>,
    /// The paths that the processes stand upon, relative to the root, escaped as
    /// `std::ascii::escape_default` does; none if they are not known.
    #[serde(default)]
    pub references: Vec<String>,
    /// Where it was made.
    pub host: Host,
    /// The pipes of the processes' standard streams.
    pub pipes: Vec<StdioPipe>,
    /// What a restore needs to know about the container; the shim's own.
    pub runtime: serde_json::Value,
    /// What is missing, for people to read.
    pub notes: Vec<String>,
}

/// What a checkpoint brings back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Files and processes, of one moment.
    Full,
    /// Files alone.
    Files,
}

/// What of a host decides whether it can restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// `uname -m`.
    pub arch: String,
    /// The boot during which it was made.
    pub boot_id: String,
    /// CRIU's version, if it was used.
    pub criu: Option<String>,
    /// The runtime's name and version.
    pub runtime: Option<String>,
}

impl Host {
    /// This host's kernel, architecture and boot; the rest is the caller's to say.
    pub fn detect() -> Self {
        let uname = nix::sys::utsname::uname();
        let text = |value: Option<&std::ffi::OsStr>| {
            value.map_or_else(String::new, |v| v.to_string_lossy().into_owned())
        };
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self {
            kernel: text(uname.as_ref().ok().map(|u| u.release())),
            arch: text(uname.as_ref().ok().map(|u| u.machine())),
            boot_id: boot_id.trim().to_owned(),
            criu: None,
            runtime: None,
        }
    }
}

/// One pipe between the shim and a process's standard stream, at the moment of the cut.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StdioPipe {
    /// The exec that it belongs to; none for init.
    pub exec_id: Option<String>,
    /// 0, 1 or 2.
    pub fd: u32,
    /// The pipe's inode number then.
    pub inode: u64,
    /// How CRIU's images name it: `pipe:[<inode>]`.
    pub target: String,
    /// Input that was on its way to the process and not yet read. In hexadecimal.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub pending: Vec<u8>,
}

fn to_hex<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&hex(bytes))
}

fn from_hex<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(d)?;
    unhex(&text).ok_or_else(|| D::Error::custom("expected hexadecimal digits"))
}

/// What the store holds of one checkpoint, with its digests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The files below `image/`.
    pub image: Vec<FileEntry>,
    /// The files below `bundle/`.
    pub bundle: Vec<FileEntry>,
    /// The writable layer, if it was captured.
    pub upper: Option<TreeSummary>,
    /// Bytes of content in all of them.
    pub bytes: u64,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Below its directory.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Of its content.
    pub sha256: Digest,
}

/// A tree in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeSummary {
    /// Of `upper.list`, which has a digest for each entry.
    pub digest: Digest,
    /// How many names, the root included.
    pub entries: u64,
    /// Of content, without holes.
    pub bytes: u64,
}

impl Manifest {
    pub(super) fn to_json(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        let unfit = |reason| StoreError::Unfit {
            path: path.to_owned(),
            reason,
        };
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| unfit(e.to_string()))?;
        json.push(b'\n');
        if json.len() as u64 > MAX_MANIFEST {
            return Err(unfit(format!("it is larger than {MAX_MANIFEST} bytes")));
        }
        Ok(json)
    }

    /// Reads a manifest, and checks that it is about this turn of this sandbox.
    pub(super) fn parse(
        json: &[u8],
        path: &Path,
        sandbox: &SandboxId,
        turn: TurnNo,
    ) -> Result<Self, StoreError> {
        let damaged = |reason: String| StoreError::Damaged {
            path: path.to_owned(),
            reason,
        };
        // Before anything else is looked at: a newer format may differ in everything else.
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        let version: Version = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        if version.format > u64::from(FORMAT) {
            return Err(StoreError::Newer {
                path: path.to_owned(),
                found: version.format,
                known: FORMAT,
            });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        let about = (&*manifest.namespace, &*manifest.id, manifest.turn);
        if about != (sandbox.namespace(), sandbox.id(), turn) {
            let (namespace, id, turn) = about;
            return Err(damaged(format!(
                "it is about turn {turn} of {namespace:?}/{id:?}"
            )));
        }
        Ok(manifest)
    }
}
