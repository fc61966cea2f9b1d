//! Options of a mount: flags of the kernel's, and the file system's own.

use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use super::{MountError, MountSpec, PAGE, describe};

#[derive(Debug)]
pub(super) struct Options {
    pub(super) flags: MsFlags,
    pub(super) data: Vec<String>,
}

impl Options {
    pub(super) fn parse(spec: &MountSpec, target: &Path) -> Result<Self, MountError> {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        if spec.fstype == "bind" && !spec.options.iter().any(|o| o == "bind" || o == "rbind") {
            flags |= MsFlags::MS_BIND;
        }
        for option in &spec.options {
            if let Some((set, flag)) = flag(option) {
                flags.set(flag, set);
                continue;
            }
            let key = option.split('=').next().unwrap_or_default();
            let helper = matches!(key, "loop" | "uidmap" | "gidmap");
            if helper || key.starts_with("X-containerd.") {
                return Err(MountError::Unsupported {
                    target: target.to_owned(),
                    option: option.clone(),
                    spec: describe(spec),
                });
            }
            if option != "defaults" && !option.is_empty() {
                data.push(option.clone());
            }
        }
        if spec.fstype.starts_with("fuse") {
            return Err(MountError::Unsupported {
                target: target.to_owned(),
                option: spec.fstype.clone(),
                spec: describe(spec),
            });
        }
        Ok(Self { flags, data })
    }

    /// Makes an overlay's lower directories relative to the directory they share if the options
    /// don't fit into a page, and returns that directory.
    pub(super) fn shorten(&mut self, spec: &MountSpec) -> Option<PathBuf> {
        let length: usize = self.data.iter().map(|o| o.len() + 1).sum();
        if spec.fstype != "overlay" || length < PAGE {
            return None;
        }
        let index = self.data.iter().position(|o| o.starts_with("lowerdir="))?;
        let lower = self.data[index].strip_prefix("lowerdir=")?;
        // An escaped colon would be split at; such an option stays as it is.
        if lower.contains('\\') {
            return None;
        }
        let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
        let common = common_directory(&dirs)?;
        let relative: Option<Vec<&str>> = dirs
            .iter()
            .map(|d| d.strip_prefix(&common).ok().and_then(Path::to_str))
            .collect();
        self.data[index] = format!("lowerdir={}", relative?.join(":"));
        Some(common)
    }
}

/// The deepest directory that holds all of them and is neither one of them nor the root.
fn common_directory(dirs: &[&Path]) -> Option<PathBuf> {
    let first = dirs.first()?;
    let holds_all = |dir: &&Path| dirs.iter().all(|d| d.starts_with(dir) && d != dir);
    let common = first.ancestors().skip(1).find(holds_all)?;
    (common.is_absolute() && common.parent().is_some()).then(|| common.to_owned())
}

/// Whether an option sets or clears a flag, and which. After containerd's table, with the
/// propagation of mount(8).
fn flag(option: &str) -> Option<(bool, MsFlags)> {
    use MsFlags as M;
    Some(match option {
        "async" => (false, M::MS_SYNCHRONOUS),
        "sync" => (true, M::MS_SYNCHRONOUS),
        "atime" => (false, M::MS_NOATIME),
        "noatime" => (true, M::MS_NOATIME),
        "diratime" => (false, M::MS_NODIRATIME),
        "nodiratime" => (true, M::MS_NODIRATIME),
        "relatime" => (true, M::MS_RELATIME),
        "norelatime" => (false, M::MS_RELATIME),
        "strictatime" => (true, M::MS_STRICTATIME),
        "nostrictatime" => (false, M::MS_STRICTATIME),
        "lazytime" => (true, M::MS_LAZYTIME),
        "nolazytime" => (false, M::MS_LAZYTIME),
        "dev" => (false, M::MS_NODEV),
        "nodev" => (true, M::MS_NODEV),
        "exec" => (false, M::MS_NOEXEC),
        "noexec" => (true, M::MS_NOEXEC),
        "suid" => (false, M::MS_NOSUID),
        "nosuid" => (true, M::MS_NOSUID),
        "mand" => (true, M::MS_MANDLOCK),
        "nomand" => (false, M::MS_MANDLOCK),
        "dirsync" => (true, M::MS_DIRSYNC),
        "remount" => (true, M::MS_REMOUNT),
        "ro" => (true, M::MS_RDONLY),
        "rw" => (false, M::MS_RDONLY),
        "bind" => (true, M::MS_BIND),
        "rbind" => (true, M::MS_BIND | M::MS_REC),
        "private" => (true, M::MS_PRIVATE),
        "rprivate" => (true, M::MS_PRIVATE | M::MS_REC),
        "shared" => (true, M::MS_SHARED),
        "rshared" => (true, M::MS_SHARED | M::MS_REC),
        "slave" => (true, M::MS_SLAVE),
        "rslave" => (true, M::MS_SLAVE | M::MS_REC),
        "unbindable" => (true, M::MS_UNBINDABLE),
        "runbindable" => (true, M::MS_UNBINDABLE | M::MS_REC),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(fstype: &str, options: &[&str]) -> MountSpec {
        MountSpec {
            fstype: fstype.into(),
            source: "none".into(),
            target: String::new(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        }
    }

    #[test]
    fn options_become_flags_or_data() {
        use MsFlags as M;
        for (options, flags, data) in [
            (
                &["ro", "nosuid", "index=off"][..],
                M::MS_RDONLY | M::MS_NOSUID,
                "index=off",
            ),
            (&["ro", "rw"], M::empty(), ""),
            (&["nodev", "dev", "noexec"], M::MS_NOEXEC, ""),
            (
                &["rbind", "rprivate"],
                M::MS_BIND | M::MS_REC | M::MS_PRIVATE,
                "",
            ),
            (
                &["relatime", "size=1m", "mode=700"],
                M::MS_RELATIME,
                "size=1m,mode=700",
            ),
            (&["defaults", ""], M::empty(), ""),
        ] {
            let parsed = Options::parse(&spec("tmpfs", options), Path::new("/t")).unwrap();
            assert_eq!(parsed.flags, flags, "{options:?}");
            assert_eq!(parsed.data.join(","), data, "{options:?}");
        }
        for bad in ["loop", "uidmap=0:1:2", "X-containerd.x=y"] {
            let error = Options::parse(&spec("ext4", &[bad]), Path::new("/t")).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(bad) && text.contains("/t"), "{text}");
        }
    }

    #[test]
    fn long_options_get_shorter_and_mean_the_same() {
        let dirs: Vec<String> = (0..120)
            .map(|n| format!("/var/lib/containerd/snapshots/{n}/fs"))
            .collect();
        let lower = format!("lowerdir={}", dirs.join(":"));
        let spec = spec("overlay", &[&lower, "upperdir=/u", "workdir=/w"]);
        let mut options = Options::parse(&spec, Path::new("/t")).unwrap();
        let dir = options.shorten(&spec).unwrap();
        assert_eq!(dir, Path::new("/var/lib/containerd/snapshots"));
        let short = options.data[0].strip_prefix("lowerdir=").unwrap();
        let again: Vec<String> = short
            .split(':')
            .map(|d| dir.join(d).to_string_lossy().into_owned())
            .collect();
        assert_eq!(again, dirs);
        assert_eq!(options.data[1..], ["upperdir=/u", "workdir=/w"]);
    }

    #[test]
    fn a_directory_is_common_only_if_it_is_above_all() {
        let common = |dirs: &[&str]| {
            let dirs: Vec<_> = dirs.iter().map(Path::new).collect();
            common_directory(&dirs)
        };
        assert_eq!(common(&["/a/b/1", "/a/b/12"]), Some("/a/b".into()));
        assert_eq!(common(&["/a/b", "/a/b/c"]), Some("/a".into()));
        assert_eq!(common(&["/a", "/b"]), None);
        assert_eq!(common(&["a/b", "a/c"]), None);
        assert_eq!(common(&["/a/b", "c"]), None);
    }
}
