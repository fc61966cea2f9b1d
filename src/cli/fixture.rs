//! Checkpoints for the tests of what is shown of them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use time::OffsetDateTime;

pub(super) use super::turns::tests::journal;

use crate::{
    sandbox::{SandboxId, TurnNo},
    store::{
        Checkpoint, Facts, Files, Host, Images, Kind, Part, SandboxStore, SandboxWriter, Store,
    },
};

/// A store with one sandbox, `default/c1`.
pub(super) struct Shelf {
    _dir: tempfile::TempDir,
    pub(super) writer: SandboxWriter,
    pub(super) checkpoints: SandboxStore,
}

impl Shelf {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("crab")).unwrap();
        let id = SandboxId::new("default", "c1").unwrap();
        Self {
            writer: store.writer(&id).unwrap(),
            checkpoints: store.sandbox(&id),
            _dir: dir,
        }
    }

    /// A checkpoint whose writable layer `fill` makes.
    pub(super) fn checkpoint(
        &self,
        turn: u64,
        facts: Facts,
        fill: impl FnOnce(&Path),
    ) -> Checkpoint {
        let mut pending = self.writer.begin(TurnNo(turn)).unwrap();
        fs::write(pending.image_dir().join("pages-1.img"), vec![9; 10_000]).unwrap();
        let upper: PathBuf = pending.image_dir().with_file_name("upper");
        fs::create_dir_all(&upper).unwrap();
        fill(&upper);
        pending.capture(&upper, Part::Whole, &|| false).unwrap();
        let done = pending.commit(facts, Images::Staged, Files::Captured);
        done.unwrap().0
    }
}

pub(super) fn facts(parent: Option<u64>) -> Facts {
    Facts {
        parent: parent.map(TurnNo),
        created_at: OffsetDateTime::UNIX_EPOCH,
        kind: Kind::Full,
        processes: 3,
        host: Host {
            kernel: "6.18.44".into(),
            arch: "x86_64".into(),
            cpu: "some".into(),
            boot_id: "another".into(),
            criu: Some("4.2.1".into()),
            runtime: Some("runc 1.1.15".into()),
        },
        pipes: Vec::new(),
        runtime: serde_json::Value::Null,
        notes: Vec::new(),
        processes_of: None,
        references: Vec::new(),
    }
}
