//! Loading the programs, in a process of its own.
//!
//! libbpf reads the kernel's types and relocates the programs against them: some megabytes, once. A
//! short-lived child does it, so that no shim keeps that memory, and pins what it made under a name
//! of its own. The rename to the final name is the commit; a child that dies before leaves a directory
//! that the next one removes.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use libbpf_rs::{MapCore, MapFlags, Object, ObjectBuilder, OpenObject, ProgramMut};
use nix::{
    mount::{MsFlags, mount},
    sys::{prctl, signal::Signal},
};
use sha2::{Digest, Sha256};

use super::{
    host::Place,
    makers,
    probes::{MARKS, ProbeSet},
};
use crate::memory;

/// The compiled programs.
static PROGRAMS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/inspector.bpf.o"));

/// The first word of the command line that asks for [`load`].
pub const WORD: &str = "inspector-load";

/// What distinguishes these programs from those of another build.
pub(super) fn build_hash() -> String {
    let digest = Sha256::digest(PROGRAMS);
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Loads, attaches and pins the programs below `run`, unless somebody else was faster. For a process
/// that ends right after.
pub fn load(run: &Path) -> Result<(), String> {
    load_without(run, &[])
}

/// As [`load`], without some of the probes: for tests that show what each one is there for.
#[doc(hidden)]
pub fn load_without(run: &Path, without: &[String]) -> Result<(), String> {
    // Without the shim that wants them, nobody would remove them.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| format!("prctl: {e}"))?;
    let place = Place::below(run);
    let _alone = place.lock()?;
    mount_bpffs(&place.bpffs)?;
    failpoint("mounted");
    remove_unfinished(&place.bpffs).map_err(|e| format!("{}: {e}", place.bpffs.display()))?;
    if place.pins.exists() {
        return Ok(());
    }
    let set = ProbeSet::choose()?;
    let is_known = |name: &str| name == MARKS || set.probes().contains(&name);
    if let Some(name) = without.iter().find(|name| !is_known(name)) {
        return Err(format!("{name} is no probe of {}", set.name()));
    }
    let unfinished = unfinished(&place.bpffs);
    pin_all(set, &unfinished, without).map_err(|e| format!("cannot load the programs: {e}"))?;
    failpoint("pinned");
    fs::rename(&unfinished, &place.pins).map_err(|e| format!("{}: {e}", place.pins.display()))?;
    failpoint("renamed");
    Ok(())
}

/// Loads the programs as [`load`] does, and lets them go.
pub(super) fn try_out(set: ProbeSet) -> Result<(), String> {
    // It says on stderr what it tries.
    libbpf_rs::set_print(None);
    let loaded = open(set, Marks::LeftOut).and_then(OpenObject::load);
    loaded.map(drop).map_err(|e| format!("{e:#}"))
}

/// Whether the program that sees marks of written pages being cleared is among those that are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marks {
    Seen,
    LeftOut,
}

/// The programs of a set, and those that belong to all sets.
fn open(set: ProbeSet, marks: Marks) -> libbpf_rs::Result<OpenObject> {
    open_without(|name| match name == MARKS {
        true => marks == Marks::LeftOut,
        false => set.leaves_out(name),
    })
}

fn open_without(is_left_out: impl Fn(&str) -> bool) -> libbpf_rs::Result<OpenObject> {
    let mut programs = ObjectBuilder::default().open_memory(PROGRAMS)?;
    for mut program in programs.progs_mut() {
        if is_left_out(&program.name().to_string_lossy()) {
            program.set_autoload(false);
        }
    }
    Ok(programs)
}

/// Loads the programs of a set; with the one about marks, if there are any, and the kernel lets it.
fn load_all(set: ProbeSet, without: &[String]) -> libbpf_rs::Result<(Object, Marks)> {
    if memory::is_tracked() && !without.iter().any(|name| name == MARKS) {
        match open(set, Marks::Seen).and_then(OpenObject::load) {
            Ok(loaded) => return Ok((loaded, Marks::Seen)),
            Err(e) => log::info!("who clears marks of written pages is not seen: {e:#}"),
        }
    }
    let loaded = open(set, Marks::LeftOut)?.load()?;
    Ok((loaded, Marks::LeftOut))
}

/// Tries whether [`MARKS`] can be seen by attaching its program for an instant.
pub(super) fn try_marks() -> Result<(), String> {
    libbpf_rs::set_print(None);
    let named = |e: libbpf_rs::Error| format!("{e:#}");
    let programs = open_without(|name| name != MARKS).and_then(OpenObject::load);
    let programs = programs.map_err(named)?;
    let marks = programs.progs_mut().find(|program| program.name() == MARKS);
    let marks = marks.ok_or_else(|| format!("no program {MARKS}"))?;
    marks.attach().map(drop).map_err(named)
}

/// How names begin of what is not complete.
const UNFINISHED: &str = "unfinished-";

/// A name for what is not complete yet, or no longer. The next one who loads removes it.
pub(super) fn unfinished(bpffs: &Path) -> PathBuf {
    bpffs.join(format!("{UNFINISHED}{}", std::process::id()))
}

fn pin_all(set: ProbeSet, dir: &Path, without: &[String]) -> anyhow::Result<()> {
    // The list of the kernel's symbols is long, and takes a third of the time that the programs take.
    let makers = thread::spawn(makers::makers);
    let (mut programs, marks) = load_all(set, without)?;
    failpoint("loaded");
    fs::create_dir(dir)?;
    for mut map in programs.maps_mut() {
        let name = map.name().to_owned();
        map.pin(dir.join(name))?;
    }
    let died = |_| Err(io::Error::other("the thread died"));
    fill_makers(&programs, makers.join().unwrap_or_else(died))?;
    failpoint("maps");
    for mut program in programs.progs_mut() {
        let name = program.name().to_string_lossy().into_owned();
        if name == MARKS {
            if marks == Marks::Seen {
                pin_marks(&mut program, dir)?;
            }
            continue;
        }
        if set.leaves_out(&name) {
            continue;
        }
        program.pin(dir.join(&name))?;
        if set.probes().contains(&name.as_str()) && !without.contains(&name) {
            let mut link = program.attach()?;
            failpoint("attached");
            link.pin(dir.join(format!("{name}{LINK}")))?;
            failpoint("linked");
        }
    }
    Ok(())
}

/// Pins the program about marks once it is attached: where it is, it sees them being cleared.
fn pin_marks(program: &mut ProgramMut<'_>, dir: &Path) -> anyhow::Result<()> {
    match program.attach() {
        Ok(mut link) => {
            program.pin(dir.join(MARKS))?;
            link.pin(dir.join(format!("{MARKS}{LINK}")))?;
        }
        Err(e) => log::info!("who clears marks of written pages is not seen: {e:#}"),
    }
    Ok(())
}

fn fill_makers(programs: &Object, makers: io::Result<Vec<u8>>) -> anyhow::Result<()> {
    let map = programs.maps().find(|map| map.name() == "makers");
    match (makers, map) {
        (Ok(makers), Some(map)) => Ok(map.update(&0u32.to_ne_bytes(), &makers, MapFlags::ANY)?),
        (Ok(_), None) => Err(anyhow::anyhow!("the programs have no map of makers")),
        (Err(e), _) => {
            log::info!("the kernel's symbols cannot be read: {e}");
            Ok(())
        }
    }
}

/// How names of pinned links end.
pub(super) const LINK: &str = "-link";

/// Under the lock, so that it is nobody's work in progress.
pub(super) fn remove_unfinished(bpffs: &Path) -> io::Result<()> {
    for entry in fs::read_dir(bpffs)? {
        let path = entry?.path();
        if path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()))
        {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// A bpffs of crab's own: containerd's mount namespace may have none.
fn mount_bpffs(at: &Path) -> Result<(), String> {
    let failed =
        |e: &dyn std::fmt::Display| format!("cannot mount a bpffs at {}: {e}", at.display());
    fs::create_dir_all(at).map_err(|e| failed(&e))?;
    if is_bpffs(at).map_err(|e| failed(&e))? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), at, Some("bpf"), flags, Some("mode=0700")).map_err(|e| failed(&e))
}

pub(super) fn is_bpffs(at: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
    let found = rustix::fs::statfs(at)?;
    Ok(found.f_type as u32 == BPF_FS_MAGIC)
}

/// In tests, the name of the step at which to die as by `kill -9`; `NAME:2` is the second time there.
pub const FAILPOINT: &str = "CRAB_INSPECTOR_DIE_AT";

/// Dies here if a test wants it.
pub(super) fn failpoint(step: &str) {
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let Some(at) = std::env::var_os(FAILPOINT) else {
        return;
    };
    let at = at.to_string_lossy();
    let (name, time) = at.split_once(':').unwrap_or((&*at, "1"));
    if name == step && time.parse() == Ok(PASSED.fetch_add(1, Ordering::Relaxed) + 1) {
        // SAFETY: plain system calls on ourselves.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// The lock under which programs are loaded, joined and removed. Released when dropped.
pub(super) fn lock_file(path: &Path) -> io::Result<nix::fcntl::Flock<File>> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, e)| io::Error::from(e))
}

/// The pins of a build.
pub(super) fn pins(bpffs: &Path) -> PathBuf {
    bpffs.join(build_hash())
}
