//! Drives crab's inspector for the tests in this directory: a command a line on stdin, its answer a
//! line on stdout, both JSON.
//!
//! inspector --run DIR --cgroup DIR --rootfs DIR [--upper DIR] [--without PROBE]…

use std::{
    collections::HashMap,
    env,
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use crab::{
    digest::Digest,
    inspector::{self, Dirty, Joined, Subject, Watch, did_bits},
    rootfs::layer::{Candidate, Change, Comparison, Layer, Scope},
    sandbox::{SandboxId, TurnNo},
    store::{Part, Store},
};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Parser)]
struct Args {
    /// crab's directory below /run.
    #[arg(long)]
    run: PathBuf,
    /// The sandbox's directory in the hierarchy of cgroup v2.
    #[arg(long)]
    cgroup: PathBuf,
    /// Where the sandbox's root file system is mounted.
    #[arg(long)]
    rootfs: PathBuf,
    /// Its writable layer, for `changes` and `capture`.
    #[arg(long)]
    upper: Option<PathBuf>,
    /// Leave a probe out, to see what it is there for.
    #[arg(long)]
    without: Vec<String>,
}

#[derive(Deserialize)]
struct Order {
    r#do: String,
    #[serde(default)]
    pids: Option<Vec<i32>>,
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == inspector::WORD) {
        let loaded = inspector::load_without(words[1].as_ref(), &words[2..]);
        return match loaded {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{e}");
                ExitCode::FAILURE
            }
        };
    }
    match serve(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&json!({ "error": format!("{e:#}") }));
            ExitCode::FAILURE
        }
    }
}

fn say(answer: &Value) {
    let mut out = io::stdout().lock();
    // Whoever reads has gone: there is nobody to tell.
    let _ = writeln!(out, "{answer}").and_then(|()| out.flush());
}

fn serve(args: &Args) -> Result<()> {
    let subject = Subject {
        cgroup: args.cgroup.clone(),
        rootfs: args.rootfs.clone(),
    };
    let load = || {
        let mut child = Command::new("/proc/self/exe");
        child
            .arg(inspector::WORD)
            .arg(&args.run)
            .args(&args.without);
        let done = child.output().map_err(|e| e.to_string())?;
        if done.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&done.stderr);
        Err(format!("{}: {}", done.status, said.trim()))
    };
    let joined = Joined::new(&args.run, &load);
    let watch = joined
        .and_then(|joined| Watch::begin(joined, &subject))
        .map_err(anyhow::Error::msg)?;
    say(&json!({ "ready": true, "probes": watch.probes() }));
    let place = tempfile::tempdir()?;
    let mut driver = Driver {
        args,
        watch,
        layer: None,
        store: Store::open(&place.path().join("store"))?,
    };
    for line in io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("not an order")?;
        if order.r#do == "quit" {
            break;
        }
        let begin = Instant::now();
        let mut answer = match driver.obey(&order) {
            Ok(answer) => answer,
            Err(e) => json!({ "error": format!("{e:#}") }),
        };
        answer["us"] = json!(begin.elapsed().as_micros() as u64);
        say(&answer);
    }
    driver.watch.leave().map_err(anyhow::Error::msg)
}

struct Driver<'a> {
    args: &'a Args,
    watch: Watch,
    /// The writable layer as of the last `capture`.
    layer: Option<Layer>,
    store: Store,
}

impl Driver<'_> {
    fn obey(&mut self, order: &Order) -> Result<Value> {
        Ok(match order.r#do.as_str() {
            "look" => show(&self.watch.look()?),
            "cut" => {
                self.watch.prepare()?;
                show(&self.watch.cut(&self.pids(order)?)?)
            }
            "prepare" => {
                self.watch.prepare()?;
                json!({})
            }
            // After `prepare`.
            "dump" => {
                let dirty = self.watch.cut(&self.pids(order)?)?;
                self.watch.forget_outsiders(&dirty)?;
                show(&dirty)
            }
            "durable" => {
                self.watch.durable();
                self.watch.retire()?;
                json!({})
            }
            "failed" => json!({}),
            "changes" => {
                let dirty = self.watch.look()?;
                self.verdict(&dirty)?
            }
            "capture" => self.capture(order)?,
            "watch" => {
                self.watch.watch_processes(&self.pids(order)?)?;
                json!({})
            }
            "registers" => {
                let read = |tid: &i32| self.watch.registers(*tid);
                json!({ "registers": self.pids(order)?.iter().map(read).collect::<Vec<_>>() })
            }
            "did" => {
                let did = self.watch.did(&self.pids(order)?)?;
                let did: serde_json::Map<_, _> = did
                    .into_iter()
                    .map(|(pid, bits)| (pid.to_string(), json!(words(bits))))
                    .collect();
                json!({ "did": did })
            }
            other => bail!("{other} is no order"),
        })
    }

    fn upper(&self) -> Result<&Path> {
        self.args.upper.as_deref().context("no --upper")
    }

    fn compare(&self, dirty: &Dirty) -> Result<Option<Comparison>> {
        let Some(layer) = &self.layer else {
            return Ok(None);
        };
        let candidates: Vec<_> = dirty
            .inodes
            .keys()
            .map(|inode| Candidate {
                dev: inode.dev,
                ino: inode.ino,
            })
            .collect();
        let outside = dirty.inodes.values().any(|how| how.is_outside());
        let scope = match (dirty.doubts.is_empty(), outside) {
            (false, _) => Scope::Everything,
            (_, true) => Scope::Search,
            _ => Scope::Candidates,
        };
        Ok(Some(layer.compare(
            self.upper()?,
            &candidates,
            scope,
            &|| false,
        )?))
    }

    fn verdict(&self, dirty: &Dirty) -> Result<Value> {
        let comparison = self.compare(dirty)?;
        let changes: Option<Vec<_>> = comparison.map(|comparison| {
            let show = |change: &Change| {
                let path = change.path.to_string_lossy();
                json!({ "path": path, "what": change.what.word() })
            };
            comparison.changes.iter().map(show).collect()
        });
        let doubt = match changes {
            None => Some("nothing was captured yet".to_owned()),
            Some(_) => None,
        };
        Ok(json!({ "doubt": doubt, "changes": changes.unwrap_or_default() }))
    }

    /// What a capture of the layer tells of its contents.
    fn contents(&self) -> Result<HashMap<(u64, u64), Digest>> {
        let writer = self.store.writer(&SandboxId::new("inspector", "driver")?)?;
        let mut pending = writer.begin(TurnNo(1))?;
        let captured = pending.capture(self.upper()?, Part::Whole, &|| false)?;
        Ok(captured.contents)
    }

    /// As around a checkpoint, while the layer stands still.
    fn capture(&mut self, order: &Order) -> Result<Value> {
        self.watch.prepare()?;
        let dirty = self.watch.cut(&self.pids(order)?)?;
        let answer = self.verdict(&dirty)?;
        match self.compare(&dirty)?.zip(self.layer.as_mut()) {
            Some((comparison, layer)) => {
                layer.apply(comparison)?;
                let contents = self.contents()?;
                if let Some(layer) = &mut self.layer {
                    layer.learn(&contents);
                }
            }
            None => self.layer = Some(Layer::read(self.upper()?, &|| false)?),
        }
        self.watch.durable();
        self.watch.retire()?;
        Ok(answer)
    }

    /// The processes of the order, or all of the cgroup and below.
    fn pids(&self, order: &Order) -> Result<Vec<i32>> {
        if let Some(pids) = &order.pids {
            return Ok(pids.clone());
        }
        let mut all = Vec::new();
        let mut dirs = vec![self.args.cgroup.clone()];
        while let Some(dir) = dirs.pop() {
            let text = std::fs::read_to_string(dir.join("cgroup.procs"))?;
            all.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            for entry in std::fs::read_dir(&dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    dirs.push(entry.path());
                }
            }
        }
        Ok(all)
    }
}

fn show(dirty: &Dirty) -> Value {
    let inodes: Vec<_> = dirty
        .inodes
        .iter()
        .map(|(inode, how)| {
            let dev = format!("{}:{}", libc::major(inode.dev), libc::minor(inode.dev));
            json!({ "dev": dev, "ino": inode.ino, "how": how.words() })
        })
        .collect();
    let doubt = (!dirty.doubts.is_empty()).then(|| dirty.doubts.join("; "));
    json!({ "doubt": doubt, "inodes": inodes, "flags": dirty.happened.words() })
}

fn words(did: u32) -> Vec<&'static str> {
    [
        (did_bits::FILE, "file"),
        (did_bits::SEND, "send"),
        (did_bits::RECEIVE, "receive"),
        (did_bits::PIPE, "pipe"),
        (did_bits::FORK, "fork"),
        (did_bits::EXEC, "exec"),
        (did_bits::SIGNAL, "signal"),
        (did_bits::GET_SIGNAL, "get_signal"),
        (did_bits::MEMORY, "memory"),
        (did_bits::EXIT, "exit"),
    ]
    .into_iter()
    .filter_map(|(bit, word)| (did & bit != 0).then_some(word))
    .collect()
}
