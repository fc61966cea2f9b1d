//! Trees, and what they look like to somebody who shares no code with the store.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr, OsString},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::PathBuf,
};

use super::*;
use crate::tree;

/// One name of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub kind: &'static str,
    pub attributes: (u32, u32, u32, u64),
    pub mtime: (i64, i64),
    pub xattrs: BTreeMap<CString, Vec<u8>>,
    pub content: Vec<u8>,
    pub target: Option<PathBuf>,
    /// The first of its names, if there are several.
    pub link: Option<PathBuf>,
}

/// All names of a tree; the root is "".
pub fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut all = BTreeMap::new();
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        // Not `join`, which would add a slash to a root that is no directory.
        let full = match path.as_os_str().is_empty() {
            true => root.to_owned(),
            false => root.join(&path),
        };
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        if kind.is_dir() {
            let names = fs::read_dir(&full).unwrap();
            let mut names: Vec<OsString> = names.map(|n| n.unwrap().file_name()).collect();
            names.sort_by(|a, b| b.cmp(a));
            todo.extend(names.iter().map(|name| path.join(name)));
        }
        // Overlay makes many whiteouts links of one inode, which means nothing.
        let is_whiteout = kind.is_char_device() && meta.rdev() == 0;
        let link = (!kind.is_dir() && !is_whiteout && meta.nlink() > 1).then(|| {
            first
                .entry(meta.ino())
                .or_insert_with(|| path.clone())
                .clone()
        });
        let seen = Seen {
            kind: match kind {
                k if k.is_dir() => "directory",
                k if k.is_file() => "file",
                k if k.is_symlink() => "symlink",
                k if k.is_fifo() => "fifo",
                k if k.is_socket() => "socket",
                k if k.is_char_device() => "char",
                _ => "block",
            },
            attributes: (meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.rdev()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            xattrs: xattrs(&full),
            content: match kind.is_file() {
                true => fs::read(&full).unwrap(),
                false => Vec::new(),
            },
            target: fs::read_link(&full).ok(),
            link,
        };
        all.insert(path, seen);
    }
    all
}

fn xattrs(path: &Path) -> BTreeMap<CString, Vec<u8>> {
    let mut list = vec![0; 4096];
    let n = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..n].split(|b| *b == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let name = CString::new(name).unwrap();
        let mut value = vec![0; 4096];
        let n = rustix::fs::lgetxattr(path, &name, &mut value[..]).unwrap();
        value.truncate(n);
        (name, value)
    };
    names.map(value).collect()
}

pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

pub fn mknod(path: &Path, kind: rustix::fs::FileType, number: u64) {
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, mode, number).unwrap();
}

pub fn escaped(path: &Path) -> String {
    path.as_os_str().as_bytes().escape_ascii().to_string()
}

/// A tree with one of everything.
pub fn zoo(root: &Path) {
    use rustix::fs::FileType;
    fs::create_dir_all(root.join("a/deep/dir")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::create_dir(root.join("opaque")).unwrap();
    set_xattr(&root.join("opaque"), "trusted.overlay.opaque", b"y");
    set_xattr(root, "trusted.overlay.origin", b"\0\xff");
    for name in ["a/file", "a/deep/dir/file", "a!", "new\nline \\ é", "z"] {
        fs::write(root.join(name), name).unwrap();
    }
    fs::write(root.join("nothing"), "").unwrap();
    fs::write(root.join("a/large"), noise(7, 200_000)).unwrap();
    symlink("nowhere/\n", root.join("link")).unwrap();
    fs::hard_link(root.join("z"), root.join("a/deep/z again")).unwrap();
    mknod(&root.join("whiteout"), FileType::CharacterDevice, 0);
    mknod(&root.join("device"), FileType::BlockDevice, 0x701);
    mknod(&root.join("fifo"), FileType::Fifo, 0);
    mknod(&root.join("socket"), FileType::Socket, 0);
    std::os::unix::fs::lchown(root.join("link"), Some(3), Some(4)).unwrap();
    std::os::unix::fs::chown(root.join("fifo"), Some(1), Some(2)).unwrap();
    set_xattr(&root.join("a/file"), "user.note", b"text");
    fs::set_permissions(root.join("a!"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::set_permissions(root.join("empty"), fs::Permissions::from_mode(0o1777)).unwrap();
    rarities(root);
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    use std::os::unix::fs::FileExt;
    sparse.write_all_at(b"middle", 5 << 30).unwrap();
}

/// What is seldom in a layer.
fn rarities(root: &Path) {
    let rare = root.join("rare");
    fs::create_dir_all(rare.join("dir/shut")).unwrap();
    fs::write(rare.join("n".repeat(255)), "long").unwrap();
    fs::write(rare.join(OsStr::from_bytes(b"\xff\xfe")), "bytes").unwrap();
    symlink("x".repeat(4000), rare.join("long-link")).unwrap();
    symlink("../../..", rare.join("up")).unwrap();
    set_xattr(&rare.join("up"), "trusted.on-a-link", b"1");
    set_xattr(&root.join("whiteout"), "trusted.on-a-device", b"1");
    for name in ["fifo", "link"] {
        fs::hard_link(root.join(name), rare.join(name)).unwrap();
    }
    for name in ["whiteouts", "dir/whiteouts"] {
        fs::hard_link(root.join("whiteout"), rare.join(name)).unwrap();
    }
    fs::write(rare.join("attributes"), "").unwrap();
    set_xattr(&rare.join("attributes"), "user.large", &[3; 2000]);
    set_xattr(&rare.join("attributes"), "user.none", b"");
    // cap_net_raw=ep, revision 2.
    let mut capability = [0; 20];
    capability[..8].copy_from_slice(&[1, 0, 0, 2, 0, 32, 0, 0]);
    set_xattr(&rare.join("attributes"), "security.capability", &capability);
    set_xattr(&rare.join("dir"), "system.posix_acl_default", &acl());
    fs::write(rare.join("dir/with-acl"), "").unwrap();
    set_xattr(
        &rare.join("dir/with-acl"),
        "system.posix_acl_access",
        &acl(),
    );
    fs::write(rare.join("setuid"), "#!").unwrap();
    std::os::unix::fs::chown(rare.join("setuid"), Some(1000), Some(70_000)).unwrap();
    fs::set_permissions(rare.join("setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(rare.join("dir/shut"), fs::Permissions::from_mode(0o000)).unwrap();
}

/// user::rwx, user:1000:r--, group::r-x, mask::r-x, other::---
pub fn acl() -> Vec<u8> {
    let mut acl = vec![2, 0, 0, 0];
    for (tag, perm, id) in [
        (1u16, 7u16, u32::MAX),
        (2, 4, 1000),
        (4, 5, u32::MAX),
        (16, 5, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// Makes `depth` directories `d`, one in the other, and returns the innermost.
pub fn make_deep(root: &Path, depth: usize) -> OwnedFd {
    fs::create_dir(root).unwrap();
    let mut dir = tree::open_root(root).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&dir, c"d", rustix::fs::Mode::RWXU).unwrap();
        dir = tree::open_dir(&tree::look_at(dir.as_fd(), c"d").unwrap()).unwrap();
    }
    dir
}

/// Bytes that do not compress.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend(next());
    }
    bytes.truncate(length);
    bytes
}
