//! Where watched files are. CRIU must find each file that inotify watches by a path, and on an
//! overlay it cannot ask the kernel, which gives out no handles there that could be opened. But the
//! handle that the kernel shows for an overlay's file holds the one of the real file below, and
//! that can.

use std::{
    ffi::c_int,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// What an overlay's file handles begin with, after three bytes of padding (`struct ovl_fb`):
/// version 0, magic, length, flags, kind of the real handle, UUID of its file system.
const VERSION_AND_MAGIC: [u8; 2] = [0, 0xfb];
const PADDING: usize = 3;
const HEADER: usize = 5 + 16;
/// The kernel's bound (`MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;

/// The handle of a file below an overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    kind: c_int,
    handle: Vec<u8>,
}

/// The watched files of overlays, in the `fdinfo` of an inotify descriptor.
pub(super) fn parse(fdinfo: &str) -> Vec<Watched> {
    let lines = fdinfo.lines().filter(|line| line.starts_with("inotify "));
    lines.filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Watched> {
    let (_, hex) = line.split_once(" f_handle:")?;
    let hex = hex.trim().as_bytes();
    if hex.len() > 2 * MAX_HANDLE {
        return None;
    }
    let pairs = hex.chunks_exact(2);
    let bytes = pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    let bytes: Vec<u8> = bytes.collect::<Option<_>>()?;
    let inner = bytes.get(PADDING..)?;
    let [version, magic, length, _flags, kind, ..] = *inner else {
        return None;
    };
    if [version, magic] != VERSION_AND_MAGIC {
        return None;
    }
    let handle = inner.get(HEADER..usize::from(length))?;
    (!handle.is_empty()).then(|| Watched {
        kind: c_int::from(kind),
        handle: handle.to_vec(),
    })
}

impl Watched {
    /// Its path in the sandbox. `layers`: the directories of its overlay, the writable one first.
    /// None if it has no path any more, or none that CRIU's options can hold.
    pub fn path(&self, layers: &[PathBuf]) -> Option<PathBuf> {
        layers.iter().find_map(|layer| {
            let file = self.open(layer).ok()?;
            let real = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
            let inside = real.strip_prefix(fs::canonicalize(layer).ok()?).ok()?;
            // Of a deleted file the kernel shows a name that leads nowhere, or to another file.
            let is_it = fs::symlink_metadata(&real)
                .ok()
                .zip(own_metadata(&file).ok());
            let same = is_it.is_some_and(|(named, open)| id(&named) == id(&open));
            let path = Path::new("/").join(inside);
            (same && can_be_said(&path)).then_some(path)
        })
    }

    fn open(&self, layer: &Path) -> io::Result<OwnedFd> {
        #[repr(C)]
        struct Handle {
            bytes: libc::c_uint,
            kind: c_int,
            handle: [u8; MAX_HANDLE],
        }
        let directory = fs::File::open(layer)?;
        let mut handle = Handle {
            bytes: self.handle.len() as libc::c_uint,
            kind: self.kind,
            handle: [0; MAX_HANDLE],
        };
        handle.handle[..self.handle.len()].copy_from_slice(&self.handle);
        // SAFETY: the structure is a `struct file_handle` with room for all that it says to hold;
        // the kernel only reads it.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                directory.as_raw_fd(),
                &raw mut handle,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        match c_int::try_from(fd) {
            // SAFETY: the kernel has just made this descriptor for us alone.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn own_metadata(file: &OwnedFd) -> io::Result<fs::Metadata> {
    fs::File::from(file.try_clone()?).metadata()
}

fn id(metadata: &fs::Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

/// CRIU's files of options have no way to quote.
fn can_be_said(path: &Path) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '#' | '"' | '\'' | '\\');
    path.to_str().is_some_and(|text| !text.contains(odd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_handle_is_taken_out_of_the_overlays() {
        // As shown by kernel 6.18 for a file in the upper layer on ext4.
        let fdinfo = "pos:\t0\nflags:\t00\nmnt_id:\t17\nino:\t1038\n\
            inotify wd:1 ino:162b61 sdev:48 mask:2 ignored_mask:0 fhandle-bytes:20 fhandle-type:f8 \
            f_handle:00000000fb1d040100000000000000000000000000000000612b1600145b0776\n\
            inotify wd:2 ino:3 sdev:48 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 \
            f_handle:0300000000000000\n";
        let wanted = Watched {
            kind: 1,
            handle: vec![0x61, 0x2b, 0x16, 0, 0x14, 0x5b, 7, 0x76],
        };
        assert_eq!(parse(fdinfo), [wanted]);
    }

    #[test]
    fn broken_handles_are_none() {
        for hex in [
            "",
            "00",
            "zz",
            "00000000fb",
            "00000000fbff0401",
            "00000000fb050401",
        ] {
            let line = format!("inotify wd:1 ino:3 sdev:48 f_handle:{hex}");
            assert_eq!(parse(&line), [], "{hex}");
        }
        let long = "0".repeat(1 << 20);
        assert_eq!(parse(&format!("inotify wd:1 f_handle:{long}")), []);
    }

    #[test]
    fn paths_that_an_options_file_cannot_hold_are_left_out() {
        for (path, can) in [
            ("/a/b-c.d", true),
            ("/a b", false),
            ("/a\nb", false),
            ("/a#", false),
        ] {
            assert_eq!(can_be_said(Path::new(path)), can, "{path:?}");
        }
    }
}
