//! The file by which the shims of a host share one table.
//!
//! It lies below `/run`, lives until the next boot, and belongs to nobody: whoever finds none makes
//! one, and a damaged one is replaced by a new one. Members notice that theirs is not the one of that
//! name any more, and come over.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::{
    mapping::Mapping,
    table::{Field, Table, VERSION},
};
use crate::slot_lock::{self, SlotLock};

/// How often joining starts anew because the file has just been replaced.
const ATTEMPTS: usize = 10;

/// The table, and our slot in it.
pub(super) struct Shared {
    pub(super) table: Table,
    lock: SlotLock,
    boot: u128,
}

impl Shared {
    /// Opens the table of the host whose directory below /run this is, makes one if there is none,
    /// and takes a slot.
    pub(super) fn join(run: &Path) -> io::Result<Self> {
        let path = path(run);
        let boot = boot_id()?;
        fs::create_dir_all(run)?;
        for _ in 0..ATTEMPTS {
            let file = match open(&path) {
                Ok(file) if is_table(&file, boot)? => file,
                Ok(_) => {
                    log::warn!("{path:?} is damaged, or of another boot: replaced");
                    create(run, boot)?.persist(&path)?;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    // Somebody else may have been faster.
                    match create(run, boot)?.persist_noclobber(&path) {
                        Err(e) if e.error.kind() != io::ErrorKind::AlreadyExists => {
                            return Err(e.into());
                        }
                        _ => continue,
                    }
                }
                Err(e) => return Err(e),
            };
            let shared = Self::claim(file, boot)?;
            if shared.is_whole() {
                return Ok(shared);
            }
        }
        Err(io::Error::other("it is replaced again and again"))
    }

    fn claim(file: File, boot: u128) -> io::Result<Self> {
        let table = Table::mapped(Mapping::of(&file, Table::BYTES, true)?);
        // Those that nobody seems to have come first: asking the kernel for a lock costs more. No more
        // are looked at than need be, as each is memory that becomes this process's.
        let seems_free = |slot: &u32| table.get(*slot, Field::Pid) == 0;
        let free = (0..table.slots()).filter(seems_free);
        let used = (0..table.slots()).filter(|slot| !seems_free(slot));
        let lock = SlotLock::claim(file, free.chain(used))?
            .map_err(|_| io::Error::other("all slots are taken"))?;
        Ok(Self { table, lock, boot })
    }

    /// Our slot.
    pub(super) fn slot(&self) -> u32 {
        self.lock.number()
    }

    /// Whether the table is still that of the host. Asked for before each use, for what a shorter
    /// file does see [`Mapping`].
    pub(super) fn is_whole(&self) -> bool {
        let there = |meta: fs::Metadata| meta.nlink() > 0 && meta.size() == Table::BYTES as u64;
        self.lock.file().metadata().is_ok_and(there) && self.table.has_header(self.boot)
    }

    /// Whether a slot's member lives. One of whom nothing is known does.
    pub(super) fn is_alive(&self, slot: u32) -> bool {
        !slot_lock::are_free(self.lock.file(), slot, 1).unwrap_or(false)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.is_whole() {
            self.table.set(self.slot(), Field::Pid, 0);
        }
    }
}

/// The same to be looked at, by who is no member. None if there is none.
pub(super) struct Window {
    pub(super) table: Table,
    file: File,
}

impl Window {
    pub(super) fn open(run: &Path) -> io::Result<Option<Self>> {
        let path = path(run);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        if !is_table(&file, boot_id()?)? {
            return Err(io::Error::other("it is damaged, or of another boot"));
        }
        let table = Table::mapped(Mapping::of(&file, Table::BYTES, false)?);
        Ok(Some(Self { table, file }))
    }

    pub(super) fn is_alive(&self, slot: u32) -> io::Result<bool> {
        slot_lock::are_free(&self.file, slot, 1).map(|free| !free)
    }
}

/// Where the table is, for `run`, crab's directory below /run. Members of another version have
/// another one, and a budget of their own.
pub(super) fn path(run: &Path) -> PathBuf {
    run.join(format!("engine.v{VERSION}"))
}

/// The tables of other versions in which somebody has a slot, by their names.
pub fn other_versions(run: &Path) -> io::Result<Vec<String>> {
    let ours = path(run);
    let mut found = Vec::new();
    let entries = match fs::read_dir(run) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_table = name.starts_with("engine.") && entry.file_type()?.is_file();
        if is_table && entry.path() != ours && has_members(&entry.path())? {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// Whether somebody has a lock on any part of a table, whatever its format.
fn has_members(table: &Path) -> io::Result<bool> {
    match File::open(table) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
        Ok(file) => slot_lock::are_free(&file, 0, 0).map(|free| !free),
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// Whether a file is a table of this boot.
fn is_table(file: &File, boot: u128) -> io::Result<bool> {
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() != Table::BYTES as u64 {
        return Ok(false);
    }
    let wanted = header(boot);
    let mut found = vec![0; wanted.len()];
    file.read_exact_at(&mut found, 0)?;
    Ok(found == wanted)
}

/// An empty table without a name. All of it is written, so that a file system without space says so
/// here, and not by a SIGBUS later.
fn create(run: &Path, boot: u128) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new()
        .prefix(".engine")
        .tempfile_in(run)?;
    let mut bytes = header(boot);
    bytes.resize(Table::BYTES, 0);
    file.write_all(&bytes)?;
    Ok(file)
}

fn header(boot: u128) -> Vec<u8> {
    let words = Table::header(boot);
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The kernel's name for the time since it was started.
fn boot_id() -> io::Result<u128> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits = text.trim().replace('-', "");
    u128::from_str_radix(&digits, 16).map_err(io::Error::other)
}
