//! (b): comparing a live process with its image.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::{
    facts::What,
    image::{Images, PAGE, Pages},
    maps::{self, Mapping},
    proc_fs::{Dir, ProcessError},
    snapshot::{self, Process, Registers},
};

/// Pages read at once.
const CHUNK: usize = 64;
/// Address space whose page map is read: eight bytes for each page, 2 MiB for 1 GiB.
const MAX_ADDRESS_SPACE: u64 = 8 << 30;

/// Bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// A page of a file, or shared.
const OF_FILE: u64 = 1 << 61;

/// Whether memory and registers are those of the image. `after` is what the process is now; it
/// must not run while this compares.
pub(super) fn equal(
    before: &Process,
    after: &Process,
    images: &dyn Images,
    registers: Registers<'_>,
    limit: u64,
) -> Result<(), What> {
    for task in &before.tasks {
        let place = || What::Memory(format!("registers of thread {}", task.tid));
        let now = after.tasks.iter().find(|other| other.tid == task.tid);
        match (task.registers, now.and_then(|now| now.registers)) {
            // Stack pointer and program counter alone prove nothing: a loop may count in another
            // register.
            (None, _) | (_, None) => {
                return Err(What::NotCompared("nobody reads registers here".to_owned()));
            }
            (Some(a), Some(b)) if a == b && now.is_some_and(|now| now.call == task.call) => {}
            _ => return Err(place()),
        }
    }
    if before.blocked != after.blocked {
        return Err(What::Attribute("blocked signals"));
    }
    equal_memory(before, after, images, limit)?;
    // If it had run, and slept again, this would differ.
    let same = |task: &super::tasks::Task| registers(task.tid) == task.registers;
    if before.tasks.iter().all(same) {
        Ok(())
    } else {
        Err(What::NotCompared("it ran meanwhile".to_owned()))
    }
}

/// As [`equal`], for the memory alone.
pub(super) fn equal_memory(
    before: &Process,
    after: &Process,
    images: &dyn Images,
    limit: u64,
) -> Result<(), What> {
    let not_compared = |error: &dyn std::fmt::Display| What::NotCompared(error.to_string());
    if !after.stood_still() {
        return Err(What::NotCompared("it runs".to_owned()));
    }
    if before.maps.digest != after.maps.digest {
        return Err(What::Memory("mappings".to_owned()));
    }
    if after.maps.shares_memory || after.maps.writes_file {
        return Err(What::NotCompared("it has shared memory".to_owned()));
    }
    let dir = Dir::open(after.pid).map_err(|error| not_compared(&error))?;
    let pages = Pages::open(images, before.inner_pid).map_err(|error| not_compared(&error))?;
    if pages.bytes() > limit {
        let bytes = pages.bytes();
        return Err(What::NotCompared(format!("its image has {bytes} bytes")));
    }
    let different = compare(&dir, &before.maps.digest, images, &pages, limit)
        .map_err(|error| not_compared(&error))?;
    if let Some(address) = different {
        return Err(What::Memory(format!("page {address:#x}")));
    }
    let progress = snapshot::progress(&dir, &after.tasks).map_err(|error| not_compared(&error))?;
    if progress != after.progress_after {
        return Err(What::NotCompared("it ran meanwhile".to_owned()));
    }
    Ok(())
}

/// The address of the first page that differs.
fn compare(
    dir: &Dir,
    digest: &super::proc_fs::Digest,
    images: &dyn Images,
    pages: &Pages,
    limit: u64,
) -> Result<Option<u64>, CompareError> {
    let live = File::from(dir.open_file("mem")?);
    let mut image = pages.file(images)?;
    let mut offset = 0;
    for run in pages.runs() {
        if let Some(address) = differs(&live, run.address, run.pages, |buffer| {
            image.read_exact_at(buffer, offset)?;
            offset += buffer.len() as u64;
            Ok(())
        })? {
            return Ok(Some(address));
        }
    }
    let (mappings, now) = maps::list(dir)?;
    if now != *digest {
        return Err(CompareError::Other("its mappings change"));
    }
    beyond_image(dir, &live, &mappings, pages, limit)
}

/// The first of the process's own pages that the image lacks and that is not all zeros.
fn beyond_image(
    dir: &Dir,
    live: &File,
    mappings: &[Mapping],
    pages: &Pages,
    limit: u64,
) -> Result<Option<u64>, CompareError> {
    let pagemap = File::from(dir.open_file("pagemap")?);
    let own = |mapping: &&Mapping| !mapping.shared && !mapping.is_of_kernel();
    let space = mappings.iter().filter(own).map(Mapping::bytes);
    if space.fold(0, u64::saturating_add) > MAX_ADDRESS_SPACE {
        return Err(CompareError::Other("its address space is too large"));
    }
    let mut left = limit / PAGE;
    let mut bits = vec![0; 64 << 10];
    for mapping in mappings.iter().filter(own) {
        let mut address = mapping.start;
        while address < mapping.end {
            let count = ((mapping.end - address) / PAGE).min(bits.len() as u64 / 8);
            let bits = &mut bits[..usize::try_from(count).unwrap_or(0) * 8];
            pagemap.read_exact_at(bits, address / PAGE * 8)?;
            for entry in bits.chunks_exact(8) {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                let own = entry & PRESENT_OR_SWAPPED != 0 && entry & OF_FILE == 0;
                if own && !pages.has(address) {
                    left = left
                        .checked_sub(1)
                        .ok_or(CompareError::Other("too much memory is not in the image"))?;
                    if let Some(address) = differs(live, address, 1, |zeros| {
                        zeros.fill(0);
                        Ok(())
                    })? {
                        return Ok(Some(address));
                    }
                }
                address += PAGE;
            }
        }
    }
    Ok(None)
}

/// The first of some pages that is not what `expected` writes into its buffer, chunk by chunk.
/// Reads by /proc/PID/mem, which goes by the open directory and not by a number.
fn differs(
    live: &File,
    mut address: u64,
    mut pages: u64,
    mut expected: impl FnMut(&mut [u8]) -> io::Result<()>,
) -> Result<Option<u64>, CompareError> {
    let mut buffers = [
        vec![0; CHUNK * PAGE as usize],
        vec![0; CHUNK * PAGE as usize],
    ];
    let [wanted, found] = &mut buffers;
    while pages > 0 {
        let now = pages.min(CHUNK as u64);
        let length = usize::try_from(now * PAGE).unwrap_or(0);
        let (wanted, found) = (&mut wanted[..length], &mut found[..length]);
        expected(wanted)?;
        live.read_exact_at(found, address)?;
        if wanted != found {
            let size = PAGE as usize;
            let pairs = wanted.chunks(size).zip(found.chunks(size));
            let place = pairs.take_while(|(a, b)| a == b).count() as u64;
            return Ok(Some(address + place * PAGE));
        }
        address += now * PAGE;
        pages -= now;
    }
    Ok(None)
}

#[derive(Debug, thiserror::Error)]
enum CompareError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Other(&'static str),
}
