//! One change at a time, on a layer that has one of everything.

use std::os::unix::fs::lchown;

use super::{fixture::*, *};

type Case = (
    &'static str,
    fn(&Bed),
    &'static [(&'static str, &'static str)],
);

const CASES: &[Case] = &[
    ("nothing", |_| {}, &[]),
    ("a directory's mtime", |b| set_mtime(&b.at("dir"), 2), &[]),
    ("made and unmade", made_and_unmade, &[]),
    (
        "the same bytes",
        |b| fs::write(b.at("file"), "file").unwrap(),
        &[("file", "content")],
    ),
    (
        "other bytes, the same times",
        |b| store(b, "file", 0),
        &[("file", "content")],
    ),
    (
        "appended",
        |b| fs::write(b.at("file"), "longer").unwrap(),
        &[("file", "content")],
    ),
    (
        "zeros into a hole",
        |b| write(b, "sparse", &[0; 4096], 5 << 20),
        &[],
    ),
    (
        "a hole's end",
        |b| write(b, "sparse", b"x", (8 << 20) - 1),
        &[("sparse", "content")],
    ),
    ("longer by a hole", longer, &[("sparse", "content")]),
    (
        "touched",
        |b| set_mtime(&b.at("none"), 2),
        &[("none", "content")],
    ),
    (
        "through a link",
        |b| store(b, "link", 0),
        &[("dir/link", "content"), ("link", "content")],
    ),
    (
        "mode",
        |b| chmod(b, "file", 0o4755),
        &[("file", "attributes")],
    ),
    (
        "a directory's mode",
        |b| chmod(b, "dir", 0o1777),
        &[("dir", "attributes")],
    ),
    (
        "the root's mode",
        |b| chmod(b, "", 0o700),
        &[(".", "attributes")],
    ),
    (
        "owner",
        |b| lchown(b.at("symlink"), Some(7), None).unwrap(),
        &[("symlink", "attributes")],
    ),
    (
        "group",
        |b| lchown(b.at("empty"), None, Some(7)).unwrap(),
        &[("empty", "attributes")],
    ),
    (
        "an ACL",
        |b| xattr(&b.at("none"), "system.posix_acl_access", ACL),
        &[("none", "attributes")],
    ),
    ("a default ACL", default_acl, &[("empty", "attributes")]),
    (
        "capabilities",
        |b| xattr(&b.at("file"), "security.capability", CAPABILITY),
        &[("file", "attributes")],
    ),
    ("overlay's books", books, &[]),
    (
        "opaque",
        |b| xattr(&b.at("dir"), "trusted.overlay.opaque", b"y"),
        &[("dir", "attributes")],
    ),
    (
        "redirect",
        |b| xattr(&b.at("dir"), "trusted.overlay.redirect", b"/x"),
        &[("dir", "attributes")],
    ),
    (
        "metacopy",
        |b| xattr(&b.at("file"), "trusted.overlay.metacopy", b""),
        &[("file", "attributes")],
    ),
    ("no longer opaque", not_opaque, &[("other", "attributes")]),
    (
        "a fifo's mtime",
        |b| set_mtime(&b.at("fifo"), 2),
        &[("fifo", "attributes")],
    ),
    (
        "a link's mtime",
        |b| set_mtime(&b.at("symlink"), 2),
        &[("symlink", "attributes")],
    ),
    ("a socket bound anew", socket, &[]),
    ("another target", target, &[("symlink", "content")]),
    ("another device", device, &[("char", "attributes")]),
    ("a whiteout made anew", whiteout, &[]),
    ("a whiteout's attributes", |b| chmod(b, "white", 0o777), &[]),
    (
        "deleted below",
        |b| replace_by_whiteout(b, "file"),
        &[("file", "kind")],
    ),
    (
        "a file over a whiteout",
        file_over_whiteout,
        &[("white", "kind")],
    ),
    (
        "added",
        |b| fs::write(b.at("dir/new"), "").unwrap(),
        &[("dir/new", "added")],
    ),
    (
        "added with all below",
        added,
        &[
            ("empty/x", "added"),
            ("empty/x/y", "added"),
            ("empty/x/y/z", "added"),
        ],
    ),
    (
        "removed",
        |b| fs::remove_file(b.at("dir/file")).unwrap(),
        &[("dir/file", "removed")],
    ),
    (
        "removed with all below",
        |b| fs::remove_dir_all(b.at("dir/sub")).unwrap(),
        &[
            ("dir/sub", "removed"),
            ("dir/sub/deep", "removed"),
            ("dir/sub/deep/two", "removed"),
            ("dir/sub/one", "removed"),
        ],
    ),
    (
        "a directory moved",
        |b| fs::rename(b.at("dir/sub/deep"), b.at("moved")).unwrap(),
        &[
            ("dir/sub/deep", "removed"),
            ("dir/sub/deep/two", "removed"),
            ("moved", "added"),
            ("moved/two", "added"),
        ],
    ),
    ("a directory made anew", anew, &[]),
    (
        "a directory made a file",
        dir_to_file,
        &[
            ("dir/sub", "kind"),
            ("dir/sub/deep", "removed"),
            ("dir/sub/deep/two", "removed"),
            ("dir/sub/one", "removed"),
        ],
    ),
    (
        "a directory made a symlink",
        dir_to_symlink,
        &[
            ("dir/sub", "kind"),
            ("dir/sub/deep", "removed"),
            ("dir/sub/deep/two", "removed"),
            ("dir/sub/one", "removed"),
        ],
    ),
    (
        "a file made a directory",
        file_to_dir,
        &[("file", "kind"), ("file/x", "added")],
    ),
    ("an equal file renamed over", equal, &[]),
    (
        "two became links",
        |b| link_over(b, "link", "twin"),
        &[("twin", "links"), ("link", "links"), ("dir/link", "links")],
    ),
    (
        "a link became a file",
        unlinked,
        &[("link", "links"), ("dir/link", "links")],
    ),
    (
        "one link more",
        |b| fs::hard_link(b.at("link"), b.at("empty/link")).unwrap(),
        &[("empty/link", "added")],
    ),
    (
        "one link less",
        |b| fs::remove_file(b.at("dir/link")).unwrap(),
        &[("dir/link", "removed")],
    ),
];

#[test]
fn each_change_is_seen_and_nothing_else() {
    if !root() {
        return;
    }
    for (what, change, expected) in CASES {
        let bed = everything();
        let mut layer = bed.read();
        let then = Snapshot::of(&bed.upper());
        change(&bed);
        let now = Snapshot::of(&bed.upper());
        let candidates: Vec<_> = then.inodes().union(&now.inodes()).copied().collect();
        let mut expected: Vec<_> = expected
            .iter()
            .map(|(p, w)| (PathBuf::from(p), *w))
            .collect();
        expected.sort();
        let sorted = |c: &Comparison| {
            let mut words = words(&c.changes);
            words.sort();
            words
        };
        let comparison = bed.compare(&layer, &candidates, Scope::Candidates);
        assert_eq!(sorted(&comparison), expected, "{what}");
        assert_eq!(comparison.is_empty(), expected.is_empty());
        let whole = bed.compare(&layer, &[], Scope::Everything);
        assert_eq!(sorted(&whole), expected, "{what}, everything");
        apply(&bed, &mut layer, comparison);
        let again = bed.compare(&layer, &candidates, Scope::Candidates);
        assert_eq!(sorted(&again), [], "{what}, again");
    }
}
