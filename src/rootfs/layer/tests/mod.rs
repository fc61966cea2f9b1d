//! Verdicts are compared with those of a snapshot of the test's own, which shares no code with the
//! index: whole contents, all attributes, by `std::fs`.

mod cases;
mod contract;
mod delta;
mod fingerprint;
mod fixture;
mod overlay;
mod random;
mod scale;
mod snapshot;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use self::snapshot::Snapshot;
use super::{facts::Facts, index::Id, *};

fn never() -> bool {
    false
}

/// Whether a test that needs root can run.
fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// Somewhere on the file system of the build, which is no tmpfs as a rule.
fn on_disk() -> tempfile::TempDir {
    let exe = std::env::current_exe().unwrap();
    tempfile::tempdir_in(exe.parent().unwrap()).unwrap()
}

/// A layer with its upper directory and a directory beside it.
struct Bed {
    dir: tempfile::TempDir,
}

impl Bed {
    fn new(dir: tempfile::TempDir) -> Self {
        fs::create_dir(dir.path().join("upper")).unwrap();
        fs::create_dir(dir.path().join("beside")).unwrap();
        Self { dir }
    }

    fn upper(&self) -> PathBuf {
        self.dir.path().join("upper")
    }

    fn beside(&self) -> PathBuf {
        self.dir.path().join("beside")
    }

    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.upper().join(path)
    }

    fn read(&self) -> Layer {
        Layer::read(&self.upper(), &never).unwrap()
    }

    fn compare(&self, layer: &Layer, candidates: &[Candidate], scope: Scope) -> Comparison {
        layer
            .compare(&self.upper(), candidates, scope, &never)
            .unwrap()
    }

    /// The candidates of these names as they are now.
    fn named<P: AsRef<Path>>(&self, paths: impl IntoIterator<Item = P>) -> Vec<Candidate> {
        paths
            .into_iter()
            .map(|path| {
                let meta = fs::symlink_metadata(self.at(path)).unwrap();
                Candidate {
                    dev: meta.dev(),
                    ino: meta.ino(),
                }
            })
            .collect()
    }
}

/// Path and kind of each change.
fn words(changes: &[Change]) -> Vec<(PathBuf, &'static str)> {
    let words = changes.iter().map(|c| (c.path.clone(), c.what.word()));
    words.collect()
}

/// What an index says, without how it says it. Looks at every inner list on the way.
fn told(layer: &Layer) -> BTreeMap<PathBuf, Facts> {
    let all: BTreeMap<_, _> = layer
        .below(Id::ROOT)
        .map(|id| (layer.path(id), layer.facts(id)))
        .collect();
    assert_eq!(all.len(), layer.entries());
    let mut ids: Vec<_> = layer.ids().collect();
    assert_eq!(ids.len(), layer.entries());
    for id in &ids {
        assert!(layer.named(layer.ino(*id)).contains(id), "{id:?}");
    }
    let inodes: std::collections::BTreeSet<_> = ids.iter().map(|id| layer.ino(*id)).collect();
    let mut named: Vec<Id> = inodes
        .iter()
        .flat_map(|ino| layer.named(*ino))
        .copied()
        .collect();
    ids.sort_unstable();
    named.sort_unstable();
    assert_eq!(ids, named);
    all
}

/// Applies a comparison and proves that the index is that of the layer as it is now.
fn apply(bed: &Bed, layer: &mut Layer, comparison: Comparison) {
    layer.apply(comparison).unwrap();
    // What a capture would tell.
    let now = bed.read();
    let content = |id| Some(((now.dev(), now.ino(id)), now.content(id)?));
    layer.learn(&now.ids().filter_map(content).collect());
    assert_eq!(told(layer), told(&bed.read()));
}
