//! What a commit costs. Measurements, not tests:
//! `cargo test --release --lib -- --ignored --nocapture store::tests::cost`

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use super::{fixture::*, *};

/// CPU time of this thread.
fn cpu() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel fills the structure that it is handed.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(done, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Runs, and says what it took.
fn measure<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let (begin, before) = (Instant::now(), cpu());
    let done = run();
    let (all, used) = (begin.elapsed(), cpu() - before);
    println!("{what}: {all:.1?}, CPU {used:.1?}");
    done
}

#[test]
#[ignore = "a measurement"]
fn ten_small_files_in_a_small_and_a_large_layer() {
    for count in [1_000, 100_000] {
        let bed = bed();
        let writer = bed.writer();
        let pending = writer.begin(TurnNo(1)).unwrap();
        let upper = pending.upper_dir();
        for n in 0..count {
            let dir = upper.join(format!("d{}/e{}", n / 5000, n / 50));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(format!("f{n}")), format!("number {n}")).unwrap();
        }
        let whole = || commit(pending, Part::Whole);
        let mut base = measure(&format!("whole, {count} files"), whole);
        for turn in 2..32 {
            let pending = writer.begin(TurnNo(turn)).unwrap();
            let mut changed = Vec::new();
            for k in 0..10 {
                let n = (turn * 7919 + k * 613) % count;
                let path: PathBuf = format!("d{}/e{}/f{n}", n / 5000, n / 50).into();
                let full = pending.upper_dir().join(&path);
                fs::create_dir_all(full.parent().unwrap()).unwrap();
                fs::write(full, format!("turn {turn} number {n}")).unwrap();
                changed.push((path, rustix::fs::FileType::RegularFile));
            }
            changed.sort_by(|(a, _), (b, _)| a.cmp(b));
            let changes = LayerChanges {
                removed: Vec::new(),
                changed,
            };
            let part = Part::Changes {
                base: &base,
                changes: &changes,
            };
            let what = format!("ten files of {count}, turn {turn}");
            base = measure(&what, || commit(pending, part));
            println!("    {} bytes", base.stored);
            measure("    retain", || {
                writer.retain(&Retention::newest(10)).unwrap()
            });
        }
        measure("verify", || {
            assert_eq!(writer.verify(TurnNo(31)).unwrap(), [])
        });
    }
}

#[test]
#[ignore = "a measurement"]
fn a_hundred_megabytes_of_memory_of_which_a_hundredth_changes() {
    let bed = bed();
    let writer = bed.writer();
    let mut pages = noise(1, 100 << 20);
    for turn in 1..4 {
        let pending = writer.begin(TurnNo(turn)).unwrap();
        for page in (0..25_600).filter(|page| page % 100 == turn as usize) {
            pages[page * 4096..][..8].copy_from_slice(&noise(turn * 77, 8));
        }
        fs::write(pending.image_dir().join("pages-1.img"), &pages).unwrap();
        let parts = (facts(), Images::Staged, Files::None);
        let made = measure("100 MiB of pages", || {
            pending.commit(parts.0, parts.1, parts.2).unwrap().0
        });
        println!("    {} bytes", made.stored);
        let laid = measure("lay out", || {
            made.lay_out_all(&writer.scratch_dir()).unwrap()
        });
        drop(laid);
    }
}
