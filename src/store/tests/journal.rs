//! The journal.

use std::{fs, io::Write};

use super::*;

pub(super) fn line(turn: u64) -> JournalLine {
    JournalLine {
        turn: TurnNo(turn),
        trigger: Trigger::Exec,
        effects: vec![Effect::Files, Effect::Other("devices".into())],
        action: Action::Full,
        missing: vec![Missing::Tmpfs, Missing::Other("clocks".into())],
        plan: Some("full: it was asked for".into()),
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
        "missing",
        "plan",
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
    assert_eq!(json["missing"], serde_json::json!(["tmpfs", "clocks"]));
    assert_eq!(json["trigger"], "exec");
}

#[test]
fn a_line_of_an_older_crab_is_read() {
    let mut json = serde_json::to_value(line(1)).unwrap();
    for newer in ["missing", "plan"] {
        json.as_object_mut().unwrap().remove(newer).unwrap();
    }
    let read: JournalLine = serde_json::from_value(json).unwrap();
    let older = JournalLine {
        missing: Vec::new(),
        plan: None,
        ..line(1)
    };
    assert_eq!(read, older);
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
    write(&[b'x'; crate::store::journal::MAX_LINE + 1]);
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
fn a_sandbox_goes_on_from_where_it_was_rolled_back_to_until_the_next_checkpoint() {
    let bed = bed();
    let writer = bed.writer();
    let commit = |writer: &SandboxWriter, turn| {
        let mut pending = writer.begin(TurnNo(turn)).unwrap();
        fill(&mut pending);
        try_commit(pending, Images::Staged, Part::Whole).unwrap().0
    };
    let head = |writer: &SandboxWriter| writer.head().unwrap().map(|its| its.turn().0);
    assert_eq!(head(&writer), None);
    let first = commit(&writer, 1);
    commit(&writer, 2);
    assert_eq!(head(&writer), Some(2));
    let rollback = |turn, checkpoint| JournalLine {
        trigger: Trigger::Rollback,
        checkpoint,
        ..line(turn)
    };
    // Refused, or not done.
    writer.append(&rollback(3, None), Sync::Now).unwrap();
    assert_eq!(head(&writer), Some(2));
    // The line of turn 1 itself is lost.
    let done = rollback(4, Some(first.digest));
    writer.append(&done, Sync::Now).unwrap();
    assert_eq!(head(&writer), Some(1));
    // It stays, although another one is newer; also for whoever comes next.
    drop(writer);
    let writer = bed.writer();
    assert_eq!(writer.retain(&Retention::newest(1)).unwrap().turns, []);
    assert_eq!(head(&writer), Some(1));
    // Power failed before its line was written.
    commit(&writer, 5);
    assert_eq!(head(&writer), Some(5));
    let gone = writer.retain(&Retention::newest(1)).unwrap().turns;
    assert_eq!(gone, [TurnNo(1), TurnNo(2)]);
}
