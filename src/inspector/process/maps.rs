//! /proc/PID/maps: its digest, and which kinds of shared memory are in it.

use std::sync::OnceLock;

use super::proc_fs::{Digest, Dir, ProcessError, digest};

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Stores reach an object that others may map, too.
    pub(super) shared: bool,
    writable: bool,
    /// The object lies in the kernel's own tmpfs, and never had a name anywhere.
    of_kernel_memory: bool,
    name: String,
}

/// The device of the kernel's own tmpfs, in which memfds, SysV and anonymous shared memory live.
pub fn shared_memory() -> Option<u64> {
    static DEV: OnceLock<Option<u64>> = OnceLock::new();
    *DEV.get_or_init(|| {
        let memory = rustix::fs::memfd_create(c"crab", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
        Some(rustix::fs::fstat(&memory).ok()?.st_dev)
    })
}

/// `fe:00` as a device number.
fn device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(libc::makedev(number(major)?, number(minor)?))
}

/// What a process has mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Maps {
    pub(super) digest: Digest,
    /// Memory that is shared within the sandbox and has no name in a file system: anonymous,
    /// SysV, memfd. It is part of an image.
    pub(super) shares_memory: bool,
    /// A shared mapping, writable now, of an object that has a name.
    pub(super) writes_file: bool,
    /// A file of a file system, without a name.
    pub(super) deleted: bool,
    /// A ring that the kernel fills while the process sleeps: of a packet socket, io_uring, perf.
    pub(super) filled_by_kernel: bool,
}

/// Reads and sums up.
pub(super) fn read(dir: &Dir) -> Result<Maps, ProcessError> {
    let text = dir.text("maps")?;
    let mappings = parse(&text).ok_or_else(|| dir.unexpected("maps"))?;
    let any = |test: fn(&Mapping) -> bool| mappings.iter().any(test);
    Ok(Maps {
        digest: digest(text.as_bytes()),
        shares_memory: any(|m| m.shared && m.is_nameless()),
        // A read-only one that can become writable does so by mprotect, which the probe on
        // mappings sees (DID_SHM).
        writes_file: any(|m| m.shared && m.writable && !m.is_nameless()),
        filled_by_kernel: any(Mapping::is_ring),
        deleted: any(|m| m.name.ends_with(" (deleted)") && !m.of_kernel_memory),
    })
}

/// The mappings, and the digest of the same text.
pub(super) fn list(dir: &Dir) -> Result<(Vec<Mapping>, Digest), ProcessError> {
    let text = dir.text("maps")?;
    let mappings = parse(&text).ok_or_else(|| dir.unexpected("maps"))?;
    Ok((mappings, digest(text.as_bytes())))
}

fn parse(text: &str) -> Option<Vec<Mapping>> {
    text.lines().map(Mapping::parse).collect()
}

impl Mapping {
    /// `start-end perms offset dev inode          name`; the name may hold anything but a newline.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let permissions = fields.next()?.as_bytes();
        let (_offset, device_text, _inode) = (fields.next()?, fields.next()?, fields.next()?);
        let name = fields.next().unwrap_or_default().trim_start();
        let mapping = Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            shared: *permissions.get(3)? == b's',
            writable: *permissions.get(1)? == b'w',
            of_kernel_memory: device(device_text).is_some_and(|dev| Some(dev) == shared_memory()),
            name: name.to_owned(),
        };
        (mapping.start < mapping.end).then_some(mapping)
    }

    /// Whether the object can be reached by descriptors and mappings alone. A file of the layer
    /// called "/memfd:x" that was deleted looks like one: it has no name either, and what an
    /// exec does to it is told by `orphans_touched`.
    fn is_nameless(&self) -> bool {
        self.name.ends_with(" (deleted)")
            && (self.name.starts_with("/memfd:")
                || self.name.starts_with("/SYSV")
                || self.name == "/dev/zero (deleted)")
    }

    fn is_ring(&self) -> bool {
        self.shared && (self.name.starts_with("socket:") || self.name.starts_with("anon_inode:"))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// The kernel's own data, shown to every process; it cannot be read through /proc/PID/mem.
    pub(super) fn is_of_kernel(&self) -> bool {
        matches!(&*self.name, "[vvar]" | "[vvar_vclock]" | "[vsyscall]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Mapping {
        Mapping::parse(line).unwrap()
    }

    #[test]
    fn kinds_of_shared_memory_are_told_apart() {
        let table = [
            (
                "7f00-8f00 rw-s 00000000 00:01 5                  /dev/zero (deleted)",
                true,
            ),
            (
                "7f00-8f00 rw-s 00000000 00:01 5                  /SYSV00000000 (deleted)",
                true,
            ),
            (
                "7f00-8f00 rw-s 00000000 00:01 5                  /memfd:a b (deleted)",
                true,
            ),
            (
                "7f00-8f00 rw-s 00000000 08:01 5                  /var/db",
                false,
            ),
            (
                "7f00-8f00 rw-s 00000000 08:01 5                  /var/db (deleted)",
                false,
            ),
            (
                "7f00-8f00 rw-s 00000000 08:01 5                  /memfd:x",
                false,
            ),
            (
                "7f00-8f00 rw-s 00000000 00:01 5                  anon_inode:[io_uring]",
                false,
            ),
        ];
        for (line, nameless) in table {
            assert_eq!(one(line).is_nameless(), nameless, "{line}");
            assert!(one(line).shared && one(line).writable);
        }
        assert!(!one("7f00-8f00 r--p 00000000 00:00 0").shared);
        assert!(one("7f00-8f00 rw-s 00000000 00:09 5                  socket:[5]").is_ring());
        assert!(
            one("7f00-8f00 rw-s 00000000 00:09 5                  anon_inode:[perf]").is_ring()
        );
        assert!(!one("7f00-8f00 rw-s 00000000 08:01 5                  /socket:[5]").is_ring());
        assert!(Mapping::parse("8f00-7f00 r--p 00000000 00:00 0").is_none());
        assert!(Mapping::parse("garbage").is_none());
    }

    #[test]
    fn anonymous_shared_memory_is_no_deleted_file_whatever_a_file_is_called() {
        let memory = shared_memory().unwrap();
        let line = |dev| {
            let (major, minor) = (libc::major(dev), libc::minor(dev));
            format!("7f00-8f00 rw-s 00000000 {major:02x}:{minor:02x} 5   /dev/zero (deleted)")
        };
        assert!(one(&line(memory)).of_kernel_memory);
        assert!(!one(&line(libc::makedev(0xfe, 0x1f))).of_kernel_memory);
        assert_eq!(device("fe:1f"), Some(libc::makedev(254, 31)));
    }
}
