//! (b): comparing a live process with its image.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use super::{
    facts::What,
    image::{Images, PAGE, Pages},
    maps::{self, Mapping},
    proc_fs::{Dir, ProcessError},
    snapshot::{self, Process, Registers},
};
use crate::memory::{Region, pages_in};

/// Pages read at once.
const CHUNK: usize = 64;
/// Address space whose page map is read: eight bytes for each page, 2 MiB for 1 GiB.
const MAX_ADDRESS_SPACE: u64 = 8 << 30;

/// Bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// A page of a file, or shared.
const OF_FILE: u64 = 1 << 61;

/// Runs of pages in as many states are not looked at: a sandbox can make one of each page.
const MAX_REGIONS: usize = 1 << 16;

/// Whether the kernel's marks of written pages (soft-dirty) are those since the dump that an image is of:
/// nobody has cleared them since, up to now.
pub type Marks<'a> = &'a dyn Fn() -> bool;

/// Marks that are of no use.
pub fn no_marks() -> bool {
    false
}

/// What a process's memory is held against.
pub(super) struct Against<'a> {
    pub(super) images: &'a dyn Images,
    pub(super) marks: Marks<'a>,
    /// So many bytes are compared.
    pub(super) limit: u64,
}

/// Whether memory and registers are those of the image. `after` is what the process is now; it
/// must not run while this compares.
pub(super) fn equal(
    before: &Process,
    after: &Process,
    against: &Against<'_>,
    registers: Registers<'_>,
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
    equal_memory(before, after, against)?;
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
    against: &Against<'_>,
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
    let pages = Pages::open(against.images, before.inner_pid);
    let pages = pages.map_err(|error| not_compared(&error))?;
    let different = compare(&dir, &before.maps.digest, &pages, against)
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

/// The address of the first page that differs: by the kernel's marks, if they tell of the time since the
/// dump, before they are read and after that.
fn compare(
    dir: &Dir,
    digest: &super::proc_fs::Digest,
    pages: &Pages,
    against: &Against<'_>,
) -> Result<Option<u64>, CompareError> {
    let marked = match (against.marks)() {
        true => marked(dir, digest).map(Some)?,
        false => None,
    };
    match marked.filter(|_| (against.marks)()) {
        Some(regions) => compare_written(dir, digest, pages, &regions, against),
        None => compare_all(dir, digest, pages, against),
    }
}

/// The pages of the process's private mappings that are there.
fn marked(dir: &Dir, digest: &super::proc_fs::Digest) -> Result<Vec<Region>, CompareError> {
    let pagemap = File::from(dir.open_file("pagemap")?);
    let mut found = Vec::new();
    for mapping in own_mappings(dir, digest)? {
        pages_in(
            &pagemap,
            mapping.start..mapping.end,
            &mut found,
            MAX_REGIONS,
        )?;
    }
    Ok(found)
}

/// Compares what was written to since the dump, or is gone: all other pages are those that were dumped.
fn compare_written(
    dir: &Dir,
    digest: &super::proc_fs::Digest,
    pages: &Pages,
    regions: &[Region],
    against: &Against<'_>,
) -> Result<Option<u64>, CompareError> {
    let live = File::from(dir.open_file("mem")?);
    let mut image = pages.file(against.images)?;
    let mut left = against.limit / PAGE;
    let mut take = |range: &Range<u64>| -> Result<u64, CompareError> {
        let count = (range.end - range.start) / PAGE;
        left = left
            .checked_sub(count)
            .ok_or(CompareError::Other("too much memory was written to"))?;
        Ok(count)
    };
    let range = |region: &Region| region.start..region.end;
    let unwritten: Vec<_> = regions
        .iter()
        .filter(|its| its.is_unwritten())
        .map(range)
        .collect();
    for run in pages.runs() {
        for part in without(run.address..run.end(), &unwritten) {
            let count = take(&part)?;
            let mut place =
                (run.first.unwrap_or(0) * PAGE).saturating_add(part.start - run.address);
            if let Some(address) = differs(&live, part.start, count, |buffer| {
                image.read_exact_at(buffer, place)?;
                place += buffer.len() as u64;
                Ok(())
            })? {
                return Ok(Some(address));
            }
        }
    }
    let dumped: Vec<_> = pages
        .runs()
        .iter()
        .map(|run| run.address..run.end())
        .collect();
    for region in regions.iter().filter(|its| its.is_own()) {
        for part in without(range(region), &dumped) {
            let count = take(&part)?;
            if let Some(address) = differs(&live, part.start, count, zeros)? {
                return Ok(Some(address));
            }
        }
    }
    own_mappings(dir, digest)?;
    Ok(None)
}

/// What is left of a range without others, which are in order.
fn without(range: Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let first = others.partition_point(|other| other.end <= range.start);
    let mut left = Vec::new();
    let mut from = range.start;
    for other in others.get(first..).unwrap_or_default() {
        if other.start >= range.end {
            break;
        }
        if other.start > from {
            left.push(from..other.start);
        }
        from = from.max(other.end);
    }
    if from < range.end {
        left.push(from..range.end);
    }
    left
}

/// The private mappings, which must be those of the dump.
fn own_mappings(dir: &Dir, digest: &super::proc_fs::Digest) -> Result<Vec<Mapping>, CompareError> {
    let (mut mappings, now) = maps::list(dir)?;
    if now != *digest {
        return Err(CompareError::Other("its mappings change"));
    }
    mappings.retain(|mapping| !mapping.shared && !mapping.is_of_kernel());
    Ok(mappings)
}

fn zeros(buffer: &mut [u8]) -> io::Result<()> {
    buffer.fill(0);
    Ok(())
}

/// Compares all of the image.
fn compare_all(
    dir: &Dir,
    digest: &super::proc_fs::Digest,
    pages: &Pages,
    against: &Against<'_>,
) -> Result<Option<u64>, CompareError> {
    if pages.bytes() > against.limit {
        return Err(CompareError::TooLarge(pages.bytes()));
    }
    let live = File::from(dir.open_file("mem")?);
    let mut image = pages.file(against.images)?;
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
    let mappings = own_mappings(dir, digest)?;
    beyond_image(dir, &live, &mappings, pages, against.limit)
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
    let space = mappings.iter().map(Mapping::bytes);
    if space.fold(0, u64::saturating_add) > MAX_ADDRESS_SPACE {
        return Err(CompareError::Other("its address space is too large"));
    }
    let mut left = limit / PAGE;
    let mut bits = vec![0; 64 << 10];
    for mapping in mappings {
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
                    if let Some(address) = differs(live, address, 1, zeros)? {
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
    #[error("its image has {0} bytes")]
    TooLarge(u64),
    #[error("{0}")]
    Other(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_without_others_is_what_lies_between_them() {
        let others = [0..2, 4..6, 6..7, 9..20];
        let ends = |(start, end): (u64, u64)| -> Vec<_> {
            let left = without(start..end, &others);
            left.iter().map(|part| (part.start, part.end)).collect()
        };
        for (range, want) in [
            ((0, 2), vec![]),
            ((0, 4), vec![(2, 4)]),
            ((3, 10), vec![(3, 4), (7, 9)]),
            ((5, 7), vec![]),
            ((20, 22), vec![(20, 22)]),
            ((1, 30), vec![(2, 4), (7, 9), (20, 30)]),
        ] {
            assert_eq!(ends(range), want, "{range:?}");
        }
    }
}
