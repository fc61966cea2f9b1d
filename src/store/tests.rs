use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
};

use proptest::prelude::*;
use time::format_description::well_known::Rfc3339;

use super::*;

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
        processes_of: None,
        references: vec!["usr/bin/sleep".into()],
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
    }
}

/// A checkpoint with a bit of everything.
fn fill(pending: &Pending) {
    fs::write(pending.image_dir().join("pages-1.img"), vec![9; 10_000]).unwrap();
    fs::write(pending.image_dir().join("core-1.img"), "core").unwrap();
    fs::write(pending.bundle_dir().join("config.json"), "{}").unwrap();
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
        let pending = writer.begin(TurnNo(turn)).unwrap();
        fill(&pending);
        pending.commit(facts()).unwrap()
    }
}

#[test]
fn what_is_committed_is_read_back() {
    let bed = bed();
    let reader = bed.store.sandbox(&bed.id);
    assert!(reader.latest().unwrap().is_none());
    assert!(!reader.dir().exists(), "reading made something");
    let writer = bed.writer();
    let made = bed.checkpoint(&writer, 7);
    let latest = reader.latest().unwrap().unwrap();
    assert_eq!(latest.manifest, made.manifest);
    assert_eq!(latest.digest, made.digest);
    assert_eq!(latest.manifest.facts, facts());
    assert_eq!(latest.manifest.contents.image.len(), 2);
    assert_eq!(latest.manifest.contents.upper.unwrap().entries, 10);
    assert_eq!(
        fs::read(made.bundle_dir().join("config.json")).unwrap(),
        b"{}"
    );
    assert!(made.upper_dir().join("z").exists());
    assert_eq!(reader.verify(TurnNo(7)).unwrap(), []);
    let mode = fs::metadata(reader.dir()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
    let twice = writer.begin(TurnNo(7)).unwrap_err();
    assert!(matches!(twice, StoreError::Exists { .. }), "{twice}");

    let json = fs::read_to_string(made.dir.join("manifest.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["created_at"], "2025-11-23T17:10:00.25Z");
    assert_eq!(json["pipes"][0]["pending"], "00ff0a");
    assert_eq!(json["kind"], "full");
    let check = std::process::Command::new("sha256sum")
        .args(["--quiet", "-c", "manifest.sha256"])
        .current_dir(&made.dir)
        .status();
    assert!(check.unwrap().success());
}

#[test]
fn an_abandoned_checkpoint_leaves_nothing_and_a_crash_leaves_nothing_for_long() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    fill(&pending);
    drop(pending);
    let turns = writer.dir().join("turns");
    assert_eq!(fs::read_dir(&turns).unwrap().count(), 0);

    let pending = writer.begin(TurnNo(1)).unwrap();
    fill(&pending);
    std::mem::forget(pending);
    fs::create_dir_all(turns.join(".condemned-3/image")).unwrap();
    assert_eq!(writer.turns().unwrap(), []);
    assert!(writer.latest().unwrap().is_none());
    // The forgotten one still holds the lock of this process.
    rustix::fs::flock(lock_of(&writer), rustix::fs::FlockOperation::Unlock).unwrap();
    let writer = bed.writer();
    assert_eq!(fs::read_dir(&turns).unwrap().count(), 0);
    bed.checkpoint(&writer, 1);
}

/// The writer's own descriptor of its lock.
fn lock_of(writer: &SandboxWriter) -> std::os::fd::OwnedFd {
    writer.lock_file().try_clone().unwrap().into()
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
fn verify_names_what_is_broken() {
    let break_and_verify = |break_it: &dyn Fn(&Path)| {
        let bed = bed();
        let dir = bed.checkpoint(&bed.writer(), 1).dir;
        break_it(&dir);
        let faults = bed.store.sandbox(&bed.id).verify(TurnNo(1)).unwrap();
        faults.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let append = |path: PathBuf| {
        let mut file = fs::File::options().append(true).open(path).unwrap();
        file.write_all(b"x").unwrap();
    };
    type Break<'a> = &'a dyn Fn(&Path);
    let cases: &[(Break, &[&str])] = &[
        (&|_| {}, &[]),
        (
            &|d| fs::remove_file(d.join("image/core-1.img")).unwrap(),
            &["image/core-1.img: missing"],
        ),
        (
            &|d| {
                fs::File::options()
                    .write(true)
                    .open(d.join("image/pages-1.img"))
                    .unwrap()
                    .set_len(9_999)
                    .unwrap()
            },
            &["image/pages-1.img: truncated: 9999 bytes of 10000"],
        ),
        (
            &|d| fs::write(d.join("bundle/config.json"), "[]").unwrap(),
            &["bundle/config.json: changed"],
        ),
        (
            &|d| fs::write(d.join("image/more"), "").unwrap(),
            &["image/more: does not belong there"],
        ),
        (
            &|d| fs::remove_dir_all(d.join("image")).unwrap(),
            &["image: missing"],
        ),
        (
            &|d| append(d.join("upper/a/deep/dir/file")),
            &["upper/a/deep/dir/file: changed"],
        ),
        (
            &|d| {
                let file = d.join("upper/a/file");
                let times = fs::metadata(&file).unwrap().modified().unwrap();
                fs::write(&file, "a/fil3").unwrap();
                fs::File::options()
                    .write(true)
                    .open(&file)
                    .unwrap()
                    .set_modified(times)
                    .unwrap();
            },
            &["upper/a/file: changed"],
        ),
        (
            &|d| {
                fs::set_permissions(d.join("upper/z"), fs::Permissions::from_mode(0o4755)).unwrap()
            },
            &["upper/z: changed"],
        ),
        (
            &|d| fs::remove_dir_all(d.join("upper")).unwrap(),
            &["upper: missing"],
        ),
        (&|d| append(d.join("upper.list")), &["upper.list: changed"]),
        (
            &|d| fs::remove_file(d.join("upper.list")).unwrap(),
            &["upper: missing"],
        ),
    ];
    for (n, (break_it, faults)) in cases.iter().enumerate() {
        assert_eq!(break_and_verify(break_it), *faults, "case {n}");
    }
    // Names that come and go also change their directory's mtime.
    for (break_it, fault) in [
        (
            &|d: &Path| fs::remove_file(d.join("upper/new\nline \\ é")).unwrap(),
            "upper/new\\nline \\\\ \\xc3\\xa9: missing",
        ),
        (
            &|d: &Path| fs::remove_file(d.join("upper/z")).unwrap(),
            "upper/z: missing",
        ),
        (
            &|d: &Path| fs::remove_dir_all(d.join("upper/a/deep")).unwrap(),
            "upper/a/deep/dir/file: missing",
        ),
        (
            &|d: &Path| fs::write(d.join("upper/a/more"), "").unwrap(),
            "upper/a/more: does not belong there",
        ),
        (
            &|d: &Path| fs::write(d.join("upper/zz"), "").unwrap(),
            "upper/zz: does not belong there",
        ),
    ] as [(&dyn Fn(&Path), &str); 5]
    {
        let faults = break_and_verify(break_it);
        assert!(faults.contains(&fault.to_owned()), "{fault}: {faults:?}");
        assert!(faults.len() <= 5, "{faults:?}");
        assert!(!faults.iter().any(|f| f.contains("link")), "{faults:?}");
    }
}

#[test]
fn a_broken_manifest_is_told_from_an_absent_and_a_newer_one() {
    let bed = bed();
    let writer = bed.writer();
    let manifest = bed.checkpoint(&writer, 1).dir.join("manifest.json");
    let whole = fs::read_to_string(&manifest).unwrap();
    let error = |content: &str| {
        fs::write(&manifest, content).unwrap();
        writer.get(TurnNo(1)).unwrap_err()
    };
    for length in [0, 1, whole.len() / 2, whole.len() - 2] {
        let error = error(&whole[..length]);
        assert!(
            matches!(error, StoreError::Damaged { .. }),
            "{length}: {error}"
        );
    }
    let newer = error(r#"{"format": 2, "everything": "else"}"#);
    assert!(
        matches!(newer, StoreError::Newer { found: 2, .. }),
        "{newer}"
    );
    let edited = error(&whole.replace("4.2.1", "4.2.2"));
    assert!(edited.to_string().contains("checksum"), "{edited}");
    let other = error(&whole.replace("\"turn\": 1", "\"turn\": 2"));
    assert!(other.to_string().contains("about turn 2"), "{other}");
    fs::remove_file(&manifest).unwrap();
    let missing = writer.get(TurnNo(1)).unwrap_err();
    assert!(missing.to_string().contains("missing"), "{missing}");
    let absent = writer.get(TurnNo(9)).unwrap_err();
    assert!(matches!(absent, StoreError::NoTurn { .. }), "{absent}");
}

#[test]
fn a_manifest_with_fields_of_a_later_version_is_still_read() {
    let bed = bed();
    let made = bed.checkpoint(&bed.writer(), 1);
    let json = made.manifest.to_json(&made.dir).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    json["later"] = 1.into();
    json["host"]["later"] = 1.into();
    let json = serde_json::to_vec(&json).unwrap();
    let read = Manifest::parse(&json, &made.dir, &bed.id, TurnNo(1)).unwrap();
    assert_eq!(read, made.manifest);
}

#[test]
fn a_checkpoint_may_not_refer_to_another() {
    let bed = bed();
    let writer = bed.writer();
    let pending = writer.begin(TurnNo(1)).unwrap();
    symlink("../../0/image", pending.image_dir().join("parent")).unwrap();
    let error = pending.commit(facts()).unwrap_err();
    assert!(error.to_string().contains("parent"), "{error}");
    assert_eq!(writer.turns().unwrap(), []);
}

#[test]
fn prune_keeps_the_newest_the_named_and_the_armed() {
    let bed = bed();
    let writer = bed.writer();
    for turn in [1, 2, 3, 5, 9, 10] {
        bed.checkpoint(&writer, turn);
    }
    writer.name("before-the-migration", TurnNo(2)).unwrap();
    writer.arm(TurnNo(3)).unwrap();
    let numbers = |turns: Vec<TurnNo>| turns.into_iter().map(|t| t.0).collect::<Vec<_>>();
    assert_eq!(numbers(writer.prune(10).unwrap()), [0; 0]);
    assert_eq!(numbers(writer.prune(2).unwrap()), [1, 5]);
    assert_eq!(numbers(writer.turns().unwrap()), [2, 3, 9, 10]);
    assert_eq!(numbers(writer.prune(0).unwrap()), [9]);
    writer.disarm().unwrap();
    writer.name("before-the-migration", TurnNo(10)).unwrap();
    assert_eq!(numbers(writer.prune(1).unwrap()), [2, 3]);
    assert_eq!(numbers(writer.turns().unwrap()), [10]);
    let left = fs::read_dir(writer.dir().join("turns")).unwrap();
    assert_eq!(left.count(), 1);
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

fn line(turn: u64) -> JournalLine {
    JournalLine {
        turn: TurnNo(turn),
        trigger: Trigger::Exec,
        effects: vec![Effect::Files, Effect::Other("devices".into())],
        action: Action::Full,
        pre_dumps: 0,
        checkpoint: Some(Digest::of(b"x")),
        changed_files: 2,
        bytes_captured: 3,
        bytes_written: 4,
        look_us: 5,
        freeze_us: 6,
        durable_us: Some(7),
        exposed_us: 8,
        started_at: time("2025-11-23T17:10:00Z"),
        ended_at: time("2025-11-23T17:10:01.5Z"),
        note: None,
    }
}

#[test]
fn a_journal_line_has_exactly_the_documented_keys() {
    let json = serde_json::to_value(line(1)).unwrap();
    let keys: Vec<_> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut documented = [
        "turn",
        "trigger",
        "effects",
        "action",
        "pre_dumps",
        "checkpoint",
        "changed_files",
        "bytes_captured",
        "bytes_written",
        "look_us",
        "freeze_us",
        "durable_us",
        "exposed_us",
        "started_at",
        "ended_at",
        "note",
    ];
    documented.sort_unstable();
    let mut keys = keys;
    keys.sort_unstable();
    assert_eq!(keys, documented);
    assert_eq!(json["effects"], serde_json::json!(["files", "devices"]));
    assert_eq!(json["trigger"], "exec");
}

#[test]
fn a_later_line_about_a_turn_replaces_the_earlier_one() {
    let bed = bed();
    let writer = bed.writer();
    writer.append(&line(1), Sync::Later).unwrap();
    writer.append(&line(2), Sync::Later).unwrap();
    let later = JournalLine {
        exposed_us: 99,
        ..line(2)
    };
    writer.append(&later, Sync::Later).unwrap();
    assert_eq!(writer.journal().unwrap().lines, [line(1), later]);
}

#[test]
fn a_torn_last_line_is_ignored_and_mended_and_a_broken_one_is_reported() {
    let bed = bed();
    let writer = bed.writer();
    let path = writer.dir().join("journal.jsonl");
    let write = |content: &[u8]| {
        let mut file = fs::File::options().append(true).open(&path).unwrap();
        file.write_all(content).unwrap();
    };
    assert_eq!(writer.journal().unwrap(), Journal::default());
    writer.append(&line(1), Sync::Now).unwrap();
    writer.append(&line(2), Sync::Later).unwrap();
    write(b"{\"turn\":3,\"trig");
    let read = writer.journal().unwrap();
    assert_eq!(read.lines, [line(1), line(2)]);
    assert_eq!(read.broken, []);
    drop(writer);

    let writer = bed.writer();
    writer.append(&line(3), Sync::Later).unwrap();
    let read = writer.journal().unwrap();
    assert_eq!(read.lines, [line(1), line(2), line(3)]);
    assert_eq!(read.broken, []);

    write(b"not json\n\xff\xfe\n");
    write(&[b'x'; journal::MAX_LINE + 1]);
    write(b"\n");
    writer.append(&line(4), Sync::Later).unwrap();
    let read = writer.journal().unwrap();
    assert_eq!(read.lines.last(), Some(&line(4)));
    let numbers: Vec<_> = read.broken.iter().map(|b| b.number).collect();
    assert_eq!(numbers, [4, 5, 6]);
}

#[test]
fn a_long_note_is_cut_and_a_line_beyond_measure_refused() {
    let bed = bed();
    let writer = bed.writer();
    let long = JournalLine {
        note: Some("ä".repeat(100_000)),
        ..line(1)
    };
    writer.append(&long, Sync::Later).unwrap();
    let read = writer.journal().unwrap();
    assert!(read.lines[0].note.as_ref().unwrap().ends_with("ä…"));
    let many = JournalLine {
        effects: vec![Effect::Other("x".repeat(100)); 1000],
        ..line(2)
    };
    writer.append(&many, Sync::Later).unwrap_err();
    assert_eq!(writer.journal().unwrap().lines.len(), 1);
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

#[test]
fn the_digest_of_a_tree_does_not_depend_on_where_its_holes_are() {
    let bed = bed();
    let digest = |turn, fill: &dyn Fn(&fs::File)| {
        let writer = bed.writer();
        let pending = writer.begin(TurnNo(turn)).unwrap();
        fs::create_dir(pending.upper_dir()).unwrap();
        let file = fs::File::create(pending.upper_dir().join("file")).unwrap();
        fill(&file);
        let time = std::time::UNIX_EPOCH;
        file.set_modified(time).unwrap();
        fs::File::open(pending.upper_dir())
            .unwrap()
            .set_modified(time)
            .unwrap();
        pending
            .commit(facts())
            .unwrap()
            .manifest
            .contents
            .upper
            .unwrap()
            .digest
    };
    use std::os::unix::fs::FileExt;
    let hole = digest(1, &|f| {
        f.set_len(1_000_000).unwrap();
        f.write_all_at(b"x", 500_000).unwrap();
    });
    let zeros = digest(2, &|f| {
        f.write_all_at(&vec![0; 1_000_000], 0).unwrap();
        f.write_all_at(b"x", 500_000).unwrap();
    });
    let other = digest(3, &|f| {
        f.set_len(1_000_000).unwrap();
        f.write_all_at(b"x", 500_001).unwrap();
    });
    assert_eq!(hole, zeros);
    assert_ne!(hole, other);
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let bed = bed();
        let path = bed.dir.path().join("file");
        fs::write(&path, &bytes).unwrap();
        let _ = journal::read(&path);
        let _ = arm::armed(&path);
        let _ = Manifest::parse(&bytes, &path, &bed.id, TurnNo(1));
        let _ = digest::Entry::parse(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn digests_and_hexadecimal_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
        prop_assert_eq!(digest::unhex(&digest::hex(&bytes)), Some(bytes.clone()));
        let digest = Digest::of(&bytes);
        prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    }

    #[test]
    fn names_of_any_bytes_keep_their_order(
        a in proptest::collection::vec(1u8.., 1..6),
        b in proptest::collection::vec(1u8.., 1..6),
    ) {
        let escaped = |name: &[u8]| name.escape_ascii().to_string();
        prop_assert_eq!(verify::before(&escaped(&a), &escaped(&b)), a < b);
    }
}
