//! What a capture of changes alone stages, put upon a copy of the layer as it was, has to give the layer
//! as it is. Put there by code of the test's own, compared by its snapshots.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::{PermissionsExt, lchown, symlink},
};

use rustix::fs::XattrFlags;

use super::{fixture::*, *};
use crate::{
    rootfs::{LayerChanges, Prestaged, capture, capture_changes},
    tree::{TreeError, remove_tree},
};

/// A copy of a layer that follows it by captures of its changes.
pub(super) struct Replica {
    dir: PathBuf,
    staging: PathBuf,
}

impl Replica {
    pub(super) fn of(bed: &Bed) -> Self {
        let dir = bed.dir.path().join("replica");
        capture(&bed.upper(), &dir, &never).unwrap();
        Self {
            dir,
            staging: bed.dir.path().join("staging"),
        }
    }

    pub(super) fn follow(&self, bed: &Bed, comparison: &Comparison) -> LayerChanges {
        self.follow_with(bed, comparison, &mut Prestaged::default())
    }

    fn follow_with(
        &self,
        bed: &Bed,
        comparison: &Comparison,
        prestaged: &mut Prestaged,
    ) -> LayerChanges {
        let upper = bed.upper();
        let (changes, _) =
            capture_changes(&upper, &self.staging, comparison, prestaged, &never).unwrap();
        self.check(&changes, comparison);
        self.apply(&changes);
        assert_eq!(
            Snapshot::of(&self.dir).differences(&Snapshot::of(&upper)),
            [],
            "{changes:?}"
        );
        remove_tree(&self.staging).unwrap();
        changes
    }

    /// Nothing but what was said lies in the staging directory, below what leads there.
    fn check(&self, changes: &LayerChanges, comparison: &Comparison) {
        let sorted = |paths: &[PathBuf]| paths.is_sorted_by(|a, b| a.as_os_str() < b.as_os_str());
        assert!(sorted(&changes.removed) && sorted(&changes.staged));
        let mut expected = BTreeSet::from([PathBuf::new()]);
        for path in &changes.staged {
            expected.extend(path.ancestors().map(Path::to_owned));
        }
        assert_eq!(names(&self.staging), expected);
        let entries = comparison.changes.iter().filter(|c| c.now.is_some());
        let linked = comparison.linked.iter().map(|(path, _)| path);
        let own: BTreeSet<PathBuf> = entries.map(|c| &c.path).chain(linked).cloned().collect();
        let shown = |path: &PathBuf| match path.as_os_str().is_empty() {
            true => PathBuf::from("."),
            false => path.clone(),
        };
        assert_eq!(
            changes.staged.iter().map(shown).collect::<BTreeSet<_>>(),
            own
        );
    }

    fn apply(&self, changes: &LayerChanges) {
        for path in &changes.removed {
            let at = self.dir.join(path);
            assert!(fs::symlink_metadata(&at).is_ok(), "{path:?}");
            remove_tree(&at).unwrap();
        }
        let mut staged: Vec<_> = changes.staged.iter().collect();
        staged.sort_by_key(|path| path.components().count());
        for path in staged {
            let (from, to) = (self.staging.join(path), self.dir.join(path));
            let is_dir = |path: &Path| fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
            if !is_dir(&from) {
                remove_tree(&to).unwrap();
                fs::hard_link(&from, &to).unwrap();
                continue;
            }
            if !is_dir(&to) {
                remove_tree(&to).unwrap();
                fs::create_dir(&to).unwrap();
            }
            attributes(&from, &to);
        }
    }
}

fn attributes(from: &Path, to: &Path) {
    let meta = fs::metadata(from).unwrap();
    lchown(to, Some(meta.uid()), Some(meta.gid())).unwrap();
    fs::set_permissions(to, PermissionsExt::from_mode(meta.mode() & 0o7777)).unwrap();
    let (old, new) = (xattrs_of(to), xattrs_of(from));
    for name in old.keys() {
        rustix::fs::lremovexattr(to, name.as_slice()).unwrap();
    }
    for (name, value) in new {
        rustix::fs::lsetxattr(to, name.as_slice(), &value, XattrFlags::empty()).unwrap();
    }
}

fn xattrs_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let n = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..n].split(|b| *b == 0).filter(|n| !n.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 65536];
            let n = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..n].to_vec())
        })
        .collect()
}

fn names(root: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = root.join(&relative);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            let below = fs::read_dir(&path).unwrap();
            todo.extend(below.map(|entry| relative.join(entry.unwrap().file_name())));
        }
        all.insert(relative);
    }
    all
}

fn paths(all: &[&str]) -> Vec<PathBuf> {
    all.iter().map(PathBuf::from).collect()
}

/// Compares with what was there before `change`, with everything as a candidate.
fn changes_of(change: impl FnOnce(&Bed)) -> LayerChanges {
    let bed = everything();
    let (layer, replica) = (bed.read(), Replica::of(&bed));
    change(&bed);
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    replica.follow(&bed, &comparison)
}

#[test]
fn every_kind_of_change_is_staged_and_nothing_else() {
    if !root() {
        return;
    }
    type Act = fn(&Bed);
    let table: &[(&str, Act, &[&str], &[&str])] = &[
        ("nothing", |_| {}, &[], &[]),
        ("made and unmade", made_and_unmade, &[], &[]),
        (
            "a file",
            |b| write(b, "dir/sub/one", b"x", 0),
            &[],
            &["dir/sub/one"],
        ),
        (
            "attributes of a directory",
            |b| chmod(b, "dir/sub", 0o700),
            &[],
            &["dir/sub"],
        ),
        ("of the root", |b| chmod(b, "", 0o711), &[], &[""]),
        (
            "new directories",
            added,
            &[],
            &["empty/x", "empty/x/y", "empty/x/y/z"],
        ),
        (
            "a tree that went",
            |b| fs::remove_dir_all(b.at("dir/sub")).unwrap(),
            &["dir/sub"],
            &[],
        ),
        ("directory to file", dir_to_file, &[], &["dir/sub"]),
        (
            "directory to symbolic link",
            dir_to_symlink,
            &[],
            &["dir/sub"],
        ),
        ("file to directory", file_to_dir, &[], &["file", "file/x"]),
        ("another inode with equal names in it", anew, &[], &[]),
        ("an equal file", equal, &[], &[]),
        ("longer", longer, &[], &["sparse"]),
        (
            "bytes of a linked file",
            |b| write(b, "link", b"L", 0),
            &[],
            &["dir/link", "link"],
        ),
        (
            "one link of two went",
            |b| fs::remove_file(b.at("link")).unwrap(),
            &["link"],
            &["dir/link"],
        ),
        (
            "a third link",
            |b| fs::hard_link(b.at("link"), b.at("other/link")).unwrap(),
            &[],
            &["dir/link", "link", "other/link"],
        ),
        (
            "a link of what had none",
            |b| fs::hard_link(b.at("file"), b.at("dir/second")).unwrap(),
            &[],
            &["dir/second", "file"],
        ),
        (
            "linked to another",
            |b| link_over(b, "link", "twin"),
            &[],
            &["dir/link", "link", "twin"],
        ),
        ("linked no more", unlinked, &[], &["dir/link", "link"]),
        (
            "a link moved",
            |b| fs::rename(b.at("link"), b.at("new")).unwrap(),
            &["link"],
            &["dir/link", "new"],
        ),
        ("opaque no more", not_opaque, &[], &["other"]),
        (
            "a whiteout",
            |b| replace_by_whiteout(b, "file"),
            &[],
            &["file"],
        ),
        (
            "a whiteout of many",
            |b| fs::remove_file(b.at("white")).unwrap(),
            &["white"],
            &[],
        ),
        (
            "a file over a whiteout",
            file_over_whiteout,
            &[],
            &["white"],
        ),
        ("a device", device, &[], &["char"]),
    ];
    for (what, act, removed, staged) in table {
        let changes = changes_of(act);
        assert_eq!(changes.removed, paths(removed), "{what}");
        assert_eq!(changes.staged, paths(staged), "{what}");
    }
}

#[test]
fn what_is_no_longer_what_was_compared_is_an_error() {
    if !root() {
        return;
    }
    type Act = fn(&Bed);
    let meddle: [(&str, Act); 4] = [
        ("gone", |b| fs::remove_file(b.at("dir/sub/one")).unwrap()),
        ("a directory", |b| {
            fs::remove_file(b.at("dir/sub/one")).unwrap();
            fs::create_dir(b.at("dir/sub/one")).unwrap();
        }),
        ("a link", |b| {
            fs::remove_file(b.at("dir/sub/one")).unwrap();
            symlink("/etc/passwd", b.at("dir/sub/one")).unwrap();
        }),
        ("a link above", |b| {
            fs::rename(b.at("dir/sub"), b.beside().join("sub")).unwrap();
            symlink(b.beside().join("sub"), b.at("dir/sub")).unwrap();
        }),
    ];
    for (what, act) in meddle {
        let bed = everything();
        let layer = bed.read();
        write(&bed, "dir/sub/one", b"new", 0);
        let comparison = bed.compare(&layer, &[], Scope::Everything);
        act(&bed);
        let staging = bed.beside().join("staging");
        let mut none = Prestaged::default();
        let error = capture_changes(&bed.upper(), &staging, &comparison, &mut none, &never);
        assert!(
            matches!(error, Err(TreeError::Changed { .. })),
            "{what}: {error:?}"
        );
    }
}

const LARGE: usize = 5 << 20;

/// A layer in which a large file has changed, the comparison, and the copy made before the freeze.
fn prestaged(bed: &Bed) -> (Replica, Comparison, Prestaged) {
    fs::write(bed.at("dir/large"), vec![1; LARGE]).unwrap();
    let (layer, replica) = (bed.read(), Replica::of(bed));
    fs::write(bed.at("dir/large"), vec![2; LARGE]).unwrap();
    fs::hard_link(bed.at("dir/large"), bed.at("large")).unwrap();
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    let copies = Prestaged::copy(
        &bed.upper(),
        &replica.staging,
        &comparison,
        &|_| false,
        &never,
    )
    .unwrap();
    (replica, comparison, copies)
}

#[test]
fn a_large_file_is_copied_once_and_before_the_freeze() {
    if !root() {
        return;
    }
    let bed = Bed::new(on_disk());
    fs::create_dir(bed.at("dir")).unwrap();
    let (replica, comparison, mut copies) = prestaged(&bed);
    // Two names of it, one copy; small ones are left to the freeze.
    assert_eq!(copies.bytes(), LARGE as u64);
    replica.follow_with(&bed, &comparison, &mut copies);
    assert!(copies.is_empty());
    drop(copies);
    assert!(!bed.dir.path().join(".crab-large-staging").exists());
}

#[test]
fn a_copy_of_a_file_that_was_written_since_is_not_used() {
    if !root() {
        return;
    }
    // A store through a mapping leaves no trace but the bytes: the caller knows the inode.
    let bed = Bed::new(on_disk());
    fs::create_dir(bed.at("dir")).unwrap();
    let (replica, comparison, mut copies) = prestaged(&bed);
    let meta = fs::metadata(bed.at("large")).unwrap();
    let mtime = (meta.mtime(), meta.mtime_nsec());
    write(&bed, "large", b"!", 7);
    mtime_of(&bed.at("large"), mtime);
    copies.distrust(|inode| inode.ino == meta.ino());
    assert!(copies.is_empty());
    replica.follow_with(&bed, &comparison, &mut copies);

    // One that leaves a trace shows by itself.
    let bed = Bed::new(on_disk());
    fs::create_dir(bed.at("dir")).unwrap();
    let (replica, comparison, mut copies) = prestaged(&bed);
    write(&bed, "large", b"!", 7);
    replica.follow_with(&bed, &comparison, &mut copies);
}

#[test]
fn a_large_file_that_can_change_without_a_sign_is_left_to_the_freeze() {
    if !root() {
        return;
    }
    let bed = Bed::new(on_disk());
    let layer = bed.read();
    fs::write(bed.at("large"), vec![1; LARGE]).unwrap();
    let [mapped] = bed.named(["large"])[..] else {
        unreachable!()
    };
    let comparison = bed.compare(&layer, &[], Scope::Everything);
    let staging = bed.beside().join("staging");
    let copies = |is_written: &dyn Fn(Candidate) -> bool| {
        Prestaged::copy(&bed.upper(), &staging, &comparison, is_written, &never).unwrap()
    };
    assert!(!copies(&|_| false).is_empty());
    assert!(copies(&|inode| inode == mapped).is_empty());
}
