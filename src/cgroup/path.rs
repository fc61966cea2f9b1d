//! From `/proc/PID/cgroup` and our own mounts to directories.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::CgroupError;

/// One line of `/proc/PID/cgroup`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Membership<'a> {
    /// Empty for cgroup2.
    pub controllers: Vec<&'a str>,
    /// Relative to the hierarchy's root, as our cgroup namespace sees it.
    pub path: &'a Path,
}

/// The lines of `/proc/PID/cgroup` (`man 7 cgroups`): `4:cpu,cpuacct:/a/b`, `0::/a/b`.
pub(super) fn memberships(text: &str) -> Vec<Membership<'_>> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            let path = fields.next()?;
            Some(Membership {
                controllers: controllers.split(',').filter(|c| !c.is_empty()).collect(),
                path: Path::new(path.strip_suffix(" (deleted)").unwrap_or(path)),
            })
        })
        .collect()
}

/// The cgroup mounts that this process sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounts(Vec<Mount>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    /// Controllers among the super block's options (beside `rw`, …); `None` for cgroup2.
    v1_options: Option<Vec<String>>,
    /// Which directory of the hierarchy is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

impl Mounts {
    /// Those of `/proc/self/mountinfo`.
    pub fn of_self() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let text = fs::read(path).map_err(|e| CgroupError::io("read", path, e))?;
        Ok(Self::parse(&String::from_utf8_lossy(&text)))
    }

    /// Those in a text of the form of `/proc/PID/mountinfo` (`man 5 proc_pid_mountinfo`).
    pub fn parse(mountinfo: &str) -> Self {
        Self(mountinfo.lines().filter_map(parse_mount).collect())
    }

    /// Whether the hierarchy of a v1 controller is mounted.
    pub(super) fn has(&self, controller: &str) -> bool {
        let of_v1 = self.0.iter().filter_map(|m| m.v1_options.as_ref());
        of_v1.flatten().any(|option| option == controller)
    }

    /// Where the cgroup2 hierarchy is mounted.
    pub(super) fn unified(&self) -> Option<&Path> {
        let its = self.0.iter().find(|m| m.v1_options.is_none())?;
        Some(&its.point)
    }

    /// The directories of a cgroup whose path is counted from each hierarchy's mount, as the OCI
    /// specification's absolute `cgroupsPath` is. Those that there are.
    pub(super) fn dirs_at(&self, path: &Path) -> Vec<PathBuf> {
        let Ok(below) = path.strip_prefix("/") else {
            return Vec::new();
        };
        let mut dirs: Vec<PathBuf> = self.0.iter().map(|m| m.point.join(below)).collect();
        dirs.retain(|dir| dir.is_dir());
        dirs.sort();
        dirs.dedup();
        dirs
    }

    /// The directory of a membership; `None` for a hierarchy's root or when no mount shows it.
    pub(super) fn dir_of(&self, membership: &Membership<'_>) -> Option<PathBuf> {
        if membership.path == Path::new("/") {
            return None;
        }
        let dirs = self
            .0
            .iter()
            .filter(|m| m.shows(membership))
            .filter_map(|m| {
                // A cgroup outside our namespace is `/../x`; it is below a mount of root `/..`.
                let below = membership.path.strip_prefix(&m.root).ok()?;
                let leaves = below.components().any(|c| c.as_os_str() == "..");
                (!leaves).then(|| m.point.join(below))
            });
        // A hierarchy mounted twice: one of the two may be covered by a later mount.
        let mut first = None;
        for dir in dirs {
            if dir.exists() {
                return Some(dir);
            }
            first.get_or_insert(dir);
        }
        first
    }
}

impl Mount {
    fn shows(&self, membership: &Membership<'_>) -> bool {
        match &self.v1_options {
            None => membership.controllers.is_empty(),
            Some(options) => membership
                .controllers
                .iter()
                .any(|c| options.iter().any(|o| o == c)),
        }
    }
}

/// `31 23 0:28 /root /point rw,relatime shared:5 - cgroup cgroup rw,cpu`, the optional fields
/// ending at the lone `-`.
fn parse_mount(line: &str) -> Option<Mount> {
    let (fields, tail) = line.split_once(" - ")?;
    let mut fields = fields.split(' ').skip(3);
    let (root, point) = (fields.next()?, fields.next()?);
    let mut tail = tail.split(' ');
    let v1_options = match tail.next()? {
        "cgroup2" => None,
        "cgroup" => Some(tail.nth(1)?.split(',').map(str::to_owned).collect()),
        _ => return None,
    };
    Some(Mount {
        v1_options,
        root: unescape(root).into(),
        point: unescape(point).into(),
    })
}

/// Undoes the kernel's `\040` for blanks and backslashes.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => out.push(*first),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
