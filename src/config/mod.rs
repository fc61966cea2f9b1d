//! crab's configuration: one TOML schema, three places, the later one winning.
//!
//! 1. `/etc/crab/config.toml`, the host's;
//! 2. the runtime's options in containerd's or Docker's configuration: TOML of the same schema
//!    (`runtimeoptions.v1.Options`), or plain runc options (`containerd.runc.v1.Options`);
//! 3. annotations `dev.crab.<key>` on one container.
//!
//! Every key is described at its field of [`Config`], and in `shim-config/crab.toml`. What is
//! wrong anywhere is refused, with an error that names the place, the key and what would be right.
//!
//! An annotation is written by whoever may start a container, which in Kubernetes is not the
//! host's owner: it can set only what concerns its own sandbox ([`Config`] marks the others
//! *host only*).

mod options;
mod schema;
pub mod units;

pub use schema::{ConfigError, Place};

use std::{
    fs, io,
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    time::Duration,
};

use options::Options;
use protobuf::well_known_types::any::Any;

use crate::engine::Limits;

/// The host's file.
pub const FILE: &str = "/etc/crab/config.toml";

/// What one shim was told to do. [`Config::default`] is what holds where nobody says anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Checkpoint after each turn ("opt in"). Default false.
    pub enabled: bool,
    /// The OCI runtime: an absolute path or a name on PATH. Default `runc`. *Host only.*
    pub runtime: PathBuf,
    /// The OCI runtime's state directory. Default `/run/crab/runc`. *Host only.*
    pub root: PathBuf,
    /// Let systemd make the cgroups. Default false. *Host only.*
    pub systemd_cgroup: bool,
    /// Use MS_MOVE instead of pivot_root (a root file system on a ramdisk). *Host only.*
    pub no_pivot_root: bool,
    /// Give the container no session keyring of its own. *Host only.*
    pub no_new_keyring: bool,
    /// Move the shim itself into this cgroup. Default none (`""`). *Host only.*
    pub shim_cgroup: Option<String>,
    /// Owner of the container's standard streams. Default 0. *Host only.*
    pub io_uid: u32,
    /// Group of the container's standard streams. Default 0. *Host only.*
    pub io_gid: u32,
    /// Where a `ctr` or `docker` checkpoint without a path of its own goes. Default none (`""`):
    /// the client's. *Host only.*
    pub criu_image_path: Option<PathBuf>,
    /// CRIU's work directory (its logs). Default none (`""`): the bundle. *Host only.*
    pub criu_work_path: Option<PathBuf>,
    /// Where checkpoints are kept. Default `/var/lib/crab`. *Host only.*
    pub store: PathBuf,
    /// How many of the newest turns keep their checkpoints. Default 10; 1 to 100000.
    pub keep: u32,
    /// How large a sandbox's checkpoints may be, in bytes, the newest one aside. Default none; at
    /// least 1 MiB.
    pub sandbox_limit: Option<u64>,
    /// The same for the checkpoints of all sandboxes.
    pub store_limit: Option<u64>,
    /// Whether a containerd Checkpoint without options stops the container. Docker and nerdctl
    /// send none for a custom runtime, so `--leave-running` cannot be seen. Default true.
    pub checkpoint_stops: bool,
    /// Where a background process's output goes when the exec that started it is over.
    pub orphan_output: OrphanOutput,
    /// What the next exec waits for.
    pub gate: Gate,
    /// Whether a turn that changed nothing is skipped, as far as the inspector can tell. Default
    /// true; else every turn is `full`.
    pub skip_unchanged: bool,
    /// Whether processes that merely ran, and moved no data, count as unchanged (D6c). Default true.
    pub consistent_cut: bool,
    /// Whether a dump has only the pages that were written to since the one before, where the kernel
    /// marks them; the sandbox has no transparent huge pages then.
    pub incremental: Incremental,
    /// How many pre-dumps come before a dump, where dumps are incremental. Default as many as pay
    /// (`"auto"`); 0 to 3.
    pub pre_dumps: Option<u32>,
    /// How long a sandbox may go on without a turn: then its state is looked at, and kept if it has
    /// changed. Default none (`""`); 1 s to 24 h.
    pub timer: Option<Duration>,
    /// Whether the sandbox sees which turn it is at, and whether it was taken back. Default false.
    pub view: bool,
    /// Execs that are no turns. Default none.
    pub not_turns: Vec<Pattern>,
    /// What becomes of established TCP connections at a restore.
    pub tcp: Tcp,
    /// What becomes of a sandbox that dies without having been asked to.
    pub recover: Recover,
    /// How long an exec's streams are kept open for processes that outlive it. Default 10 s; at
    /// most 60 s.
    pub exec_linger: Duration,
    /// How long CRIU's dump may take, and the host owner's hook in a cut. Default 60 s; 1 s to 10 min.
    pub dump_timeout: Duration,
    /// What the checkpoints of all sandboxes may cost the host. *Host only.*
    pub engine: Engine,
}

/// See [`Config::engine`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Engine {
    /// Bytes a second that are written in the long run. Default none (`"unlimited"`); at least 1 MiB.
    pub rate: Option<NonZeroU64>,
    /// Bytes that may be written at once after a pause. Default 256 MiB; at least 1 MiB.
    pub burst: u64,
    /// Dumps that run at once, before one that nobody waits for has to wait. Default 0, for four for each
    /// CPU of the host; at most 1024.
    pub dumps: u32,
    /// Bytes that are captured and not yet written. Default 1 GiB; at least 1 MiB.
    pub undrained: u64,
}

/// Fewer leave CPUs idle, or to others alone, while agents wait; more only slow each other, and the
/// sandboxes' own work, down: docs/engine.md.
const DUMPS_FOR_A_CPU: u32 = 4;

impl Engine {
    /// These, as the engine takes them.
    pub fn limits(&self) -> Limits {
        let cpus = || std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
        Limits {
            rate: self.rate,
            burst: self.burst,
            dumps: match self.dumps {
                0 => u32::try_from(cpus())
                    .unwrap_or(u32::MAX)
                    .saturating_mul(DUMPS_FOR_A_CPU),
                dumps => dumps,
            },
            undrained: self.undrained,
        }
    }
}

/// See [`Config::orphan_output`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrphanOutput {
    /// Into the sandbox's log. The default.
    Log,
    /// Nowhere.
    Discard,
}

/// See [`Config::gate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Until the last turn is durable. The default.
    Strict,
    /// Until the sandbox is thawed; a crash may lose one turn.
    Async,
    /// For nothing.
    Off,
}

/// See [`Config::incremental`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incremental {
    /// Where it is seen, too, if anybody clears the marks. The default.
    Auto,
    /// Even where that would go unnoticed, and a restore would bring old memory back.
    Always,
    /// Each dump has everything.
    Never,
}

/// See [`Config::recover`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recover {
    /// Its end is told. The default.
    Off,
    /// It goes on from its last checkpoint with processes, at once, or at its next start.
    Last,
}

/// See [`Config::tcp`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tcp {
    /// They are closed. The default.
    Close,
    /// They are put back as they were.
    Keep,
}

/// A glob on a command line: `*` is any text, `?` one character, all else itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the whole of `command_line` (arguments joined by a space) matches.
    pub fn matches(&self, command_line: &str) -> bool {
        schema::glob(&self.0, command_line)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            enabled: false,
            runtime: "runc".into(),
            root: "/run/crab/runc".into(),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            shim_cgroup: None,
            io_uid: 0,
            io_gid: 0,
            criu_image_path: None,
            criu_work_path: None,
            store: "/var/lib/crab".into(),
            keep: 10,
            sandbox_limit: None,
            store_limit: None,
            checkpoint_stops: true,
            orphan_output: OrphanOutput::Log,
            gate: Gate::Strict,
            skip_unchanged: true,
            consistent_cut: true,
            incremental: Incremental::Auto,
            pre_dumps: None,
            timer: None,
            view: false,
            not_turns: Vec::new(),
            tcp: Tcp::Close,
            recover: Recover::Off,
            exec_linger: Duration::from_secs(1),
            dump_timeout: Duration::from_secs(60),
            engine: Engine {
                rate: None,
                burst: 256 << 20,
                dumps: 0,
                undrained: 1 << 30,
            },
        }
    }
}

impl Config {
    /// Reads the three places.
    ///
    /// A `file` that is missing counts as empty. `annotations` may be all of a container's: those
    /// without the prefix `dev.crab.` are skipped.
    pub fn load<'a>(
        file: &Path,
        options: Option<&Any>,
        annotations: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        let place = || Place::File(file.to_owned());
        match fs::read(file) {
            Ok(text) => schema::apply_toml(&mut config, &place(), &text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(ConfigError::new(place(), format!("cannot read it: {e}"))),
        }
        match options.map(options::decode).transpose()? {
            Some(Options::Toml { place, text }) => schema::apply_toml(&mut config, &place, &text)?,
            Some(Options::Keys(keys)) => {
                for (key, value) in keys {
                    schema::set(&mut config, &Place::Options, key, &value)?;
                }
            }
            None => {}
        }
        for (name, text) in annotations {
            if let Some(key) = name.strip_prefix(schema::ANNOTATION) {
                schema::apply_annotation(&mut config, key, text)?;
            }
        }
        Ok(config)
    }

    /// Whether an exec of these arguments is a turn, that is, matches none of `not_turns`.
    pub fn is_turn(&self, args: &[String]) -> bool {
        let line = args.join(" ");
        !self.not_turns.iter().any(|p| p.matches(&line))
    }
}

#[cfg(test)]
mod tests;
