//! What must hold of the store.

mod chain;
mod commit;
mod cost;
mod damage;
mod death;
mod fixture;
mod foreign;
mod gc;
mod hostile;
mod journal;
mod memory;
mod reuse;
mod seal;
mod shelf;
mod trees;

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
};

use time::format_description::well_known::Rfc3339;

use super::*;
use crate::sandbox::TurnNo;

struct Bed {
    dir: tempfile::TempDir,
    store: Store,
    id: SandboxId,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("crab")).unwrap();
    let id = SandboxId::new("default", "box").unwrap();
    Bed { dir, store, id }
}

fn time(text: &str) -> time::OffsetDateTime {
    time::OffsetDateTime::parse(text, &Rfc3339).unwrap()
}

fn facts() -> Facts {
    Facts {
        parent: Some(TurnNo(6)),
        created_at: time("2025-11-23T17:10:00.25Z"),
        kind: Kind::Full,
        processes: 3,
        host: Host {
            criu: Some("4.2.1".into()),
            ..Host::detect()
        },
        pipes: vec![StdioPipe {
            exec_id: Some("exec-1".into()),
            fd: 0,
            inode: 4711,
            target: "pipe:[4711]".into(),
            pending: vec![0, 255, b'\n'],
        }],
        runtime: serde_json::json!({ "terminal": false, "init": { "pid": 12 } }),
        notes: vec!["/dev/shm is missing".into()],
        processes_of: Some(TurnNo(2)),
        references: vec![Reference {
            path: "a/100% \n".into(),
            entry: Some(Digest::of(b"x")),
        }],
    }
}

/// A checkpoint with a bit of everything.
fn fill(pending: &mut Pending) {
    fs::write(pending.image_dir().join("pages-1.img"), vec![9; 10_000]).unwrap();
    fs::write(pending.image_dir().join("core-1.img"), "core").unwrap();
    pending.add_to_bundle("config.json", b"{}".to_vec());
    let upper = pending.upper_dir();
    fs::create_dir_all(upper.join("a/deep/dir")).unwrap();
    for name in ["a/file", "a/deep/dir/file", "a!", "new\nline \\ é", "z"] {
        fs::write(upper.join(name), name).unwrap();
    }
    symlink("nowhere", upper.join("link")).unwrap();
}

impl Bed {
    fn writer(&self) -> SandboxWriter {
        self.store.writer(&self.id).unwrap()
    }

    fn checkpoint(&self, writer: &SandboxWriter, turn: u64) -> Checkpoint {
        let mut pending = writer.begin(TurnNo(turn)).unwrap();
        fill(&mut pending);
        commit(pending, Part::Whole)
    }
}

/// The writable layer of a checkpoint that is being made lies beside what is staged.
trait UpperDir {
    fn upper_dir(&self) -> PathBuf;
}

impl UpperDir for Pending {
    fn upper_dir(&self) -> PathBuf {
        self.image_dir().with_file_name("upper")
    }
}

fn commit(pending: Pending, part: Part<'_>) -> Checkpoint {
    try_commit(pending, Images::Staged, part).unwrap().0
}

fn try_commit(
    mut pending: Pending,
    images: Images<'_>,
    part: Part<'_>,
) -> Result<(Checkpoint, Staging), StoreError> {
    pending.capture(&pending.upper_dir(), part, &|| false)?;
    pending.commit(facts(), images, Files::Captured)
}

/// Whatever is refused by the one is refused by the other.
fn lay_out(store: &SandboxStore, turn: TurnNo, scratch: &Path) -> Result<Laid, StoreError> {
    let checkpoint = store.get(turn)?;
    let checked = checkpoint.lay_out(scratch);
    let laid = checkpoint.lay_out_all(scratch);
    assert_eq!(checked.is_ok(), laid.is_ok(), "{checked:?}, {laid:?}");
    laid
}

fn numbers(turns: Vec<TurnNo>) -> Vec<u64> {
    turns.into_iter().map(|turn| turn.0).collect()
}

#[test]
fn one_process_writes_and_the_others_are_told_who() {
    let bed = bed();
    let writer = bed.writer();
    let second = bed.store.writer(&bed.id).unwrap_err();
    let text = second.to_string();
    assert!(matches!(second, StoreError::Locked { .. }));
    assert!(
        text.contains(&format!("pid {}", std::process::id())),
        "{text}"
    );
    let pending = writer.begin(TurnNo(1)).unwrap();
    drop(writer);
    bed.store.writer(&bed.id).unwrap_err();
    drop(pending);
    bed.store.writer(&bed.id).unwrap();
}

#[test]
fn whoever_waits_writes_next_and_does_not_wait_for_ever() {
    let bed = bed();
    let writer = bed.writer();
    let short = Duration::from_millis(30);
    let begin = Instant::now();
    let refused = bed.store.writer_within(&bed.id, short).unwrap_err();
    assert!(matches!(refused, StoreError::Locked { .. }) && begin.elapsed() >= short);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(short);
            drop(writer);
        });
        bed.store
            .writer_within(&bed.id, Duration::from_secs(60))
            .unwrap();
    });
}

#[test]
fn a_copy_of_the_descriptor_does_not_keep_the_lock() {
    let bed = bed();
    let writer = bed.writer();
    // As in a child between its fork and its exec.
    let copy = writer.lock_file().try_clone().unwrap();
    drop(writer);
    bed.writer();
    drop(copy);
}

#[test]
fn only_what_exists_is_armed_or_named() {
    let bed = bed();
    let writer = bed.writer();
    assert_eq!(writer.armed().unwrap(), None);
    writer.disarm().unwrap();
    writer.arm(TurnNo(1)).unwrap_err();
    writer.name("x", TurnNo(1)).unwrap_err();
    bed.checkpoint(&writer, 1);
    bed.checkpoint(&writer, 2);
    writer.arm(TurnNo(1)).unwrap();
    writer.arm(TurnNo(2)).unwrap();
    assert_eq!(writer.armed().unwrap(), Some(TurnNo(2)));
    writer.disarm().unwrap();
    assert_eq!(writer.armed().unwrap(), None);
    writer.name("x", TurnNo(1)).unwrap();
    assert_eq!(writer.named("x").unwrap(), TurnNo(1));
    assert_eq!(writer.names().unwrap().len(), 1);
    assert!(matches!(writer.named("y"), Err(StoreError::NoName { .. })));
    assert!(matches!(
        writer.name("../x", TurnNo(1)),
        Err(StoreError::BadName(_))
    ));
    for (content, newer) in [("{", false), ("{\"format\":9,\"turn\":1}", true)] {
        fs::write(writer.dir().join("armed"), content).unwrap();
        let error = writer.armed().unwrap_err();
        assert_eq!(matches!(error, StoreError::Newer { .. }), newer, "{error}");
    }
}

#[test]
fn a_sandbox_is_found_by_its_id_or_a_unique_beginning() {
    let bed = bed();
    let id = |namespace, id| SandboxId::new(namespace, id).unwrap();
    let all = [
        id("a", "web"),
        id("a", "web1"),
        id("a", "db"),
        id("b", "db"),
        id("b", "cache"),
    ];
    for id in &all {
        bed.store.writer(id).unwrap();
    }
    let find = |namespace, prefix| bed.store.find(namespace, prefix);
    assert_eq!(find(None, "web").unwrap(), all[0]);
    assert_eq!(find(None, "web1").unwrap(), all[1]);
    assert_eq!(find(None, "c").unwrap(), all[4]);
    assert_eq!(find(Some("b"), "d").unwrap(), all[3]);
    let error = find(None, "db").unwrap_err().to_string();
    assert!(error.contains("a/db, b/db"), "{error}");
    let error = find(None, "we").unwrap_err().to_string();
    assert!(error.contains("a/web, a/web1"), "{error}");
    assert!(matches!(
        find(Some("a"), "cache"),
        Err(StoreError::NoSandbox { .. })
    ));
}

#[test]
fn a_store_that_others_can_read_is_refused() {
    let bed = bed();
    let root = bed.dir.path().join("crab");
    fs::set_permissions(&root, fs::Permissions::from_mode(0o750)).unwrap();
    let error = Store::open(&root).unwrap_err();
    assert!(error.to_string().contains("0750"), "{error}");
}
