//! Putting back, interrupted everywhere.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{from, tmp};
use crate::rootfs::{
    Overlay,
    put_back::{Layer, PutBackError, put_back},
};

/// A layer with the name of its state in it, and beside it a saved one.
fn states(dir: &Path) -> (Layer, PathBuf) {
    let (upper, saved) = (dir.join("active/fs"), dir.join("saved"));
    for (path, state) in [(&upper, "old"), (&saved, "new")] {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("state"), state).unwrap();
    }
    (Layer::new(&upper).unwrap(), saved)
}

#[test]
fn an_interruption_leaves_one_whole_layer_and_the_next_put_back_clears_up() {
    let state = |layer: &Layer| fs::read_to_string(layer.path.join("state")).unwrap();
    type Interrupt = fn(&Layer, &Path);
    let cases: &[(&str, Interrupt, &str)] = &[
        (
            "half built",
            |l, _| {
                fs::create_dir(&l.new).unwrap();
                fs::write(l.new.join("half"), "").unwrap();
            },
            "old",
        ),
        (
            "built",
            |l, saved| {
                l.build(&mut from(saved)).unwrap();
            },
            "old",
        ),
        (
            "exchanged",
            |l, saved| {
                l.build(&mut from(saved)).unwrap();
                assert!(l.exchange().unwrap());
            },
            "new",
        ),
        (
            "swapped",
            |l, saved| {
                l.build(&mut from(saved)).unwrap();
                l.swap().unwrap();
            },
            "new",
        ),
        (
            "moved away, without exchange",
            |l, saved| {
                l.build(&mut from(saved)).unwrap();
                fs::rename(&l.path, &l.old).unwrap();
            },
            "old",
        ),
    ];
    for (name, interrupt, after) in cases {
        let dir = tmp();
        let (layer, saved) = states(dir.path());
        interrupt(&layer, &saved);
        layer.recover().unwrap();
        assert_eq!(state(&layer), *after, "{name}");
        let left = fs::read_dir(dir.path().join("active")).unwrap().count();
        assert_eq!(left, 1, "{name}");
        layer.build(&mut from(&saved)).unwrap();
        layer.swap().unwrap();
        assert_eq!(state(&layer), "new", "{name}");
    }
}

fn unmounted(layer: &Layer) -> Overlay {
    Overlay {
        lowerdirs: vec!["/".into()],
        upperdir: layer.path.clone(),
        workdir: layer.path.with_file_name("work"),
        options: vec![],
        mountpoint: None,
    }
}

#[test]
fn a_layer_that_cannot_be_built_leaves_the_old_one() {
    let dir = tmp();
    let (layer, _) = states(dir.path());
    let overlay = unmounted(&layer);
    let error = put_back(&mut from(&dir.path().join("absent")), &overlay).unwrap_err();
    assert!(matches!(error, PutBackError::Build(_)), "{error}");
    assert_eq!(fs::read_to_string(layer.path.join("state")).unwrap(), "old");
}

#[test]
fn names_that_both_layers_share_are_gone_from_the_old_one_at_once() {
    let dir = tmp();
    let (layer, _) = states(dir.path());
    fs::create_dir(layer.path.join("sub")).unwrap();
    for name in ["sub/shared", "own"] {
        fs::write(layer.path.join(name), name).unwrap();
    }
    let overlay = unmounted(&layer);
    let mut build = |new: &Path, old: &Path| {
        fs::create_dir(new).unwrap();
        fs::hard_link(old.join("sub/shared"), new.join("shared")).map_err(|e| e.to_string())
    };
    let replaced = put_back(&mut build, &overlay).unwrap();
    let shared = layer.path.join("shared");
    assert_eq!(fs::read(&shared).unwrap(), b"sub/shared");
    assert_eq!(fs::metadata(&shared).unwrap().nlink(), 1);
    assert!(layer.old.join("own").exists(), "the rest can wait");
    replaced.remove_old().unwrap();
    let left = fs::read_dir(dir.path().join("active")).unwrap();
    assert_eq!(left.count(), 2);
}
