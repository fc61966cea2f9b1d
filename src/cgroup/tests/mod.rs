//! Tests on directories of plain files that stand for cgroups, with text captured from kernels
//! 6.18 (hybrid) and 6.12 (v2).

mod freezer;
mod oom;
mod stats;

use std::{
    os::fd::BorrowedFd,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use tempfile::TempDir;

use super::*;

const V1_CONTROLLERS: [&str; 8] = [
    "cpu", "cpuacct", "memory", "freezer", "blkio", "pids", "devices", "cpuset",
];

/// A fake `/sys/fs/cgroup`, and the text that would have a sandbox at `/default/box` in it.
struct Fake {
    root: TempDir,
    mountinfo: String,
    proc_cgroup: String,
}

impl Fake {
    fn v1() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut mountinfo = String::new();
        let mut proc_cgroup = String::new();
        for (n, name) in V1_CONTROLLERS.iter().enumerate() {
            let point = root.path().join(name);
            fs::create_dir_all(point.join("default/box")).unwrap();
            mountinfo += &format!(
                "3{n} 31 0:3{n} / {} rw,relatime - cgroup cgroup rw,{name}\n",
                point.display()
            );
            proc_cgroup += &format!("{n}:{name}:/default/box\n");
        }
        Self {
            root,
            mountinfo,
            proc_cgroup,
        }
    }

    fn hybrid() -> Self {
        let mut fake = Self::v1();
        let point = fake.root.path().join("unified");
        fs::create_dir_all(point.join("default/box")).unwrap();
        fake.mountinfo += &format!(
            "41 31 0:38 / {} rw,relatime - cgroup2 cgroup2 rw\n",
            point.display()
        );
        fake.proc_cgroup += "0::/default/box\n";
        fake
    }

    fn v2() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("default/box")).unwrap();
        let mountinfo = format!(
            "35 24 0:31 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
            root.path().display()
        );
        Self {
            root,
            mountinfo,
            proc_cgroup: "0::/default/box\n".to_owned(),
        }
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::resolve(1, &self.proc_cgroup, &Mounts::parse(&self.mountinfo)).unwrap()
    }

    /// Writes a file of the sandbox's cgroup, `controller` being `""` for v2.
    fn put(&self, controller: &str, file: &str, text: &str) {
        fs::write(self.path(controller, file), text).unwrap();
    }

    fn path(&self, controller: &str, file: &str) -> PathBuf {
        self.root
            .path()
            .join(controller)
            .join("default/box")
            .join(file)
    }
}

#[test]
fn a_cgroup_is_found_in_every_layout() {
    for (fake, layout) in [
        (Fake::v1(), Layout::V1),
        (Fake::hybrid(), Layout::Hybrid),
        (Fake::v2(), Layout::V2),
    ] {
        let cgroup = fake.cgroup();
        assert_eq!(cgroup.layout(), layout);
        assert_eq!(cgroup.id().is_some(), layout != Layout::V1);
        assert!(cgroup.exists());
        let root = fake.root.path();
        let freezer = match layout {
            Layout::V2 => root.join("default/box"),
            _ => root.join("freezer/default/box"),
        };
        assert_eq!(cgroup.freezer_dir(), Some(freezer.as_path()));
    }
}

#[test]
fn the_id_outlives_the_directory() {
    let fake = Fake::v2();
    let cgroup = fake.cgroup();
    let inode = fs::metadata(fake.path("", "")).unwrap().ino();
    fs::remove_dir(fake.path("", "")).unwrap();
    assert!(!cgroup.exists());
    assert_eq!(cgroup.id(), Some(inode));
    assert_eq!(cgroup.procs().unwrap(), [0; 0]);
    assert!(cgroup.thaw().unwrap_err().is_gone());
    assert!(cgroup.stats().is_ok());
}

/// One mount line, one membership, and where that leads.
#[test]
fn paths_are_relative_to_what_is_mounted() {
    let v2 = |root: &str| {
        format!("35 24 0:31 {root} /sys/fs/cgroup rw shared:9 master:1 - cgroup2 cgroup2 rw\n")
    };
    let systemd = "37 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
    let cpu = "33 31 0:30 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
    for (mountinfo, proc_cgroup, want) in [
        (v2("/"), "0::/a/b\n", Some("/sys/fs/cgroup/a/b")),
        // A path with a colon, as systemd's scopes have; a cgroup that is being removed.
        (
            v2("/"),
            "0::/cri:box (deleted)\n",
            Some("/sys/fs/cgroup/cri:box"),
        ),
        // A subtree is mounted (docker in docker, in the host's cgroup namespace).
        (
            v2("/docker/x"),
            "0::/docker/x/a\n",
            Some("/sys/fs/cgroup/a"),
        ),
        (v2("/docker/x"), "0::/docker/xa\n", None),
        (v2("/docker/x"), "0::/other\n", None),
        // Within a cgroup namespace whose mount shows the directory above.
        (v2("/.."), "0::/../a\n", Some("/sys/fs/cgroup/a")),
        (v2("/"), "0::/../a\n", None),
        (v2("/.."), "0::/../../a\n", None),
        // Never the whole host.
        (v2("/"), "0::/\n", None),
        (v2("/a\\040b"), "0::/a b/c\n", Some("/sys/fs/cgroup/c")),
        (
            systemd.to_owned(),
            "9:name=systemd:/a\n",
            Some("/sys/fs/cgroup/systemd/a"),
        ),
        (systemd.to_owned(), "9:systemd:/a\n", None),
        (systemd.to_owned(), "0::/a\n", None),
        (
            cpu.to_owned(),
            "4:cpu,cpuacct:/a\n",
            Some("/cg/cpu,cpuacct/a"),
        ),
        (
            "garbage\n1 2 3 - cgroup\n".to_owned(),
            "0::/a\nx\n:\n",
            None,
        ),
    ] {
        let found = Cgroup::resolve(7, proc_cgroup, &Mounts::parse(&mountinfo)).ok();
        let dirs: Vec<_> = found.iter().flat_map(Cgroup::dirs).collect();
        assert_eq!(dirs.first().copied(), want.map(Path::new), "{proc_cgroup}");
    }
}

#[test]
fn a_cgroup_that_no_mount_shows_is_named() {
    let error = Cgroup::resolve(7, "4:memory:/a\n0::/a\n", &Mounts::parse("")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no cgroup mount shows the cgroup of process 7 (/proc/7/cgroup: 4:memory:/a 0::/a)"
    );
}

#[test]
fn a_mount_that_shows_the_directory_is_preferred() {
    let fake = Fake::v2();
    let covered = "34 24 0:31 / /nonexistent rw - cgroup2 cgroup2 rw\n".to_owned();
    let mounts = Mounts::parse(&(covered + &fake.mountinfo));
    let cgroup = Cgroup::resolve(1, &fake.proc_cgroup, &mounts).unwrap();
    assert_eq!(cgroup, fake.cgroup());
}

#[test]
fn processes_of_descendants_count_once() {
    let fake = Fake::hybrid();
    fs::create_dir_all(fake.path("freezer", "inner/most")).unwrap();
    fake.put("freezer", "cgroup.procs", "12\n10\n12\n");
    fake.put("freezer", "inner/cgroup.procs", "0\n11\n");
    fake.put("freezer", "inner/most/cgroup.procs", "9\n10\n");
    assert_eq!(fake.cgroup().procs().unwrap(), [9, 10, 11, 12]);
    // Without the freezer's directory another hierarchy answers.
    fs::remove_dir_all(fake.path("freezer", "")).unwrap();
    fake.put("unified", "cgroup.procs", "5\n");
    assert_eq!(fake.cgroup().procs().unwrap(), [5]);
}

#[test]
fn our_own_cgroup_can_be_resolved_or_is_refused() {
    // What it finds depends on where the tests run; it must find something or say why.
    let pid = i32::try_from(std::process::id()).unwrap();
    if let Ok(cgroup) = Cgroup::of_pid(pid) {
        assert!(cgroup.exists());
    }
    let error = Cgroup::of_pid(i32::MAX).unwrap_err();
    assert!(error.is_gone());
    assert_eq!(
        error.to_string(),
        "cannot read /proc/2147483647/cgroup: No such file or directory (os error 2)"
    );
}
