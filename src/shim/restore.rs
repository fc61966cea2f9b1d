//! Start from images: containerd's restore, and an armed one (D13).
//!
//! Both take up init's pipes or terminal again, and the pipes of what execs had left running
//! (D12).

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    artefacts,
    container::{Container, Leftover},
    error::{Context, Kind, Result, ShimError},
    hold, hooks,
    io::{IoContext, ProcessIo, StdioConfig},
    proto,
    start::{adopt_init, attach, discard, runtime_stdio},
    state::Phase,
};
use crate::{
    config::{OrphanOutput, Tcp},
    coordinator::cut::Scene,
    packet_lock::PacketLock,
    runtime::{
        self,
        criu_conf::{self, CriuConf},
        descriptors::{self, Stream},
    },
    sandbox::TurnNo,
    store::{self, Laid},
};

/// Where a container's processes come from instead of a boot.
#[derive(Debug, Clone)]
pub enum Source {
    /// containerd's Create named images.
    Client {
        /// CRIU's image directory.
        image: PathBuf,
    },
    /// `crab restore` armed this start.
    Armed {
        /// The turn to go back to.
        turn: TurnNo,
        /// What its checkpoint brings back. Without processes Start boots.
        kind: store::Kind,
        /// Its images, and its writable layer, which Create puts back.
        laid: Arc<Laid>,
        /// A directory on the same file system, which the store tidies.
        scratch: PathBuf,
    },
}

impl Source {
    /// Whether Start boots nevertheless: there are files, and no processes.
    pub fn boots(&self) -> bool {
        matches!(self, Self::Armed { kind, .. } if *kind == store::Kind::Files)
    }

    /// The turn whose checkpoint it is; a client's images have none.
    pub fn turn(&self) -> Option<TurnNo> {
        match self {
            Self::Client { .. } => None,
            Self::Armed { turn, .. } => Some(*turn),
        }
    }

    /// Adds to an error what can be done about it.
    pub fn way_out(&self, mut error: ShimError) -> ShimError {
        if let Self::Armed { turn, .. } = self {
            error.message += &format!(
                "\nTurn {turn} stays armed. `crab restore CONTAINER@TURN` chooses another one (`crab \
                 log` lists them), `crab restore CONTAINER --cancel` lets the next start boot."
            );
        }
        error
    }

    fn image(&self) -> PathBuf {
        match self {
            Self::Client { image } => image.clone(),
            Self::Armed { laid, .. } => laid.image_dir(),
        }
    }
}

impl Source {
    /// Where a restore may put links to the images: not among those that the store answers for.
    fn scratch(&self) -> &Path {
        match self {
            Self::Client { image } => image,
            Self::Armed { scratch, .. } => scratch,
        }
    }
}

impl Source {
    /// What was kept of the host's files; a client's images have none.
    pub(super) fn bundle(&self) -> Option<PathBuf> {
        match self {
            Self::Client { .. } => None,
            Self::Armed { laid, .. } => Some(laid.bundle_dir()),
        }
    }
}

/// Restores the container's processes. After an error none of them is left.
pub fn restore(container: &Arc<Container>, source: &Source) -> Result<()> {
    let images = source.image();
    let step = format!("{}: restore from {images:?}", container.sandbox);
    let io = container.init.io().ok_or_else(|| {
        ShimError::new(Kind::Failed, format!("{step}: an earlier try has failed"))
    })?;
    let streams = descriptors::load(&images).context(&step)?;
    let taken = take_up(container, &streams).context(&step)?;
    if let Some(stream) = streams.iter().find(|s| s.exec_id.is_empty() && s.fd == 0) {
        io.preload_stdin(&pending(stream));
    }
    let mut image = descriptors::prepare_restore(
        &images,
        &[source.scratch(), container.run_dir.path()],
        taken.fds,
        descriptors::of_this_boot(&images),
    )
    .context(&step)?;
    let hooked = hooks::restored_exists();
    // What the client has paused comes back as it is: before its first instruction.
    let paused = container.phase() == Phase::Paused;
    let script = match hooked || paused {
        true => Some(hold::write_script(container.run_dir.path()).context(&step)?),
        false => None,
    };
    let keep_tcp = container.config.tcp == Tcp::Keep || descriptors::has_no_outside_tcp(&images);
    let home = CriuConf::for_restore(!keep_tcp, script.as_deref())
        .write(&container.run_dir.criu_home("restore"))
        .context(&step)?;
    let work = container.run_dir.criu_work();
    fs::create_dir_all(&work).context(&step)?;
    if let Some(saved) = source.bundle() {
        artefacts::put_files_back(container, &saved)?;
    }
    let (stdio, socket) = runtime_stdio(container, &io)?;
    let pid_file = pid_file(container);
    let watch = container.host.reaper().watch();
    let extra_fds = image.take_fds();
    let locked = keep_tcp.then(|| PacketLock::for_restore(&images, &container.network()));
    let restored = container.runtime.restore(runtime::Restore {
        id: container.sandbox.id(),
        bundle: &container.bundle,
        image_path: image.path(),
        work_path: &work,
        pid_file: &pid_file,
        stdio,
        extra_fds,
        tcp_established: keep_tcp,
        shell_job: container.init.stdio.terminal,
        file_locks: true,
        no_pivot_root: container.config.no_pivot_root,
        home: Some(home),
    });
    if let Err(e) = restored {
        discard(container);
        let log = criu_conf::log_tail(&work.join("restore.log"));
        let text = format!("{step}: {e}; CRIU's log says:\n{log}");
        return Err(ShimError::new(Kind::Failed, text));
    }
    let begun = attach(container, &io, socket)
        .and_then(|()| adopt_init(container, &pid_file, watch))
        .and_then(|()| match source.bundle() {
            Some(saved) => artefacts::put_limits_back(container, &saved),
            None => Ok(()),
        })
        .and_then(|()| {
            for leftover in &taken.leftovers {
                leftover.io.start().context(&step)?;
            }
            match hooked {
                true => hooks::run_restored(container).context(&step),
                false if paused => confirm_pause(container).context(&step),
                false => Ok(()),
            }
        });
    // Only now, so that what the hook sees is what was in the images.
    drop(locked);
    begun.inspect_err(|_| discard(container))?;
    *container.leftovers.lock() = taken.leftovers;
    fs::remove_dir_all(&work).context(&step)
}

/// Where the runtime writes init's pid. The bundle's file tells, also when this shim is dead, the
/// pid that the client knows.
fn pid_file(container: &Container) -> PathBuf {
    match container.init.pid() {
        0 => container.bundle.join("init.pid"),
        _ => container.run_dir.path().join("init.pid"),
    }
}

/// The script has frozen them; now the client's freeze holds them.
fn confirm_pause(container: &Container) -> Result<()> {
    let held = container.place()?.freeze.hold()?;
    drop(held);
    Ok(())
}

/// New pipes for what execs had left running.
struct Taken {
    fds: Vec<(u64, OwnedFd)>,
    leftovers: Vec<Leftover>,
}

fn take_up(container: &Container, streams: &[Stream]) -> Result<Taken> {
    let mut by_exec: BTreeMap<&str, Vec<&Stream>> = BTreeMap::new();
    for stream in streams.iter().filter(|s| !s.exec_id.is_empty()) {
        by_exec.entry(&stream.exec_id).or_default().push(stream);
    }
    let mut taken = Taken {
        fds: Vec::new(),
        leftovers: Vec::new(),
    };
    for (exec_id, streams) in by_exec {
        let target = |fd| {
            let stream = streams.iter().find(|s| s.fd == fd);
            stream.map_or_else(String::new, |s| reopenable(&s.target))
        };
        let stdio = StdioConfig {
            terminal: false,
            stdin: String::new(),
            stdout: target(1),
            stderr: target(2),
        };
        let targets = [stdio.stdout.clone(), stdio.stderr.clone()];
        let io = Arc::new(open_leftover(container, exec_id, &stdio)?);
        let ends = io.take_child_fds().into_iter().flatten();
        for (fd, end) in (0u8..).zip(ends) {
            for stream in streams.iter().filter(|s| s.fd == fd) {
                taken.fds.push((
                    stream.inode,
                    end.try_clone().context(format_args!("pipe of {exec_id}"))?,
                ));
                if fd == 0 {
                    io.preload_stdin(&pending(stream));
                }
            }
        }
        taken.leftovers.push(Leftover {
            exec_id: exec_id.to_owned(),
            targets,
            io,
        });
    }
    Ok(taken)
}

/// A target that still means something without the client that made it: a FIFO does not.
fn reopenable(target: &str) -> String {
    match target.split_once("://") {
        Some(("file" | "binary", _)) => target.to_owned(),
        _ => String::new(),
    }
}

fn open_leftover(container: &Container, exec_id: &str, stdio: &StdioConfig) -> Result<ProcessIo> {
    let reaper = Arc::clone(container.host.reaper());
    let spawner = move |command| reaper.spawn_detached(command);
    let orphan = match container.config.orphan_output {
        OrphanOutput::Log => container.init.io().and_then(|io| io.orphan_sink()),
        OrphanOutput::Discard => None,
    };
    let context = IoContext {
        namespace: container.sandbox.namespace(),
        container_id: exec_id,
        uid: container.config.io_uid,
        gid: container.config.io_gid,
        spawner: &spawner,
        orphan,
    };
    ProcessIo::open_leftover(container.host.pump(), stdio, &context)
        .context(format_args!("stdio of {exec_id}"))
}

fn pending(stream: &Stream) -> Vec<u8> {
    proto::from_hex(&stream.pending).unwrap_or_default()
}
