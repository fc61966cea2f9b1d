use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::tree::{self, TreeError, remove_tree};

fn tmp() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn never() -> bool {
    false
}

/// Makes `depth` directories, one in the other, and returns the innermost.
fn make_deep(root: &Path, depth: usize) -> OwnedFd {
    fs::create_dir(root).unwrap();
    let mut dir = tree::open_root(root).unwrap();
    for _ in 0..depth {
        rustix::fs::mkdirat(&dir, c"deep", Mode::RWXU).unwrap();
        dir = tree::open_dir(&tree::look_at(dir.as_fd(), c"deep").unwrap()).unwrap();
    }
    dir
}

#[test]
fn few_descriptors_are_open_in_a_deep_tree() {
    /// Descriptors that lead below the first.
    struct Count(PathBuf, usize);
    impl tree::Visitor for Count {
        fn enter(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
            Ok(())
        }
        fn other(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
            let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
            self.1 = fds
                .filter_map(|fd| fs::read_link(fd.path()).ok())
                .filter(|target| target.starts_with(&self.0))
                .count();
            Ok(())
        }
        fn leave(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
            Ok(())
        }
    }
    let dir = tmp();
    let upper = dir.path().canonicalize().unwrap().join("upper");
    // Short enough for the kernel to tell where the descriptors lead.
    let bottom = make_deep(&upper, 700);
    let write = OFlags::WRONLY | OFlags::CREATE;
    rustix::fs::openat(&bottom, c"file", write, Mode::RWXU).unwrap();
    drop(bottom);
    let mut count = Count(upper.clone(), 0);
    let root = tree::open_root(&upper).unwrap();
    tree::walk(root, &upper, tree::Expect::Unchanged, &never, &mut count).unwrap();
    assert!((1..100).contains(&count.1), "{}", count.1);
}

#[test]
fn removing_a_tree_removes_links_and_not_what_they_lead_to() {
    let dir = tmp();
    let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("keep"), "").unwrap();
    symlink(&outside, tree.join("a/b/link")).unwrap();
    symlink(&outside, dir.path().join("itself")).unwrap();
    remove_tree(&tree).unwrap();
    remove_tree(&dir.path().join("itself")).unwrap();
    assert!(outside.join("keep").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_directory_with_more_names_than_are_listed_at_once_is_removed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tmp());
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    for n in 0..66_000 {
        File::create(full.join(n.to_string())).unwrap();
    }
    remove_tree(&full).unwrap();
    assert!(!full.exists());
}

#[test]
fn what_is_too_deep_to_capture_can_still_be_removed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tmp());
    let upper = dir.path().join("upper");
    drop(make_deep(&upper, 16 << 10));
    let root = tree::open_root(&upper).unwrap();
    let expect = tree::Expect::Unchanged;
    let deep = tree::walk(root, &upper, expect, &never, &mut Nothing).unwrap_err();
    assert!(matches!(deep, TreeError::Limit { .. }), "{deep}");
    remove_tree(&upper).unwrap();
}

struct Nothing;

impl tree::Visitor for Nothing {
    fn enter(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
    fn other(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
    fn leave(&mut self, _: &tree::Found<'_>) -> Result<(), TreeError> {
        Ok(())
    }
}

#[test]
fn errors_show_paths_escaped_and_shortened() {
    let path = PathBuf::from("/a\u{1b}[31m\n").join("x".repeat(3000));
    let shown = tree::failed("open", &path)(Errno::NOENT).to_string();
    assert!(
        shown.len() < 700 && shown.contains("\\u{1b}[31m\\n"),
        "{shown}"
    );
}
