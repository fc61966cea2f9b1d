//! Where a runtime that died half-way may have left a cgroup.

use std::path::{Component, Path, PathBuf};

use super::{CgroupError, Mounts};

/// The directories of the cgroup that `path` (OCI's `cgroupsPath`) names, in every hierarchy; those
/// that there are.
///
/// The path is a client's: only one that is absolute and ends with the container's own id counts, so
/// that nobody else's cgroup is ever touched.
pub fn named(path: &Path, id: &str) -> Result<Vec<PathBuf>, CgroupError> {
    Ok(named_in(&Mounts::of_self()?, path, id))
}

fn named_in(mounts: &Mounts, path: &Path, id: &str) -> Vec<PathBuf> {
    let plain = path
        .components()
        .all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    match plain && path.file_name().is_some_and(|name| name == id) {
        true => mounts.dirs_at(path),
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_a_path_that_ends_with_the_containers_id_names_a_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let mounts = Mounts::parse(&format!(
            "31 23 0:28 / {} rw - cgroup cgroup rw,freezer",
            root.path().display()
        ));
        let dir = |path: &str| root.path().join(path);
        for path in ["ns/c1/inner", "ns/other", "c1"] {
            fs::create_dir_all(dir(path)).unwrap();
        }
        for path in ["/", "/ns", "/ns/other", "ns/c1", "/ns/../ns/c1", "/none/c1"] {
            assert!(
                named_in(&mounts, Path::new(path), "c1").is_empty(),
                "{path}"
            );
        }
        assert_eq!(named_in(&mounts, Path::new("/ns/c1"), "c1"), [dir("ns/c1")]);
    }
}
