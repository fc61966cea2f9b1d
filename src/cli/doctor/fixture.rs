//! A host made of files.

use std::fs;

use tempfile::TempDir;

use super::Host;
use crate::config::Config;

/// One with these files, of those that have a text.
pub(super) fn fake(files: &[(&str, Option<&str>)]) -> (TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let host = Host {
        root: dir.path().to_owned(),
        is_root: true,
        config: Config::default(),
    };
    for (path, text) in files {
        if let Some(text) = text {
            let path = host.at(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }
    (dir, host)
}
