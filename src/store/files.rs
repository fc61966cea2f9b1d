//! Small files and directories of the store: bounded reads, atomic and durable writes.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use super::{StoreError, failpoint::failpoint};

/// How the name of a file begins that is not complete yet.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Wraps an I/O error with what was tried, and where.
pub(super) fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { step, path, source }
}

/// Makes a directory (0700), durably. That it is there already is fine.
pub(super) fn make_dir(path: &Path) -> Result<(), StoreError> {
    match make_dir_unsynced(path)? {
        true => sync_parent(path),
        false => Ok(()),
    }
}

/// Makes a directory (0700), unless it is there; whether it made it. [`sync_parent`] is then the caller's affair.
pub(super) fn make_dir_unsynced(path: &Path) -> Result<bool, StoreError> {
    match super::dir_builder().create(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(io("make", path)(e)),
    }
}

/// Makes the name of a file or directory durable.
pub(super) fn sync_parent(path: &Path) -> Result<(), StoreError> {
    path.parent().map_or(Ok(()), sync_dir)
}

pub(super) fn sync_dir(path: &Path) -> Result<(), StoreError> {
    let dir = File::open(path).map_err(io("open", path))?;
    dir.sync_all().map_err(io("fsync", path))
}

/// The names in a directory that are UTF-8 and not hidden; none if there is no such directory.
pub(super) fn names(path: &Path) -> Result<Vec<String>, StoreError> {
    let mut all = all_names(path)?;
    all.retain(|name| !name.starts_with('.'));
    Ok(all)
}

/// The same with the hidden ones.
pub(super) fn all_names(path: &Path) -> Result<Vec<String>, StoreError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if absent(&e) => return Ok(Vec::new()),
        Err(e) => return Err(io("list", path)(e)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let name = entry.map_err(io("list", path))?.file_name();
        all.extend(name.into_string());
    }
    Ok(all)
}

fn absent(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

/// Reads a file of at most `limit` bytes; none if it isn't there.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let open = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path);
    let file = match open {
        Ok(file) => file,
        Err(e) if absent(&e) => return Ok(None),
        Err(e) => return Err(io("open", path)(e)),
    };
    let mut content = Vec::new();
    let read = file.take(limit + 1).read_to_end(&mut content);
    read.map_err(io("read", path))?;
    if content.len() as u64 > limit {
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            reason: format!("it is larger than {limit} bytes"),
        });
    }
    Ok(Some(content))
}

/// Writes a new file, not yet synced.
pub(super) fn write_new(path: &Path, content: &[u8]) -> Result<File, StoreError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io("make", path))?;
    file.write_all(content).map_err(io("write", path))?;
    Ok(file)
}

/// Replaces a file: afterwards it has the old content or the new, whatever happens in between.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<(), StoreError> {
    let mut name = std::ffi::OsString::from(TEMPORARY);
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    remove(&temporary)?;
    failpoint("write a file");
    let file = write_new(&temporary, content)?;
    failpoint("sync a file");
    file.sync_all().map_err(io("fsync", &temporary))?;
    failpoint("rename a file");
    fs::rename(&temporary, path).map_err(io("rename", &temporary))?;
    failpoint("sync its directory");
    sync_parent(path)
}

/// Removes a file; true if there was one.
pub(super) fn remove(path: &Path) -> Result<bool, StoreError> {
    failpoint("remove a file");
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if absent(&e) => Ok(false),
        Err(e) => Err(io("remove", path)(e)),
    }
}

/// Removes what was not completed in a directory. Only for the one writer.
pub(super) fn remove_temporary(dir: &Path) -> Result<(), StoreError> {
    for name in all_names(dir)? {
        if name.starts_with(TEMPORARY) {
            remove(&dir.join(name))?;
        }
    }
    Ok(())
}
