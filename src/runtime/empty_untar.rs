//! The `tar` by which CRIU fills each tmpfs of a sandbox again.
//!
//! tar, and the gzip that it starts, take some milliseconds for each of the directories of /proc and /sys
//! that runc hides, of which nothing comes back but owner, mode and time. So for a restore, too, PATH begins
//! with a directory in which this very program is called [tar](super::empty_tar). It unpacks what holds an
//! empty directory, and leaves anything else to tar.

use std::{
    ffi::{OsStr, OsString},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use rustix::fs::{Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW, Uid};
use tar::{EntryType, Header};

use super::empty_tar::{BLOCK, RECORD};

/// How CRIU calls it: `tmpfs_restore` in its `criu/filesystems.c`. The directory follows; the archive is
/// the standard input. Called otherwise, it is tar's business.
const EXTRACT: [&str; 5] = [
    "--extract",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--directory",
];
/// A larger archive holds more than one name.
const MAX_PACKED: usize = RECORD + 1024;

/// Does what tar would, if it is called for an archive of an empty directory. False: it is tar's business,
/// and tar finds all as it was.
pub(super) fn unpack(args: &[OsString]) -> bool {
    let [options @ .., dir] = args else {
        return false;
    };
    options == EXTRACT && unpack_into(io::stdin().as_fd(), dir).is_some()
}

fn unpack_into(archive: BorrowedFd<'_>, dir: &OsStr) -> Option<()> {
    let own = Own::read(archive)?;
    // Another user gives nothing away.
    let is_root = nix::unistd::geteuid().is_root();
    is_root.then(|| own.put(Path::new(dir)).ok()).flatten()
}

/// What an archive says of the directory that it was made of.
struct Own {
    uid: u32,
    gid: u32,
    mode: u32,
    mtime: i64,
}

impl Own {
    /// None if the archive holds anything else, or is not one.
    fn read(archive: BorrowedFd<'_>) -> Option<Self> {
        // Where tar will read from, if it has to.
        let start = rustix::fs::seek(archive, SeekFrom::Current(0)).ok()?;
        let mut packed = vec![0; MAX_PACKED + 1];
        let length = rustix::io::pread(archive, &mut packed, start).ok()?;
        let packed = packed.get(..length).filter(|_| length <= MAX_PACKED)?;
        let mut blocks = Vec::new();
        let unpacker = flate2::read::GzDecoder::new(packed);
        unpacker
            .take(RECORD as u64 + 1)
            .read_to_end(&mut blocks)
            .ok()?;
        let (header, rest) = blocks.split_at_checked(BLOCK)?;
        let is_end = rest.len() >= 2 * BLOCK && rest.iter().all(|byte| *byte == 0);
        if blocks.len() > RECORD || !is_end {
            return None;
        }
        Self::of(Header::from_byte_slice(header))
    }

    fn of(header: &Header) -> Option<Self> {
        let mut sum = header.clone();
        sum.set_cksum();
        let is_whole = sum.cksum().ok()? == header.cksum().ok()?;
        let is_own = header.path_bytes().as_ref() == b"./"
            && header.entry_type() == EntryType::Directory
            && header.size().ok()? == 0;
        // With names of users tar would look for their numbers.
        let has_names = [header.username_bytes(), header.groupname_bytes()]
            .into_iter()
            .any(|name| name.is_some_and(|name| !name.is_empty()));
        (is_whole && is_own && !has_names).then_some(())?;
        Some(Self {
            uid: header.uid().ok()?.try_into().ok()?,
            gid: header.gid().ok()?.try_into().ok()?,
            mode: header.mode().ok()?,
            mtime: header.mtime().ok()?.try_into().ok()?,
        })
    }

    /// Makes the directory what it was. A change of owner takes set-id bits away, so it comes first.
    fn put(&self, dir: &Path) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(dir, flags, Mode::empty())?;
        let owner = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::fs::fchown(&dir, Some(owner.0), Some(owner.1))?;
        rustix::fs::fchmod(&dir, Mode::from_raw_mode(self.mode & 0o7777))?;
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            },
            last_modification: Timespec {
                tv_sec: self.mtime,
                tv_nsec: 0,
            },
        };
        rustix::fs::futimens(&dir, &times)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, Permissions},
        os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
        process::{Command, Stdio},
    };

    use super::*;

    /// What tar makes of a directory, called as by CRIU.
    fn packed(dir: &Path) -> File {
        let archive = tempfile::tempfile().unwrap();
        let mut tar = Command::new("tar");
        tar.args(["--create", "--gzip", "--numeric-owner", "--directory"]);
        tar.arg(dir).arg(".");
        tar.stdout(Stdio::from(archive.try_clone().unwrap()));
        assert!(tar.status().unwrap().success());
        rewound(archive)
    }

    fn rewound(archive: File) -> File {
        rustix::fs::seek(&archive, SeekFrom::Start(0)).unwrap();
        archive
    }

    fn own(path: &Path) -> (u32, u32, u32, i64) {
        let its = fs::metadata(path).unwrap();
        (its.mode(), its.uid(), its.gid(), its.mtime())
    }

    #[test]
    fn an_empty_directory_comes_back_as_by_tar() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        for (mode, uid) in [(0o755, 0), (0o1777, 7), (0o2700, 3_000_000)] {
            let all = tempfile::tempdir().unwrap();
            let at = |name: &str| {
                let path = all.path().join(name);
                fs::create_dir(&path).unwrap();
                path
            };
            let (was, ours, theirs) = (at("was"), at("ours"), at("theirs"));
            chown(&was, Some(uid), Some(uid)).unwrap();
            fs::set_permissions(&was, Permissions::from_mode(mode)).unwrap();
            let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            File::open(&was).unwrap().set_modified(long_ago).unwrap();
            let archive = packed(&was);
            unpack_into(archive.as_fd(), ours.as_os_str()).unwrap();
            // Where it was left is where tar begins.
            let mut tar = Command::new("tar");
            tar.args(EXTRACT).arg(&theirs).stdin(Stdio::from(archive));
            assert!(tar.status().unwrap().success());
            assert_eq!(own(&ours), own(&was));
            assert_eq!(own(&theirs), own(&was));
        }
    }

    #[test]
    fn anything_else_is_left_to_tar_and_nothing_is_done() {
        let into = tempfile::tempdir().unwrap();
        fs::set_permissions(into.path(), Permissions::from_mode(0o711)).unwrap();
        let before = own(into.path());
        let refused = |archive: File| {
            let done = unpack_into(archive.as_fd(), into.path().as_os_str());
            assert!(done.is_none());
            assert_eq!(own(into.path()), before);
        };
        let make: [fn(&Path); 3] = [
            |at| fs::write(at.join("file"), "x").unwrap(),
            |at| fs::create_dir(at.join("dir")).unwrap(),
            |at| symlink("x", at.join("link")).unwrap(),
        ];
        for make in make {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path());
            refused(packed(dir.path()));
        }
        // No archive, or half of one.
        let empty = tempfile::tempdir().unwrap();
        let whole = packed(empty.path());
        let length = whole.metadata().unwrap().len();
        whole.set_len(length / 2).unwrap();
        refused(whole);
        refused(tempfile::tempfile().unwrap());
        let text = tempfile::tempfile().unwrap();
        text.set_len(1 << 20).unwrap();
        refused(text);
        // Whoever calls it otherwise.
        let words = ["--extract", "--gzip", "--directory", "/nowhere"];
        assert!(!unpack(&words.map(OsString::from)));
    }

    #[test]
    fn no_link_is_followed() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (dir, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let link = beside.path().join("link");
        symlink(dir.path(), &link).unwrap();
        let archive = packed(dir.path());
        assert!(unpack_into(archive.as_fd(), link.as_os_str()).is_none());
        assert!(unpack_into(archive.as_fd(), dir.path().as_os_str()).is_some());
    }
}
