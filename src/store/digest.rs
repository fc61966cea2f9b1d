//! SHA-256 of files, and of trees.

use std::{
    ffi::CString,
    fmt::{self, Write as _},
    os::fd::OwnedFd,
    str::FromStr,
};

use rustix::{fs::FileType, io::Errno};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};

use crate::tree::{Found, TreeError, Visitor, next_data, wide};

/// Content is read in pieces of this size, and hashed in blocks of [`BLOCK`].
const PIECE: usize = 256 << 10;
/// Blocks that are all zeros count as holes, so that the digest does not depend on where a
/// filesystem keeps its holes.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A SHA-256, written `sha256:<hex>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    pub(super) fn of(data: &[u8]) -> Self {
        Self(Sha256::digest(data).into())
    }

    pub(super) fn from_hash(hash: Sha256) -> Self {
        Self(hash.finalize().into())
    }

    /// The 64 digits without the name of the algorithm.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A string that is no digest.
#[derive(Debug, thiserror::Error)]
#[error("not a digest: expected sha256: and 64 hexadecimal digits")]
pub struct BadDigest;

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(s: &str) -> Result<Self, BadDigest> {
        let hex = s.strip_prefix("sha256:").ok_or(BadDigest)?;
        let bytes = unhex(hex).ok_or(BadDigest)?;
        bytes.try_into().map(Self).map_err(|_| BadDigest)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(D::Error::custom)
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, b| {
        // Writing to a String does not fail.
        let _ = write!(hex, "{b:02x}");
        hex
    })
}

pub(super) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let digit = |d: u8| match d {
        b'0'..=b'9' => Some(d - b'0'),
        b'a'..=b'f' => Some(d - b'a' + 10),
        _ => None,
    };
    let pairs = digits.chunks(2);
    pairs
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}

/// The plain SHA-256 of a file, as `sha256sum` computes it, and its size.
pub(super) fn of_file(found: &Found<'_>) -> Result<(Digest, u64), TreeError> {
    let file = found.open_file()?;
    let mut hash = Sha256::new();
    let mut buf = vec![0; PIECE];
    let mut size = 0;
    loop {
        let n = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut buf[..]))
            .map_err(found.err("read"))?;
        if n == 0 {
            return Ok((Digest::from_hash(hash), size));
        }
        hash.update(&buf[..n]);
        size += n as u64;
    }
}

/// One entry of a tree, as `upper.list` has it: a line `depth TAB digest TAB name`, where the
/// digest covers type, mode, owner, mtime, device number, extended attributes and content.
/// Names in byte order below their directory, so that the list of a tree is unique. The depth
/// stands for the path: paths of a deep tree would need space quadratic in its depth.
///
/// Not covered: atime (a backup may read a checkpoint), ctime, inode numbers, and which names are
/// links of one inode, apart from the count of links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) depth: usize,
    pub(super) digest: Digest,
    /// Escaped as by `std::ascii::escape_default`.
    pub(super) name: String,
}

impl Entry {
    pub(super) fn line(&self) -> String {
        format!("{}\t{}\t{}\n", self.depth, self.digest.hex(), self.name)
    }

    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut fields = line.strip_suffix('\n')?.splitn(3, '\t');
        Some(Self {
            depth: fields.next()?.parse().ok()?,
            digest: format!("sha256:{}", fields.next()?).parse().ok()?,
            name: fields.next()?.to_owned(),
        })
    }
}

/// Hands each entry of a walk on, with the bytes of content that it has.
pub(super) struct Lister<F> {
    pub(super) each: F,
}

impl<F: FnMut(Entry, u64, &Found<'_>) -> Result<(), TreeError>> Lister<F> {
    fn list(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        let (digest, bytes) = of_entry(found)?;
        let entry = Entry {
            depth: found.depth,
            digest,
            name: found.name.to_bytes().escape_ascii().to_string(),
        };
        (self.each)(entry, bytes, found)
    }
}

impl<F: FnMut(Entry, u64, &Found<'_>) -> Result<(), TreeError>> Visitor for Lister<F> {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        self.list(dir)
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.list(found)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

fn of_entry(found: &Found<'_>) -> Result<(Digest, u64), TreeError> {
    let (stat, kind) = (found.stat, found.kind());
    let mut hash = Sha256::new();
    for number in [
        u64::from(stat.st_mode),
        u64::from(stat.st_uid),
        u64::from(stat.st_gid),
        stat.st_mtime as u64,
        wide(stat.st_mtime_nsec),
        stat.st_rdev,
    ] {
        hash.update(number.to_le_bytes());
    }
    let xattrs = found.xattrs()?;
    hash.update((xattrs.len() as u64).to_le_bytes());
    for (name, value) in xattrs {
        field(&mut hash, &CString::into_bytes(name));
        field(&mut hash, &value);
    }
    if kind != FileType::Directory {
        // A directory's count of links and size are the filesystem's own affair.
        hash.update(wide(stat.st_nlink).to_le_bytes());
        hash.update(stat.st_size.unsigned_abs().to_le_bytes());
    }
    let bytes = match kind {
        FileType::RegularFile => {
            content(&mut hash, &found.open_file()?, stat.st_size.unsigned_abs())
                .map_err(found.err("read"))?
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(found.fd, c"", Vec::new())
                .map_err(found.err("read the link"))?;
            field(&mut hash, target.as_bytes());
            0
        }
        _ => 0,
    };
    Ok((Digest::from_hash(hash), bytes))
}

fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// Hashes offset and bytes of every block that is not all zeros; returns how many bytes were read.
fn content(hash: &mut Sha256, file: &OwnedFd, size: u64) -> Result<u64, Errno> {
    let mut buf = vec![0; PIECE.min(usize::try_from(size).unwrap_or(PIECE).max(1))];
    let (mut at, mut total) = (0, 0);
    while let Some((start, end)) = match at < size {
        true => next_data(file, at, size)?,
        false => None,
    } {
        let mut from = start - start % BLOCK as u64;
        while from < end {
            let n = fill(file, &mut buf, from)?;
            if n == 0 {
                return Ok(total);
            }
            for (index, block) in buf[..n].chunks(BLOCK).enumerate() {
                if *block != ZEROS[..block.len()] {
                    hash.update((from + (index * BLOCK) as u64).to_le_bytes());
                    hash.update(block);
                }
            }
            from += n as u64;
            total += n as u64;
        }
        at = from;
    }
    Ok(total)
}

fn fill(file: &OwnedFd, buf: &mut [u8], at: u64) -> Result<usize, Errno> {
    let mut filled = 0;
    while filled < buf.len() {
        let n = rustix::io::retry_on_intr(|| {
            rustix::io::pread(file, &mut buf[filled..], at + filled as u64)
        })?;
        if n == 0 {
            break;
        }
        filled += n;
    }
    Ok(filled)
}
