//! Random operations, whose candidates are noted as the kernel would name them: the inode acted
//! upon, and the directories in which a name came or went.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, OpenOptions},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use proptest::{collection::vec, prelude::*};
use rustix::fs::{AtFlags, CWD, FileType, Mode, RenameFlags, Timespec, Timestamps, XattrFlags};

use super::{delta::Replica, *};

const NAMES: [&[u8]; 4] = [b"a", b"b", b"new\nline", b"\xff\x01"];

/// One to three names, each out of four.
type Route = Vec<usize>;

#[derive(Debug, Clone)]
enum Op {
    Write(Route, usize, u8, bool),
    /// Other bytes, equal size, equal mtime: what a store through a mapping looks like.
    Store(Route, u8),
    Touch(Route, i64),
    Chmod(Route, u32),
    Chown(Route, u32),
    Xattr(Route, usize, u8),
    NoXattr(Route, usize),
    Mkdir(Route),
    Symlink(Route, usize),
    Fifo(Route),
    Device(Route, u64),
    Whiteout(Route),
    /// A link of one whiteout, as overlay makes them.
    SharedWhiteout(Route),
    Link(Route, Route),
    /// In place of a file that is there.
    LinkOver(Route, Route),
    Rename(Route, Route),
    Exchange(Route, Route),
    Remove(Route),
    /// Replaced by a file equal in everything.
    Twin(Route),
}

const XATTRS: [&str; 5] = [
    "user.a",
    "trusted.overlay.opaque",
    "trusted.overlay.origin",
    "trusted.overlay.redirect",
    "trusted.b",
];

fn op() -> impl Strategy<Value = Op> {
    // Mostly near the root, where operations meet.
    let at = || prop_oneof![3 => vec(0..2_usize, 1), 2 => vec(0..NAMES.len(), 1..=2), 1 => vec(0..NAMES.len(), 1..=3)];
    let write = (at(), 0..3_usize, 0..3_u8, any::<bool>());
    prop_oneof![
        4 => write.prop_map(|(p, n, b, t)| Op::Write(p, n, b, t)),
        2 => (at(), 0..3_u8).prop_map(|(p, b)| Op::Store(p, b)),
        1 => (at(), 0..3_i64).prop_map(|(p, t)| Op::Touch(p, t)),
        1 => (at(), 0..2_u32).prop_map(|(p, m)| Op::Chmod(p, m)),
        1 => (at(), 0..2_u32).prop_map(|(p, m)| Op::Chown(p, m)),
        1 => (at(), 0..XATTRS.len(), 0..2_u8).prop_map(|(p, x, v)| Op::Xattr(p, x, v)),
        1 => (at(), 0..XATTRS.len()).prop_map(|(p, x)| Op::NoXattr(p, x)),
        6 => at().prop_map(Op::Mkdir),
        1 => (at(), 0..3_usize).prop_map(|(p, t)| Op::Symlink(p, t)),
        1 => at().prop_map(Op::Fifo),
        1 => (at(), 1..3_u64).prop_map(|(p, d)| Op::Device(p, d)),
        1 => at().prop_map(Op::Whiteout),
        2 => at().prop_map(Op::SharedWhiteout),
        3 => (at(), at()).prop_map(|(a, b)| Op::Link(a, b)),
        4 => (at(), at()).prop_map(|(a, b)| Op::LinkOver(a, b)),
        3 => (at(), at()).prop_map(|(a, b)| Op::Rename(a, b)),
        1 => (at(), at()).prop_map(|(a, b)| Op::Exchange(a, b)),
        3 => at().prop_map(Op::Remove),
        2 => at().prop_map(Op::Twin),
    ]
}

/// Does operations, and keeps what the kernel would have named.
struct Doer<'b> {
    bed: &'b Bed,
    touched: BTreeSet<Candidate>,
}

impl Doer<'_> {
    /// Symbolic links on the way followed, so that the directory named is the one acted in.
    fn path(&self, route: &Route) -> PathBuf {
        let mut path = self.bed.upper();
        path.extend(route.iter().map(|i| OsStr::from_bytes(NAMES[*i])));
        match path.parent().unwrap().canonicalize() {
            Ok(above) => above.join(path.file_name().unwrap()),
            Err(_) => path,
        }
    }

    fn touch(&mut self, path: &Path) {
        if let Ok(meta) = fs::symlink_metadata(path) {
            self.touched.insert(Candidate {
                dev: meta.dev(),
                ino: meta.ino(),
            });
        }
    }

    fn touch_tree(&mut self, path: &Path) {
        self.touch(path);
        let is_dir = fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
        for entry in is_dir
            .then(|| fs::read_dir(path).unwrap())
            .into_iter()
            .flatten()
        {
            self.touch_tree(&entry.unwrap().path());
        }
    }

    /// Notes paths before and after.
    fn around(&mut self, paths: &[&Path], act: impl FnOnce() -> std::io::Result<()>) {
        paths.iter().for_each(|p| self.touch(p));
        // What cannot be done is not done.
        let _ = act();
        paths.iter().for_each(|p| self.touch(p));
    }

    fn name(&mut self, path: &Path, act: impl FnOnce() -> std::io::Result<()>) {
        self.around(&[path, path.parent().unwrap()], act);
    }

    fn names(&mut self, a: &Path, b: &Path, act: impl FnOnce() -> std::io::Result<()>) {
        let (above_a, above_b) = (a.parent().unwrap(), b.parent().unwrap());
        self.around(&[a, b, above_a, above_b], act);
    }

    fn act(&mut self, op: &Op) {
        match op {
            Op::Write(p, len, byte, old) => {
                let path = self.path(p);
                self.name(&path, || {
                    if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_file()) {
                        return Ok(());
                    }
                    fs::write(&path, vec![*byte; *len])?;
                    if *old {
                        mtime(&path, (i64::from(*byte), 7))
                    } else {
                        Ok(())
                    }
                });
            }
            Op::Store(p, byte) => {
                let path = self.path(p);
                self.around(&[&path], || store(&path, *byte));
            }
            Op::Touch(p, time) => {
                let path = self.path(p);
                self.around(&[&path], || mtime(&path, (*time, 7)));
            }
            Op::Chmod(p, mode) => {
                let path = self.path(p);
                self.around(&[&path], || match path.is_symlink() {
                    true => Ok(()),
                    false => fs::set_permissions(&path, PermissionsExt::from_mode(0o750 + mode)),
                });
            }
            Op::Chown(p, id) => {
                let path = self.path(p);
                self.around(&[&path], || lchown(&path, Some(*id), Some(*id)));
            }
            Op::Xattr(p, which, value) => {
                let path = self.path(p);
                self.around(&[&path], || {
                    let flags = XattrFlags::empty();
                    Ok(rustix::fs::lsetxattr(
                        &path,
                        XATTRS[*which],
                        &[*value],
                        flags,
                    )?)
                });
            }
            Op::NoXattr(p, which) => {
                let path = self.path(p);
                self.around(&[&path], || {
                    Ok(rustix::fs::lremovexattr(&path, XATTRS[*which])?)
                });
            }
            Op::Mkdir(p) => {
                let path = self.path(p);
                self.name(&path, || fs::create_dir(&path));
            }
            Op::Symlink(p, target) => {
                let path = self.path(p);
                self.name(&path, || {
                    symlink(OsStr::from_bytes(NAMES[*target]), &path)?;
                    mtime(&path, (1, 7))
                });
            }
            Op::Fifo(p) => self.node(p, FileType::Fifo, 0),
            Op::Device(p, dev) => self.node(p, FileType::CharacterDevice, *dev),
            Op::Whiteout(p) => self.node(p, FileType::CharacterDevice, 0),
            Op::SharedWhiteout(p) => {
                let (path, shared) = (self.path(p), self.bed.beside().join("whiteout"));
                let kind = FileType::CharacterDevice;
                let _ = rustix::fs::mknodat(CWD, &shared, kind, Mode::empty(), 0);
                self.name(&path, || fs::hard_link(&shared, &path));
            }
            Op::Link(a, b) => {
                let (a, b) = (self.path(a), self.path(b));
                self.name(&b, || fs::hard_link(&a, &b));
            }
            Op::LinkOver(a, b) => {
                let (a, b) = (self.path(a), self.path(b));
                self.name(&b, || {
                    if fs::symlink_metadata(&a)?.is_file() && a != b {
                        let _ = fs::remove_file(&b);
                    }
                    fs::hard_link(&a, &b)
                });
            }
            Op::Rename(a, b) => {
                let (a, b) = (self.path(a), self.path(b));
                self.names(&a, &b, || fs::rename(&a, &b));
            }
            Op::Exchange(a, b) => {
                let (a, b) = (self.path(a), self.path(b));
                let flags = RenameFlags::EXCHANGE;
                self.names(&a, &b, || {
                    Ok(rustix::fs::renameat_with(CWD, &a, CWD, &b, flags)?)
                });
            }
            Op::Remove(p) => {
                let path = self.path(p);
                self.touch_tree(&path);
                self.name(&path, || {
                    crate::tree::remove_tree(&path).map_err(std::io::Error::other)
                });
            }
            Op::Twin(p) => {
                let (path, twin) = (self.path(p), self.bed.beside().join("twin"));
                self.name(&path, || twin_of(&path, &twin));
            }
        }
    }

    fn node(&mut self, p: &Route, kind: FileType, dev: u64) {
        let path = self.path(p);
        self.name(&path, || {
            rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR, dev)?;
            mtime(&path, (1, 7))
        });
    }
}

fn mtime(path: &Path, (tv_sec, tv_nsec): (i64, i64)) -> std::io::Result<()> {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(rustix::fs::utimensat(
        CWD,
        path,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn store(path: &Path, byte: u8) -> std::io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_file() {
        return Ok(());
    }
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&vec![byte; meta.len() as usize], 0)?;
    mtime(path, (meta.mtime(), meta.mtime_nsec()))
}

fn twin_of(path: &Path, twin: &Path) -> std::io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_file() {
        return Ok(());
    }
    fs::copy(path, twin)?;
    lchown(twin, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(twin, meta.permissions())?;
    for name in XATTRS {
        let mut value = [0; 8];
        if let Ok(n) = rustix::fs::lgetxattr(path, name, &mut value[..]) {
            rustix::fs::lsetxattr(twin, name, &value[..n], XattrFlags::empty())?;
        }
    }
    mtime(twin, (meta.mtime(), meta.mtime_nsec()))?;
    fs::rename(twin, path)
}

/// Several turns. Every way to look has to say what the snapshots say, and to lead to the index
/// that a new reading gives; what is captured of the changes, to the layer as it is.
fn turns(dir: tempfile::TempDir, first: &[Op], turns: &[Vec<Op>]) {
    let bed = Bed::new(dir);
    let mut doer = Doer {
        bed: &bed,
        touched: BTreeSet::new(),
    };
    first.iter().for_each(|op| doer.act(op));
    let (mut layer, replica) = (bed.read(), Replica::of(&bed));
    let mut then = Snapshot::of(&bed.upper());
    for ops in turns {
        doer.touched.clear();
        ops.iter().for_each(|op| doer.act(op));
        let now = Snapshot::of(&bed.upper());
        let expected = then.differences(&now);
        let exact: Vec<Candidate> = doer.touched.iter().copied().collect();
        let mut more: Vec<Candidate> = then.inodes().into_iter().chain(now.inodes()).collect();
        more.extend(exact.iter().rev());
        more.push(Candidate { dev: 1, ino: 2 });

        let narrow = bed.compare(&layer, &exact, Scope::Candidates);
        assert_eq!(words(&narrow.changes), expected, "exact candidates");
        replica.follow(&bed, &narrow);
        for (candidates, scope) in [
            (&exact, Scope::Search),
            (&more, Scope::Candidates),
            (&more, Scope::Search),
            (&Vec::new(), Scope::Everything),
        ] {
            let wide = bed.compare(&layer, candidates, scope);
            assert_eq!(words(&wide.changes), expected, "{scope:?}");
            apply(&bed, &mut layer.clone(), wide);
        }
        apply(&bed, &mut layer, narrow);
        then = now;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn every_way_to_look_says_what_a_full_comparison_says(
        first in vec(op(), 0..50),
        later in vec(vec(op(), 0..8), 1..5),
    ) {
        if root() {
            turns(on_disk(), &first, &later);
        }
    }

    #[test]
    fn the_same_in_a_tmpfs(
        first in vec(op(), 0..50),
        later in vec(vec(op(), 0..8), 1..5),
    ) {
        if root() {
            turns(tempfile::tempdir_in("/dev/shm").unwrap(), &first, &later);
        }
    }
}
