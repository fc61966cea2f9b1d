//! The few calls of `bpf(2)` that libbpf-rs has no safe form of.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering},
};

use libbpf_sys::{BPF_TRACE_ITER, bpf_insn, bpf_prog_info, bpf_prog_load_opts, bpf_prog_type};

use super::abi::{Control, Plain, SLOTS};

/// A bucket of a hash map is read as a whole, and has to fit.
const BATCH: usize = 1024;

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a C string that lives through the call.
    let fd = unsafe { libbpf_sys::bpf_obj_get(name.as_ptr()) };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: a new descriptor that is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// All entries of a hash map. One that is added meanwhile may be missing, no other.
///
/// (libbpf-rs' iterator over batches ends at the first short one, and loses the rest.)
pub(super) fn entries<K: Plain, V: Plain>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut room = BATCH;
    loop {
        match entries_in(map, room) {
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 20 => room *= 4,
            found => return found,
        }
    }
}

fn entries_in<K: Plain, V: Plain>(map: BorrowedFd<'_>, room: usize) -> io::Result<Vec<(K, V)>> {
    let mut found = Vec::new();
    let mut keys = vec![K::default(); room];
    let mut values = vec![V::default(); room];
    let (mut at, mut first) = (0u32, true);
    loop {
        let mut count = u32::try_from(room).unwrap_or(u32::MAX);
        let from: *mut u32 = if first { ptr::null_mut() } else { &raw mut at };
        let mut next = 0u32;
        // SAFETY: both arrays have room for `count` entries of the map's sizes, and the cursor of a
        // hash map is a u32.
        let error = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                map.as_raw_fd(),
                from.cast(),
                (&raw mut next).cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &raw mut count,
                ptr::null(),
            )
        };
        let end = error == -libc::ENOENT;
        if error < 0 && !end {
            return Err(io::Error::from_raw_os_error(-error));
        }
        let count = (count as usize).min(room);
        found.extend(
            keys[..count]
                .iter()
                .copied()
                .zip(values[..count].iter().copied()),
        );
        if end {
            return Ok(found);
        }
        (at, first) = (next, false);
    }
}

/// Of whom an iterator program tells.
#[derive(Debug, Clone, Copy)]
pub(super) enum Whom {
    Process(i32),
    Thread(i32),
}

/// Reads an iterator program's lines. Who is gone has none.
pub(super) fn iterate<T: Plain>(program: BorrowedFd<'_>, whom: Whom) -> io::Result<Vec<T>> {
    let mut which = libbpf_sys::bpf_iter_link_info::default();
    match whom {
        Whom::Process(pid) => which.task.pid = pid.cast_unsigned(),
        Whom::Thread(tid) => which.task.tid = tid.cast_unsigned(),
    }
    let mut options = libbpf_sys::bpf_link_create_opts::default();
    options.sz = size_of_val(&options) as _;
    options.iter_info = &raw mut which;
    options.iter_info_len = size_of_val(&which) as _;
    // SAFETY: the options point to `which`, which lives through the call.
    let link = unsafe {
        libbpf_sys::bpf_link_create(program.as_raw_fd(), 0, BPF_TRACE_ITER, &raw const options)
    };
    if link == -libc::ESRCH {
        return Ok(Vec::new());
    }
    let link = owned(link)?;
    // SAFETY: takes no pointers.
    let lines = owned(unsafe { libbpf_sys::bpf_iter_create(link.as_raw_fd()) })?;
    let mut bytes = Vec::new();
    File::from(lines).read_to_end(&mut bytes)?;
    let lines = bytes.chunks(size_of::<T>()).map(T::read);
    let whole: Option<Vec<T>> = lines.collect();
    whole.ok_or_else(|| io::Error::other("the iterator's last line is not whole"))
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: libbpf returned a new descriptor that is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How often a program was not run because it was running already.
pub(super) fn missed(program: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(info(program)?.recursion_misses)
}

/// What the kernel says of a program.
pub(super) fn info(program: impl AsFd) -> io::Result<bpf_prog_info> {
    let mut info = bpf_prog_info::default();
    let mut size = size_of_val(&info) as u32;
    // SAFETY: the structure and its size.
    let error = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(
            program.as_fd().as_raw_fd(),
            (&raw mut info).cast(),
            &raw mut size,
        )
    };
    if error < 0 {
        return Err(io::Error::from_raw_os_error(-error));
    }
    Ok(info)
}

/// Loads a program that is no part of an object file.
pub(super) fn load(
    kind: bpf_prog_type,
    code: &[bpf_insn],
    mut options: bpf_prog_load_opts,
) -> io::Result<OwnedFd> {
    // SAFETY: the name is none, the licence a C string; code and options live through the call.
    owned(unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            ptr::null(),
            c"GPL".as_ptr(),
            code.as_ptr(),
            code.len() as _,
            &raw mut options,
        )
    })
}

/// Attaches a tracing program to what it was loaded for, as long as the link lives.
pub(super) fn attach(program: impl AsFd) -> io::Result<OwnedFd> {
    let program = program.as_fd().as_raw_fd();
    // SAFETY: the name is none, as such a program knows its place.
    owned(unsafe { libbpf_sys::bpf_raw_tracepoint_open(ptr::null(), program) })
}

/// A map of the kind array, made with BPF_F_MMAPABLE, that all shims and programs of the host share.
struct Shared<T> {
    first: NonNull<T>,
    count: usize,
}

impl<T> Shared<T> {
    fn map(array: impl AsFd, count: usize) -> io::Result<Self> {
        let fd = array.as_fd().as_raw_fd();
        // SAFETY: a new mapping.
        let first = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if first == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(first.cast())
            .map(|first| Self { first, count })
            .ok_or_else(|| io::Error::other("mapped at 0"))
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<T>();
        // SAFETY: mapped in `map` with the same size, and no reference outlives self.
        unsafe { libc::munmap(self.first.as_ptr().cast(), bytes) };
    }
}

/// The map `control`.
pub(super) struct ControlPage(Shared<Control>);

// SAFETY: its fields are only used as atomics.
unsafe impl Send for ControlPage {}
// SAFETY: as above.
unsafe impl Sync for ControlPage {}

impl ControlPage {
    pub(super) fn map(control: impl AsFd) -> io::Result<Self> {
        Shared::map(control, 1).map(Self)
    }

    fn field(&self, field: impl Fn(*mut Control) -> *mut u64) -> &AtomicU64 {
        // SAFETY: mapped, aligned to a page, and shared with others that use atomics as well.
        unsafe { AtomicU64::from_ptr(field(self.0.first.as_ptr())) }
    }

    /// Makes every CPU forget what it remembers.
    pub(super) fn new_generation(&self) {
        // SAFETY: projects a field, reads nothing.
        self.field(|c| unsafe { &raw mut (*c).generation })
            .fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn add_levels(&self, levels: u64) {
        // SAFETY: projects a field, reads nothing.
        self.field(|c| unsafe { &raw mut (*c).levels })
            .fetch_or(levels, Ordering::SeqCst);
    }

    pub(super) fn set_watching(&self) {
        // SAFETY: projects a field, reads nothing.
        self.field(|c| unsafe { &raw mut (*c).watching })
            .store(1, Ordering::SeqCst);
    }
}

/// The map `epoch_numbers`.
pub(super) struct EpochNumbers(Shared<u64>);

// SAFETY: its words are only used as atomics.
unsafe impl Send for EpochNumbers {}
// SAFETY: as above.
unsafe impl Sync for EpochNumbers {}

impl EpochNumbers {
    pub(super) fn map(numbers: impl AsFd) -> io::Result<Self> {
        Shared::map(numbers, SLOTS as usize).map(Self)
    }

    /// The number of the epoch that a slot is in; None if there is no such slot.
    pub(super) fn of(&self, slot: u32) -> Option<&AtomicU64> {
        let slot = usize::try_from(slot)
            .ok()
            .filter(|its| *its < self.0.count)?;
        // SAFETY: within the mapping, aligned, and shared with others that use atomics as well.
        Some(unsafe { AtomicU64::from_ptr(self.0.first.as_ptr().add(slot)) })
    }
}
