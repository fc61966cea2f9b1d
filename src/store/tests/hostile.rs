//! Layers that somebody changes while they are captured, or has made to be hard to capture.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};

use super::{fixture::*, *};
use crate::tree::{self, TreeError, remove_tree};

fn open_deep(root: &Path, depth: usize) -> OwnedFd {
    let mut dir = tree::open_root(root).unwrap();
    for _ in 0..depth {
        dir = tree::open_dir(&tree::look_at(dir.as_fd(), c"d").unwrap()).unwrap();
    }
    dir
}

#[test]
fn a_tree_deeper_than_any_path_is_captured_and_comes_back() {
    const DEPTH: usize = 5_000;
    let bed = bed();
    let writer = bed.writer();
    // In memory if possible: ext4 takes long to make and remove it.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let (upper, back) = (dir.path().join("upper"), dir.path().join("back"));
    let bottom = make_deep(&upper, DEPTH);
    let write = OFlags::WRONLY | OFlags::CREATE;
    let file = rustix::fs::openat(&bottom, c"file", write, Mode::RWXU).unwrap();
    File::from(file).write_all(b"at the bottom").unwrap();
    rustix::fs::linkat(&bottom, c"file", &bottom, c"link", AtFlags::empty()).unwrap();
    rustix::fs::linkat(&bottom, c"file", CWD, upper.join("zz"), AtFlags::empty()).unwrap();

    let mut pending = writer.begin(TurnNo(1)).unwrap();
    let captured = pending.capture(&upper, Part::Whole, &|| false).unwrap();
    assert_eq!(captured.names, DEPTH as u64 + 4);
    let committed = pending.commit(facts(), Images::Staged, Files::Captured);
    committed.unwrap().0.lay_out_upper(&back).unwrap();
    let bottom = open_deep(&back, DEPTH);
    let file = rustix::fs::openat(&bottom, c"file", OFlags::RDONLY, Mode::empty()).unwrap();
    assert_eq!(
        std::io::read_to_string(File::from(file)).unwrap(),
        "at the bottom"
    );
    let inode = rustix::fs::statat(&bottom, c"link", AtFlags::empty()).unwrap();
    assert_eq!(inode.st_nlink, 3);
    assert_eq!(inode.st_ino, fs::metadata(back.join("zz")).unwrap().ino());
    remove_tree(&upper).unwrap();
    remove_tree(&back).unwrap();
}

#[test]
fn a_layer_that_changes_while_it_is_read_is_an_error() {
    let bed = bed();
    let writer = bed.writer();
    let upper = bed.dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    // Large enough for the stop function to be asked within the file.
    fs::write(upper.join("file"), vec![1; 1 << 20]).unwrap();
    let asked = std::cell::Cell::new(0);
    let meddle = || {
        asked.set(asked.get() + 1);
        if asked.get() == 4 {
            let file = File::options().append(true).open(upper.join("file"));
            file.unwrap().write_at(b"x", 0).unwrap();
        }
        false
    };
    let capture = |stop: &dyn Fn() -> bool| {
        let mut pending = writer.begin(TurnNo(1)).unwrap();
        pending.capture(&upper, Part::Whole, stop).unwrap_err()
    };
    let error = capture(&meddle);
    assert!(asked.get() >= 4);
    assert!(
        matches!(error, StoreError::Tree(TreeError::Changed { .. })),
        "{error}"
    );

    // A name that comes into a directory behind the walk.
    fs::create_dir(upper.join("sub")).unwrap();
    let asked = std::cell::Cell::new(0);
    let meddle = || {
        asked.set(asked.get() + 1);
        if asked.get() == 2 {
            fs::write(upper.join("aaa"), "new").unwrap();
        }
        false
    };
    let error = capture(&meddle);
    assert!(
        matches!(error, StoreError::Tree(TreeError::Changed { .. })),
        "{error}"
    );

    let error = capture(&|| true);
    assert!(
        matches!(error, StoreError::Tree(TreeError::Stopped { .. })),
        "{error}"
    );
    assert!(files::all_names(&writer.packs_dir()).unwrap().is_empty());
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_directory_that_is_swapped_for_a_link_never_leads_outside() {
    let bed = bed();
    let writer = bed.writer();
    let dir = bed.dir.path();
    let (upper, outside) = (dir.join("upper"), dir.join("outside"));
    fs::create_dir_all(upper.join("x/y")).unwrap();
    fs::create_dir_all(outside.join("y")).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::write(outside.join("y/secret"), "secret").unwrap();
    for n in 0..50 {
        fs::write(upper.join(format!("x/y/{n}")), "inside").unwrap();
    }
    symlink(&outside, upper.join("link")).unwrap();
    fs::write(upper.join("plain"), "inside").unwrap();
    symlink(outside.join("secret"), upper.join("plain-link")).unwrap();
    let stop = AtomicBool::new(false);
    let (mut done, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let swap = |a: &str, b: &str| {
                let (a, b) = (upper.join(a), upper.join(b));
                rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
            };
            while !stop.load(Ordering::Relaxed) {
                swap("x", "link");
                swap("plain", "plain-link");
            }
        });
        // Also when an assertion fails: the scope waits for the thread.
        let _stop = StopOnDrop(&stop);
        let begun = Instant::now();
        for n in 0.. {
            // How soon the two meet is up to the scheduler.
            let is_met = refused > 0 || begun.elapsed().as_secs() > 60;
            if n >= 200 && is_met {
                break;
            }
            let mut pending = writer.begin(TurnNo(1)).unwrap();
            let all = |_, _| false;
            pending
                .read_ahead(&upper, &Ahead::All, None, &all, &|| false)
                .unwrap();
            match pending.capture(&upper, Part::Whole, &|| false) {
                Ok(captured) => {
                    done += 1;
                    let secret = fs::metadata(outside.join("secret")).unwrap();
                    let id = (secret.dev(), secret.ino());
                    assert!(!captured.contents.contains_key(&id));
                }
                Err(_) => refused += 1,
            }
        }
    });
    eprintln!("{done} captures, {refused} refused");
    assert!(refused > 0, "the race was never met");
}

#[test]
fn a_default_acl_around_a_layer_does_not_get_into_it() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    let upper = pending.upper_dir();
    fs::create_dir(&upper).unwrap();
    zoo(&upper);
    fs::remove_file(upper.join("sparse")).unwrap();
    let (made, staging) = try_commit(pending, Images::Staged, Part::Whole).unwrap();
    let around = bed.dir.path().join("around");
    fs::create_dir(&around).unwrap();
    set_xattr(&around, "system.posix_acl_default", &acl());
    made.lay_out_upper(&around.join("back")).unwrap();
    assert_eq!(look(&around.join("back")), look(&upper));
    drop(staging);
}
