//! Where files lie: the store, and the writable layers of containerd and Docker.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{XattrFlags, fsetxattr, ioctl_ficlone, statvfs},
    mount::{FsOpenFlags, fsopen},
};

use super::{Check, Host, Verdict};
use crate::{
    cli::term::bytes,
    rootfs::{MountEntry, parse_mountinfo},
    store::Store,
};

/// Where changes and captures are tested (docs/inspector.md, section 5).
const TRIED: [&str; 4] = ["ext4", "xfs", "btrfs", "tmpfs"];
/// Gone after a reboot.
const OF_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];

pub(super) fn checks(host: &Host) -> Vec<Check> {
    vec![
        overlay(host),
        store(host),
        layers(host, &CONTAINERD),
        layers(host, &DOCKER),
    ]
}

fn overlay(host: &Host) -> Check {
    let check = Check::needed(
        "overlay",
        "overlay",
        "cannot run: only an overlay's writable layer is captured",
    );
    if host.is_root {
        let tried = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC);
        return check.tried("yes", tried.map(drop).map_err(|e| e.to_string()));
    }
    let listed = host.text("/proc/filesystems").ok().flatten();
    match listed.is_some_and(|text| text.split_whitespace().any(|word| word == "overlay")) {
        true => check.is(Verdict::Ok, "yes"),
        // It may be a module that nobody has needed yet.
        false => check.cannot_tell(),
    }
}

/// What holds a path, or would: the directory that is there, and its mount.
struct Place {
    dir: PathBuf,
    kind: String,
    is_read_only: bool,
}

impl Place {
    fn of(host: &Host, path: &Path) -> io::Result<Self> {
        let there = path.ancestors().find(|dir| host.at(dir).exists());
        let dir = host.at(there.unwrap_or(Path::new("/"))).canonicalize()?;
        let list = fs::read(host.at("/proc/self/mountinfo"))?;
        let mount = holder(parse_mountinfo(&list), &dir);
        let mount =
            mount.ok_or_else(|| io::Error::other(format!("no mount has {}", dir.display())))?;
        Ok(Self {
            kind: mount.fstype.to_string_lossy().into_owned(),
            is_read_only: is_read_only(&mount),
            dir,
        })
    }

    fn free(&self) -> io::Result<u64> {
        let room = statvfs(&self.dir)?;
        Ok(room.f_bavail.saturating_mul(room.f_frsize))
    }
}

/// The mount with the deepest place above a directory; of several at one place the last.
fn holder(mounts: impl Iterator<Item = MountEntry>, dir: &Path) -> Option<MountEntry> {
    mounts
        .filter(|mount| dir.starts_with(&mount.mountpoint))
        .max_by_key(|mount| mount.mountpoint.components().count())
}

fn is_read_only(mount: &MountEntry) -> bool {
    let of = [&mount.options, &mount.super_options];
    of.iter().any(|options| {
        options
            .to_string_lossy()
            .split(',')
            .any(|option| option == "ro")
    })
}

fn store(host: &Host) -> Check {
    let path = &host.config.store;
    let check = Check::needed(
        "store",
        "store",
        "cannot run: checkpoints would lie nowhere",
    )
    .fact("path", path.to_string_lossy());
    // Makes nothing: who asks need not want a store here.
    if host.is_root
        && host.at(path).exists()
        && let Err(e) = Store::open(&host.at(path))
    {
        return check.is(Verdict::Missing, e.to_string());
    }
    match Place::of(host, path).and_then(|place| Ok((place.free()?, place))) {
        Ok((free, place)) => of_store(check, path, &place.kind, place.is_read_only, free),
        Err(e) if !host.is_root && e.kind() == io::ErrorKind::PermissionDenied => {
            check.cannot_tell()
        }
        Err(e) => check.is(Verdict::Missing, format!("{}: {e}", path.display())),
    }
}

fn of_store(check: Check, path: &Path, kind: &str, is_read_only: bool, free: u64) -> Check {
    let check = check.fact("file_system", kind).fact("free_bytes", free);
    let found = format!("{} on {kind}, {} free", path.display(), bytes(free));
    if is_read_only {
        return check.is(Verdict::Missing, format!("{found}, read-only"));
    }
    match OF_MEMORY.contains(&kind) {
        true => Check {
            without: "checkpoints are gone after a reboot".into(),
            ..check
        }
        .is(Verdict::Limited, found),
        false => check.is(Verdict::Ok, found),
    }
}

/// Who makes writable layers, and where.
struct Maker {
    name: &'static str,
    what: &'static str,
    config: &'static str,
    usual: &'static str,
    root: fn(&str) -> Result<Option<String>, String>,
}

const CONTAINERD: Maker = Maker {
    name: "containerd",
    what: "containerd's layers",
    config: "/etc/containerd/config.toml",
    usual: "/var/lib/containerd",
    root: |text| {
        let config: toml::Table = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        Ok(config
            .get("root")
            .and_then(|root| Some(root.as_str()?.to_owned())))
    },
};

const DOCKER: Maker = Maker {
    name: "docker",
    what: "Docker's layers",
    config: "/etc/docker/daemon.json",
    usual: "/var/lib/docker",
    root: |text| {
        let config: serde_json::Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        Ok(config["data-root"].as_str().map(str::to_owned))
    },
};

fn layers(host: &Host, maker: &Maker) -> Check {
    let check = Check::new(
        maker.name,
        maker.what,
        "its sandboxes have no checkpoints; tried on ext4, XFS, btrfs and tmpfs",
    );
    let root = host.text(maker.config).map_err(|e| e.to_string());
    let root = root.and_then(|text| match text {
        Some(text) => (maker.root)(&text).map_err(|e| format!("{}: {e}", maker.config)),
        None => Ok(None),
    });
    let root = match root {
        Ok(root) => PathBuf::from(root.unwrap_or_else(|| maker.usual.to_owned())),
        Err(e) => return check.is(Verdict::Unknown, e),
    };
    let check = check.fact("path", root.to_string_lossy());
    match host.at(&root).try_exists() {
        Ok(true) => {}
        Ok(false) => {
            return Check {
                without: "nothing is lost: it has made none here".into(),
                ..check
            }
            .is(Verdict::Missing, format!("no {}", root.display()));
        }
        Err(_) => return check.cannot_tell(),
    }
    let place = match Place::of(host, &root) {
        Ok(place) => place,
        Err(e) => return check.is(Verdict::Unknown, e.to_string()),
    };
    let trial = match host.is_root {
        true => Some(try_layer(&place.dir).map_err(|e| e.to_string())),
        false => None,
    };
    of_layers(check, &root, &place.kind, trial)
}

/// What a file of a writable layer can have.
struct Trial {
    can_be_marked: bool,
    can_share: bool,
}

/// Tries it on two files without a name.
fn try_layer(dir: &Path) -> io::Result<Trial> {
    let unnamed = || {
        let flags = libc::O_TMPFILE | libc::O_CLOEXEC;
        File::options()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(dir)
    };
    let (mut one, other) = (unnamed()?, unnamed()?);
    one.write_all(&[1; 4096])?;
    let marked = fsetxattr(&one, "trusted.crab", b"1", XattrFlags::empty());
    Ok(Trial {
        can_be_marked: marked.is_ok(),
        can_share: ioctl_ficlone(&other, &one).is_ok(),
    })
}

fn of_layers(check: Check, root: &Path, kind: &str, trial: Option<Result<Trial, String>>) -> Check {
    let mut check = check.fact("file_system", kind);
    let mut found = format!("{} on {kind}", root.display());
    let has_attributes = match trial {
        None => true,
        Some(Ok(trial)) => {
            check = check.fact("reflink", trial.can_share);
            if !trial.can_be_marked {
                found += ", no extended attributes (trusted.*)";
            }
            trial.can_be_marked
        }
        // Some file systems know no files without a name.
        Some(Err(e)) => {
            found += &format!(", not tried: {e}");
            true
        }
    };
    match (kind, has_attributes) {
        // The kernel refuses an upper directory on an overlay, containerd copies whole trees then.
        ("overlay", _) | (_, false) => check.is(Verdict::Missing, found),
        (kind, true) if TRIED.contains(&kind) => check.is(Verdict::Ok, found),
        _ => check.is(Verdict::Limited, found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::fixture::fake;

    const MOUNTS: &[u8] = b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
        2 1 8:2 / /var rw - xfs /dev/b rw\n\
        3 1 0:9 / /var/lib/crab ro - tmpfs tmpfs rw\n\
        4 2 8:3 / /var rw - btrfs /dev/c ro\n";

    #[test]
    fn the_mount_of_a_path_is_the_deepest_and_the_last() {
        let of = |path: &str| holder(parse_mountinfo(MOUNTS), Path::new(path)).unwrap();
        for (path, kind, ro) in [
            ("/", "ext4", false),
            ("/variable", "ext4", false),
            ("/var/lib", "btrfs", true),
            ("/var/lib/crab/default", "tmpfs", true),
        ] {
            let mount = of(path);
            assert_eq!(
                (mount.fstype.to_str().unwrap(), is_read_only(&mount)),
                (kind, ro),
                "{path}"
            );
        }
    }

    #[test]
    fn a_store_in_memory_or_read_only_is_said_so() {
        let verdict = |kind, ro| {
            of_store(
                Check::needed("store", "", ""),
                Path::new("/s"),
                kind,
                ro,
                1 << 30,
            )
        };
        assert_eq!(verdict("ext4", false).verdict, Verdict::Ok);
        assert_eq!(verdict("ext4", false).found, "/s on ext4, 1.0 GiB free");
        assert_eq!(verdict("tmpfs", false).verdict, Verdict::Limited);
        assert_eq!(verdict("xfs", true).verdict, Verdict::Missing);
    }

    #[test]
    fn a_store_that_is_not_there_yet_is_looked_for_above_and_not_made() {
        let (dir, mut host) = fake(&[("/var/x", Some(""))]);
        let list = format!(
            "1 0 8:1 / {} rw - xfs /dev/a rw\n",
            dir.path().canonicalize().unwrap().display()
        );
        fs::create_dir_all(host.at("/proc/self")).unwrap();
        fs::write(host.at("/proc/self/mountinfo"), list).unwrap();
        host.config.store = "/var/lib/crab".into();
        let check = store(&host);
        assert!(
            check.found.starts_with("/var/lib/crab on xfs, "),
            "{}",
            check.found
        );
        assert_eq!(check.verdict, Verdict::Ok);
        assert!(!host.at("/var/lib").exists());
    }

    #[test]
    fn layers_lie_where_their_makers_configuration_says() {
        let config = "version = 3\nroot = \"/data/containerd\"\n[grpc]\nroot = \"/no\"\n";
        assert_eq!(
            (CONTAINERD.root)(config).unwrap().unwrap(),
            "/data/containerd"
        );
        assert_eq!((CONTAINERD.root)("version = 3\n").unwrap(), None);
        assert!((CONTAINERD.root)("version = \n").is_err());
        assert_eq!(
            (DOCKER.root)(r#"{"data-root": "/d"}"#).unwrap().unwrap(),
            "/d"
        );
        assert_eq!((DOCKER.root)("{}").unwrap(), None);
        assert!((DOCKER.root)("{").is_err());
        let (_dir, host) = fake(&[("/etc/docker/daemon.json", Some("{"))]);
        let check = layers(&host, &DOCKER);
        assert!(
            check.found.starts_with("/etc/docker/daemon.json: "),
            "{}",
            check.found
        );
        let (_dir, host) = fake(&[("/etc/containerd/config.toml", Some(config))]);
        let check = layers(&host, &CONTAINERD);
        assert_eq!(
            (check.found.as_str(), check.verdict),
            ("no /data/containerd", Verdict::Missing)
        );
    }

    #[test]
    fn layers_are_judged_by_what_was_tried() {
        let verdict = |kind, can_be_marked| {
            let trial = Trial {
                can_be_marked,
                can_share: false,
            };
            of_layers(
                Check::new("docker", "", ""),
                Path::new("/d"),
                kind,
                Some(Ok(trial)),
            )
            .verdict
        };
        assert_eq!(verdict("ext4", true), Verdict::Ok);
        assert_eq!(verdict("btrfs", true), Verdict::Ok);
        assert_eq!(verdict("zfs", true), Verdict::Limited);
        assert_eq!(verdict("ext4", false), Verdict::Missing);
        assert_eq!(verdict("overlay", true), Verdict::Missing);
    }
}
