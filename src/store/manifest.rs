//! What one checkpoint says about itself.

use std::{
    ffi::OsString,
    fs::File,
    io::Read,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use time::OffsetDateTime;

use super::{
    Digest, FORMAT, StoreError,
    content::{self, Cut},
    entry::Content,
};
use crate::{
    digest::{hex, unhex},
    sandbox::{SandboxId, TurnNo},
};

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
    /// The checkpoint of another sandbox that this one's history begins with, if it is a fork.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// What the caller knew.
    #[serde(flatten)]
    pub facts: Facts,
    /// What the store holds of it.
    pub contents: Contents,
}

/// A checkpoint of any sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The sandbox's containerd namespace.
    pub namespace: String,
    /// The sandbox's container id.
    pub id: String,
    /// Which turn.
    pub turn: TurnNo,
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
    /// Where it was made.
    pub host: Host,
    /// The pipes of the processes' standard streams.
    pub pipes: Vec<StdioPipe>,
    /// What a restore needs to know about the container; the shim's own.
    pub runtime: serde_json::Value,
    /// What is missing and why, for people to read. Of [`Kind::Files`] at least why there are no
    /// processes.
    pub notes: Vec<String>,
    /// The turn whose dump the processes are, if it is an earlier one (D7a).
    #[serde(default)]
    pub processes_of: Option<TurnNo>,
    /// Files that the dumped processes refer to, as they were at the dump (D7a).
    #[serde(default)]
    pub references: Vec<Reference>,
}

/// A file that a process in the dump has open, mapped, watched or the like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// Relative to the root. Written with `%` and two digits for each byte that is not printable
    /// ASCII, and for `%` itself.
    #[serde(serialize_with = "to_escaped", deserialize_with = "from_escaped")]
    pub path: PathBuf,
    /// The digest of its entry in the writable layer ([`super::TreeEntry::digest`]); none if the
    /// layer had no such name, of directories, and in the checkpoint of the dump itself.
    #[serde(default)]
    pub entry: Option<Digest>,
}

fn to_escaped<S: Serializer>(path: &Path, s: S) -> Result<S::Ok, S::Error> {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'%' => text += "%25",
            b' '..=b'~' => text.push(char::from(*byte)),
            byte => text += &format!("%{byte:02x}"),
        }
    }
    s.serialize_str(&text)
}

fn from_escaped<'de, D: Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(d)?;
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(unhex);
        bytes.extend(code.ok_or_else(|| D::Error::custom("expected two hexadecimal digits"))?);
        bytes.extend(part.as_bytes().get(2..).unwrap_or_default());
    }
    Ok(OsString::from_vec(bytes).into())
}

/// What a checkpoint brings back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Files and processes.
    Full,
    /// Files without processes, where these could not be kept: a start boots on them.
    Files,
}

/// What of a host decides whether it can restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `uname -r`.
    pub kernel: String,
    /// `uname -m`.
    pub arch: String,
    /// The processor's model: a dump may use what another one lacks.
    #[serde(default)]
    pub cpu: String,
    /// The boot during which it was made.
    pub boot_id: String,
    /// CRIU's version, if it was used.
    pub criu: Option<String>,
    /// The runtime's name and version.
    pub runtime: Option<String>,
}

impl Host {
    /// This host's kernel, architecture and boot; the rest is the caller's to say. Read once: none of it
    /// changes while a process lives, and /proc/cpuinfo asks each CPU how fast it is just now.
    pub fn detect() -> Self {
        static HOST: OnceLock<Host> = OnceLock::new();
        HOST.get_or_init(Self::read).clone()
    }

    fn read() -> Self {
        let uname = nix::sys::utsname::uname();
        let text = |value: Option<&std::ffi::OsStr>| {
            value.map_or_else(String::new, |v| v.to_string_lossy().into_owned())
        };
        let boot_id = beginning("/proc/sys/kernel/random/boot_id");
        let cpu = beginning("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        Self {
            kernel: text(uname.as_ref().ok().map(|u| u.release())),
            arch: text(uname.as_ref().ok().map(|u| u.machine())),
            cpu: cpu
                .map_or("", |cpu| cpu.trim_matches([':', '\t', ' ']))
                .to_owned(),
            boot_id: boot_id.trim().to_owned(),
            criu: None,
            runtime: None,
        }
    }
}

/// The first bytes of a file of /proc; nothing if it cannot be read.
fn beginning(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let _ = file.take(1024).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
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
    /// Of these, how many are in chunks that are not all zeros.
    pub data: u64,
    /// How long its chunks are.
    pub chunk: u32,
    /// Of its chunk or list of chunks.
    pub digest: Digest,
}

impl FileEntry {
    pub(super) fn cut(&self) -> Cut {
        Cut {
            content: Content {
                size: self.size,
                data: self.data,
                root: self.digest,
            },
            chunk: self.chunk,
        }
    }
}

/// A tree in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeSummary {
    /// Of its root: equal trees have equal digests.
    pub digest: Digest,
    /// How many names, the root included.
    pub entries: u64,
    /// Of content that is not all zeros; a file with several names counts with each.
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
        let files = manifest
            .contents
            .image
            .iter()
            .chain(&manifest.contents.bundle);
        for file in files {
            check_file(file).map_err(|what| damaged(format!("{what} of {:?}", file.path)))?;
        }
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

/// What is laid out by it must stay below its directory, and its content be of a possible shape.
fn check_file(file: &FileEntry) -> Result<(), &'static str> {
    let path = Path::new(&file.path);
    let normal = |part| matches!(part, std::path::Component::Normal(_));
    let zeros = file.digest == Digest::ZEROS;
    if file.path.is_empty() || file.path.contains('\0') || !path.components().all(normal) {
        return Err("the path");
    }
    if !matches!(file.chunk, content::FILE_CHUNK | content::PAGE_CHUNK) {
        return Err("the chunk's size");
    }
    match file.data <= file.size && zeros == (file.data == 0) && i64::try_from(file.size).is_ok() {
        true => Ok(()),
        false => Err("the size"),
    }
}
