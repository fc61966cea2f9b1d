use std::os::unix::fs::symlink;

use nix::mount::{MsFlags, mount};

use super::{fixture::set_mtime, *};
use crate::{rootfs::tests::with_own_mounts, tree::TreeError};

const LARGE: Limits = Limits {
    bytes: 1 << 30,
    entries: 1000,
};

struct Shm(tempfile::TempDir);

impl Shm {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = dir.path().join("tmp");
        fs::create_dir_all(at.join("d")).unwrap();
        fs::write(at.join("d/f"), "one").unwrap();
        fs::write(at.join("g"), "one").unwrap();
        for name in ["d/f", "g"] {
            set_mtime(&at.join(name), 1_000);
        }
        symlink("/etc", at.join("link")).unwrap();
        set_mtime(&at.join("link"), 1_000);
        Self(dir)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.0.path().join("tmp").join(path)
    }

    fn print(&self, limits: Limits) -> Result<Option<Fingerprint>, TreeError> {
        let dev = fs::metadata(self.0.path()).unwrap().dev();
        Fingerprint::of(self.0.path(), Path::new("/tmp"), dev, limits, &never)
    }

    fn whole(&self) -> Fingerprint {
        self.print(LARGE).unwrap().unwrap()
    }
}

#[test]
fn a_fingerprint_is_of_the_state_and_of_nothing_else() {
    let one = Shm::new();
    let print = one.whole();
    assert_eq!(print, Shm::new().whole(), "other inodes");
    let file = fs::File::options().write(true).open(one.at("g")).unwrap();
    let equal: [&dyn Fn(); 3] = [
        &|| set_mtime(&one.at("d"), 5),
        &|| {
            fs::write(one.at("new"), "").unwrap();
            fs::remove_file(one.at("new")).unwrap();
        },
        &|| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_millis(1_000_900);
            file.set_modified(time).unwrap();
        },
    ];
    for act in equal {
        act();
        assert_eq!(print, one.whole());
    }
    let mut seen = vec![print];
    let other: [&dyn Fn(); 7] = [
        &|| fs::write(one.at("new"), "").unwrap(),
        &|| fs::rename(one.at("new"), one.at("d/new")).unwrap(),
        &|| set_mtime(&one.at("d/new"), 5),
        &|| {
            fs::write(one.at("g"), "two").unwrap();
            set_mtime(&one.at("g"), 1_000);
        },
        &|| fs::write(one.at("h"), "one").unwrap(),
        &|| {
            set_mtime(&one.at("h"), 1_000);
            fs::remove_file(one.at("d/f")).unwrap();
        },
        &|| fs::hard_link(one.at("h"), one.at("d/f")).unwrap(),
    ];
    for act in other {
        act();
        assert!(!seen.contains(&one.whole()));
        seen.push(one.whole());
    }
}

#[test]
fn links_are_told_from_equal_files() {
    let (one, two) = (Shm::new(), Shm::new());
    for shm in [&one, &two] {
        fs::write(shm.at("h"), "one").unwrap();
        set_mtime(&shm.at("h"), 1_000);
    }
    assert_eq!(one.whole(), two.whole());
    fs::remove_file(two.at("h")).unwrap();
    fs::hard_link(two.at("g"), two.at("h")).unwrap();
    assert_ne!(one.whole(), two.whole());
}

#[test]
fn a_tree_above_the_limits_has_none() {
    let shm = Shm::new();
    let limits = |bytes, entries| shm.print(Limits { bytes, entries }).unwrap().is_some();
    assert!(limits(6, 5));
    assert!(!limits(5, 5));
    assert!(!limits(6, 4));
    let sparse = fs::File::create(shm.at("sparse")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    assert!(limits(6, 6), "a hole costs nothing");
}

/// The sandbox's own links are not followed, and what was mounted over the tmpfs is not it.
#[test]
fn only_the_expected_file_system_is_read() {
    let shm = Shm::new();
    symlink("/tmp", shm.0.path().join("l")).unwrap();
    let dev = fs::metadata(shm.0.path()).unwrap().dev();
    let of = |at: &str, dev| Fingerprint::of(shm.0.path(), Path::new(at), dev, LARGE, &never);
    assert!(of("/tmp/../../../tmp", dev).is_ok());
    assert!(matches!(of("/l", dev), Err(TreeError::Io { .. })));
    assert!(matches!(
        of("/tmp", dev + 1),
        Err(TreeError::Changed { .. })
    ));
}

#[test]
fn a_mount_in_it_is_named_and_not_entered() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let shm = Shm::new();
        let print = shm.whole();
        let tmpfs = Some("tmpfs");
        let over = shm.at("d");
        mount(tmpfs, &over, tmpfs, MsFlags::empty(), None::<&str>).unwrap();
        let mounted = shm.whole();
        assert_ne!(print, mounted);
        fs::write(over.join("x"), "").unwrap();
        assert_eq!(mounted, shm.whole());
        let layer = Layer::read(&shm.at(""), &never);
        assert!(layer.is_err(), "a layer has no mounts");
        nix::mount::umount(&over).unwrap();
        assert_eq!(print, shm.whole());
    });
}

#[test]
fn a_tmpfs_without_files_is_told_from_one_with_some() {
    let shm = Shm::new();
    let dev = fs::metadata(shm.0.path()).unwrap().dev();
    let holds = |entries| {
        let holds = holds_files(shm.0.path(), Path::new("/tmp"), dev, entries, &never);
        holds.unwrap()
    };
    assert!(holds(1000));
    fs::remove_file(shm.at("g")).unwrap();
    assert!(holds(1000), "one below");
    fs::remove_file(shm.at("d/f")).unwrap();
    assert!(!holds(1000), "a directory and a link are none");
    // The root, a directory, a link.
    assert!(!holds(3));
    assert!(holds(2), "more than anybody looks at");
    if root() {
        with_own_mounts(|| {
            let tmpfs = Some("tmpfs");
            mount(tmpfs, &shm.at("d"), tmpfs, MsFlags::empty(), None::<&str>).unwrap();
            fs::write(shm.at("d/x"), "").unwrap();
            assert!(!holds(1000), "what is mounted on it is another one");
        });
    }
}
