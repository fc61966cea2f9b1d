//! Where an overlay's layers are: from the mounts containerd sends, or from the kernel's list of
//! mounts when somebody else (dockerd) has mounted the rootfs.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    MountSpec,
    mountinfo::{MountEntry, parse_mountinfo, unescape_octal},
};

/// Longest mountinfo that is read: a host with 100,000 mounts has about 30 MB of it.
const MAX_MOUNTINFO: u64 = 256 << 20;
/// The thread's, which need not be the process's.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// An overlay with a writable layer. All three kinds of directories are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// The read-only layers, the uppermost first.
    pub lowerdirs: Vec<PathBuf>,
    /// The writable layer.
    pub upperdir: PathBuf,
    /// The kernel's own work directory, on the same filesystem as `upperdir`.
    pub workdir: PathBuf,
    /// All other options, in the words of mount(8): `index=off`, `nosuid`, …
    pub options: Vec<String>,
    /// Where it is mounted by somebody else; none if mounting it is up to us.
    pub mountpoint: Option<PathBuf>,
}

/// Why a rootfs has no writable layer that crab can capture.
#[derive(Debug, thiserror::Error)]
pub enum NoOverlay {
    /// No mount at all was sent.
    #[error("no rootfs mount was given")]
    NoMounts,
    /// The path is a directory of some other mount.
    #[error("{0:?} is not a mount point")]
    NotAMountPoint(PathBuf),
    /// A native, btrfs, devmapper, … snapshotter.
    #[error("the rootfs is a {0} mount, not an overlay")]
    OtherFilesystem(String),
    /// An overlay without an upper directory, or mounted `ro`.
    #[error("the rootfs is read-only ({0})")]
    ReadOnly(&'static str),
    /// An overlay that uses something crab would not put back faithfully.
    #[error("the rootfs is an overlay with {0}, which is not supported")]
    Unsupported(String),
    /// A relative layer that was found nowhere.
    #[error(
        "the overlay's relative directory {layer:?} was not found in any directory above \
         {mountpoint:?}"
    )]
    Unresolved {
        /// As the mount option has it.
        layer: PathBuf,
        /// Where the overlay is mounted.
        mountpoint: PathBuf,
    },
    /// A file could not be read.
    #[error("cannot {step} {path:?}: {source}")]
    Io {
        /// What was tried.
        step: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> NoOverlay {
    let path = path.to_owned();
    move |source| NoOverlay::Io { step, path, source }
}

pub(super) fn open_mountinfo() -> Result<File, NoOverlay> {
    File::open(MOUNTINFO).map_err(io("open", Path::new(MOUNTINFO)))
}

impl Overlay {
    /// Reads the rootfs mounts of containerd's Create request.
    pub fn from_mounts(mounts: &[MountSpec]) -> Result<Self, NoOverlay> {
        let [mount] = mounts else {
            return Err(match mounts.len() {
                0 => NoOverlay::NoMounts,
                n => NoOverlay::Unsupported(format!("{n} mounts on top of each other")),
            });
        };
        if mount.fstype != "overlay" {
            return Err(NoOverlay::OtherFilesystem(mount.fstype.clone()));
        }
        if !matches!(mount.target.as_str(), "" | "/") {
            return Err(NoOverlay::Unsupported(format!(
                "the target {:?} inside the rootfs",
                mount.target
            )));
        }
        let options = mount.options.iter();
        let layers = Layers::parse(options.flat_map(|o| split_options(o.as_bytes())))?;
        for dir in layers.dirs() {
            if !dir.is_absolute() {
                return Err(NoOverlay::Unsupported(format!("a relative layer {dir:?}")));
            }
        }
        Ok(layers.overlay(None))
    }

    /// Finds the overlay that is mounted on top at `rootfs`, which may lead through links.
    pub fn from_mountinfo(rootfs: &Path) -> Result<Self, NoOverlay> {
        Self::find(&open_mountinfo()?, rootfs)
    }

    /// The same in a list that has just been opened.
    pub(super) fn find(list: &File, rootfs: &Path) -> Result<Self, NoOverlay> {
        let mountpoint = rootfs.canonicalize().map_err(io("resolve", rootfs))?;
        // A host with sandboxes has a hundred mounts or more.
        let mut text = Vec::with_capacity(32 << 10);
        list.take(MAX_MOUNTINFO)
            .read_to_end(&mut text)
            .map_err(io("read", Path::new(MOUNTINFO)))?;
        // The last one is the one on top: mounts are listed in the order in which they were made.
        let mount = parse_mountinfo(&text)
            .filter(|m| m.mountpoint == mountpoint)
            .last()
            .ok_or_else(|| NoOverlay::NotAMountPoint(mountpoint.clone()))?;
        Self::from_mount_entry(&mount)
    }

    pub(crate) fn from_mount_entry(mount: &MountEntry) -> Result<Self, NoOverlay> {
        if mount.fstype != "overlay" {
            let fstype = mount.fstype.to_string_lossy().into_owned();
            return Err(NoOverlay::OtherFilesystem(fstype));
        }
        if mount.root != Path::new("/") {
            return Err(NoOverlay::Unsupported(format!(
                "only its subdirectory {:?} mounted",
                mount.root
            )));
        }
        let split = |options: &OsStr| -> Vec<Vec<u8>> {
            let options = options.as_bytes().split(|b| *b == b',');
            options.map(unescape_octal).collect()
        };
        let mut options = split(&mount.options);
        if options.iter().any(|o| o == b"idmapped") {
            return Err(NoOverlay::Unsupported("an id-mapped mount".into()));
        }
        for option in split(&mount.super_options) {
            // `seclabel` is only ever shown, never taken.
            if option != b"seclabel" && !options.contains(&option) {
                options.push(option);
            }
        }
        let mut layers = Layers::parse(options)?;
        layers.resolve(&mount.mountpoint)?;
        Ok(layers.overlay(Some(mount.mountpoint.clone())))
    }

    /// The mount that makes this overlay again.
    pub fn mount_spec(&self) -> MountSpec {
        let lower: Vec<_> = self.lowerdirs.iter().map(|d| escape(d, b"\\:,")).collect();
        let mut options = vec![
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={}", escape(&self.upperdir, b"\\,")),
            format!("workdir={}", escape(&self.workdir, b"\\,")),
        ];
        options.extend(self.options.iter().cloned());
        MountSpec {
            fstype: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options,
        }
    }
}

#[derive(Default)]
struct Layers {
    lower: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    options: Vec<String>,
}

impl Layers {
    fn parse(options: impl IntoIterator<Item = Vec<u8>>) -> Result<Self, NoOverlay> {
        let mut layers = Self::default();
        let mut read_only = false;
        for option in options {
            let option = String::from_utf8(option).map_err(|e| {
                NoOverlay::Unsupported(format!(
                    "the option {:?}",
                    OsString::from_vec(e.into_bytes())
                ))
            })?;
            let (key, value) = option.split_once('=').unwrap_or((&option, ""));
            match key {
                "lowerdir" => layers.lower = split_lower(value)?,
                // Not unescaped by the kernel, and always one directory.
                "lowerdir+" => layers.lower.push(value.into()),
                "datadir+" => return Err(NoOverlay::Unsupported("data-only layers".into())),
                "upperdir" => layers.upper = unescape(value).into(),
                "workdir" => layers.work = unescape(value).into(),
                "" | "rw" => {}
                "ro" => read_only = true,
                _ => layers.options.push(option),
            }
        }
        if read_only {
            return Err(NoOverlay::ReadOnly("mounted with ro"));
        }
        if layers.upper.as_os_str().is_empty() {
            return Err(NoOverlay::ReadOnly("no upperdir"));
        }
        if layers.work.as_os_str().is_empty() || layers.lower.is_empty() {
            return Err(NoOverlay::Unsupported("no workdir or no lowerdir".into()));
        }
        Ok(layers)
    }

    fn dirs(&self) -> impl Iterator<Item = &PathBuf> {
        self.lower.iter().chain([&self.upper, &self.work])
    }

    /// Makes relative directories absolute. dockerd mounts with its storage directory as working
    /// directory when the options are long (`mountFrom`), and that is some directory above the
    /// mount point: the closest one that holds all of them.
    fn resolve(&mut self, mountpoint: &Path) -> Result<(), NoOverlay> {
        let Some(layer) = self.dirs().find(|d| !d.is_absolute()).cloned() else {
            return Ok(());
        };
        let holds_all = |base: &&Path| {
            self.dirs()
                .all(|d| d.is_absolute() || base.join(d).is_dir())
        };
        let Some(base) = mountpoint.ancestors().skip(1).find(holds_all) else {
            return Err(NoOverlay::Unresolved {
                layer,
                mountpoint: mountpoint.to_owned(),
            });
        };
        let base = base.to_owned();
        let dirs = self.lower.iter_mut();
        for dir in dirs.chain([&mut self.upper, &mut self.work]) {
            *dir = base.join(&dir);
        }
        Ok(())
    }

    fn overlay(self, mountpoint: Option<PathBuf>) -> Overlay {
        Overlay {
            lowerdirs: self.lower,
            upperdir: self.upper,
            workdir: self.work,
            options: self.options,
            mountpoint,
        }
    }
}

fn split_lower(value: &str) -> Result<Vec<PathBuf>, NoOverlay> {
    let parts = split_unescaped(value.as_bytes(), b':');
    let dirs: Vec<PathBuf> = parts
        .map(|part| String::from_utf8_lossy(&part).into_owned())
        .map(|part| unescape(&part).into())
        .collect();
    // `a::b` makes b a layer that only metacopy files refer to.
    if dirs.iter().any(|d| d.as_os_str().is_empty()) {
        return Err(NoOverlay::Unsupported(format!("the lowerdir {value:?}")));
    }
    Ok(dirs)
}

/// Splits an option string where the kernel does: at commas without a backslash before them.
fn split_options(options: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    split_unescaped(options, b',')
}

fn split_unescaped(text: &[u8], separator: u8) -> impl Iterator<Item = Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for &byte in text {
        if byte == separator && !escaped {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
        escaped = byte == b'\\' && !escaped;
    }
    parts.into_iter()
}

/// Overlay's own escapes: a backslash makes the next character an ordinary one.
fn unescape(value: &str) -> String {
    let mut chars = value.chars();
    let mut plain = String::with_capacity(value.len());
    while let Some(c) = chars.next() {
        match c {
            '\\' => plain.extend(chars.next()),
            c => plain.push(c),
        }
    }
    plain
}

fn escape(dir: &Path, special: &[u8]) -> String {
    let mut escaped = String::new();
    for c in dir.to_string_lossy().chars() {
        if u8::try_from(c).is_ok_and(|c| special.contains(&c)) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(fstype: &str, options: &[&str]) -> MountSpec {
        MountSpec {
            fstype: fstype.into(),
            source: "overlay".into(),
            target: String::new(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    /// What the kernel makes of a string in `super_options`.
    fn escape_octal(text: &str, special: &str) -> String {
        text.bytes()
            .map(|b| match b {
                b if special.as_bytes().contains(&b) => format!("\\{b:03o}"),
                b => char::from(b).to_string(),
            })
            .collect()
    }

    #[test]
    fn containerds_mounts_are_understood() {
        let overlay = Overlay::from_mounts(&[spec(
            "overlay",
            &[
                "index=off",
                "workdir=/s/9/work",
                "upperdir=/s/9/fs",
                "lowerdir=/s/8/fs:/s/7/fs",
            ],
        )])
        .unwrap();
        assert_eq!(
            overlay.lowerdirs,
            [Path::new("/s/8/fs"), Path::new("/s/7/fs")]
        );
        assert_eq!(overlay.upperdir, Path::new("/s/9/fs"));
        assert_eq!(overlay.workdir, Path::new("/s/9/work"));
        assert_eq!(overlay.options, ["index=off"]);
        assert_eq!(overlay.mountpoint, None);
    }

    #[test]
    fn a_rootfs_without_a_writable_layer_is_refused_with_the_reason() {
        let refused = |mounts: &[MountSpec]| Overlay::from_mounts(mounts).unwrap_err().to_string();
        let layers = ["lowerdir=/a", "upperdir=/b", "workdir=/c"];
        for (mounts, reason) in [
            (vec![], "no rootfs mount"),
            (vec![spec("bind", &["rbind", "rw"])], "is a bind mount"),
            (vec![spec("overlay", &["lowerdir=/a:/b"])], "no upperdir"),
            (
                vec![spec("overlay", &["ro", layers[0], layers[1], layers[2]])],
                "with ro",
            ),
            (
                vec![spec("overlay", &layers), spec("overlay", &layers)],
                "2 mounts",
            ),
            (
                vec![spec("overlay", &["lowerdir=a", layers[1], layers[2]])],
                "relative",
            ),
            (
                vec![spec("overlay", &["lowerdir=/a::/d", layers[1], layers[2]])],
                "/a::/d",
            ),
        ] {
            assert!(
                refused(&mounts).contains(reason),
                "{mounts:?}: {}",
                refused(&mounts)
            );
        }
    }

    #[test]
    fn the_mount_on_top_wins_and_lists_of_mounts_are_unescaped() {
        let text = b"36 35 98:0 /r /mnt/a\\040b rw,noatime shared:1 master:2 - ext4 /dev/root rw\n\
            37 36 0:50 / /mnt/a\\040b rw,relatime - overlay overlay rw,lowerdir=/l\\0541,upperdir=/u,workdir=/w,index=off\n\
            broken line\n";
        let mounts: Vec<_> = parse_mountinfo(text).collect();
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].mountpoint, Path::new("/mnt/a b"));
        assert_eq!(mounts[0].root, Path::new("/r"));
        let overlay = Overlay::from_mount_entry(&mounts[1]).unwrap();
        assert_eq!(overlay.lowerdirs, [Path::new("/l,1")]);
        assert_eq!(overlay.options, ["relatime", "index=off"]);
        assert_eq!(overlay.mountpoint.as_deref(), Some(Path::new("/mnt/a b")));
    }

    #[test]
    fn relative_layers_are_found_above_the_mount_point() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path().canonicalize().unwrap();
        for dir in ["l/A", "l/B", "id/diff", "id/work", "id/merged"] {
            std::fs::create_dir_all(home.join(dir)).unwrap();
        }
        let entry = |lower: &str| MountEntry {
            device: "0:50".into(),
            root: "/".into(),
            mountpoint: home.join("id/merged"),
            options: "rw".into(),
            propagation: vec![],
            fstype: "overlay".into(),
            super_options: format!("rw,lowerdir={lower},upperdir=id/diff,workdir=id/work").into(),
        };
        let overlay = Overlay::from_mount_entry(&entry("l/A:l/B")).unwrap();
        assert_eq!(overlay.lowerdirs, [home.join("l/A"), home.join("l/B")]);
        assert_eq!(overlay.upperdir, home.join("id/diff"));
        let error = Overlay::from_mount_entry(&entry("l/A:l/C")).unwrap_err();
        assert!(matches!(error, NoOverlay::Unresolved { .. }), "{error}");
    }

    proptest! {
        #[test]
        fn no_list_of_mounts_makes_the_parser_panic(text in proptest::collection::vec(any::<u8>(), 0..400)) {
            for entry in parse_mountinfo(&text) {
                let _ = Overlay::from_mount_entry(&entry);
            }
        }

        #[test]
        fn no_overlay_options_make_the_parser_panic(options in r"(lowerdir|upperdir|workdir|ro|x)?=?[a/\\:,=01 ]{0,40}") {
            let line = format!("1 2 0:3 / /m rw - overlay overlay {}", options.replace(' ', "\\040"));
            for entry in parse_mountinfo(line.as_bytes()) {
                let _ = Overlay::from_mount_entry(&entry);
            }
            let _ = Overlay::from_mounts(&[spec("overlay", &[&options])]);
        }

        #[test]
        fn names_with_special_characters_come_through_mount_options_and_the_kernels_list(
            lower in proptest::collection::vec(r"/[a:,=\\ é]{1,12}", 1..5),
            upper in r"/[a:,=\\ é]{1,12}",
        ) {
            let overlay = Overlay {
                lowerdirs: lower.iter().map(PathBuf::from).collect(),
                upperdir: upper.into(),
                workdir: "/w".into(),
                options: vec!["index=off".into()],
                mountpoint: None,
            };
            let spec = overlay.mount_spec();
            prop_assert_eq!(&Overlay::from_mounts(std::slice::from_ref(&spec)).unwrap(), &overlay);

            // The kernel splits at commas first, and shows values with their backslashes.
            let shown: Vec<String> = spec.options.iter().map(|o| {
                let (key, value) = o.split_once('=').unwrap();
                let value: Vec<u8> = escape_octal(value, ", \t\n\\").into_bytes();
                format!("{key}={}", String::from_utf8_lossy(&value))
            }).collect();
            let bytes: Vec<u8> = shown.join(",").chars().map(|c| c as u8).collect();
            let mut line = b"1 2 0:3 / /m rw - overlay overlay rw,".to_vec();
            line.extend(bytes);
            let entry = parse_mountinfo(&line).next().unwrap();
            let again = Overlay::from_mount_entry(&entry).unwrap();
            prop_assert_eq!(again, Overlay { mountpoint: Some("/m".into()), ..overlay });
        }
    }
}
