//! The little that the shim must know of a bundle's `config.json`.
//!
//! Only a few fields are read, and an edit keeps every other one as it was: the runtime may know
//! fields that this crab does not.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::LinuxNamespaceType;
use serde::Deserialize;
use serde_json::{Map, Value};

/// The OCI configuration's file name.
pub const CONFIG: &str = "config.json";
/// More than any client writes.
const MAX_CONFIG: u64 = 64 << 20;

/// What `config.json` says.
#[derive(Debug, Default, Deserialize)]
pub struct Spec {
    /// The container's annotations.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    root: Option<Root>,
    #[serde(default)]
    mounts: Vec<Mount>,
    #[serde(default)]
    linux: Option<Linux>,
}

#[derive(Debug, Deserialize)]
struct Root {
    path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Mount {
    destination: PathBuf,
    #[serde(default)]
    source: Option<PathBuf>,
    #[serde(default)]
    options: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    #[serde(default)]
    namespaces: Vec<Namespace>,
    #[serde(default)]
    cgroups_path: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: LinuxNamespaceType,
    #[serde(default)]
    path: Option<PathBuf>,
}

/// A bundle that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {source}", path.display())]
pub struct SpecError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl Spec {
    /// Reads a bundle's `config.json`.
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        let (path, bytes) = read(bundle)?;
        // Into an object first: serde would take an array for a struct as well.
        serde_json::from_slice::<Map<String, Value>>(&bytes)
            .and_then(|object| serde_json::from_value(Value::Object(object)))
            .map_err(|e| SpecError {
                what: "cannot understand",
                path,
                source: e.into(),
            })
    }

    /// Where the root file system is, if `config.json` says.
    pub fn rootfs(&self, bundle: &Path) -> PathBuf {
        let path = self
            .root
            .as_ref()
            .map_or(Path::new("rootfs"), |r| r.path.as_path());
        bundle.join(path)
    }

    /// What the client mounts at a place in the container; of several the last, which covers the
    /// others.
    pub fn bound_from(&self, destination: &Path) -> Option<&Path> {
        let mount = self.mounts.iter().rfind(|m| m.destination == destination)?;
        mount.source.as_deref()
    }

    /// The cgroup that the client asks for.
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.linux.as_ref()?.cgroups_path.as_deref()
    }

    /// What of the host is bound at a place of the container, if it can be written to there.
    pub fn writable_bind(&self, destination: &Path) -> Option<&Path> {
        let mount = self
            .mounts
            .iter()
            .rev()
            .find(|m| m.destination == destination)?;
        let has = |word: &str| mount.options.iter().flatten().any(|option| option == word);
        let is_bind = has("bind") || has("rbind");
        mount.source.as_deref().filter(|_| is_bind && !has("ro"))
    }

    fn namespace(&self, kind: LinuxNamespaceType) -> Option<&Namespace> {
        self.linux
            .as_ref()?
            .namespaces
            .iter()
            .find(|n| n.kind == kind)
    }

    /// Whether the container shares its pid namespace with others, so that its processes outlive
    /// their init.
    pub fn shares_pids(&self) -> bool {
        self.namespace(LinuxNamespaceType::Pid)
            .is_none_or(|n| n.path.is_some())
    }

    /// Why the container's processes cannot be dumped, if it shares what a dump must own: what
    /// belongs to others would come back private, or not at all.
    pub fn shared_with_others(&self) -> Option<&'static str> {
        let shares_ipc = self
            .namespace(LinuxNamespaceType::Ipc)
            .is_none_or(|n| n.path.is_some());
        match (self.shares_pids(), shares_ipc) {
            (true, _) => Some("it shares its pid namespace with others"),
            (_, true) => Some("it shares its IPC namespace with others"),
            _ => None,
        }
    }

    /// Where files and directories of the host are mounted in the container.
    pub fn bind_mounts(&self) -> Vec<PathBuf> {
        let is_bind = |m: &&Mount| {
            let mut options = m.options.iter().flatten();
            options.any(|o| o == "bind" || o == "rbind")
        };
        let binds = self.mounts.iter().filter(is_bind);
        binds.map(|mount| mount.destination.clone()).collect()
    }

    /// Whether the client mounts anything at or below a place in the container.
    pub fn mounts_at_or_below(&self, place: &Path) -> bool {
        let mut mounts = self.mounts.iter();
        mounts.any(|mount| mount.destination.starts_with(place))
    }

    /// Whether the container has a network of its own, or one that was made for it.
    pub fn has_network_namespace(&self) -> bool {
        self.namespace(LinuxNamespaceType::Network).is_some()
    }

    /// Where its network namespace is, if `config.json` says so.
    pub fn network_path(&self) -> Option<&Path> {
        self.namespace(LinuxNamespaceType::Network)?.path.as_deref()
    }

    /// Whether the runtime would make a network namespace that the shim may make in its stead.
    /// With a user namespace it may not: that must own the network.
    pub fn wants_private_network(&self) -> bool {
        self.namespace(LinuxNamespaceType::User).is_none()
            && self
                .namespace(LinuxNamespaceType::Network)
                .is_some_and(|n| n.path.is_none())
    }
}

fn read(bundle: &Path) -> Result<(PathBuf, Vec<u8>), SpecError> {
    let path = bundle.join(CONFIG);
    let bytes = fs::metadata(&path).and_then(|m| {
        if m.len() > MAX_CONFIG {
            return Err(io::Error::other(format!("{} bytes are too many", m.len())));
        }
        fs::read(&path)
    });
    match bytes {
        Ok(bytes) => Ok((path, bytes)),
        Err(source) => Err(SpecError {
            what: "cannot read",
            path,
            source,
        }),
    }
}

/// Gives the network namespace in a bundle's `config.json` a path.
pub fn set_network_path(bundle: &Path, netns: &Path) -> Result<(), SpecError> {
    edit(bundle, |config| {
        let namespaces = config
            .pointer_mut("/linux/namespaces")
            .and_then(Value::as_array_mut)
            .ok_or_else(|| io::Error::other("it has no namespaces"))?;
        for namespace in namespaces {
            if namespace["type"] == "network" {
                namespace["path"] = Value::from(netns.to_string_lossy());
            }
        }
        Ok(())
    })
}

/// Adds to a bundle's `config.json` that a directory of the host is mounted read-only, after all others.
pub fn add_read_only(bundle: &Path, dir: &Path, destination: &Path) -> Result<(), SpecError> {
    edit(bundle, |config| {
        let mount = serde_json::json!({
            "destination": destination, "type": "bind", "source": dir,
            "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
        });
        let config = config
            .as_object_mut()
            .ok_or_else(|| io::Error::other("it is no object"))?;
        match config
            .entry("mounts")
            .or_insert_with(|| Value::Array(Vec::new()))
        {
            Value::Array(mounts) => mounts.push(mount),
            _ => return Err(io::Error::other("its mounts are no list")),
        }
        Ok(())
    })
}

fn edit(bundle: &Path, change: impl FnOnce(&mut Value) -> io::Result<()>) -> Result<(), SpecError> {
    let (path, bytes) = read(bundle)?;
    let edited = serde_json::from_slice::<Value>(&bytes)
        .map_err(io::Error::from)
        .and_then(|mut config| {
            change(&mut config)?;
            serde_json::to_vec(&config).map_err(Into::into)
        })
        .and_then(|bytes| {
            let new = path.with_extension("json.crab");
            fs::write(&new, bytes)?;
            fs::rename(&new, &path)
        });
    edited.map_err(|source| SpecError {
        what: "cannot edit",
        path,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), config).unwrap();
        dir
    }

    #[test]
    fn an_edit_keeps_what_it_does_not_know() {
        let dir =
            bundle(r#"{"x":[1],"linux":{"namespaces":[{"type":"pid"},{"type":"network"}],"y":2}}"#);
        let spec = Spec::load(dir.path()).unwrap();
        assert!(spec.wants_private_network());
        assert!(!spec.shares_pids());
        set_network_path(dir.path(), Path::new("/run/n")).unwrap();
        let spec = Spec::load(dir.path()).unwrap();
        assert!(!spec.wants_private_network());
        let config: Value =
            serde_json::from_slice(&fs::read(dir.path().join(CONFIG)).unwrap()).unwrap();
        assert_eq!(config["x"][0], 1);
        assert_eq!(config["linux"]["y"], 2);
        assert_eq!(config["linux"]["namespaces"][1]["path"], "/run/n");
    }

    #[test]
    fn a_mount_is_added_after_all_others() {
        let dir = bundle(r#"{"mounts":[{"destination":"/run","type":"tmpfs","source":"x"}]}"#);
        let (path, at) = (dir.path(), Path::new("/run/crab"));
        assert!(!Spec::load(path).unwrap().mounts_at_or_below(at));
        add_read_only(path, Path::new("/host/view"), at).unwrap();
        let spec = Spec::load(path).unwrap();
        assert!(spec.mounts_at_or_below(at));
        assert_eq!(spec.bind_mounts(), [at]);
        assert_eq!(spec.mounts.len(), 2);
        assert_eq!(spec.bound_from(at), Some(Path::new("/host/view")));
        assert_eq!(spec.writable_bind(at), None);
    }

    #[test]
    fn a_user_namespace_keeps_its_own_network() {
        let dir = bundle(r#"{"linux":{"namespaces":[{"type":"user"},{"type":"network"}]}}"#);
        let spec = Spec::load(dir.path()).unwrap();
        assert!(!spec.wants_private_network());
        assert!(spec.shares_pids());
    }

    #[test]
    fn whoever_shares_pids_or_ipc_is_told_apart() {
        for (namespaces, shares) in [
            (r#"{"type":"pid"},{"type":"ipc"}"#, None),
            (
                r#"{"type":"pid"},{"type":"ipc","path":"/proc/1/ns/ipc"}"#,
                Some("IPC"),
            ),
            (r#"{"type":"pid"}"#, Some("IPC")),
            (r#"{"type":"ipc"}"#, Some("pid")),
        ] {
            let dir = bundle(&format!(r#"{{"linux":{{"namespaces":[{namespaces}]}}}}"#));
            let said = Spec::load(dir.path()).unwrap().shared_with_others();
            assert_eq!(said.is_some(), shares.is_some(), "{namespaces}");
            assert!(
                said.unwrap_or_default()
                    .contains(shares.unwrap_or_default())
            );
        }
    }

    #[test]
    fn a_broken_config_is_named() {
        let dir = bundle("{");
        let error = Spec::load(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("config.json") && error.contains("EOF"),
            "{error}"
        );
        fs::write(dir.path().join(CONFIG), "[]").unwrap();
        assert!(Spec::load(dir.path()).is_err());
        fs::remove_file(dir.path().join(CONFIG)).unwrap();
        assert!(
            Spec::load(dir.path())
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
    }
}
