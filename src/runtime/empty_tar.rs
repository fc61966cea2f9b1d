//! The `tar` by which CRIU packs each tmpfs of a sandbox.
//!
//! CRIU runs tar for it, that a shell, and that gzip: 7 to 13 ms while the sandbox stands still. Nearly
//! all are empty, since runc hides directories of /proc and /sys below one each, and /dev holds device
//! nodes and links. So for a dump PATH begins with a directory in which this very program is called
//! tar. It packs what has no contents as tar would, and leaves anything else to tar. A restore finds it, too:
//! see [`empty_untar`].

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use flate2::Crc;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use tar::{EntryType, Header};

use super::empty_untar;
use crate::tree::{self, Expect, Found, TreeError, Visitor};

const TAR: &str = "tar";
/// How CRIU calls it: `tmpfs_dump` in its `criu/filesystems.c`. Called otherwise, it is tar's business.
const CREATE: [&str; 12] = [
    "--create",
    "--gzip",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
    "--directory",
    STDIN,
    ".",
];
/// The directory is CRIU's, open as the standard input.
const STDIN: &str = "/proc/self/fd/0";
pub(super) const BLOCK: usize = 512;
/// tar fills an archive up to a multiple of this many bytes, of which two blocks at least mark its end.
pub(super) const RECORD: usize = 20 * BLOCK;
/// Larger trees are left to tar: a /dev has some twenty names.
const MAX_ENTRIES: usize = 256;
/// As long a path, or what a link says, fits into a header.
const MAX_NAME: usize = 99;
/// The largest piece of data that deflate can hold as it is.
const MAX_STORED: usize = u16::MAX as usize;

/// The directory of PATH that goes with a HOME of CRIU.
fn dir(home: &Path) -> PathBuf {
    home.join("bin")
}

/// Makes a tar of this program below a HOME of CRIU.
pub(super) fn install(home: &Path) -> io::Result<()> {
    link(home, TAR)
}

/// Has this program found by a name.
pub(super) fn link(home: &Path, name: &str) -> io::Result<()> {
    fs::create_dir_all(dir(home))?;
    unlink(home, name)?;
    symlink(super::own_program(), dir(home).join(name))
}

/// Has it no longer found.
pub(super) fn unlink(home: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir(home).join(name)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The PATH with which that tar is found before any other.
pub(super) fn path(home: &Path) -> Option<OsString> {
    let others = env::var_os("PATH")?;
    env::join_paths([dir(home)].into_iter().chain(env::split_paths(&others))).ok()
}

/// Whether this program was called by the name of tar.
pub fn is_called() -> bool {
    let name = env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(TAR)))
}

/// Does what tar does.
///
/// # Errors
/// When there is no other tar, or the archive cannot be written.
pub fn main() -> io::Result<()> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let ours = args == CREATE;
    if let Some(archive) = ours.then(|| pack(Path::new(STDIN))).flatten() {
        return io::stdout().write_all(&archive);
    }
    if empty_untar::unpack(&args) {
        return Ok(());
    }
    // Each time around there is one directory less to find ourselves in.
    let path = env::var_os("PATH").unwrap_or_default();
    let others = env::join_paths(env::split_paths(&path).skip(1)).map_err(io::Error::other)?;
    Err(Command::new(TAR).args(args).env("PATH", others).exec())
}

/// The archive of a directory that holds nothing but directories, links and device nodes. None of any
/// other, or if it cannot be told: tar knows what to say. As in tar's, what is mounted below is left out.
fn pack(dir: &Path) -> Option<Vec<u8>> {
    // CRIU's descriptor is reached by a link of /proc.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, dir, flags, Mode::empty()).ok()?;
    let mut packer = Packer {
        prefix: dir.as_os_str().len() + 1,
        archive: Vec::with_capacity(RECORD),
    };
    tree::walk(root, dir, Expect::Unchanged, &|| false, &mut packer).ok()?;
    let mut archive = packer.archive;
    archive.resize((archive.len() + 2 * BLOCK).next_multiple_of(RECORD), 0);
    Some(gzip(&archive))
}

struct Packer {
    /// How long the part of a path is that an archive does not show.
    prefix: usize,
    archive: Vec<u8>,
}

impl Packer {
    fn add(&mut self, found: &Found<'_>) -> Option<()> {
        let mut header = Header::new_gnu();
        let (kind, trailing) = match found.kind() {
            FileType::Directory => (EntryType::Directory, "/"),
            FileType::CharacterDevice => (EntryType::Char, ""),
            FileType::BlockDevice => (EntryType::Block, ""),
            FileType::Symlink => (EntryType::Symlink, ""),
            _ => return None,
        };
        let is_full = self.archive.len() >= MAX_ENTRIES * BLOCK;
        // Names of one inode are links of each other in an archive, too.
        let has_names = kind != EntryType::Directory && found.stat.st_nlink != 1;
        if is_full || has_names {
            return None;
        }
        header.set_entry_type(kind);
        let path = found.path.as_os_str().as_bytes();
        let inside = path.get(self.prefix..).unwrap_or_default();
        let dot: &[u8] = if inside.is_empty() { b"." } else { b"./" };
        let name = [dot, inside, trailing.as_bytes()].concat();
        put(&mut header.as_gnu_mut()?.name, &name)?;
        match kind {
            EntryType::Symlink => {
                let target = rustix::fs::readlinkat(found.fd, c"", Vec::new()).ok()?;
                put(&mut header.as_gnu_mut()?.linkname, target.as_bytes())?;
            }
            EntryType::Char | EntryType::Block => {
                let number = found.stat.st_rdev;
                header.set_device_major(libc::major(number)).ok()?;
                header.set_device_minor(libc::minor(number)).ok()?;
            }
            _ => {}
        }
        header.set_mode(found.stat.st_mode & 0o7777);
        header.set_uid(found.stat.st_uid.into());
        header.set_gid(found.stat.st_gid.into());
        header.set_mtime(u64::try_from(found.stat.st_mtime).ok()?);
        header.set_size(0);
        header.set_cksum();
        self.archive.extend_from_slice(header.as_bytes());
        Some(())
    }

    fn or_tar(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.add(found)
            .ok_or_else(|| found.changed("it is left to tar"))
    }
}

impl Visitor for Packer {
    fn enter(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        self.or_tar(dir)
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        self.or_tar(found)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

fn put(field: &mut [u8; MAX_NAME + 1], text: &[u8]) -> Option<()> {
    let fits = text.len() <= MAX_NAME;
    field
        .get_mut(..text.len())
        .filter(|_| fits)?
        .copy_from_slice(text);
    Some(())
}

/// A gzip file of data as it is. To compress these few blocks of zeros would take longer than all else:
/// the tables for it are 350 KB of fresh memory.
fn gzip(data: &[u8]) -> Vec<u8> {
    // Magic, deflate, no flags, no time, nothing special, Unix.
    let mut out = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let mut pieces = data.chunks(MAX_STORED).peekable();
    while let Some(piece) = pieces.next() {
        let length = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        out.push(u8::from(pieces.peek().is_none()));
        out.extend(length.to_le_bytes());
        out.extend((!length).to_le_bytes());
        out.extend_from_slice(piece);
    }
    let mut check = Crc::new();
    check.update(data);
    out.extend(check.sum().to_le_bytes());
    out.extend(check.amount().to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs::{File, Permissions},
        os::unix::fs::{MetadataExt, PermissionsExt, chown},
        process::Stdio,
    };

    use super::*;

    /// tar, called as by CRIU to pack (fd 0) or to unpack (from fd 0).
    fn real_tar(args: &[&str], stdin: &Path) -> Vec<u8> {
        let mut tar = Command::new(TAR);
        tar.args(args)
            .stdin(Stdio::from(File::open(stdin).unwrap()));
        let done = tar.output().unwrap();
        assert!(done.status.success(), "{done:?}");
        done.stdout
    }

    /// What is in an archive, by name: its headers, without the checksum that tar writes with one digit
    /// less. An error of gzip's is one of the test.
    fn entries(packed: &[u8]) -> (usize, BTreeMap<Vec<u8>, Vec<u8>>) {
        let mut archive = Vec::new();
        io::copy(&mut flate2::read::GzDecoder::new(packed), &mut archive).unwrap();
        let headers = archive.chunks(BLOCK).filter(|block| block[0] != 0);
        let entry = |block: &[u8]| {
            let mut header = block.to_vec();
            header[148..156].fill(0);
            (block[..100].to_vec(), header)
        };
        (archive.len(), headers.map(entry).collect())
    }

    fn extract(packed: &[u8], name: &str, other: &Path) -> PathBuf {
        let (image, into) = (other.join("image"), other.join(name));
        fs::write(&image, packed).unwrap();
        fs::create_dir(&into).unwrap();
        let into_name = into.to_str().unwrap();
        real_tar(&["--extract", "--gzip", "--directory", into_name], &image);
        into
    }

    #[test]
    fn an_empty_directory_is_packed_as_by_tar() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let is_root = nix::unistd::geteuid().is_root();
        for (mode, uid) in [(0o755, 0), (0o1777, 7), (0o2700, 3_000_000)] {
            if is_root {
                chown(dir.path(), Some(uid), Some(uid)).unwrap();
            }
            fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
            let packed = pack(dir.path()).unwrap();
            assert_eq!(entries(&packed), entries(&real_tar(&CREATE, dir.path())));
            let into = extract(&packed, &format!("{mode:o}"), other.path());
            let of = |path: &Path| {
                let its = fs::metadata(path).unwrap();
                (its.mode(), its.uid(), its.gid(), its.mtime())
            };
            assert_eq!(of(&into), of(dir.path()));
        }
    }

    #[test]
    fn a_dev_is_packed_as_by_tar() {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};

        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("pts/deep")).unwrap();
        symlink("/proc/self/fd", at("fd")).unwrap();
        symlink("x".repeat(MAX_NAME), at("y".repeat(MAX_NAME - 2).as_str())).unwrap();
        let is_root = nix::unistd::geteuid().is_root();
        if is_root {
            let mode = Mode::from_bits_truncate(0o620);
            for (name, kind, number) in [
                ("null", SFlag::S_IFCHR, makedev(1, 3)),
                ("large", SFlag::S_IFCHR, makedev(4095, 1_000_000)),
                ("pts/disk", SFlag::S_IFBLK, makedev(8, 0)),
            ] {
                mknod(&at(name), kind, mode, number).unwrap();
            }
            chown(at("null"), Some(5), Some(3_000_000)).unwrap();
        }
        let packed = pack(dir.path()).unwrap();
        let (ours, theirs) = (entries(&packed), entries(&real_tar(&CREATE, dir.path())));
        assert_eq!(
            ours.1.keys().collect::<Vec<_>>(),
            theirs.1.keys().collect::<Vec<_>>()
        );
        assert_eq!(ours, theirs);
        assert_eq!(ours.1.len(), if is_root { 8 } else { 5 });
        let into = extract(&packed, "dev", other.path());
        let target = fs::read_link(into.join("fd")).unwrap();
        assert_eq!(target, Path::new("/proc/self/fd"));
        assert!(into.join("pts/deep").is_dir());
    }

    #[test]
    fn an_archive_of_many_names_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..MAX_ENTRIES - 1 {
            fs::create_dir(dir.path().join(n.to_string())).unwrap();
        }
        let ours = entries(&pack(dir.path()).unwrap());
        assert_eq!(ours, entries(&real_tar(&CREATE, dir.path())));
        fs::create_dir(dir.path().join("more")).unwrap();
        assert!(pack(dir.path()).is_none());
    }

    #[test]
    fn anything_else_is_left_to_tar() {
        let make: [fn(&Path); 5] = [
            |at| fs::write(at.join(".hidden"), "").unwrap(),
            |at| {
                fs::create_dir(at.join("in")).unwrap();
                fs::write(at.join("in/it"), "x").unwrap();
            },
            |at| {
                symlink("x", at.join("a")).unwrap();
                fs::hard_link(at.join("a"), at.join("b")).unwrap();
            },
            |at| symlink("x".repeat(MAX_NAME + 1), at.join("a")).unwrap(),
            |at| symlink("x", at.join("y".repeat(MAX_NAME - 1))).unwrap(),
        ];
        for (number, make) in make.iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            assert!(pack(dir.path()).is_some());
            make(dir.path());
            assert!(pack(dir.path()).is_none(), "{number}");
        }
        assert!(pack(Path::new("/nowhere/at/all")).is_none());
    }

    #[test]
    fn it_is_found_first_and_finds_the_other() {
        let home = tempfile::tempdir().unwrap();
        // An upgrade leaves the link of the version before.
        install(home.path()).unwrap();
        install(home.path()).unwrap();
        let path = path(home.path()).unwrap();
        let first = env::split_paths(&path).next().unwrap();
        let linked = fs::read_link(first.join(TAR)).unwrap();
        assert_eq!(linked, crate::runtime::own_program());
    }
}
