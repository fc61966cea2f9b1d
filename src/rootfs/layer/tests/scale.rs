//! Cost in proportion to the candidates; memory in proportion to the names.

use std::time::{Duration, Instant};

use super::*;

const DIRS: usize = 500;
const FILES: usize = 99;

fn large() -> Bed {
    let bed = Bed::new(tempfile::tempdir_in("/dev/shm").unwrap());
    for d in 0..DIRS {
        fs::create_dir(bed.at(format!("dir-{d}"))).unwrap();
        for f in 0..FILES {
            fs::write(bed.at(format!("dir-{d}/file-{f}")), format!("{d} {f}")).unwrap();
        }
    }
    bed
}

fn best<T>(mut act: impl FnMut() -> T) -> (Duration, T) {
    let once = |act: &mut dyn FnMut() -> T| {
        let start = Instant::now();
        let done = act();
        (start.elapsed(), done)
    };
    let all: Vec<_> = (0..15).map(|_| once(&mut act)).collect();
    all.into_iter().min_by_key(|(time, _)| *time).unwrap()
}

#[test]
fn a_change_in_a_large_layer_costs_no_more_than_in_a_small_one() {
    let bed = large();
    let start = Instant::now();
    let mut layer = bed.read();
    let read = start.elapsed();
    let names = DIRS * (6 + 2 + FILES * 7);
    let per_entry = (layer.memory() - names) / layer.entries();
    assert!(
        per_entry <= 100,
        "{per_entry} bytes for each entry, names not counted"
    );

    fs::write(bed.at("dir-77/file-7"), "changed").unwrap();
    fs::write(bed.at("dir-78/new"), "new").unwrap();
    let file = bed.named(["dir-77/file-7"]);
    let both = bed.named(["dir-77/file-7", "dir-78", "dir-78/new"]);
    let temporary = [file[0], bed.named(["../beside"])[0]];
    let look = |c: &[Candidate], scope| best(|| bed.compare(&layer, c, scope));
    let (one, comparison) = look(&file, Scope::Candidates);
    assert_eq!(
        words(&comparison.changes),
        [("dir-77/file-7".into(), "content")]
    );
    assert_eq!(comparison.bytes_read, 0);
    let (three, comparison) = look(&both, Scope::Candidates);
    assert_eq!(comparison.len(), 2);
    let (search, _) = look(&temporary, Scope::Search);
    let start = Instant::now();
    bed.compare(&layer, &[], Scope::Everything);
    let everything = start.elapsed();
    let start = Instant::now();
    layer.apply(comparison).unwrap();
    let applied = start.elapsed();
    eprintln!(
        "{} entries, {per_entry} B each and names: read {read:?}; compare 1 file {one:?}, 1 file \
         and 1 directory {three:?}, with a search {search:?}, everything {everything:?}; apply \
         {applied:?}",
        layer.entries()
    );
    // Far from what is measured (tens of µs), and far from what a walk takes.
    assert!(
        one < Duration::from_millis(1) && one * 20 < everything,
        "{one:?}"
    );
}

/// A sandbox that makes and removes names for ever does not make the index grow.
#[test]
fn names_that_are_gone_take_no_memory() {
    let bed = Bed::new(tempfile::tempdir_in("/dev/shm").unwrap());
    let mut layer = bed.read();
    let long = "n".repeat(200);
    let mut sizes = Vec::new();
    for turn in 0..40 {
        for n in 0..100 {
            let _ = fs::remove_file(bed.at(format!("{long}{}-{n}", turn - 1)));
            fs::write(bed.at(format!("{long}{turn}-{n}")), "").unwrap();
        }
        let comparison = bed.compare(&layer, &bed.named([""]), Scope::Candidates);
        assert_eq!(comparison.len(), if turn == 0 { 100 } else { 200 });
        apply(&bed, &mut layer, comparison);
        sizes.push(layer.memory());
    }
    let (early, late) = (sizes[9..20].iter().max(), sizes[20..].iter().max());
    assert!(late <= early, "{sizes:?}");
}
