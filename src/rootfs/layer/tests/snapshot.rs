//! What a layer holds, and how two differ, by docs/state.md and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use super::Candidate;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    ino: u64,
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    rdev: u64,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    content: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    dev: u64,
    all: BTreeMap<PathBuf, Seen>,
}

impl Snapshot {
    pub(super) fn of(upper: &Path) -> Self {
        let mut all = BTreeMap::new();
        let mut todo = vec![PathBuf::new()];
        while let Some(relative) = todo.pop() {
            let path = upper.join(&relative);
            let seen = Seen::of(&path);
            if seen.kind == "dir" {
                let names = fs::read_dir(&path).unwrap();
                todo.extend(names.map(|e| relative.join(e.unwrap().file_name())));
            }
            all.insert(relative, seen);
        }
        let dev = fs::metadata(upper).unwrap().dev();
        Self { dev, all }
    }

    /// Every inode of it.
    pub(super) fn inodes(&self) -> BTreeSet<Candidate> {
        let dev = self.dev;
        let inodes = self.all.values().map(|s| Candidate { dev, ino: s.ino });
        inodes.collect()
    }

    /// The paths that differ, and how.
    pub(super) fn differences(&self, now: &Self) -> Vec<(PathBuf, &'static str)> {
        let mut all = BTreeMap::new();
        for (path, then) in &self.all {
            match now.all.get(path) {
                None => {
                    all.insert(path.clone(), "removed");
                }
                Some(seen) => {
                    if let Some(word) = then.difference(seen) {
                        all.insert(path.clone(), word);
                    }
                }
            }
        }
        for path in now.all.keys().filter(|p| !self.all.contains_key(*p)) {
            all.insert(path.clone(), "added");
        }
        let staying: Vec<&PathBuf> = self.all.keys().filter(|p| self.stays(now, p)).collect();
        for path in &staying {
            let partners = |of: &Self| -> Vec<&PathBuf> {
                let same = |p: &&&PathBuf| of.all[**p].ino == of.all[*path].ino;
                staying.iter().filter(same).copied().collect()
            };
            if partners(self) != partners(now) {
                all.entry((*path).clone()).or_insert("links");
            }
        }
        let mut all: Vec<_> = all
            .into_iter()
            .map(|(path, word)| match path.as_os_str().is_empty() {
                true => (PathBuf::from("."), word),
                false => (path, word),
            })
            .collect();
        all.sort_by(|a, b| a.0.as_os_str().as_bytes().cmp(b.0.as_os_str().as_bytes()));
        all
    }

    fn stays(&self, now: &Self, path: &Path) -> bool {
        let (then, now) = (&self.all[path], now.all.get(path));
        !matches!(then.kind, "dir" | "whiteout") && now.is_some_and(|now| now.kind == then.kind)
    }
}

impl Seen {
    fn of(path: &Path) -> Self {
        let meta = fs::symlink_metadata(path).unwrap();
        let kind = match meta.mode() & libc::S_IFMT {
            libc::S_IFREG => "file",
            libc::S_IFDIR => "dir",
            libc::S_IFLNK => "symlink",
            libc::S_IFCHR if meta.rdev() == 0 => "whiteout",
            libc::S_IFCHR => "char",
            libc::S_IFBLK => "block",
            libc::S_IFIFO => "fifo",
            _ => "socket",
        };
        let whiteout = kind == "whiteout";
        Self {
            ino: meta.ino(),
            kind,
            mode: if whiteout { 0 } else { meta.mode() & 0o7777 },
            owner: if whiteout {
                (0, 0)
            } else {
                (meta.uid(), meta.gid())
            },
            mtime: match kind {
                "dir" | "socket" | "whiteout" => (0, 0),
                _ => (meta.mtime(), meta.mtime_nsec()),
            },
            rdev: meta.rdev(),
            xattrs: if whiteout { Vec::new() } else { xattrs(path) },
            content: match kind {
                "file" => fs::read(path).unwrap(),
                "symlink" => fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec(),
                _ => Vec::new(),
            },
        }
    }

    fn difference(&self, now: &Self) -> Option<&'static str> {
        let attributes = |s: &Self| (s.mode, s.owner, s.mtime, s.rdev, s.xattrs.clone());
        if self.kind != now.kind {
            return Some("kind");
        }
        let times = self.mtime != now.mtime || self.content.len() != now.content.len();
        if self.kind == "file" && times || self.kind == "symlink" && self.content != now.content {
            return Some("content");
        }
        if attributes(self) != attributes(now) {
            return Some("attributes");
        }
        (self.content != now.content).then_some("content")
    }
}

const BOOKS: [&[u8]; 5] = [
    b"trusted.overlay.origin",
    b"trusted.overlay.impure",
    b"trusted.overlay.nlink",
    b"trusted.overlay.uuid",
    b"trusted.overlay.upper",
];

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut list = vec![0; 65536];
    let n = rustix::fs::llistxattr(path.as_c_str(), &mut list[..]).unwrap();
    let mut all: Vec<_> = list[..n]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty() && !BOOKS.contains(name))
        .map(|name| {
            let mut value = vec![0; 65536];
            let n = rustix::fs::lgetxattr(path.as_c_str(), name, &mut value[..]).unwrap();
            (name.to_vec(), value[..n].to_vec())
        })
        .collect();
    all.sort();
    all
}
