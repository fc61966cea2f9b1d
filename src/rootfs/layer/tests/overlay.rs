//! A layer as the kernel's overlay makes it.

use std::os::unix::fs::PermissionsExt;

use nix::mount::{MsFlags, mount, umount};

use super::*;
use crate::rootfs::tests::with_own_mounts;

type Step = (
    &'static str,
    fn(&Path),
    &'static [(&'static str, &'static str)],
);

/// What is done in the merged view, and what then differs in the layer.
const STEPS: &[Step] = &[
    ("read", |m| drop(fs::read(m.join("lower/a"))), &[]),
    (
        "copied up by a change of mode",
        |m| fs::set_permissions(m.join("lower/a"), PermissionsExt::from_mode(0o600)).unwrap(),
        &[("lower", "added"), ("lower/a", "added")],
    ),
    (
        "hidden",
        |m| fs::remove_file(m.join("lower/b")).unwrap(),
        &[("lower/b", "added")],
    ),
    (
        "made and unmade where one is hidden",
        |m| {
            fs::write(m.join("lower/b"), "").unwrap();
            fs::remove_file(m.join("lower/b")).unwrap();
        },
        &[],
    ),
    (
        "another one hidden, by a link of the same whiteout",
        |m| fs::remove_file(m.join("lower/c")).unwrap(),
        &[("lower/c", "added")],
    ),
    (
        "a directory made anew over the lower one",
        |m| {
            fs::remove_dir_all(m.join("tree")).unwrap();
            fs::create_dir(m.join("tree")).unwrap();
        },
        &[("tree", "added")],
    ),
    (
        "and once more",
        |m| {
            fs::remove_dir(m.join("tree")).unwrap();
            fs::create_dir(m.join("tree")).unwrap();
        },
        &[],
    ),
    (
        "no longer hidden",
        |m| fs::create_dir(m.join("lower/c")).unwrap(),
        &[("lower/c", "kind")],
    ),
];

#[test]
fn overlay_s_own_ways_are_understood() {
    if !root() {
        return;
    }
    with_own_mounts(|| {
        let bed = Bed::new(tempfile::tempdir_in("/dev/shm").unwrap());
        let (lower, merged) = (bed.beside().join("lower"), bed.beside().join("merged"));
        for dir in ["lower", "tree/x"] {
            fs::create_dir_all(lower.join(dir)).unwrap();
        }
        for file in ["lower/a", "lower/b", "lower/c", "tree/x/y"] {
            fs::write(lower.join(file), file).unwrap();
        }
        fs::create_dir(&merged).unwrap();
        fs::create_dir(bed.beside().join("work")).unwrap();
        let data = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            bed.upper().display(),
            bed.beside().join("work").display()
        );
        let overlay = Some("overlay");
        mount(overlay, &merged, overlay, MsFlags::empty(), Some(&*data)).unwrap();
        let mut layer = bed.read();
        for (what, step, expected) in STEPS {
            let then = Snapshot::of(&bed.upper());
            step(&merged);
            let now = Snapshot::of(&bed.upper());
            let candidates: Vec<_> = then.inodes().union(&now.inodes()).copied().collect();
            let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
            let expected: Vec<_> = expected
                .iter()
                .map(|(p, w)| (PathBuf::from(p), *w))
                .collect();
            assert_eq!(words(&comparison.changes), expected, "{what}");
            assert_eq!(then.differences(&now), expected, "{what}");
            apply(&bed, &mut layer, comparison);
        }
        umount(&merged).unwrap();
    });
}
