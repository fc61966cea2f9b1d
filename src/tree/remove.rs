//! Removing a tree.

use std::{
    ffi::CString,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::{
    fs::{AtFlags, FileType},
    io::Errno,
};

use super::{Expect, Found, TreeError, Visitor, failed, look_at, open_dir, open_root, walk};

/// Removes a tree, or a file; that nothing is there is fine. Stops at mounts.
pub fn remove_tree(path: &Path) -> Result<(), TreeError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed("remove", path)(Errno::INVAL));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let name = CString::new(name.as_bytes()).map_err(|_| failed("remove", path)(Errno::INVAL))?;
    let dir = match open_root(parent) {
        Err(TreeError::Io {
            source: Errno::NOENT,
            ..
        }) => return Ok(()),
        dir => dir?,
    };
    let fd = match look_at(dir.as_fd(), &name) {
        Err(Errno::NOENT) => return Ok(()),
        fd => fd.map_err(failed("open", path))?,
    };
    let stat = rustix::fs::fstat(&fd).map_err(failed("stat", path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return rustix::fs::unlinkat(&dir, &name, AtFlags::empty()).map_err(failed("remove", path));
    }
    let root = open_dir(&fd).map_err(failed("open", path))?;
    walk(root, path, Expect::Removal, &|| false, &mut Remover)?;
    rustix::fs::unlinkat(&dir, &name, AtFlags::REMOVEDIR).map_err(failed("remove", path))
}

struct Remover;

impl Visitor for Remover {
    fn enter(&mut self, _: &Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }

    fn other(&mut self, found: &Found<'_>) -> Result<(), TreeError> {
        unlink(found, AtFlags::empty())
    }

    fn leave(&mut self, dir: &Found<'_>) -> Result<(), TreeError> {
        unlink(dir, AtFlags::REMOVEDIR)
    }
}

fn unlink(found: &Found<'_>, flags: AtFlags) -> Result<(), TreeError> {
    match found.parent {
        Some(parent) => {
            rustix::fs::unlinkat(parent, found.name, flags).map_err(found.err("remove"))
        }
        None => Ok(()),
    }
}
