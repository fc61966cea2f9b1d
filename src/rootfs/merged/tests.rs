//! A plan, done to trees in memory, makes them equal.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use proptest::prelude::*;

use super::{Depth, Kind, Links, MergedError, Node, Plan, Step, View, plan};
use crate::{content::Content, digest::Digest};

const LIMIT: usize = 10_000;
/// The names that trees are made of: few, so that they meet.
const NAMES: [&str; 4] = ["a", "b", "a-b", "c"];

/// A tree: each name with the number of its inode.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Forest {
    names: BTreeMap<PathBuf, u64>,
    inodes: HashMap<u64, (Node, u8)>,
    next: u64,
}

impl Forest {
    fn new() -> Self {
        let mut forest = Self::default();
        forest.put("", dir(0o755), 0);
        forest
    }

    fn put(&mut self, path: impl AsRef<Path>, node: Node, byte: u8) {
        self.next += 1;
        self.names.insert(path.as_ref().to_owned(), self.next);
        self.inodes.insert(self.next, (node, byte));
    }

    fn names_of(&self, ino: u64) -> BTreeSet<&PathBuf> {
        let same = self.names.iter().filter(|(_, its)| **its == ino);
        same.map(|(path, _)| path).collect()
    }

    /// What of it is part of a state: of each name what is there, its bytes, and the names of the same inode.
    fn state(&self) -> BTreeMap<&PathBuf, (Node, u8, BTreeSet<&PathBuf>)> {
        let state = self.names.iter().map(|(path, ino)| {
            let (node, byte) = &self.inodes[ino];
            let mut node = node.clone();
            if node.is_dir() {
                node.mtime = (0, 0);
            }
            (path, (node, *byte, self.names_of(*ino)))
        });
        state.collect()
    }

    fn children(&self, dir: &Path) -> BTreeSet<PathBuf> {
        let all = self.names.keys().filter(|path| path.parent() == Some(dir));
        all.cloned().collect()
    }

    /// Does what a plan says, as strictly as a kernel would.
    fn apply(&mut self, plan: &Plan, wanted: &Self) {
        let byte = |path: &PathBuf| wanted.inodes[&wanted.names[path]].1;
        for step in &plan.steps {
            if let Some(above) = step.path().parent() {
                assert!(self.inodes[&self.names[above]].0.is_dir(), "{step:?}");
            }
            match step {
                Step::Remove { path, is_dir } => {
                    assert_eq!(self.inodes[&self.names[path]].0.is_dir(), *is_dir);
                    assert_eq!(
                        self.children(path),
                        BTreeSet::new(),
                        "{path:?} is not empty"
                    );
                    self.names.remove(path);
                }
                Step::Make { path, node } => {
                    assert!(!self.names.contains_key(path), "{step:?}");
                    let node = Node {
                        links: Links::One,
                        ..node.clone()
                    };
                    self.put(path, node, byte(path));
                }
                Step::Rewrite { path, node } => {
                    let ino = self.names[path];
                    assert_eq!(self.names_of(ino).len(), 1, "{step:?}");
                    self.inodes.insert(ino, (node.clone(), byte(path)));
                }
                Step::Attributes { path, node } => {
                    self.inodes.insert(self.names[path], (node.clone(), 0));
                }
                Step::Link { path, to } => {
                    assert!(!self.names.contains_key(path), "{step:?}");
                    self.names.insert(path.clone(), self.names[to]);
                }
            }
        }
    }
}

/// One of the two, as a view.
struct Seen<'f> {
    forest: &'f Forest,
    /// Its links as a store tells them, or a kernel.
    is_stored: bool,
}

impl View for Seen<'_> {
    fn at(&mut self, path: &Path) -> Result<Option<Node>, MergedError> {
        let Some(ino) = self.forest.names.get(path) else {
            return Ok(None);
        };
        let mut node = self.forest.inodes[ino].0.clone();
        let names = self.forest.names_of(*ino);
        node.links = match (names.len(), self.is_stored) {
            (1, _) => Links::One,
            (_, true) => Links::Named(Digest::of(names.first().unwrap().as_os_str().as_bytes())),
            (names, false) => Links::Inode {
                dev: 1,
                ino: *ino,
                names: names as u64,
            },
        };
        Ok(Some(node))
    }

    fn names(&mut self, dir: &Path) -> Result<BTreeSet<OsString>, MergedError> {
        let children = self.forest.children(dir);
        let names = children.iter().filter_map(|path| path.file_name());
        Ok(names.map(ToOwned::to_owned).collect())
    }

    fn content(&mut self, file: &Path) -> Result<Content, MergedError> {
        let byte = self.forest.inodes[&self.forest.names[file]].1;
        Ok(Content {
            size: 1,
            data: 1,
            root: Digest::of(&[byte]),
        })
    }
}

fn node(kind: Kind, mode: u16) -> Node {
    Node {
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: (1, 1),
        xattrs: Vec::new(),
        links: Links::One,
    }
}

fn dir(mode: u16) -> Node {
    node(Kind::Dir, mode)
}

fn file() -> Node {
    node(Kind::File(1), 0o644)
}

/// What the names that differ are, told as a comparison of two layers does: with all names of an inode whose names
/// differ.
fn differing(a: &Forest, b: &Forest) -> BTreeMap<PathBuf, Depth> {
    let (a_state, b_state) = (a.state(), b.state());
    let all: BTreeSet<&PathBuf> = a_state.keys().chain(b_state.keys()).copied().collect();
    let differ = all
        .into_iter()
        .filter(|path| a_state.get(*path) != b_state.get(*path));
    differ.map(|path| (path.clone(), Depth::Itself)).collect()
}

fn planned(
    wanted: &Forest,
    now: &Forest,
    paths: &BTreeMap<PathBuf, Depth>,
) -> Result<Plan, MergedError> {
    let mut wanted = Seen {
        forest: wanted,
        is_stored: true,
    };
    let mut now = Seen {
        forest: now,
        is_stored: false,
    };
    plan(&mut wanted, &mut now, paths, LIMIT)
}

/// One change of a tree.
#[derive(Debug, Clone)]
enum Edit {
    Put(PathBuf, bool, u16, u8),
    Remove(PathBuf),
    Link(PathBuf, PathBuf),
}

fn any_path() -> impl Strategy<Value = PathBuf> {
    prop::collection::vec(prop::sample::select(&NAMES[..]), 1..4)
        .prop_map(|names| names.iter().collect())
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        4 => (any_path(), any::<bool>(), prop::sample::select(&[0o600, 0o755][..]), 0..3u8)
            .prop_map(|(path, is_dir, mode, byte)| Edit::Put(path, is_dir, mode, byte)),
        2 => any_path().prop_map(Edit::Remove),
        2 => (any_path(), any_path()).prop_map(|(path, to)| Edit::Link(path, to)),
    ]
}

impl Forest {
    /// Does it if a kernel would.
    fn edit(&mut self, edit: &Edit) {
        let is_dir = |its: &Self, path: &Path| {
            let ino = its.names.get(path);
            ino.is_some_and(|ino| its.inodes[ino].0.is_dir())
        };
        let fits = |its: &Self, path: &Path| path.parent().is_some_and(|above| is_dir(its, above));
        match edit {
            Edit::Remove(path) => self.names.retain(|name, _| !name.starts_with(path)),
            Edit::Put(path, as_dir, mode, byte) if fits(self, path) => {
                let kind = match as_dir {
                    true => Kind::Dir,
                    false => Kind::File(1),
                };
                let byte = if *as_dir { 0 } else { *byte };
                match self.names.get(path).copied() {
                    // In place, under all its names.
                    Some(ino) if self.inodes[&ino].0.kind == kind => {
                        self.inodes.insert(ino, (node(kind, *mode), byte));
                    }
                    _ => {
                        self.names.retain(|name, _| !name.starts_with(path));
                        self.put(path, node(kind, *mode), byte);
                    }
                }
            }
            Edit::Link(path, to) if fits(self, path) && !self.names.contains_key(path) => {
                if let Some(ino) = self.names.get(to).filter(|_| !is_dir(self, to)) {
                    self.names.insert(path.clone(), *ino);
                }
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_tree_becomes_equal_or_stays_untouched(
        first in prop::collection::vec(edit(), 0..24),
        then in prop::collection::vec(edit(), 0..12),
        deep in any::<bool>(),
    ) {
        let mut wanted = Forest::new();
        first.iter().for_each(|edit| wanted.edit(edit));
        let mut now = wanted.clone();
        then.iter().for_each(|edit| now.edit(edit));
        let mut paths = differing(&wanted, &now);
        if deep {
            paths.insert(PathBuf::new(), Depth::Below);
        }
        match planned(&wanted, &now, &paths) {
            Ok(plan) => {
                now.apply(&plan, &wanted);
                prop_assert_eq!(now.state(), wanted.state());
            }
            Err(MergedError::Unproven { .. }) => {
                let links = wanted.inodes.keys().any(|ino| wanted.names_of(*ino).len() > 1);
                prop_assert!(links, "only links are left to others");
            }
            Err(e) => prop_assert!(false, "{}", e),
        }
    }
}

#[test]
fn what_is_equal_is_left_alone_and_a_file_stays_the_inode_that_it_is() {
    let mut wanted = Forest::new();
    wanted.put("d", dir(0o700), 0);
    wanted.put("d/same", file(), 1);
    wanted.put("d/other", file(), 2);
    let mut now = wanted.clone();
    now.put("d/new", file(), 3);
    let paths = [("d", Depth::Below)].map(|(path, depth)| (PathBuf::from(path), depth));
    let ino = now.names[Path::new("d/other")];
    now.inodes.insert(ino, (file(), 9));
    let plan = planned(&wanted, &now, &paths.into()).unwrap();
    let of = |path: &str| {
        plan.steps
            .iter()
            .filter(|step| step.path() == Path::new(path))
            .count()
    };
    assert_eq!(
        (of("d/same"), of("d/other"), of("d/new")),
        (0, 1, 1),
        "{plan:?}"
    );
    assert!(matches!(plan.steps[1], Step::Rewrite { .. }));
    assert_eq!(plan.times.len(), 1, "of the directory that has lost a name");
}

#[test]
fn a_link_of_a_name_that_has_not_changed_is_left_to_others() {
    let mut wanted = Forest::new();
    wanted.put("a", file(), 1);
    wanted.edit(&Edit::Link("b".into(), "a".into()));
    let mut now = wanted.clone();
    now.edit(&Edit::Remove("b".into()));
    let only = BTreeMap::from([(PathBuf::from("b"), Depth::Itself)]);
    let left = planned(&wanted, &now, &only).unwrap_err();
    assert!(matches!(left, MergedError::Unproven { .. }), "{left}");
    // With all its names it is put back.
    let plan = planned(&wanted, &now, &differing(&wanted, &now)).unwrap();
    now.apply(&plan, &wanted);
    assert_eq!(now.state(), wanted.state());
}

#[test]
fn too_much_is_left_to_others() {
    let (wanted, mut now) = (Forest::new(), Forest::new());
    for number in 0..20 {
        now.put(number.to_string(), file(), 0);
    }
    let all = BTreeMap::from([(PathBuf::new(), Depth::Below)]);
    let mut views = [&wanted, &now].map(|forest| Seen {
        forest,
        is_stored: false,
    });
    let [wanted, now] = &mut views;
    let refused = plan(wanted, now, &all, 10).unwrap_err();
    assert!(matches!(refused, MergedError::TooMuch { limit: 10, .. }));
}
