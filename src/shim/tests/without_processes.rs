//! Where the processes cannot be kept: what is taken then, and what becomes of it.

use super::{plan::Verb, *};
use crate::{
    coordinator::turns::{Asked, Proof},
    sandbox::{SandboxId, TurnNo},
    shim::rollback::roll_back,
    store::{Action, Effect, JournalLine, Kind, Missing, Store},
};

const IO_URING: &str = "process 7 uses io_uring";

impl Bed {
    /// A container with a full checkpoint of turn 1, and one without processes of turn 2.
    fn without_processes() -> Self {
        let bed = Self::protected("");
        bed.turn("a");
        bed.journal(1);
        bed.write("changed");
        bed.machine.fail(Verb::Checkpoint, IO_URING);
        bed.turn("b");
        bed.journal(2);
        bed
    }

    /// The container dies, and is created again to go on from `turn`.
    fn die_and_arm(&self, turn: u64) {
        self.finish();
        let id = SandboxId::new("test", "c").unwrap();
        let store = Store::open(&self.path("store")).unwrap();
        store.writer(&id).unwrap().arm(TurnNo(turn)).unwrap();
        self.write("newer");
    }
}

fn lacks_processes(line: &JournalLine) {
    assert_eq!(line.action, Action::Files);
    assert_eq!(line.missing[0], Missing::Processes);
    assert!(line.checkpoint.is_some() && line.effects.contains(&Effect::Files));
}

#[test]
fn a_turn_whose_processes_cannot_be_dumped_keeps_its_files_and_says_why() {
    let bed = Bed::without_processes();
    assert!(!bed.machine.group("c").is_frozen());
    let line = &bed.journal(2)[1];
    lacks_processes(line);
    let checkpoint = bed.store().get(TurnNo(2)).unwrap();
    let manifest = &checkpoint.manifest;
    assert_eq!(line.checkpoint, Some(checkpoint.digest));
    assert_eq!(
        (manifest.facts.kind, manifest.facts.processes),
        (Kind::Files, 0)
    );
    assert_eq!(manifest.facts.parent, Some(TurnNo(1)));
    assert_eq!(manifest.contents.image, []);
    for said in [
        &manifest.facts.notes.join("; "),
        line.note.as_ref().unwrap(),
    ] {
        assert!(said.starts_with("without processes: "), "{said}");
        assert!(said.contains(IO_URING), "{said}");
    }
    let laid = checkpoint.lay_out_all(&bed.store().scratch_dir()).unwrap();
    let saved = fs::read_to_string(laid.upper_dir().join("file")).unwrap();
    assert_eq!(saved, "changed");
    // Once they can be dumped, they are.
    bed.turn("again");
    let line = &bed.journal(3)[2];
    assert_eq!((line.action, line.missing.len()), (Action::Full, 0));
    bed.finish();
}

#[test]
fn the_freeze_of_the_dump_that_failed_is_told_too() {
    let bed = Bed::protected("");
    let blocked = bed.machine.block(Verb::Checkpoint);
    bed.turn("a");
    blocked.wait();
    thread::sleep(A_MOMENT);
    blocked.fail(IO_URING);
    let line = &bed.journal(1)[0];
    lacks_processes(line);
    assert!(line.freeze_us >= A_MOMENT.as_micros() as u64, "{line:?}");
    bed.finish();
}

#[test]
fn a_boundary_with_a_live_exec_keeps_the_files_and_names_the_exec() {
    let bed = Bed::protected("");
    let spec = r#"{"args":["healthcheck"]}"#;
    bed.exec_spec("c", "h", spec).unwrap();
    let health = bed.start("c", "h").unwrap().pid as i32;
    bed.turn("a");
    let line = &bed.journal(1)[0];
    lacks_processes(line);
    let note = line.note.as_deref().unwrap();
    assert!(note.contains("live execs (h;"), "{note}");
    assert_eq!(bed.machine.count("checkpoint"), 0, "no dump was tried");
    bed.end(health, 0, "exit c/h 0");
    bed.finish();
}

#[test]
fn a_sandbox_that_shares_its_ipc_namespace_keeps_its_files() {
    let bed = Bed::unborn("");
    let request = bed.protected_request();
    let bundle = std::path::Path::new(&request.bundle);
    let shared =
        r#"{"linux":{"namespaces":[{"type":"pid"},{"type":"ipc","path":"/proc/1/ns/ipc"}]}}"#;
    fs::write(bundle.join("config.json"), shared).unwrap();
    bed.create_as(request).unwrap();
    bed.start("c", "").unwrap();
    bed.turn("a");
    let line = &bed.journal(1)[0];
    lacks_processes(line);
    let note = line.note.as_deref().unwrap();
    assert!(note.contains("it shares its IPC namespace"), "{note}");
    assert_eq!(bed.machine.count("checkpoint"), 0, "no dump was tried");
    bed.finish();
}

#[test]
fn whoever_asks_for_a_checkpoint_gets_processes_or_is_told_unless_files_will_do() {
    let bed = Bed::protected("");
    bed.machine.fail(Verb::Checkpoint, IO_URING);
    let refused = bed.container("c").checkpoint_now(Asked::default());
    let refused = refused.unwrap_err().message;
    for words in ["test/c", IO_URING, "crab checkpoint --or-files"] {
        assert!(refused.contains(words), "{refused}");
    }
    assert_eq!(bed.store().turns().unwrap(), []);
    let line = &bed.journal(1)[0];
    assert_eq!((line.action, line.checkpoint), (Action::Skip, None));

    bed.machine.fail(Verb::Checkpoint, IO_URING);
    let asked = Asked {
        name: Some("files".into()),
        prove: true,
        or_files: true,
    };
    let (line, proof) = bed.container("c").checkpoint_now(asked.clone()).unwrap();
    lacks_processes(&line);
    assert_eq!(bed.store().named("files").unwrap(), line.turn);
    let Proof::Failed(why) = proof else {
        panic!("{proof:?}");
    };
    assert!(why.contains("nothing to prove"), "{why}");
    assert_eq!(bed.machine.count("restore"), 0);

    // It is a whole one where it can be.
    let asked = Asked {
        prove: false,
        ..asked
    };
    let (line, _) = bed.container("c").checkpoint_now(asked).unwrap();
    assert_eq!((line.action, line.missing.len()), (Action::Full, 0));
    bed.finish();
}

#[test]
fn a_start_boots_on_the_files_of_a_checkpoint_without_processes() {
    let bed = Bed::without_processes();
    bed.die_and_arm(2);
    bed.create_as(bed.protected_request()).unwrap();
    assert_eq!(bed.file(), "changed");
    assert_eq!(bed.status("c", ""), Status::CREATED);
    assert_ne!(bed.state("c", "").unwrap().pid, 0, "init waits for Start");
    // Whoever dies before the start finds it armed.
    assert_eq!(bed.store().armed().unwrap(), Some(TurnNo(2)));
    bed.start("c", "").unwrap();
    assert_eq!(bed.machine.count("restore"), 0);
    assert_eq!(bed.calls_since("create"), ["create c", "start c"]);
    assert_eq!(bed.store().armed().unwrap(), None);
    // And it takes turns again, after those that it had.
    bed.turn("d");
    let line = &bed.journal(3)[2];
    assert_eq!((line.turn, line.action), (TurnNo(3), Action::Full));
    bed.finish();
}

#[test]
fn limits_come_back_with_the_files() {
    let bed = Bed::protected("");
    let limits = r#"{"pids":{"limit":7}}"#;
    bed.update(limits).unwrap();
    bed.machine.fail(Verb::Checkpoint, IO_URING);
    bed.turn("a");
    bed.journal(1);
    bed.die_and_arm(1);
    bed.create_as(bed.protected_request()).unwrap();
    let calls = bed.calls_since("create");
    assert_eq!(calls, ["create c".to_owned(), format!("update c {limits}")]);
    bed.start("c", "").unwrap();
    bed.finish();
}

#[test]
fn a_boot_that_fails_says_what_to_do_and_stays_armed() {
    let bed = Bed::without_processes();
    bed.die_and_arm(2);
    bed.machine.fail(Verb::Create, "no such runtime");
    let words = ["no such runtime", "Turn 2 stays armed", "--cancel"];
    assert_names(
        bed.create_as(bed.protected_request()),
        Code::UNKNOWN,
        &words,
    );
    assert_eq!(bed.store().armed().unwrap(), Some(TurnNo(2)));
}

#[test]
fn a_rollback_to_it_is_refused_with_the_way_out_and_nothing_is_touched() {
    let bed = Bed::without_processes();
    bed.machine.make_mortal();
    let calls = bed.machine.calls();
    let refused = roll_back(&bed.container("c"), TurnNo(2)).unwrap_err();
    for words in [IO_URING, "nothing was touched", "crab restore c@2 --start"] {
        assert!(refused.message.contains(words), "{refused}");
    }
    assert_eq!(bed.machine.calls(), calls);
    bed.journal(2);
    roll_back(&bed.container("c"), TurnNo(1)).unwrap();
    assert_eq!(bed.file(), "text");
    bed.finish();
}
