//! Which hierarchies a host has, whoever is in them.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::{CgroupError, Layout, Mounts, path::memberships};

/// The hierarchies of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// None where no hierarchy is mounted.
    pub layout: Option<Layout>,
    /// Controllers of v1 hierarchies that are mounted.
    pub v1: BTreeSet<String>,
    /// Controllers that the cgroup2 hierarchy has.
    pub v2: BTreeSet<String>,
    /// Whether a cgroup can be frozen.
    pub freezes: bool,
}

impl Survey {
    /// That of the host whose files are below `root` (`/`).
    pub fn of(root: &Path) -> Result<Self, CgroupError> {
        let read = |path: &str| {
            let path = root.join(path);
            let text = fs::read(&path).map_err(|e| CgroupError::io("read", &path, e))?;
            Ok::<_, CgroupError>(String::from_utf8_lossy(&text).into_owned())
        };
        let mounts = Mounts::parse(&read("proc/self/mountinfo")?);
        // Named hierarchies (`name=systemd`) control nothing.
        let text = read("proc/self/cgroup")?;
        let of_kernel = memberships(&text).into_iter().flat_map(|m| m.controllers);
        let v1: BTreeSet<String> = of_kernel
            .filter(|name| !name.starts_with("name=") && mounts.has(name))
            .map(str::to_owned)
            .collect();
        let unified = mounts
            .unified()
            .map(|dir| root.join(dir.strip_prefix("/").unwrap_or(dir)));
        let v2 = match &unified {
            Some(dir) => controllers(dir)?,
            None => BTreeSet::new(),
        };
        Ok(Self {
            layout: match (v1.is_empty(), &unified) {
                (true, None) => None,
                (false, None) => Some(Layout::V1),
                (false, Some(_)) => Some(Layout::Hybrid),
                (true, Some(_)) => Some(Layout::V2),
            },
            freezes: v1.contains("freezer") || unified.is_some_and(|dir| has_freezer(&dir)),
            v1,
            v2,
        })
    }
}

fn controllers(dir: &Path) -> Result<BTreeSet<String>, CgroupError> {
    let path = dir.join("cgroup.controllers");
    let text = fs::read_to_string(&path).map_err(|e| CgroupError::io("read", &path, e))?;
    Ok(text.split_whitespace().map(str::to_owned).collect())
}

/// Every cgroup but the root has the file, or none.
fn has_freezer(dir: &Path) -> bool {
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = below.map(|entry| entry.path()).chain([PathBuf::from(dir)]);
    dirs.into_iter()
        .any(|dir| dir.join("cgroup.freeze").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "25 20 0:20 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
         26 20 0:21 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
         27 20 0:22 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
         28 20 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    const V2: &str = "28 20 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    const MEMBER: &str = "9:freezer:/\n4:cpu,cpuacct:/a\n3:memory:/a\n1:name=systemd:/\n0::/a\n";

    fn survey(mountinfo: &str, unified: &str, controllers: &str, child: &str) -> Survey {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/self/mountinfo", mountinfo);
        write("proc/self/cgroup", MEMBER);
        write(&format!("{unified}/cgroup.controllers"), controllers);
        write(&format!("{unified}/child/{child}"), "0\n");
        Survey::of(root.path()).unwrap()
    }

    fn names(set: &BTreeSet<String>) -> String {
        Vec::from_iter(set.iter().map(String::as_str)).join(" ")
    }

    #[test]
    fn a_hybrid_host_freezes_by_v1() {
        let found = survey(HYBRID, "sys/fs/cgroup/unified", "", "cgroup.procs");
        assert_eq!(found.layout, Some(Layout::Hybrid));
        // memory is in the kernel and mounted nowhere.
        assert_eq!(
            (names(&found.v1).as_str(), names(&found.v2).as_str()),
            ("cpu cpuacct freezer", "")
        );
        assert!(found.freezes);
    }

    #[test]
    fn a_host_of_v2_freezes_where_its_cgroups_have_the_file() {
        let found = survey(V2, "sys/fs/cgroup", "cpu memory pids\n", "cgroup.freeze");
        assert_eq!(found.layout, Some(Layout::V2));
        assert_eq!(
            (names(&found.v1).as_str(), names(&found.v2).as_str()),
            ("", "cpu memory pids")
        );
        assert!(found.freezes);
        assert!(!survey(V2, "sys/fs/cgroup", "", "cgroup.procs").freezes);
    }

    #[test]
    fn v1_alone_and_nothing_are_told_apart() {
        let v1 = HYBRID.rsplit_once("28 ").unwrap().0;
        assert_eq!(survey(v1, "x", "", "x").layout, Some(Layout::V1));
        assert_eq!(survey("", "x", "", "x").layout, None);
    }
}
