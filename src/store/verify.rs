//! Whether a checkpoint still holds what was put into it.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, ErrorKind, Read},
    path::{Path, PathBuf},
};

use super::{
    Digest, FileEntry, SandboxStore, StoreError, TreeSummary,
    digest::{Entry, Lister},
    files,
    pending::list_files,
};
use crate::{
    sandbox::TurnNo,
    tree::{self, Expect, Found, TreeError},
};

/// As many faults are named.
const MAX_FAULTS: usize = 100;
/// A name of 255 bytes, each escaped as four, a digest and a depth.
const MAX_LINE: u64 = 2048;

/// One thing that is wrong with a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Below the checkpoint's directory; names of the writable layer are escaped.
    pub path: String,
    /// What.
    pub what: What,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// How a file is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// It isn't there.
    Missing,
    /// It is shorter.
    Truncated {
        /// In bytes.
        expected: u64,
        /// In bytes.
        found: u64,
    },
    /// It has other content, or (in the writable layer) other attributes.
    Changed,
    /// It was not there before.
    Added,
    /// It could not be read.
    Unreadable(String),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("missing"),
            Self::Truncated { expected, found } => {
                write!(f, "truncated: {found} bytes of {expected}")
            }
            Self::Changed => f.write_str("changed"),
            Self::Added => f.write_str("does not belong there"),
            Self::Unreadable(why) => write!(f, "unreadable: {why}"),
        }
    }
}

impl SandboxStore {
    /// Reads a whole checkpoint and compares it with its digests. Names up to 100 faults; none
    /// means that it is sound. An error means that the manifest itself is not.
    pub fn verify(&self, turn: TurnNo) -> Result<Vec<Fault>, StoreError> {
        let checkpoint = self.get(turn)?;
        let contents = &checkpoint.manifest.contents;
        let mut faults = Vec::new();
        for (name, expected) in [("image", &contents.image), ("bundle", &contents.bundle)] {
            match list_files(&checkpoint.dir.join(name)) {
                Ok(found) => compare_files(name, expected, &found, &mut faults),
                Err(e) => faults.push(unreadable(name, &e)),
            }
        }
        if let Some(summary) = &contents.upper
            && let Err(e) = compare_trees(&checkpoint.dir, summary, &mut faults)
        {
            faults.push(unreadable("upper", &e));
        }
        faults.truncate(MAX_FAULTS);
        Ok(faults)
    }
}

fn unreadable(path: &str, error: &StoreError) -> Fault {
    let absent = |e: &StoreError| match e {
        StoreError::Io { source, .. } => source.kind() == ErrorKind::NotFound,
        StoreError::Tree(TreeError::Io { source, .. }) => *source == rustix::io::Errno::NOENT,
        _ => false,
    };
    Fault {
        path: path.to_owned(),
        what: match absent(error) {
            true => What::Missing,
            false => What::Unreadable(error.to_string()),
        },
    }
}

fn compare_files(dir: &str, expected: &[FileEntry], found: &[FileEntry], faults: &mut Vec<Fault>) {
    let mut fault = |file: &FileEntry, what| {
        faults.push(Fault {
            path: format!("{dir}/{}", file.path),
            what,
        });
    };
    for file in expected {
        match found.iter().find(|f| f.path == file.path) {
            None => fault(file, What::Missing),
            Some(now) if now.size < file.size => fault(
                file,
                What::Truncated {
                    expected: file.size,
                    found: now.size,
                },
            ),
            Some(now) if now != file => fault(file, What::Changed),
            Some(_) => {}
        }
    }
    for file in found {
        if !expected.iter().any(|f| f.path == file.path) {
            fault(file, What::Added);
        }
    }
}

/// Walks the tree along its list; both are in the same order.
fn compare_trees(
    dir: &Path,
    summary: &TreeSummary,
    faults: &mut Vec<Fault>,
) -> Result<(), StoreError> {
    let path = dir.join("upper.list");
    if digest_of(&path)? != summary.digest {
        faults.push(Fault {
            path: "upper.list".into(),
            what: What::Changed,
        });
        return Ok(());
    }
    let mut comparison = Comparison {
        list: List::open(&path)?,
        ancestors: Vec::new(),
        faults,
        failed: None,
    };
    let mut lister = Lister {
        each: |entry: Entry, _, found: &Found<'_>| {
            if comparison.failed.is_none() {
                comparison.failed = comparison.step(&entry).err();
            }
            match comparison.failed.is_some() || comparison.faults.len() >= MAX_FAULTS {
                true => Err(found.changed("enough is known")),
                false => Ok(()),
            }
        },
    };
    let upper = dir.join("upper");
    let walked = tree::walk(
        tree::open_root(&upper)?,
        &upper,
        Expect::Unchanged,
        &|| false,
        &mut lister,
    );
    if let Some(e) = comparison.failed.take() {
        return Err(e);
    }
    if comparison.faults.len() >= MAX_FAULTS {
        return Ok(());
    }
    walked?;
    while let Some(entry) = comparison.list.next.take() {
        comparison.fault(&entry, What::Missing);
        comparison.list.advance()?;
        if comparison.faults.len() >= MAX_FAULTS {
            break;
        }
    }
    Ok(())
}

struct Comparison<'a> {
    list: List,
    /// Names on the way to the entry that is looked at.
    ancestors: Vec<String>,
    faults: &'a mut Vec<Fault>,
    failed: Option<StoreError>,
}

impl Comparison<'_> {
    fn step(&mut self, now: &Entry) -> Result<(), StoreError> {
        loop {
            let key = |e: &Entry| e.name.clone();
            match self.list.next.take() {
                Some(then) if then.depth == now.depth && then.name == now.name => {
                    let what = (then.digest != now.digest).then_some(What::Changed);
                    self.place(now);
                    if let Some(what) = what {
                        self.fault(now, what);
                    }
                    return self.list.advance();
                }
                // The listed one sorts before the found one, or lies deeper: it is gone.
                Some(then)
                    if then.depth > now.depth
                        || then.depth == now.depth && before(&key(&then), &key(now)) =>
                {
                    self.fault(&then, What::Missing);
                    self.list.advance()?;
                    if self.faults.len() >= MAX_FAULTS {
                        return Ok(());
                    }
                }
                then => {
                    self.list.next = then;
                    self.fault(now, What::Added);
                    return Ok(());
                }
            }
        }
    }

    fn place(&mut self, entry: &Entry) {
        self.ancestors.truncate(entry.depth);
        self.ancestors.push(entry.name.clone());
    }

    fn fault(&mut self, entry: &Entry, what: What) {
        self.place(entry);
        // The root's own name is empty.
        let names = self.ancestors.iter().skip(1).map(String::as_str);
        let path: PathBuf = std::iter::once("upper").chain(names).collect();
        self.faults.push(Fault {
            path: path.to_string_lossy().into_owned(),
            what,
        });
    }
}

/// The order of the names themselves, which that of their escaped forms is not.
pub(super) fn before(a: &str, b: &str) -> bool {
    unescape(a) < unescape(b)
}

fn unescape(name: &str) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut rest = name.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, after) = match (first, tail) {
            (b'\\', [b'x', digits @ ..]) => {
                let hex = digits.get(..2).and_then(|d| std::str::from_utf8(d).ok());
                let byte = hex.and_then(|d| u8::from_str_radix(d, 16).ok());
                (byte.unwrap_or(b'?'), digits.get(2..).unwrap_or_default())
            }
            (b'\\', [b't', after @ ..]) => (b'\t', after),
            (b'\\', [b'n', after @ ..]) => (b'\n', after),
            (b'\\', [b'r', after @ ..]) => (b'\r', after),
            (b'\\', [quoted, after @ ..]) => (*quoted, after),
            (plain, after) => (plain, after),
        };
        plain.push(byte);
        rest = after;
    }
    plain
}

/// `upper.list`, one entry ahead.
struct List {
    lines: BufReader<File>,
    path: PathBuf,
    next: Option<Entry>,
}

impl List {
    fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(files::io("open", path))?;
        let mut list = Self {
            lines: BufReader::new(file),
            path: path.to_owned(),
            next: None,
        };
        list.advance()?;
        Ok(list)
    }

    fn advance(&mut self) -> Result<(), StoreError> {
        let mut line = String::new();
        let read = Read::by_ref(&mut self.lines)
            .take(MAX_LINE)
            .read_line(&mut line);
        if read.map_err(files::io("read", &self.path))? == 0 {
            self.next = None;
            return Ok(());
        }
        let entry = Entry::parse(&line).ok_or_else(|| StoreError::Damaged {
            path: self.path.clone(),
            reason: format!("a line is {line:?}"),
        })?;
        self.next = Some(entry);
        Ok(())
    }
}

fn digest_of(path: &Path) -> Result<Digest, StoreError> {
    let mut file = File::open(path).map_err(files::io("open", path))?;
    let mut hash = <sha2::Sha256 as sha2::Digest>::new();
    std::io::copy(&mut file, &mut hash).map_err(files::io("read", path))?;
    Ok(Digest::from_hash(hash))
}
