//! Trees are compared by a walk of the test's own.

mod put_back;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, symlink},
    },
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::*;
use crate::test_child::TestChild;

/// Whether a test that needs root can run.
fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn tmp() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Copies a tree, with all attributes.
fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let mut cp = std::process::Command::new("cp");
    let done = cp.arg("-a").arg(from).arg(to).output().unwrap();
    match done.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
    }
}

/// What makes a layer a copy of this one.
fn from(saved: &Path) -> impl FnMut(&Path, &Path) -> Result<(), String> {
    move |new, _| copy(saved, new)
}

/// Everything about one inode that a copy has to keep.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    rdev: u64,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    content: Vec<u8>,
    /// The first path that is a name of the same inode.
    same_as: Option<PathBuf>,
}

fn look(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut metas = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(full) = todo.pop() {
        let path = full.strip_prefix(root).unwrap().to_owned();
        let meta = fs::symlink_metadata(&full).unwrap();
        if meta.is_dir() {
            todo.extend(fs::read_dir(&full).unwrap().map(|e| e.unwrap().path()));
        } else {
            let names = inodes.entry((meta.dev(), meta.ino()));
            names.or_insert_with(Vec::new).push(path.clone());
        }
        metas.insert(path, (full, meta));
    }
    let mut all = BTreeMap::new();
    for (path, (full, meta)) in metas {
        let kind = meta.file_type();
        let content = if kind.is_dir() {
            vec![]
        } else if kind.is_file() && meta.len() < 1 << 30 {
            fs::read(&full).unwrap()
        } else if kind.is_symlink() {
            fs::read_link(&full)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else {
            meta.len().to_le_bytes().to_vec()
        };
        let mut names = vec![0; 65536];
        let n = rustix::fs::llistxattr(&full, &mut names[..]).unwrap();
        let mut xattrs = vec![];
        for name in names[..n].split(|b| *b == 0).filter(|n| !n.is_empty()) {
            let mut value = vec![0; 65536];
            let n = rustix::fs::lgetxattr(&full, name, &mut value[..]).unwrap();
            xattrs.push((name.to_vec(), value[..n].to_vec()));
        }
        xattrs.sort();
        let seen = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            rdev: meta.rdev(),
            xattrs,
            content,
            same_as: None,
        };
        all.insert(path, seen);
    }
    for mut paths in inodes.into_values() {
        paths.sort();
        for path in &paths[1..] {
            all.get_mut(path).unwrap().same_as = Some(paths[0].clone());
        }
    }
    all
}

fn assert_same(a: &Path, b: &Path) {
    assert_equal(&look(a), &look(b));
}

fn assert_equal(a: &BTreeMap<PathBuf, Seen>, b: &BTreeMap<PathBuf, Seen>) {
    let names = |m: &BTreeMap<PathBuf, Seen>| m.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(a), names(b));
    for (path, seen) in a {
        assert_eq!(seen, &b[path], "{path:?}");
    }
}

/// Runs in a thread with mounts of its own.
pub(super) fn with_own_mounts(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Err(e) = unshare(CloneFlags::CLONE_NEWNS) {
                eprintln!("skipped: no mount namespace: {e}");
                return;
            }
            let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

struct Bed {
    dir: tempfile::TempDir,
    overlay: Overlay,
    target: PathBuf,
}

/// Directories for an overlay with `layers` lower layers.
fn bed(layers: usize) -> Bed {
    let dir = tmp();
    let base = dir.path().canonicalize().unwrap();
    let make = |name: String| {
        let path = base.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    };
    let lowerdirs: Vec<_> = (0..layers)
        .map(|n| {
            let lower = make(format!("snapshots-with-a-name-of-some-length/{n}/fs"));
            fs::write(lower.join(format!("lower-{n}")), "low").unwrap();
            lower
        })
        .collect();
    let overlay = Overlay {
        lowerdirs,
        upperdir: make("active/fs".into()),
        workdir: make("active/work".into()),
        options: vec!["index=off".into()],
        mountpoint: None,
    };
    let target = make("root fs".into());
    Bed {
        dir,
        overlay,
        target,
    }
}

impl Bed {
    fn mount(&self) {
        mount_all(&[self.overlay.mount_spec()], &self.target).unwrap();
    }

    fn read(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.target.join(name)).ok()
    }

    fn saved(&self) -> PathBuf {
        self.dir.path().join("saved")
    }
}

#[test]
fn root_an_overlay_is_mounted_found_captured_and_put_back() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let bed = bed(2);
        bed.mount();
        fs::write(bed.target.join("kept"), "then").unwrap();
        fs::remove_file(bed.target.join("lower-0")).unwrap();
        fs::write(bed.target.join("lower-1"), "copied up").unwrap();
        let found = Overlay::from_mountinfo(&bed.target).unwrap();
        assert_eq!(found.lowerdirs, bed.overlay.lowerdirs);
        assert_eq!(found.upperdir, bed.overlay.upperdir);
        assert_eq!(found.workdir, bed.overlay.workdir);
        assert!(found.options.contains(&"relatime".into()), "{found:?}");
        let link = bed.dir.path().join("link");
        symlink(&bed.target, &link).unwrap();
        assert_eq!(Overlay::from_mountinfo(&link).unwrap(), found);
        let inside = Overlay::from_mountinfo(bed.dir.path()).unwrap_err();
        assert!(matches!(inside, NoOverlay::NotAMountPoint(_)), "{inside}");

        copy(&bed.overlay.upperdir, &bed.saved()).unwrap();
        fs::write(bed.target.join("kept"), "now").unwrap();
        fs::write(bed.target.join("new"), "now").unwrap();
        let refused = put_back(&mut from(&bed.saved()), &bed.overlay).unwrap_err();
        assert!(matches!(refused, PutBackError::Mounted { .. }), "{refused}");
        assert_eq!(bed.read("kept").unwrap(), "now");

        unmount(&bed.target).unwrap();
        unmount(&bed.target).unwrap();
        let replaced = put_back(&mut from(&bed.saved()), &bed.overlay).unwrap();
        assert_same(&bed.saved(), &bed.overlay.upperdir);
        assert_eq!(fs::read_dir(&bed.overlay.workdir).unwrap().count(), 0);
        bed.mount();
        assert_eq!(bed.read("kept").unwrap(), "then");
        assert_eq!(bed.read("lower-0"), None);
        assert_eq!(bed.read("lower-1").unwrap(), "copied up");
        assert_eq!(bed.read("new"), None);
        replaced.remove_old().unwrap();
        let left = fs::read_dir(bed.dir.path().join("active")).unwrap();
        assert_eq!(left.count(), 2);
        unmount(&bed.target).unwrap();
    });
}

#[test]
fn root_more_layers_than_fit_into_a_page_are_mounted() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let bed = bed(100);
        let cwd = std::env::current_dir().unwrap();
        let length: usize = bed
            .overlay
            .mount_spec()
            .options
            .iter()
            .map(String::len)
            .sum();
        assert!(length > 4096);
        bed.mount();
        assert_eq!(std::env::current_dir().unwrap(), cwd);
        for n in [0, 99] {
            assert_eq!(bed.read(&format!("lower-{n}")).unwrap(), "low");
        }
        unmount(&bed.target).unwrap();
    });
}

#[test]
fn root_layers_mounted_relative_to_a_directory_are_found() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        // As dockerd lays them out, with its links to layers.
        let dir = tmp();
        let home = dir.path().canonicalize().unwrap();
        for name in ["one/diff", "id/diff", "id/work", "id/merged", "l"] {
            fs::create_dir_all(home.join(name)).unwrap();
        }
        symlink("../one/diff", home.join("l/A,:\\")).unwrap();
        unshare(CloneFlags::CLONE_FS).unwrap();
        nix::unistd::chdir(&home).unwrap();
        let data = "lowerdir=l/A\\,\\:\\\\,upperdir=id/diff,workdir=id/work,index=off";
        let merged = home.join("id/merged");
        let flags = MsFlags::MS_NODEV;
        mount(Some("overlay"), &merged, Some("overlay"), flags, Some(data)).unwrap();
        nix::unistd::chdir("/").unwrap();
        let found = Overlay::from_mountinfo(&merged).unwrap();
        assert_eq!(found.lowerdirs, [home.join("l/A,:\\")]);
        assert_eq!(found.upperdir, home.join("id/diff"));
        assert_eq!(found.workdir, home.join("id/work"));

        let saved = dir.path().join("saved");
        copy(&found.upperdir, &saved).unwrap();
        fs::write(merged.join("new"), "").unwrap();
        let replaced = remount_with(&mut from(&saved), &found).unwrap();
        assert!(!merged.join("new").exists());
        let again = Overlay::from_mountinfo(&merged).unwrap();
        assert_eq!(again.lowerdirs, found.lowerdirs);
        assert!(again.options.contains(&"nodev".into()), "{again:?}");
        replaced.remove_old().unwrap();
        unmount(&merged).unwrap();
    });
}

#[test]
fn root_what_was_found_once_holds_until_a_mount_changes() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let (bed, other) = (bed(1), bed(2));
        let mounted = Mounted::default();
        let found = || mounted.overlay(&bed.target);
        assert!(matches!(found(), Err(NoOverlay::NotAMountPoint(_))));
        bed.mount();
        let first = found().unwrap();
        assert_eq!(first.upperdir, bed.overlay.upperdir);
        assert!(mounted.is_current(&bed.target));
        assert!(!mounted.is_current(&other.target));
        assert_eq!(found().unwrap(), first);

        // The same one, mounted otherwise.
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID;
        mount(None::<&str>, &bed.target, None::<&str>, flags, None::<&str>).unwrap();
        assert!(found().unwrap().options.contains(&"nosuid".into()));

        // On top of it, and both gone.
        mount_all(&[other.overlay.mount_spec()], &bed.target).unwrap();
        assert!(!mounted.is_current(&bed.target));
        assert_eq!(found().unwrap().upperdir, other.overlay.upperdir);
        unmount(&bed.target).unwrap();
        assert!(matches!(found(), Err(NoOverlay::NotAMountPoint(_))));
        bed.mount();
        // Two places, told apart though no mount has changed.
        other.mount();
        let elsewhere = mounted.overlay(&other.target).unwrap();
        assert_eq!(elsewhere.upperdir, other.overlay.upperdir);
        assert_eq!(found().unwrap().upperdir, first.upperdir);
        unmount(&other.target).unwrap();
        unmount(&bed.target).unwrap();
        assert!(matches!(found(), Err(NoOverlay::NotAMountPoint(_))));
    });
}

#[test]
fn root_a_busy_overlay_stays_as_it_is_and_the_error_says_who_uses_it() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let bed = bed(1);
        bed.mount();
        let overlay = Overlay::from_mountinfo(&bed.target).unwrap();
        let id = || {
            let list = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let line = list.lines().find(|l| l.contains("root\\040fs"));
            line.unwrap().split(' ').next().unwrap().to_owned()
        };
        let mounted = id();
        copy(&overlay.upperdir, &bed.saved()).unwrap();
        fs::write(bed.target.join("new"), "x").unwrap();
        let open = File::open(bed.target.join("new")).unwrap();
        let busy = remount_with(&mut from(&bed.saved()), &overlay).unwrap_err();
        assert!(matches!(busy, PutBackError::Busy { .. }), "{busy}");
        let pid = format!("process {} ", std::process::id());
        assert!(busy.to_string().contains(&pid), "{busy}");
        assert_eq!(bed.read("new").unwrap(), "x");
        drop(open);

        // Another mount namespace that would keep it alive.
        let mut command = std::process::Command::new("unshare");
        command.args(["-m", "--propagation", "private", "sleep", "1000"]);
        let child = TestChild::asleep_as(command);
        let pinned = remount_with(&mut from(&bed.saved()), &overlay).unwrap_err();
        let text = pinned.to_string();
        assert!(
            text.contains(&format!("process {} ", child.pid())),
            "{text}"
        );
        drop(child);
        assert_eq!(bed.read("new").unwrap(), "x");
        assert_eq!(id(), mounted, "it was mounted again");

        remount_with(&mut from(&bed.saved()), &overlay)
            .unwrap()
            .remove_old()
            .unwrap();
        assert_eq!(bed.read("new"), None);
        unmount(&bed.target).unwrap();
    });
}

#[test]
fn root_a_failed_mount_takes_those_before_it_away() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let dir = tmp();
        let spec = |fstype: &str, options: &[&str]| MountSpec {
            fstype: fstype.into(),
            source: "none".into(),
            target: String::new(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        };
        let good = spec("tmpfs", &["size=1m", "nosuid", "rslave"]);
        let error = mount_all(&[good.clone(), spec("no-such-fs", &["ro"])], dir.path());
        let text = error.unwrap_err().to_string();
        for part in [
            "no-such-fs",
            "none",
            "ENODEV",
            &dir.path().to_string_lossy(),
        ] {
            assert!(text.contains(part), "{text}");
        }
        let mounted = || {
            let list = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let place = dir.path().to_string_lossy().into_owned();
            let lines = list.lines().filter(|l| l.contains(&place));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(mounted(), [""; 0]);
        mount_all(&[good.clone(), good], dir.path()).unwrap();
        assert_eq!(mounted().len(), 2);
        assert!(
            mounted().iter().all(|l| l.contains("nosuid")),
            "{:?}",
            mounted()
        );
        unmount(dir.path()).unwrap();
        assert_eq!(mounted(), [""; 0]);

        let (source, bound) = (tmp(), dir.path());
        fs::write(source.path().join("file"), "").unwrap();
        let bind = MountSpec {
            source: source.path().to_string_lossy().into_owned(),
            ..spec("bind", &["rbind", "ro"])
        };
        mount_all(std::slice::from_ref(&bind), bound).unwrap();
        assert!(bound.join("file").exists());
        let write = fs::write(bound.join("file"), "x").unwrap_err();
        assert_eq!(write.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        // A target inside must not lead out through a link.
        fs::create_dir(source.path().join("sub")).unwrap();
        symlink("/../../../../sub", source.path().join("way-out")).unwrap();
        let within = MountSpec {
            target: "/way-out".into(),
            ..spec("tmpfs", &[])
        };
        mount_all(&[within], bound).unwrap();
        assert!(
            mounted().iter().any(|l| l.contains("/sub ")),
            "{:?}",
            mounted()
        );
        unmount(&bound.join("sub")).unwrap();
        // Busy: a lazy unmount still takes it out of sight.
        let open = File::open(bound.join("file")).unwrap();
        assert!(unmount_busy_is_error(bound).is_err());
        assert!(bound.join("file").exists());
        unmount(bound).unwrap();
        assert!(!bound.join("file").exists());
        drop(open);
    });
}
