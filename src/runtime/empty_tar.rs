//! The `tar` by which CRIU packs each tmpfs of a sandbox.
//!
//! CRIU runs tar for it, that a shell, and that gzip: 7 to 13 ms while the sandbox stands still. Nearly
//! all are empty, since runc hides directories of /proc and /sys below one each. So for a dump PATH
//! begins with a directory in which this very program is called tar. It packs an empty directory as tar
//! would, and leaves anything else to tar.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write},
    os::unix::{
        fs::{MetadataExt, symlink},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use flate2::{Compression, write::GzEncoder};
use tar::{EntryType, Header};

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
/// tar fills an archive up to a multiple of this many bytes.
const RECORD: usize = 20 * 512;

/// The directory of PATH that goes with a HOME of CRIU.
fn dir(home: &Path) -> PathBuf {
    home.join("bin")
}

/// Makes a tar of this program below a HOME of CRIU.
pub(super) fn install(home: &Path) -> io::Result<()> {
    let dir = dir(home);
    fs::create_dir_all(&dir)?;
    let link = dir.join(TAR);
    if let Err(e) = fs::remove_file(&link)
        && e.kind() != io::ErrorKind::NotFound
    {
        return Err(e);
    }
    symlink(super::own_program(), link)
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
    if let Some(archive) = ours.then(|| pack_empty(Path::new(STDIN))).flatten() {
        return io::stdout().write_all(&archive);
    }
    // Each time around there is one directory less to find ourselves in.
    let path = env::var_os("PATH").unwrap_or_default();
    let others = env::join_paths(env::split_paths(&path).skip(1)).map_err(io::Error::other)?;
    Err(Command::new(TAR).args(args).env("PATH", others).exec())
}

/// The archive of an empty directory. None of any other, or if it cannot be told: tar knows what to say.
fn pack_empty(dir: &Path) -> Option<Vec<u8>> {
    if fs::read_dir(dir).ok()?.next().is_some() {
        return None;
    }
    let found = fs::metadata(dir).ok()?;
    let mut header = Header::new_gnu();
    header.as_gnu_mut()?.name[..2].copy_from_slice(b"./");
    header.set_entry_type(EntryType::Directory);
    header.set_mode(found.mode() & 0o7777);
    header.set_uid(found.uid().into());
    header.set_gid(found.gid().into());
    header.set_mtime(u64::try_from(found.mtime()).ok()?);
    header.set_size(0);
    header.set_cksum();
    let mut archive = vec![0; RECORD];
    archive[..header.as_bytes().len()].copy_from_slice(header.as_bytes());
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&archive).ok()?;
    packed.finish().ok()
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{File, Permissions},
        os::unix::fs::{PermissionsExt, chown},
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

    fn gunzip(packed: &[u8]) -> Vec<u8> {
        let mut archive = Vec::new();
        io::copy(&mut flate2::read::GzDecoder::new(packed), &mut archive).unwrap();
        // tar writes the checksum with one digit less, and a blank.
        archive[148..156].fill(0);
        archive
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
            let packed = pack_empty(dir.path()).unwrap();
            let (ours, theirs) = (gunzip(&packed), gunzip(&real_tar(&CREATE, dir.path())));
            let differs = (0..RECORD).find(|at| ours.get(*at) != theirs.get(*at));
            assert_eq!((ours.len(), differs), (theirs.len(), None), "{mode:o}");
            let image = other.path().join("image");
            fs::write(&image, packed).unwrap();
            let into = other.path().join(format!("{mode:o}"));
            fs::create_dir(&into).unwrap();
            real_tar(
                &["--extract", "--gzip", "--directory", into.to_str().unwrap()],
                &image,
            );
            let of = |path: &Path| {
                let its = fs::metadata(path).unwrap();
                (its.mode(), its.uid(), its.gid(), its.mtime())
            };
            assert_eq!(of(&into), of(dir.path()));
        }
    }

    #[test]
    fn anything_else_is_left_to_tar() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".hidden"), "").unwrap();
        assert!(pack_empty(dir.path()).is_none());
        assert!(pack_empty(&dir.path().join(".hidden")).is_none());
        assert!(pack_empty(&dir.path().join("missing")).is_none());
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
