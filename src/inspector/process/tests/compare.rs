//! (b): memory against an image.

use std::os::unix::fs::FileExt as _;

use super::*;
use crate::{
    inspector::process::{ImageDir, image::PAGE},
    page_map::testing::page_map,
};

/// Registers that never change, for threads that do not run.
pub(super) fn registers(tid: i32) -> Option<u64> {
    Some(u64::from(tid.unsigned_abs()))
}

/// Every page of its own, as CRIU would write it; `keep` chooses.
/// `ghost`: a page that is not there, and has something in the image.
fn dump(pid: i32, to: &std::path::Path, keep: impl Fn(u64) -> bool, ghost: Option<u64>) {
    let dir = proc_fs::Dir::open(pid).unwrap();
    let (memory, map) = (
        dir.open_file("mem").unwrap(),
        dir.open_file("pagemap").unwrap(),
    );
    let (memory, map) = (fs::File::from(memory), fs::File::from(map));
    let (mut entries, mut pages) = (Vec::new(), Vec::new());
    for mapping in maps::list(&dir).unwrap().0 {
        if mapping.shared || mapping.is_of_kernel() {
            continue;
        }
        for address in (mapping.start..mapping.end).step_by(4096) {
            let mut entry = [0; 8];
            if ghost == Some(address) {
                entries.push((address, 1, true));
                pages.extend([b'x'; 4096]);
            }
            map.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
            let entry = u64::from_le_bytes(entry);
            if entry >> 62 != 0 && entry >> 61 & 1 == 0 && keep(address) {
                let mut page = vec![0; 4096];
                memory.read_exact_at(&mut page, address).unwrap();
                if page.iter().any(|&byte| byte != 0) {
                    entries.push((address, 1, true));
                    pages.extend(page);
                }
            }
        }
    }
    fs::write(to.join(format!("pagemap-{pid}.img")), page_map(9, &entries)).unwrap();
    fs::write(to.join("pages-9.img"), pages).unwrap();
}

pub(super) fn comparing() -> Settings {
    Settings {
        compare_memory: true,
        ..settings()
    }
}

pub(super) struct Dumped {
    pub(super) actor: Actor,
    pub(super) images: tempfile::TempDir,
    pub(super) baseline: Baseline,
    /// Of a page that holds "marker" at its start; the third one after it is not there.
    pub(super) address: u64,
}

impl Dumped {
    pub(super) fn new(keep: impl Fn(u64, u64) -> bool) -> Self {
        Self::with(keep, false)
    }

    pub(super) fn with(keep: impl Fn(u64, u64) -> bool, ghost: bool) -> Self {
        let actor = Actor::asleep(
            "m = mmap.mmap(-1, 16 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:6] = b'marker'; m[4096] = 0\n\
             open('at', 'w').write(str(ctypes.addressof(ctypes.c_char.from_buffer(m))) + '\\n')",
        );
        let address = fs::read_to_string(actor.path("at"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        let images = tempfile::tempdir().unwrap();
        let ghost = ghost.then_some(address + 3 * PAGE);
        let keep = |page| keep(page, address);
        dump(actor.pid(), images.path(), keep, ghost);
        let mut baseline = baseline(&[actor.pid()], registers);
        baseline.set_images(std::sync::Arc::new(ImageDir::new(images.path())));
        Self {
            actor,
            images,
            baseline,
            address,
        }
    }

    fn judge(&self, registers: Registers<'_>, settings: &Settings) -> Verdict {
        self.judge_with((registers, &no_marks), settings)
    }

    pub(super) fn judge_with(
        &self,
        of_kernel: (Registers<'_>, Marks<'_>),
        settings: &Settings,
    ) -> Verdict {
        let now = Snapshot::take(&[self.actor.pid()], of_kernel.0).unwrap();
        let mut facts = self.actor.facts();
        facts.memory_reached = true;
        self.baseline.verdict(&now, &facts, of_kernel, settings)
    }

    pub(super) fn poke(&self, address: u64, bytes: &[u8]) {
        let path = format!("/proc/{}/mem", self.actor.pid());
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(bytes, address).unwrap();
    }

    fn differs_at(&self) -> u64 {
        let why = reasons(&self.judge(&registers, &comparing()));
        let [What::MemoryReached, What::Memory(place)] = &why[..] else {
            panic!("{why:?}");
        };
        u64::from_str_radix(place.strip_prefix("page 0x").unwrap(), 16).unwrap()
    }
}

#[test]
fn who_equals_its_image_is_acquitted_though_its_memory_was_reached() {
    let dumped = Dumped::new(|_, _| true);
    assert_eq!(
        acquittals(&dumped.judge(&registers, &comparing())),
        [Acquittal::Equal]
    );
    let off = Settings {
        compare_memory: false,
        ..comparing()
    };
    assert_eq!(
        reasons(&dumped.judge(&registers, &off)),
        [What::MemoryReached]
    );
}

#[test]
fn one_byte_written_by_another_process_is_found() {
    let dumped = Dumped::new(|_, _| true);
    // Without a doubt nobody looks: the process has not run. This is what the doubt is for.
    dumped.poke(dumped.address + 5, b"!");
    let verdict = dumped.actor.judge(&dumped.baseline, &dumped.actor.facts());
    assert_eq!(acquittals(&verdict), [Acquittal::NotRun]);
    assert_eq!(dumped.differs_at(), dumped.address);
    dumped.poke(dumped.address + 5, b"r");
    assert_eq!(
        acquittals(&dumped.judge(&registers, &comparing())),
        [Acquittal::Equal]
    );
    // A page that was untouched, or zeros, when the image was made.
    for page in [1, 7] {
        let address = dumped.address + page * PAGE;
        dumped.poke(address + 4095, b"!");
        assert_eq!(dumped.differs_at(), address);
        dumped.poke(address + 4095, b"\0");
        assert_eq!(
            acquittals(&dumped.judge(&registers, &comparing())),
            [Acquittal::Equal]
        );
    }
}

#[test]
fn a_page_that_the_image_lacks_is_found() {
    let dumped = Dumped::new(|page, address| page != address);
    assert_eq!(dumped.differs_at(), dumped.address);
}

#[test]
fn registers_must_be_known_and_equal() {
    let dumped = Dumped::new(|_, _| true);
    let other = |tid| registers(tid).map(|value| value + 1);
    let why = reasons(&dumped.judge(&other, &comparing()));
    assert!(
        matches!(&why[..], [_, What::Memory(place)] if place.contains("registers")),
        "{why:?}"
    );
    let why = reasons(&dumped.judge(&no_registers, &comparing()));
    assert!(matches!(&why[..], [_, What::NotCompared(_)]), "{why:?}");
    let mut blind = baseline(&[dumped.actor.pid()], no_registers);
    blind.set_images(std::sync::Arc::new(ImageDir::new(dumped.images.path())));
    let mut facts = dumped.actor.facts();
    facts.memory_reached = true;
    let verdict = blind.verdict(
        &dumped.actor.snapshot(),
        &facts,
        (&no_registers, &no_marks),
        &comparing(),
    );
    assert!(matches!(&reasons(&verdict)[..], [_, What::NotCompared(_)]));
    // Also those that change between the look and the end of the comparison.
    let calls = std::cell::Cell::new(0);
    let moving = |tid| {
        calls.set(calls.get() + 1);
        registers(tid).map(|value| value + u64::from(calls.get() > 1))
    };
    let why = reasons(&dumped.judge(&moving, &comparing()));
    assert!(
        matches!(&why[..], [_, What::NotCompared(why)] if why.contains("ran")),
        "{why:?}"
    );
}

#[test]
fn too_much_memory_is_not_compared() {
    let dumped = Dumped::new(|_, _| true);
    let little = Settings {
        compared_bytes: 8192,
        ..comparing()
    };
    let why = reasons(&dumped.judge(&registers, &little));
    assert!(
        matches!(&why[..], [_, What::NotCompared(why)] if why.contains("bytes")),
        "{why:?}"
    );
    let empty = Dumped::new(|_, _| false);
    let none = Settings {
        compared_bytes: 0,
        ..comparing()
    };
    let why = reasons(&empty.judge(&registers, &none));
    assert!(
        matches!(&why[..], [_, What::NotCompared(why)] if why.contains("not in the image")),
        "{why:?}"
    );
}

#[test]
fn a_damaged_or_missing_image_acquits_nobody() {
    let dumped = Dumped::new(|_, _| true);
    let pages = dumped.images.path().join("pages-9.img");
    let length = fs::metadata(&pages).unwrap().len();
    fs::File::options()
        .write(true)
        .open(&pages)
        .unwrap()
        .set_len(length - 1)
        .unwrap();
    let why = reasons(&dumped.judge(&registers, &comparing()));
    assert!(
        matches!(&why[..], [_, What::NotCompared(why)] if why.contains("short")),
        "{why:?}"
    );
    fs::remove_file(
        dumped
            .images
            .path()
            .join(format!("pagemap-{}.img", dumped.actor.pid())),
    )
    .unwrap();
    let why = reasons(&dumped.judge(&registers, &comparing()));
    assert!(matches!(&why[..], [_, What::NotCompared(_)]), "{why:?}");
}

#[test]
fn shared_memory_and_other_mappings_are_not_equal() {
    let dumped = Dumped::new(|_, _| true);
    let mut now = Snapshot::take(&[dumped.actor.pid()], &registers).unwrap();
    let mut facts = dumped.actor.facts();
    facts.memory_reached = true;
    now.processes[0].maps.shares_memory = true;
    let verdict = dumped
        .baseline
        .verdict(&now, &facts, (&registers, &no_marks), &comparing());
    assert!(
        matches!(&reasons(&verdict)[..], [_, What::NotCompared(why)] if why.contains("shared"))
    );
    now.processes[0].maps.digest = [0; 32];
    let verdict = dumped
        .baseline
        .verdict(&now, &facts, (&registers, &no_marks), &comparing());
    assert!(matches!(&reasons(&verdict)[..], [_, What::Memory(what)] if what == "mappings"));
}

/// After a thaw system calls start again with other registers; they are P's if the memory is.
#[test]
fn settling_takes_new_registers_only_with_the_memory_of_the_image() {
    let later = |tid| registers(tid).map(|value| value + 1);
    for changed in [false, true] {
        let mut dumped = Dumped::new(|_, _| true);
        if changed {
            dumped.poke(dumped.address, b"M");
        }
        let now = Snapshot::take(&[dumped.actor.pid()], &later).unwrap();
        let settled =
            dumped
                .baseline
                .settle(now, &dumped.actor.facts(), &no_marks, &comparing(), None);
        assert_eq!(settled, Settled::Yes);
        if changed {
            dumped.poke(dumped.address, b"m");
        }
        assert_eq!(dumped.judge(&later, &comparing()).is_unchanged(), !changed);
        assert_eq!(
            dumped.judge(&registers, &comparing()).is_unchanged(),
            changed
        );
    }
}

/// Somebody holds a file that writes the memory: what settles is then compared with the image.
#[test]
fn whose_memory_was_reached_settles_with_that_of_the_image() {
    let later = |tid| registers(tid).map(|value| value + 1);
    let settle = |dumped: &mut Dumped, settings: &Settings| {
        let now = Snapshot::take(&[dumped.actor.pid()], &later).unwrap();
        let mut facts = dumped.actor.facts();
        facts.memory_reached = true;
        dumped
            .baseline
            .settle(now, &facts, &no_marks, settings, None)
    };
    let mut dumped = Dumped::new(|_, _| true);
    let off = Settings {
        compare_memory: false,
        ..comparing()
    };
    let Settled::No(why) = settle(&mut dumped, &off) else {
        panic!("settled without a comparison");
    };
    assert!(matches!(why[0].what, What::MemoryReached), "{why:?}");
    assert_eq!(settle(&mut dumped, &comparing()), Settled::Yes);
    assert!(dumped.judge(&later, &comparing()).is_unchanged());

    let mut dumped = Dumped::new(|_, _| true);
    dumped.poke(dumped.address, b"M");
    let Settled::No(why) = settle(&mut dumped, &comparing()) else {
        panic!("settled with other memory");
    };
    let [reached, differs] = &why[..] else {
        panic!("{why:?}");
    };
    assert_eq!(reached.what, What::MemoryReached);
    assert!(matches!(differs.what, What::Memory(_)), "{why:?}");
    assert!(!dumped.judge(&later, &comparing()).is_unchanged());
}
