//! Drives a store for the tests of power loss in this directory: a command a line on stdin, its answer a line on
//! stdout, both JSON.
//!
//! store drive ROOT    changes the store as it is told
//! store check ROOT    what is in the store, once and without a change
//! store mend ROOT     goes on with it: new checkpoints, collections; then what is in it

use std::{
    collections::{BTreeMap, HashMap},
    env, fs,
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use crab::{
    sandbox::{SandboxId, TurnNo},
    store::{
        Checkpoint, Facts, Files, Host, Images, JournalLine, Kind, LayerChanges, Part, Pending,
        Retention, SandboxStore, SandboxWriter, Store, Sync, Trigger,
    },
};
use rustix::fs::FileType;
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;

const NAMESPACE: &str = "default";
/// Of a dump's memory, in bytes.
const PAGE: usize = 4096;
const PAGES: usize = 40;
const DIRECTORIES: u64 = 4;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Order {
    /// Takes the checkpoint of a turn.
    Checkpoint {
        sandbox: String,
        turn: TurnNo,
        /// Says what the turn changes.
        seed: u64,
        how: How,
    },
    Retain {
        sandbox: String,
        keep: usize,
    },
    Collect {
        sandbox: String,
    },
    Name {
        sandbox: String,
        name: String,
        turn: TurnNo,
    },
    Arm {
        sandbox: String,
        turn: TurnNo,
    },
    Disarm {
        sandbox: String,
    },
    Append {
        sandbox: String,
        turn: TurnNo,
        /// Whether it must be durable.
        now: bool,
    },
    /// Leaves what a restore and a commit leave if they do not come to their end.
    Litter {
        sandbox: String,
        turn: TurnNo,
    },
    /// Gives the sandbox's lock up.
    Close {
        sandbox: String,
    },
    Remove {
        sandbox: String,
    },
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum How {
    /// Everything is staged.
    Whole,
    /// What has changed.
    Delta,
    /// Files alone: the processes are those of the checkpoint before.
    Files,
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["drive", root] => drive(root.as_ref()),
        ["check", root] => check(root.as_ref()),
        ["mend", root] => mend(root.as_ref()),
        _ => Err(anyhow::anyhow!("usage: store drive|check|mend ROOT")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn say(answer: &Value) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{answer}")?;
    Ok(out.flush()?)
}

fn drive(root: &Path) -> Result<()> {
    let mut driver = Driver {
        store: Store::open(root)?,
        sandboxes: HashMap::new(),
    };
    say(&json!({ "ready": true }))?;
    for line in io::stdin().lock().lines() {
        let order = serde_json::from_str(&line?).context("not an order")?;
        say(&driver.obey(order)?)?;
    }
    Ok(())
}

struct Driver {
    store: Store,
    sandboxes: HashMap<String, Sandbox>,
}

/// One that is being written.
struct Sandbox {
    writer: SandboxWriter,
    state: State,
}

impl Driver {
    fn sandbox(&mut self, id: &str) -> Result<&mut Sandbox> {
        if !self.sandboxes.contains_key(id) {
            let writer = self.store.writer(&SandboxId::new(NAMESPACE, id)?)?;
            // Whatever it was before: the next checkpoint is a whole one.
            let state = State::default();
            self.sandboxes
                .insert(id.to_owned(), Sandbox { writer, state });
        }
        self.sandboxes.get_mut(id).context("it was just put there")
    }

    fn obey(&mut self, order: Order) -> Result<Value> {
        Ok(match order {
            Order::Checkpoint {
                sandbox,
                turn,
                seed,
                how,
            } => self.sandbox(&sandbox)?.checkpoint(turn, seed, how)?,
            Order::Retain { sandbox, keep } => {
                let freed = self
                    .sandbox(&sandbox)?
                    .writer
                    .retain(&Retention::newest(keep))?;
                json!({ "gone": freed.turns })
            }
            Order::Collect { sandbox } => {
                json!({ "freed": self.sandbox(&sandbox)?.writer.collect()?.bytes })
            }
            Order::Name {
                sandbox,
                name,
                turn,
            } => {
                self.sandbox(&sandbox)?.writer.name(&name, turn)?;
                json!({})
            }
            Order::Arm { sandbox, turn } => {
                self.sandbox(&sandbox)?.writer.arm(turn)?;
                json!({})
            }
            Order::Disarm { sandbox } => {
                self.sandbox(&sandbox)?.writer.disarm()?;
                json!({})
            }
            Order::Append { sandbox, turn, now } => {
                let sync = if now { Sync::Now } else { Sync::Later };
                let writer = &self.sandbox(&sandbox)?.writer;
                writer.append(&line(turn), sync)?;
                json!({})
            }
            Order::Litter { sandbox, turn } => {
                litter(&self.sandbox(&sandbox)?.writer, turn)?;
                json!({})
            }
            Order::Close { sandbox } => {
                self.sandboxes.remove(&sandbox);
                json!({})
            }
            Order::Remove { sandbox } => {
                self.sandboxes.remove(&sandbox);
                let freed = self.store.remove(&SandboxId::new(NAMESPACE, &sandbox)?)?;
                json!({ "gone": freed.turns })
            }
        })
    }
}

/// What a sandbox is, by where its bytes come from: `noise` of a seed and a length.
#[derive(Default)]
struct State {
    pages: Vec<u64>,
    files: BTreeMap<String, (u64, usize)>,
    /// The last checkpoint, and whose dump its processes are.
    last: Option<(Checkpoint, Option<TurnNo>)>,
}

impl Sandbox {
    fn checkpoint(&mut self, turn: TurnNo, seed: u64, how: How) -> Result<Value> {
        let state = &mut self.state;
        let mut random = Random(seed | 1);
        let how = match &state.last {
            Some(_) => how,
            None => How::Whole,
        };
        if !matches!(how, How::Files) {
            state.pages.resize(PAGES, 1);
            for _ in 0..random.below(8) {
                let page = random.below(PAGES as u64) as usize;
                state.pages[page] = random.next();
            }
        }
        let changes = state.change_files(&mut random);
        let mut pending = self.writer.begin(turn)?;
        stage(&mut pending, state, how, &changes)?;
        let last = state.last.take();
        let (images, part) = match (how, &last) {
            (How::Whole, _) | (_, None) => (Images::Staged, Part::Whole),
            (How::Delta, Some((base, _))) => (Images::Staged, upon(base, &changes)),
            (How::Files, Some((base, _))) => (Images::Same(base), upon(base, &changes)),
        };
        pending.capture(&upper_dir(&pending), part, &|| false)?;
        let processes_of = match (how, &last) {
            (How::Files, Some((base, of))) => of.or(Some(base.turn())),
            _ => None,
        };
        let parent = last.as_ref().map(|(base, _)| base.turn());
        let (checkpoint, _) =
            pending.commit(facts(turn, parent, processes_of), images, Files::Captured)?;
        let answer = json!({
            "digest": checkpoint.digest, "content": state.fingerprint(), "stored": checkpoint.stored,
        });
        state.last = Some((checkpoint, processes_of));
        Ok(answer)
    }
}

impl State {
    /// Writes some files and removes some.
    fn change_files(&mut self, random: &mut Random) -> LayerChanges {
        let mut changes = LayerChanges::default();
        let mut staged = BTreeMap::new();
        for _ in 0..1 + random.below(4) {
            let path = format!("d{}/f{}", random.below(DIRECTORIES), random.below(8));
            match random.below(4) {
                0 => drop(staged.insert(path.clone(), false)),
                _ => {
                    let size = [10, 3000, 9000, 80_000][random.below(4) as usize];
                    self.files.insert(path.clone(), (random.next(), size));
                    staged.insert(path, true);
                }
            }
        }
        for (path, is_there) in staged {
            match is_there {
                true => changes.changed.push((path.into(), FileType::RegularFile)),
                false => {
                    self.files.remove(&path);
                    changes.removed.push(path.into());
                }
            }
        }
        changes
    }

    /// Of what a restore must bring back.
    fn fingerprint(&self) -> String {
        let mut all = BTreeMap::new();
        let pages = self.pages.iter().flat_map(|seed| noise(*seed, PAGE));
        all.insert("image/pages-1.img".to_owned(), pages.collect());
        all.insert("bundle/config.json".to_owned(), b"{}".to_vec());
        for (path, (seed, size)) in &self.files {
            all.insert(format!("upper/{path}"), noise(*seed, *size));
        }
        fingerprint(all)
    }
}

fn upon<'a>(base: &'a Checkpoint, changes: &'a LayerChanges) -> Part<'a> {
    Part::Changes { base, changes }
}

/// The writable layer, beside what is staged.
fn upper_dir(pending: &Pending) -> PathBuf {
    pending.image_dir().with_file_name("upper")
}

fn stage(pending: &mut Pending, state: &State, how: How, changes: &LayerChanges) -> Result<()> {
    if !matches!(how, How::Files) {
        let pages = state.pages.iter().flat_map(|seed| noise(*seed, PAGE));
        let pages: Vec<u8> = pages.collect();
        fs::write(pending.image_dir().join("pages-1.img"), pages)?;
    }
    pending.add_to_bundle("config.json", b"{}".to_vec());
    for n in 0..DIRECTORIES {
        fs::create_dir_all(upper_dir(pending).join(format!("d{n}")))?;
    }
    for (path, (seed, size)) in &state.files {
        if matches!(how, How::Whole)
            || changes
                .changed
                .iter()
                .any(|(changed, _)| changed == Path::new(path))
        {
            fs::write(upper_dir(pending).join(path), noise(*seed, *size))?;
        }
    }
    Ok(())
}

fn facts(turn: TurnNo, parent: Option<TurnNo>, processes_of: Option<TurnNo>) -> Facts {
    Facts {
        parent,
        created_at: moment(turn),
        kind: Kind::Full,
        processes: 1,
        host: Host::detect(),
        pipes: Vec::new(),
        runtime: Value::Null,
        notes: Vec::new(),
        processes_of,
        references: Vec::new(),
    }
}

fn moment(turn: TurnNo) -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH + time::Duration::seconds((turn.0 % 1_000_000) as i64)
}

fn line(turn: TurnNo) -> JournalLine {
    JournalLine::new(turn, Trigger::Exec, moment(turn), moment(turn))
}

/// Whatever a reader can see of a store, and what is wrong with it.
fn check(root: &Path) -> Result<()> {
    let mut all = serde_json::Map::new();
    if root.exists() {
        let store = Store::open(root)?;
        for id in store.sandboxes()? {
            let seen = see(&store.sandbox(&id))
                .unwrap_or_else(|e| json!({ "faults": [format!("{e:#}")] }));
            all.insert(id.id().to_owned(), seen);
        }
    }
    say(&Value::Object(all))
}

fn see(sandbox: &SandboxStore) -> Result<Value> {
    let mut faults: Vec<String> = Vec::new();
    let mut turns = serde_json::Map::new();
    for turn in sandbox.turns()? {
        let found = match look_at(sandbox, turn, &mut faults) {
            Ok(found) => found,
            Err(e) => {
                faults.push(format!("turn {turn}: {e:#}"));
                Value::Null
            }
        };
        turns.insert(turn.to_string(), found);
    }
    faults.extend(sandbox.verify_packs()?.iter().map(ToString::to_string));
    if let Err(e) = sandbox.head() {
        faults.push(format!("head: {e}"));
    }
    let journal = sandbox.journal()?;
    faults.extend(journal.broken.iter().map(|b| format!("journal: {b:?}")));
    let lines: Vec<TurnNo> = journal.lines.iter().map(|line| line.turn).collect();
    Ok(json!({
        "turns": turns, "names": sandbox.names()?, "armed": sandbox.armed()?, "journal": lines, "faults": faults,
    }))
}

fn look_at(sandbox: &SandboxStore, turn: TurnNo, faults: &mut Vec<String>) -> Result<Value> {
    let found = sandbox.verify(turn)?;
    faults.extend(found.iter().map(|fault| format!("turn {turn}: {fault}")));
    let checkpoint = sandbox.get(turn)?;
    let scratch = tempfile::tempdir()?;
    let laid = checkpoint.lay_out_all(scratch.path())?;
    let mut all = BTreeMap::new();
    for (name, dir) in [
        ("image", laid.image_dir()),
        ("bundle", laid.bundle_dir()),
        ("upper", laid.upper_dir()),
    ] {
        read_files(&dir, name, &mut all)?;
    }
    Ok(json!({ "digest": checkpoint.digest, "content": fingerprint(all) }))
}

fn read_files(dir: &Path, name: &str, all: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let below = format!("{name}/{}", entry.file_name().to_string_lossy());
        match entry.file_type()?.is_dir() {
            true => read_files(&entry.path(), &below, all)?,
            false => drop(all.insert(below, fs::read(entry.path())?)),
        }
    }
    Ok(())
}

/// After a power loss everything goes on: the store is opened to be written, what was left is removed, and a new
/// checkpoint has all that it needs, also after everything else has been let go.
fn mend(root: &Path) -> Result<()> {
    let store = Store::open(root)?;
    for id in store.sandboxes()? {
        let writer = store.writer(&id)?;
        let left = left(&writer)?;
        if !left.is_empty() {
            bail!("{id}: the next writer left {left:?}");
        }
        let turn = writer.turns()?.last().map_or(TurnNo(1), |last| last.next());
        let state = State::default();
        let mut sandbox = Sandbox { writer, state };
        sandbox.checkpoint(turn, 77, How::Whole)?;
        sandbox.writer.collect()?;
        sandbox.checkpoint(turn.next(), 78, How::Files)?;
        sandbox.writer.disarm()?;
        sandbox.writer.retain(&Retention::newest(1))?;
        sandbox.writer.collect()?;
        sandbox.writer.append(&line(turn.next()), Sync::Now)?;
    }
    store.tidy()?;
    let namespace = root.join(NAMESPACE);
    if namespace.exists() {
        let left = hidden(&namespace)?;
        if !left.is_empty() {
            bail!("collection left {left:?}");
        }
    }
    check(root)
}

fn litter(writer: &SandboxWriter, turn: TurnNo) -> Result<()> {
    // Its lock is this process's until that ends, as that of a restore would be.
    std::mem::forget(writer.get(turn)?.lay_out(&writer.scratch_dir())?);
    let staged = writer.scratch_dir().join("staged-999/image");
    fs::create_dir_all(&staged)?;
    fs::write(staged.join("pages-1.img"), noise(1, 5 * PAGE))?;
    let packs = writer.dir().join("packs");
    Ok(fs::write(packs.join(".tmp-999.pack"), noise(2, 5000))?)
}

/// What is in a sandbox's directory and no part of the store.
fn left(sandbox: &SandboxStore) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for dir in ["", "packs", "names"] {
        all.extend(hidden(&sandbox.dir().join(dir))?);
    }
    for entry in fs::read_dir(sandbox.scratch_dir())? {
        all.push(entry?.path());
    }
    Ok(all)
}

fn hidden(dir: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(dir)?.map(|entry| Ok(entry?.path()));
    let is_hidden = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with('.')
    };
    let paths: Result<Vec<_>> = paths.collect();
    Ok(paths?.into_iter().filter(is_hidden).collect())
}

fn fingerprint(all: BTreeMap<String, Vec<u8>>) -> String {
    let mut hasher = blake3::Hasher::new();
    for (path, content) in all {
        hasher.update(format!("{path}\0{}\0", content.len()).as_bytes());
        hasher.update(&content);
    }
    hasher.finalize().to_hex().to_string()
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let words = (0..length.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(length).collect()
}
