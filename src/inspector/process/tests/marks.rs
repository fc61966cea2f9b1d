//! (b) by the kernel's marks of written pages. Where it has none (no soft-dirty), it says that nothing was
//! written, and is believed: that, too, shows what is compared.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    compare::{Dumped, comparing, registers},
    *,
};
use crate::{inspector::process::image::PAGE, memory};

/// So little that an image is not compared as a whole.
fn little() -> Settings {
    Settings {
        compared_bytes: 128 * PAGE,
        ..comparing()
    }
}

/// All of an actor is in an image, and its marks are those since then.
fn dumped(ghost: bool) -> Dumped {
    let dumped = Dumped::with(|_, _| true, ghost);
    let marks = format!("/proc/{}/clear_refs", dumped.actor.pid());
    fs::write(marks, "4").unwrap();
    dumped
}

fn judge(dumped: &Dumped, settings: &Settings) -> Verdict {
    dumped.judge_with((&registers, &|| true), settings)
}

/// Where the one page that differs is.
fn differs_at(verdict: &Verdict) -> u64 {
    let why = reasons(verdict);
    let [What::MemoryReached, What::Memory(place)] = &why[..] else {
        panic!("{why:?}");
    };
    u64::from_str_radix(place.strip_prefix("page 0x").unwrap(), 16).unwrap()
}

/// Images of which it is counted how much is read.
#[derive(Debug)]
struct Counted(ImageDir, Arc<AtomicU64>);

struct CountedFile(Box<dyn ImageFile>, Arc<AtomicU64>);

impl Images for Counted {
    fn open(&self, name: &str) -> std::io::Result<Box<dyn ImageFile>> {
        let file = self.0.open(name)?;
        Ok(match name.starts_with("pages-") {
            true => Box::new(CountedFile(file, Arc::clone(&self.1))),
            false => file,
        })
    }
}

impl ImageFile for CountedFile {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        self.1.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.0.read_exact_at(buffer, at)
    }
}

#[test]
fn verdicts_are_the_same_by_marks_and_less_is_read() {
    let mut dumped = dumped(false);
    let read = Arc::new(AtomicU64::new(0));
    let images = ImageDir::new(dumped.images.path());
    let counted = Counted(images, Arc::clone(&read));
    dumped.baseline.set_images(Arc::new(counted));
    let of = |marks: Marks<'_>| {
        let verdict = dumped.judge_with((&registers, marks), &comparing());
        (verdict, read.swap(0, Ordering::Relaxed))
    };
    let all = fs::metadata(dumped.images.path().join("pages-9.img")).unwrap();
    for byte in [b"r", b"R"] {
        dumped.poke(dumped.address + 5, byte);
        let (by_all, read_of_all) = of(&no_marks);
        let (by_marks, read_of_marked) = of(&|| true);
        if byte == b"r" {
            assert!(by_all.is_unchanged() && read_of_all == all.len());
        } else {
            assert!(!by_all.is_unchanged());
        }
        if byte == b"r" || memory::is_tracked() {
            assert_eq!(by_marks, by_all);
        }
        // What was poked, and nothing where there are no marks.
        let most = u64::from(memory::is_tracked()) * PAGE;
        assert_eq!(read_of_marked, most);
        println!("{} of {} bytes", read_of_marked, read_of_all);
    }
}

#[test]
fn what_was_not_written_to_is_not_compared() {
    let dumped = dumped(false);
    let why = reasons(&dumped.judge_with((&registers, &no_marks), &little()));
    assert!(matches!(&why[..], [_, What::NotCompared(why)] if why.contains("bytes")));
    let verdict = judge(&dumped, &little());
    assert_eq!(acquittals(&verdict), [Acquittal::Equal]);
}

#[test]
fn what_the_kernel_marks_is_compared() {
    let dumped = dumped(false);
    for (page, was) in [(0, b"r"), (1, b"\0"), (7, b"\0")] {
        let address = dumped.address + page * PAGE;
        dumped.poke(address + 5, b"!");
        // A page that is in no image is always compared.
        match memory::is_tracked() || page > 0 {
            true => assert_eq!(differs_at(&judge(&dumped, &little())), address),
            false => assert!(judge(&dumped, &little()).is_unchanged()),
        }
        dumped.poke(address + 5, was);
        assert!(judge(&dumped, &little()).is_unchanged(), "{page}");
    }
}

#[test]
fn a_page_that_is_gone_is_compared() {
    let dumped = dumped(true);
    let at = differs_at(&judge(&dumped, &little()));
    assert_eq!(at, dumped.address + 3 * PAGE);
}

#[test]
fn marks_that_are_cleared_while_they_are_read_are_of_no_use() {
    let dumped = dumped(false);
    dumped.poke(dumped.address, b"M");
    let marks = format!("/proc/{}/clear_refs", dumped.actor.pid());
    fs::write(marks, "4").unwrap();
    assert!(
        judge(&dumped, &comparing()).is_unchanged(),
        "nobody said so"
    );
    let asked = Cell::new(0);
    let first_alone = || asked.replace(asked.get() + 1) == 0;
    let verdict = dumped.judge_with((&registers, &first_alone), &comparing());
    assert_eq!(differs_at(&verdict), dumped.address);
}
