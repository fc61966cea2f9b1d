//! A layer that is written beside another shares the files that are equal, and no others.

use proptest::prelude::*;

use super::{
    fixture::*,
    trees::{op, run},
    *,
};

/// A checkpoint of what `fill` makes, and the layer, which stays.
fn made(bed: &Bed, fill: impl FnOnce(&Path)) -> (Laid, PathBuf) {
    let upper = bed.dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    fill(&upper);
    let writer = bed.writer();
    let mut pending = writer.begin(TurnNo(1)).unwrap();
    pending.capture(&upper, Part::Whole, &|| false).unwrap();
    let committed = pending.commit(facts(), Images::Staged, Files::Captured);
    let laid = committed.unwrap().0.lay_out(&writer.scratch_dir());
    (laid.unwrap(), upper)
}

/// Names in both that are one inode.
fn shared(a: &Path, b: &Path) -> Vec<String> {
    let inode = |path: PathBuf| fs::symlink_metadata(path).map(|meta| meta.ino()).ok();
    let names = look(a).into_keys().filter(|name| {
        let (one, other) = (inode(a.join(name)), inode(b.join(name)));
        one.is_some() && one == other
    });
    names.map(|name| escaped(&name)).collect()
}

type Change = fn(&Path);

fn same_mtime(path: &Path, change: impl FnOnce()) {
    let time = fs::metadata(path).unwrap().modified().unwrap();
    change();
    fs::File::options()
        .append(true)
        .open(path)
        .unwrap()
        .set_modified(time)
        .unwrap();
}

#[test]
fn what_differs_in_anything_is_written_anew() {
    let changes: &[(&str, Change)] = &[
        ("bytes", |f| same_mtime(f, || fs::write(f, "FILE").unwrap())),
        ("size", |f| same_mtime(f, || fs::write(f, "files").unwrap())),
        ("mtime", |f| fs::write(f, "file").unwrap()),
        ("mode", |f| {
            fs::set_permissions(f, fs::Permissions::from_mode(0o751)).unwrap()
        }),
        ("owner", |f| {
            std::os::unix::fs::chown(f, Some(7), None).unwrap()
        }),
        ("attributes", |f| set_xattr(f, "user.note", b"x")),
        ("links", |f| {
            fs::hard_link(f, f.with_file_name("another")).unwrap();
        }),
        ("kind", |f| {
            fs::remove_file(f).unwrap();
            symlink("other", f).unwrap();
        }),
        ("gone", |f| fs::remove_file(f).unwrap()),
        ("a directory above", |f| {
            let dir = f.parent().unwrap();
            fs::rename(dir, dir.with_file_name("elsewhere")).unwrap();
            symlink("elsewhere", dir).unwrap();
        }),
        ("a file above", |f| {
            let dir = f.parent().unwrap();
            fs::rename(dir, dir.with_file_name("elsewhere")).unwrap();
            fs::write(dir, "").unwrap();
        }),
    ];
    for (what, change) in changes {
        let bed = bed();
        let (laid, upper) = made(&bed, |upper| {
            fs::create_dir(upper.join("dir")).unwrap();
            fs::write(upper.join("dir/file"), "file").unwrap();
            fs::write(upper.join("other"), "file").unwrap();
        });
        let before = look(&upper);
        change(&upper.join("dir/file"));
        let back = bed.dir.path().join("back");
        laid.write_upper(&back, &upper).unwrap();
        assert_eq!(shared(&back, &upper), ["other"], "{what}");
        fs::remove_file(upper.join("other")).unwrap();
        assert_eq!(look(&back), before, "{what}");
    }
}

#[test]
fn names_of_one_inode_stay_so_and_others_do_not_become_so() {
    let bed = bed();
    let (laid, upper) = made(&bed, |upper| {
        fs::write(upper.join("one"), "x").unwrap();
        fs::hard_link(upper.join("one"), upper.join("two")).unwrap();
        fs::write(upper.join("three"), "y").unwrap();
        fs::copy(upper.join("three"), upper.join("four")).unwrap();
        let time = fs::metadata(upper.join("three"))
            .unwrap()
            .modified()
            .unwrap();
        let four = fs::File::options().append(true).open(upper.join("four"));
        four.unwrap().set_modified(time).unwrap();
    });
    let before = look(&upper);
    fs::remove_file(upper.join("four")).unwrap();
    fs::hard_link(upper.join("three"), upper.join("four")).unwrap();
    let back = bed.dir.path().join("back");
    laid.write_upper(&back, &upper).unwrap();
    assert_eq!(shared(&back, &upper), Vec::<String>::new());
    assert_eq!(look(&back), before);
}

#[test]
fn a_layer_with_one_of_everything_is_the_same_whatever_it_shares() {
    let bed = bed();
    let (laid, upper) = made(&bed, |upper| {
        zoo(upper);
        fs::remove_file(upper.join("sparse")).unwrap();
    });
    let before = look(&upper);
    let back = bed.dir.path().join("back");
    laid.write_upper(&back, &upper).unwrap();
    assert!(shared(&back, &upper).len() > 5);
    crate::tree::remove_tree(&upper).unwrap();
    assert_eq!(look(&back), before);
    // And without anything to share.
    crate::tree::remove_tree(&back).unwrap();
    laid.write_upper(&back, &upper).unwrap();
    assert_eq!(look(&back), before);
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        cases: ProptestConfig::default().cases.min(2000) / 4,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_comes_back_does_not_depend_on_what_is_there(
        first in proptest::collection::vec(op(), 0..40),
        then in proptest::collection::vec(op(), 0..25),
    ) {
        let bed = bed();
        let (laid, upper) = made(&bed, |upper| first.iter().for_each(|op| run(upper, op)));
        let before = look(&upper);
        then.iter().for_each(|op| run(&upper, op));
        let back = bed.dir.path().join("back");
        laid.write_upper(&back, &upper).unwrap();
        crate::tree::remove_tree(&upper).unwrap();
        prop_assert_eq!(look(&back), before);
    }
}
