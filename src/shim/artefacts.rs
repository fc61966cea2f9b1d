//! What belongs to a sandbox's state and lies in files of the host: its specification, limits that were
//! changed while it ran, and the files that its client has made for it (`/etc/hosts` and friends).

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::{
    container::Container,
    error::{Context, Kind, Result, ShimError},
    spec::{self, Spec},
};

/// Limits that Update has changed, in a checkpoint's `bundle/`.
const LIMITS: &str = "resources.json";
/// Where clients bind files of their own making, and how these are called in `bundle/`.
const FILES: [(&str, &str); 3] = [
    ("/etc/hosts", "etc-hosts"),
    ("/etc/hostname", "etc-hostname"),
    ("/etc/resolv.conf", "etc-resolv.conf"),
];
/// A larger one is nobody's /etc/hosts, and stays as it is.
const MAX_FILE: u64 = 64 << 10;

/// Everything that a checkpoint keeps of it, by name.
pub fn of(container: &Container) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    let config = fs::read(container.bundle.join(spec::CONFIG))?;
    all.insert(spec::CONFIG.to_owned(), config);
    if let Some(limits) = &*container.limits.lock() {
        all.insert(LIMITS.to_owned(), serde_json::to_vec(limits)?);
    }
    for (name, path) in own_files(&container.spec, container.sandbox.id()) {
        if let Some(bytes) = read(&path)? {
            all.insert(name.to_owned(), bytes);
        }
    }
    Ok(all)
}

/// Before a restore: writes the files as they were at the checkpoint, in place, since they are bound by
/// inode.
pub fn put_files_back(container: &Container, saved: &Path) -> Result<()> {
    for (name, path) in own_files(&container.spec, container.sandbox.id()) {
        let step = format!("{}: put {path:?} back", container.sandbox);
        let Some(then) = read(&saved.join(name)).context(&step)? else {
            continue;
        };
        // Gone, or no file: the client has made something else of it.
        if let Some(now) = read(&path).context(&step)?
            && now != then
        {
            write(&path, &then).context(&step)?;
        }
    }
    Ok(())
}

/// After a restore: sets the limits that were set at the checkpoint.
pub fn put_limits_back(container: &Container, saved: &Path) -> Result<()> {
    let step = format!("{}: set the limits again", container.sandbox);
    let Some(bytes) = read(&saved.join(LIMITS)).context(&step)? else {
        return Ok(());
    };
    let limits: Value = serde_json::from_slice(&bytes)
        .map_err(|e| ShimError::new(Kind::Failed, format!("{step}: {e}")))?;
    set_limits(container, limits)
}

/// Sets limits after a restore, which has set those of the specification.
pub fn set_limits(container: &Container, limits: Value) -> Result<()> {
    let bytes = limits.to_string();
    container
        .runtime
        .update(container.sandbox.id(), bytes.as_bytes())
        .context(format_args!("{}: set the limits again", container.sandbox))?;
    *container.limits.lock() = Some(limits);
    Ok(())
}

/// What an Update asks for, on top of what earlier ones did: each names what it changes alone.
pub fn merge(limits: &mut Option<Value>, update: Value) {
    fn add(into: &mut Value, from: Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    add(into.entry(key).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }
    match limits {
        Some(limits) => add(limits, update),
        None => *limits = Some(update),
    }
}

/// The files that the client has made for this container alone, and that it can write to: a component of
/// the path is the container's id. What is the host's, or shared by a pod, has another place.
fn own_files<'s>(
    spec: &'s Spec,
    id: &'s str,
) -> impl Iterator<Item = (&'static str, PathBuf)> + 's {
    let is_own = move |path: &Path| {
        path.is_absolute()
            && path
                .components()
                .any(|part| part == Component::Normal(id.as_ref()))
    };
    FILES.into_iter().filter_map(move |(destination, name)| {
        let source = spec.writable_bind(Path::new(destination))?;
        is_own(source).then(|| (name, source.to_owned()))
    })
}

/// A small regular file; None if it is something else, or not there.
fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match open(OpenOptions::new().read(true), path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= MAX_FILE).then_some(bytes))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = open(OpenOptions::new().write(true), path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    file.set_len(0)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Neither follows a link in the last place nor waits at a FIFO.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    options.custom_flags(flags).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn spec(mounts: &str) -> Spec {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join(spec::CONFIG),
            format!(r#"{{"mounts":{mounts}}}"#),
        )
        .unwrap();
        Spec::load(dir.path()).unwrap()
    }

    fn found(mounts: &str) -> Vec<(&'static str, PathBuf)> {
        own_files(&spec(mounts), "abc").collect()
    }

    #[test]
    fn only_what_the_client_made_for_this_container_is_its_own() {
        let docker = r#"[
            {"destination":"/etc/hosts","type":"bind","source":"/var/lib/docker/containers/abc/hosts","options":["rbind","rprivate"]},
            {"destination":"/etc/hostname","source":"/var/lib/docker/containers/abc/hostname","options":["bind","ro"]},
            {"destination":"/etc/resolv.conf","type":"bind","source":"/etc/resolv.conf","options":["rbind"]}]"#;
        let own = (
            "etc-hosts",
            PathBuf::from("/var/lib/docker/containers/abc/hosts"),
        );
        assert_eq!(found(docker), [own]);
        for other in [
            "/etc/hosts",
            "/var/lib/docker/containers/abcd/hosts",
            "/pods/other/hosts",
            "abc/hosts",
            "/x/../abc-/hosts",
        ] {
            let mounts = format!(
                r#"[{{"destination":"/etc/hosts","type":"bind","source":"{other}","options":["rbind"]}}]"#
            );
            assert_eq!(found(&mounts), [], "{other}");
        }
        // Only a bind is a file of the host's; the last mount at a place is the one that shows.
        assert_eq!(
            found(r#"[{"destination":"/etc/hosts","type":"tmpfs","source":"/abc"}]"#),
            []
        );
        assert_eq!(found("[]"), []);
    }

    #[test]
    fn only_small_files_are_read_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "text").unwrap();
        symlink(at("file"), at("link")).unwrap();
        fs::write(at("large"), vec![0; MAX_FILE as usize + 1]).unwrap();
        assert_eq!(read(&at("file")).unwrap().unwrap(), b"text");
        assert!(read(&at("link")).is_err());
        assert!(write(&at("link"), b"x").is_err());
        assert_eq!(read(&at("large")).unwrap(), None);
        assert_eq!(read(&at("none")).unwrap(), None);
        assert_eq!(read(dir.path()).unwrap(), None);
        write(&at("file"), b"new").unwrap();
        assert_eq!(fs::read(at("file")).unwrap(), b"new");
    }

    #[test]
    fn updates_add_up() {
        let mut limits = None;
        for update in [
            r#"{"memory":{"limit":1,"swap":2},"pids":{"limit":7}}"#,
            r#"{"memory":{"limit":3}}"#,
            r#"{"cpu":{"quota":5},"pids":null}"#,
        ] {
            merge(&mut limits, serde_json::from_str(update).unwrap());
        }
        let expected: Value = serde_json::from_str(
            r#"{"memory":{"limit":3,"swap":2},"pids":null,"cpu":{"quota":5}}"#,
        )
        .unwrap();
        assert_eq!(limits.unwrap(), expected);
    }
}
