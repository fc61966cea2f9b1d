//! Dumps that build upon each other, and what is kept of them.

use super::{fixture::noise, *};
use crate::page_map::testing::page_map;

const PAGE: u64 = 4096;
const BASE: u64 = 0x10_0000;

/// A page that says which it is.
fn page(number: u64, version: u8) -> Vec<u8> {
    let mut page = noise(number, PAGE as usize);
    page[0] = version;
    page
}

/// The images of a dump: runs of pages by number, how many, and their version if they are in it.
fn dump(dir: &Path, file: u32, runs: &[(u64, u64, Option<u8>)]) {
    let map: Vec<_> = runs
        .iter()
        .map(|(first, count, version)| (BASE + first * PAGE, *count, version.is_some()))
        .collect();
    fs::write(dir.join("pagemap-1.img"), page_map(file, &map)).unwrap();
    let here = runs.iter().filter_map(|run| Some((run.0, run.1, run.2?)));
    let pages: Vec<u8> = here
        .flat_map(|(first, count, version)| (first..first + count).map(move |n| page(n, version)))
        .flatten()
        .collect();
    fs::write(dir.join(format!("pages-{file}.img")), pages).unwrap();
    fs::write(dir.join("inventory.img"), format!("dump {file}")).unwrap();
    fs::write(dir.join("core-1.img"), "registers").unwrap();
}

/// A dump that builds upon another, as CRIU leaves it.
fn delta(pending: &Pending, file: u32, runs: &[(u64, u64, Option<u8>)]) {
    let link = pending.parent_path().unwrap();
    symlink(link, pending.image_dir().join("parent")).unwrap();
    dump(pending.image_dir(), file, runs);
}

fn pages(of: &Checkpoint, file: u32) -> Vec<u8> {
    let name = format!("pages-{file}.img");
    let mut file = of.image_file(&name).unwrap().unwrap();
    let mut bytes = vec![0; file.size() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn expected(versions: &[(u64, u64, u8)]) -> Vec<u8> {
    let pages = versions
        .iter()
        .flat_map(|(first, count, version)| (*first..first + count).map(|n| page(n, *version)));
    pages.flatten().collect()
}

fn commit(pending: Pending) -> Result<(Checkpoint, Staging), StoreError> {
    pending.commit(facts(), Images::Staged, Files::None)
}

#[test]
fn what_is_kept_of_a_dump_upon_others_is_whole() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    dump(pending.image_dir(), 4, &[(0, 300, Some(1))]);
    let (first, staging) = commit(pending).unwrap();
    staging.leave_as_parent().unwrap();
    drop(staging);

    let mut pending = writer.begin(TurnNo(2)).unwrap();
    pending.build_upon(&first);
    let upon = |pending: &Pending| {
        let dir = pending.image_dir().join(pending.parent_path().unwrap());
        let inventory = fs::read_to_string(dir.join("inventory.img")).unwrap();
        let pages = dir.join(format!("pages-{}.img", &inventory[5..]));
        (inventory, fs::metadata(pages).unwrap().len())
    };
    assert_eq!(upon(&pending), ("dump 4".into(), 300 * PAGE));
    let pre_dump = pending.add_pre_dump().unwrap();
    dump(
        &pre_dump,
        2,
        &[(0, 10, None), (10, 20, Some(2)), (30, 270, None)],
    );
    assert_eq!(upon(&pending), ("dump 2".into(), 20 * PAGE));
    // Of what the pre-dump has, some was written again; and some that it has not.
    delta(
        &pending,
        3,
        &[
            (0, 5, None),
            (5, 2, Some(3)),
            (7, 13, None),
            (20, 1, Some(3)),
            (21, 279, None),
        ],
    );
    let (second, staging) = commit(pending).unwrap();
    let whole = expected(&[
        (0, 5, 1),
        (5, 2, 3),
        (7, 3, 1),
        (10, 10, 2),
        (20, 1, 3),
        (21, 9, 2),
        (30, 270, 1),
    ]);
    assert!(pages(&second, 3) == whole);
    let kept: Vec<_> = second
        .manifest
        .contents
        .image
        .iter()
        .map(|f| &*f.path)
        .collect();
    assert_eq!(
        kept,
        [
            "core-1.img",
            "inventory.img",
            "pagemap-1.img",
            "pages-3.img"
        ]
    );
    assert!(second.stored < 40 * PAGE, "{}", second.stored);
    staging.leave_as_parent().unwrap();
    drop(staging);

    // And the next one builds upon what was made whole.
    let mut pending = writer.begin(TurnNo(3)).unwrap();
    pending.build_upon(&second);
    assert_eq!(upon(&pending), ("dump 3".into(), 300 * PAGE));
    delta(&pending, 9, &[(0, 299, None), (299, 1, Some(4))]);
    let (third, _) = commit(pending).unwrap();
    let then = whole.len() - PAGE as usize;
    assert!(pages(&third, 9) == [&whole[..then], &page(299, 4)].concat());
    assert_eq!(writer.verify(TurnNo(3)).unwrap(), []);
}

#[test]
fn a_page_that_is_nowhere_is_an_error_and_no_checkpoint() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    dump(pending.image_dir(), 1, &[(0, 5, Some(1))]);
    let (first, staging) = commit(pending).unwrap();
    staging.leave_as_parent().unwrap();
    drop(staging);
    let refused = |file, runs: &[(u64, u64, Option<u8>)]| {
        let mut pending = writer.begin(TurnNo(2)).unwrap();
        pending.build_upon(&first);
        delta(&pending, file, runs);
        commit(pending).map(drop).unwrap_err().to_string()
    };
    let error = refused(2, &[(0, 6, None)]);
    assert!(error.contains("0x105000"), "{error}");
    let mut pending = writer.begin(TurnNo(2)).unwrap();
    pending.build_upon(&first);
    delta(&pending, 2, &[(0, 5, None)]);
    // Nothing is thought to be in the dump before, if it was not built upon.
    pending.build_upon_nothing();
    commit(pending).map(drop).unwrap_err();
    assert_eq!(writer.turns().unwrap(), [TurnNo(1)]);
}
