//! The kernel's lists of mounts.

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
};

/// One line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// The filesystem's own device number, `major:minor`.
    pub(crate) device: OsString,
    /// The directory of the filesystem that is mounted.
    pub(crate) root: PathBuf,
    pub(crate) mountpoint: PathBuf,
    /// Of this mount.
    pub(crate) options: OsString,
    /// `shared:7`, `master:3`, …
    pub(crate) propagation: Vec<OsString>,
    pub(crate) fstype: OsString,
    /// Of the filesystem, still escaped, since an escaped comma is no separator.
    pub(crate) super_options: OsString,
}

impl MountEntry {
    /// Whether unmounting `other` unmounts this one, too: both are in one peer group, or this one
    /// is a slave of the other's.
    pub(crate) fn follows(&self, other: &Self) -> bool {
        let group = |field: &OsString| {
            let field = field.to_str()?;
            let (kind, number) = field.split_once(':')?;
            matches!(kind, "shared" | "master").then(|| number.to_owned())
        };
        let shared = |field: &&OsString| field.as_bytes().starts_with(b"shared:");
        let theirs = other.propagation.iter().filter(shared).find_map(group);
        theirs.is_some_and(|t| self.propagation.iter().filter_map(group).any(|g| g == t))
    }
}

/// Its lines, but for what is none.
pub(crate) fn parse_mountinfo(text: &[u8]) -> impl Iterator<Item = MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line)
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ');
    let device = fields.nth(2)?;
    let root = fields.next()?;
    let mountpoint = fields.next()?;
    let options = fields.next()?;
    let plain = |field| OsString::from_vec(unescape_octal(field));
    let mut propagation = Vec::new();
    loop {
        match fields.next()? {
            b"-" => break,
            field => propagation.push(plain(field)),
        }
    }
    let fstype = fields.next()?;
    let super_options = fields.nth(1)?;
    Some(MountEntry {
        device: plain(device),
        root: plain(root).into(),
        mountpoint: plain(mountpoint).into(),
        options: OsString::from_vec(options.to_vec()),
        propagation,
        fstype: plain(fstype),
        super_options: OsString::from_vec(super_options.to_vec()),
    })
}

/// The kernel's escapes in its lists of mounts: a backslash and three octal digits.
pub(super) fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if first == b'\\' => {
                plain.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}
