//! A layer with one of everything, and ways to change it.

use std::{
    fs::File,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileExt, PermissionsExt, symlink},
            net::UnixListener,
        },
    },
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::*;

pub(super) fn set_mtime(path: &Path, seconds: i64) {
    mtime_of(path, (seconds, 5));
}

pub(super) fn mtime_of(path: &Path, (tv_sec, tv_nsec): (i64, i64)) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

pub(super) fn node(path: &Path, kind: FileType, dev: u64) {
    rustix::fs::mknodat(CWD, path, kind, Mode::RUSR, dev).unwrap();
}

pub(super) fn xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// user::rw- user:1:r-- group::r-- mask::r-- other::---, as the kernel keeps it.
pub(super) const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 1, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255,
    255, 16, 0, 4, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];
/// cap_net_bind_service=ep.
pub(super) const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub(super) fn everything() -> Bed {
    let bed = Bed::new(on_disk());
    let at = |p: &str| bed.at(p);
    for dir in ["dir/sub/deep", "other", "empty"] {
        fs::create_dir_all(at(dir)).unwrap();
    }
    for file in ["file", "dir/file", "dir/sub/one", "dir/sub/deep/two"] {
        fs::write(at(file), file).unwrap();
    }
    fs::write(at("link"), "linked").unwrap();
    fs::hard_link(at("link"), at("dir/link")).unwrap();
    fs::write(at("twin"), "linked").unwrap();
    fs::write(at("none"), "").unwrap();
    let sparse = File::create(at("sparse")).unwrap();
    sparse.write_all_at(b"x", 3 << 20).unwrap();
    sparse.set_len(8 << 20).unwrap();
    symlink("/etc", at("symlink")).unwrap();
    node(&at("fifo"), FileType::Fifo, 0);
    node(&at("char"), FileType::CharacterDevice, 0x103);
    node(&at("block"), FileType::BlockDevice, 0x701);
    node(&at("white"), FileType::CharacterDevice, 0);
    fs::hard_link(at("white"), at("dir/white")).unwrap();
    UnixListener::bind(at("socket")).unwrap();
    xattr(&at("other"), "trusted.overlay.opaque", b"y");
    for (path, _) in told(&bed.read()).iter().rev() {
        set_mtime(&bed.at(path), 1_000);
    }
    bed
}

pub(super) fn write(bed: &Bed, path: &str, bytes: &[u8], at: u64) {
    let file = File::options().write(true).open(bed.at(path)).unwrap();
    file.write_all_at(bytes, at).unwrap();
    set_mtime(&bed.at(path), 1_000);
}

pub(super) fn store(bed: &Bed, path: &str, at: u64) {
    write(bed, path, b"!", at);
}

pub(super) fn chmod(bed: &Bed, path: &str, mode: u32) {
    fs::set_permissions(bed.at(path), PermissionsExt::from_mode(mode)).unwrap();
}

pub(super) fn made_and_unmade(bed: &Bed) {
    fs::create_dir_all(bed.at("dir/new/x")).unwrap();
    fs::write(bed.at("dir/new/x/y"), "z").unwrap();
    fs::remove_dir_all(bed.at("dir/new")).unwrap();
    fs::rename(bed.at("dir"), bed.at("moved")).unwrap();
    fs::rename(bed.at("moved"), bed.at("dir")).unwrap();
}

pub(super) fn longer(bed: &Bed) {
    let file = File::options().write(true).open(bed.at("sparse")).unwrap();
    file.set_len(9 << 20).unwrap();
    set_mtime(&bed.at("sparse"), 1_000);
}

pub(super) fn default_acl(bed: &Bed) {
    xattr(&bed.at("empty"), "system.posix_acl_default", ACL);
}

pub(super) fn books(bed: &Bed) {
    for name in ["origin", "impure", "nlink", "uuid", "upper"] {
        xattr(&bed.at("dir"), &format!("trusted.overlay.{name}"), b"x");
        xattr(&bed.at("file"), &format!("trusted.overlay.{name}"), b"x");
    }
}

pub(super) fn not_opaque(bed: &Bed) {
    rustix::fs::lremovexattr(bed.at("other"), "trusted.overlay.opaque").unwrap();
}

pub(super) fn socket(bed: &Bed) {
    fs::remove_file(bed.at("socket")).unwrap();
    UnixListener::bind(bed.at("socket")).unwrap();
}

pub(super) fn target(bed: &Bed) {
    fs::remove_file(bed.at("symlink")).unwrap();
    symlink("/usr", bed.at("symlink")).unwrap();
    set_mtime(&bed.at("symlink"), 1_000);
}

pub(super) fn device(bed: &Bed) {
    fs::remove_file(bed.at("char")).unwrap();
    node(&bed.at("char"), FileType::CharacterDevice, 0x105);
    set_mtime(&bed.at("char"), 1_000);
}

pub(super) fn whiteout(bed: &Bed) {
    fs::remove_file(bed.at("white")).unwrap();
    node(&bed.at("white"), FileType::CharacterDevice, 0);
}

pub(super) fn replace_by_whiteout(bed: &Bed, path: &str) {
    fs::remove_file(bed.at(path)).unwrap();
    node(&bed.at(path), FileType::CharacterDevice, 0);
}

pub(super) fn file_over_whiteout(bed: &Bed) {
    fs::remove_file(bed.at("white")).unwrap();
    fs::write(bed.at("white"), "").unwrap();
}

pub(super) fn added(bed: &Bed) {
    fs::create_dir_all(bed.at("empty/x/y")).unwrap();
    symlink("z", bed.at("empty/x/y/z")).unwrap();
}

/// Another inode with equal names in it: two moved there, one made anew.
pub(super) fn anew(bed: &Bed) {
    fs::rename(bed.at("dir/sub"), bed.at("old")).unwrap();
    fs::create_dir(bed.at("dir/sub")).unwrap();
    fs::rename(bed.at("old/deep"), bed.at("dir/sub/deep")).unwrap();
    fs::write(bed.at("dir/sub/one"), "dir/sub/one").unwrap();
    set_mtime(&bed.at("dir/sub/one"), 1_000);
    fs::remove_dir_all(bed.at("old")).unwrap();
}

pub(super) fn dir_to_file(bed: &Bed) {
    fs::remove_dir_all(bed.at("dir/sub")).unwrap();
    fs::write(bed.at("dir/sub"), "").unwrap();
}

/// One that leads to a directory with the same names.
pub(super) fn dir_to_symlink(bed: &Bed) {
    fs::rename(bed.at("dir/sub"), bed.beside().join("sub")).unwrap();
    symlink(bed.beside().join("sub"), bed.at("dir/sub")).unwrap();
}

pub(super) fn file_to_dir(bed: &Bed) {
    fs::remove_file(bed.at("file")).unwrap();
    fs::create_dir(bed.at("file")).unwrap();
    fs::write(bed.at("file/x"), "").unwrap();
}

pub(super) fn equal(bed: &Bed) {
    fs::write(bed.beside().join("file"), "file").unwrap();
    set_mtime(&bed.beside().join("file"), 1_000);
    fs::rename(bed.beside().join("file"), bed.at("file")).unwrap();
}

pub(super) fn link_over(bed: &Bed, from: &str, to: &str) {
    fs::remove_file(bed.at(to)).unwrap();
    fs::hard_link(bed.at(from), bed.at(to)).unwrap();
}

pub(super) fn unlinked(bed: &Bed) {
    fs::remove_file(bed.at("link")).unwrap();
    fs::write(bed.at("link"), "linked").unwrap();
    set_mtime(&bed.at("link"), 1_000);
}

/// A file of which the first page is mapped, to be written to. In a tmpfs such stores change no time, once
/// the page is writable.
pub(super) struct Mapped(*mut libc::c_void);

impl Mapped {
    pub(super) fn of(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path);
        let file = file.unwrap();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of a file that is not empty; its first byte alone is written.
        let page = unsafe {
            let none = std::ptr::null_mut();
            libc::mmap(none, 4096, both, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page)
    }

    pub(super) fn put(&self, byte: u8) {
        // SAFETY: the file has that byte.
        unsafe { self.0.cast::<u8>().write_volatile(byte) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { libc::munmap(self.0, 4096) };
    }
}
