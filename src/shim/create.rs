//! How a container comes to be: Create.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use containerd_shim::protos::api::CreateTaskRequest;
use parking_lot::{Condvar, Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::{
    container::{Container, Inner},
    early_join::EarlyJoin,
    error::{Context, Kind, Result, ShimError},
    events::EventSink,
    health_check,
    host::Host,
    io::StdioConfig,
    process::Process,
    proto,
    restore::Source,
    run_dir::RunDir,
    spec::{self, Spec},
    start,
    state::Phase,
    undo::Undo,
    view,
};
use crate::{
    config::{Config, Recover},
    control::ControlSocket,
    coordinator::doors::Doors,
    rootfs::{self, Overlay, PutBackError, Replaced},
    sandbox::SandboxId,
    store::{self, Store},
};

/// What has to be known to clean up after the shim has died: a file in the sandbox's run directory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Remains {
    /// containerd's directory for the container.
    pub bundle: PathBuf,
    /// The cgroup that the client asked for.
    pub cgroups_path: Option<PathBuf>,
    /// The runtime's binary.
    pub runtime: PathBuf,
    /// Its state directory, without the namespace.
    pub root: PathBuf,
    /// Whether it drives systemd.
    pub systemd_cgroup: bool,
    /// Where the shim mounts the root file system, if it does.
    pub mounted: Option<PathBuf>,
    /// The directories of its cgroup, once it has one.
    #[serde(default)]
    pub cgroup: Vec<PathBuf>,
}

impl Remains {
    const FILE: &str = "remains.json";

    /// What a shim has written down; none if it died before that, or had no sandbox there.
    pub fn load(run_dir: &RunDir) -> Option<Self> {
        let bytes = fs::read(run_dir.path().join(Self::FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn save(&self, run_dir: &RunDir) -> std::io::Result<()> {
        let path = run_dir.path().join(Self::FILE);
        fs::write(path, serde_json::to_vec(self)?)
    }

    /// Adds the cgroup, as soon as there is one.
    pub fn add_cgroup(run_dir: &RunDir, cgroup: Vec<PathBuf>) -> std::io::Result<()> {
        let mut remains = Self::load(run_dir)
            .ok_or_else(|| std::io::Error::other("this shim's own notes are gone"))?;
        if remains.cgroup != cgroup {
            remains.cgroup = cgroup;
            remains.save(run_dir)?;
        }
        Ok(())
    }
}

/// What every container of a shim shares.
pub struct World<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The machine below.
    pub host: &'a Arc<dyn Host>,
    /// Where events go.
    pub events: &'a Arc<dyn EventSink>,
    /// The shim's control socket.
    pub control: Option<&'a Path>,
}

/// Makes a container from a request. After an error nothing is left of it.
pub fn create(world: &World<'_>, request: &CreateTaskRequest) -> Result<Arc<Container>> {
    let World {
        namespace, host, ..
    } = *world;
    let sandbox = SandboxId::new(namespace, &request.id)?;
    let bundle = PathBuf::from(&request.bundle);
    if !bundle.is_absolute() {
        let text = format!("{sandbox}: bundle {bundle:?} is no absolute path");
        return Err(ShimError::new(Kind::InvalidArgument, text));
    }
    let spec = Spec::load(&bundle).context(&sandbox)?;
    let annotations = spec.annotations.iter();
    let config = Config::load(
        host.config_file(),
        request.options.as_ref(),
        annotations.map(|(k, v)| (k.as_str(), v.as_str())),
    )
    .map_err(|e| ShimError::new(Kind::InvalidArgument, format!("{sandbox}: {e}")))?;

    let mut undo = Undo::new();
    let run_dir = host.run_dir(&sandbox);
    run_dir
        .create()
        .context(format_args!("{sandbox}: cannot make {:?}", run_dir.path()))?;
    undo.push({
        let run_dir = run_dir.clone();
        move || run_dir.remove().map_err(|e| e.to_string())
    });

    // Before there is anything to clean up.
    let remains = Remains {
        cgroups_path: spec.cgroups_path().map(Path::to_owned),
        runtime: config.runtime.clone(),
        root: config.root.clone(),
        systemd_cgroup: config.systemd_cgroup,
        mounted: (!request.rootfs.is_empty()).then(|| bundle.join("rootfs")),
        cgroup: Vec::new(),
        bundle: bundle.clone(),
    };
    remains.save(&run_dir).context(&sandbox)?;
    if let Some(socket) = world.control {
        ControlSocket::link(socket, run_dir.path()).context(&sandbox)?;
    }
    let source = source_of(request, &sandbox, &config)?;
    let spec = match config.enabled && config.view {
        true => view::give(&sandbox, &bundle, &spec, &config, source.as_ref(), &run_dir)?,
        false => spec,
    };
    let mounted = mount_rootfs(host, request, &sandbox, &spec, source.as_ref(), &mut undo)?;
    if spec.wants_private_network() {
        make_netns(host, &sandbox, &bundle, &run_dir)?;
    }

    let early_join = match config.enabled && config.skip_unchanged {
        true => {
            let host = Arc::clone(host);
            EarlyJoin::begin(move || host.join_inspector())
        }
        false => EarlyJoin::default(),
    };
    let boots = source.as_ref().is_none_or(Source::boots);
    let phase = match boots {
        true => Phase::Created,
        false => Phase::CreatedCheckpoint,
    };
    let stdio = StdioConfig {
        terminal: request.terminal,
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
    };
    let container = Arc::new(Container {
        init: Process::new("", stdio, Vec::new()),
        runtime: host.runtime(&config, namespace, run_dir.path()),
        host: Arc::clone(host),
        events: Arc::clone(world.events),
        doors: Doors::new(),
        place: RwLock::default(),
        turns: OnceLock::new(),
        early_join,
        leftovers: Mutex::default(),
        tidying: Mutex::default(),
        limits: Mutex::default(),
        inner: Mutex::new(Inner::new(phase)),
        changed: Condvar::new(),
        health_check: health_check::of(&spec),
        source,
        sandbox,
        bundle,
        config,
        spec,
        run_dir,
        mounted,
        mounts: request.rootfs.iter().map(proto::mount_spec).collect(),
    });
    if boots {
        start::create_init(&container)?;
    } else {
        // The client's side exists from now on; the processes come with Start.
        let io = start::open_io(&container, &container.init)?;
        container.init.set_io(io);
    }
    undo.forget();
    Ok(container)
}

/// Images to start from: those of the request, or those of an armed restore (D13).
fn source_of(
    request: &CreateTaskRequest,
    sandbox: &SandboxId,
    config: &Config,
) -> Result<Option<Source>> {
    if !request.checkpoint.is_empty() {
        return Ok(Some(Source::Client {
            image: PathBuf::from(&request.checkpoint),
        }));
    }
    if !config.enabled || !config.store.exists() {
        return Ok(None);
    }
    let store = Store::open(&config.store)
        .context(sandbox)?
        .sandbox(sandbox);
    let armed = match store.armed().context(sandbox)? {
        None if config.recover == Recover::Last && store.was_alive() => {
            let last = store.head_with_processes().context(sandbox)?;
            let turn = last.map(|checkpoint| checkpoint.turn());
            if let Some(turn) = turn {
                log::warn!("{sandbox}: it had not ended as it should: back to turn {turn}");
            }
            turn
        }
        armed => armed,
    };
    let Some(turn) = armed else {
        return Ok(None);
    };
    let checkpoint = store
        .get(turn)
        .context(format_args!("{sandbox}: armed for turn {turn}"))?;
    let changed = checkpoint.changed_reference().context(sandbox)?;
    if let Some(path) = changed {
        let text = format!(
            "{sandbox}: armed for turn {turn}, whose processes were dumped earlier, upon another {path:?} than \
             it has: `crab restore CONTAINER@TURN` with an earlier turn"
        );
        return Err(ShimError::new(Kind::Failed, text));
    }
    let kind = checkpoint.manifest.facts.kind;
    match kind {
        store::Kind::Full => log::info!("{sandbox}: starting from turn {turn}"),
        store::Kind::Files => log::warn!(
            "{sandbox}: booting on the files of turn {turn}, {}",
            checkpoint.manifest.facts.notes.join("; ")
        ),
    }
    let scratch = store.scratch_dir();
    // All of it, checked, before anything of the sandbox is touched.
    let laid = checkpoint
        .lay_out(&scratch)
        .context(format_args!("{sandbox}: lay out turn {turn}"))?;
    Ok(Some(Source::Armed {
        turn,
        kind,
        laid: Arc::new(laid),
        scratch,
    }))
}

/// Mounts what the request says, or takes what dockerd has mounted; puts files of an armed
/// restore back first. Returns the mount point if it is ours.
fn mount_rootfs(
    host: &Arc<dyn Host>,
    request: &CreateTaskRequest,
    sandbox: &SandboxId,
    spec: &Spec,
    source: Option<&Source>,
    undo: &mut Undo,
) -> Result<Option<PathBuf>> {
    let step = |what| format!("{sandbox}: {what}");
    let bundle = Path::new(&request.bundle);
    let mounts: Vec<_> = request.rootfs.iter().map(proto::mount_spec).collect();
    let mut saved = match source {
        Some(Source::Armed { laid, .. }) => {
            Some(|new: &Path, old: &Path| laid.write_upper(new, old).map_err(|e| e.to_string()))
        }
        _ => None,
    };
    if mounts.is_empty() {
        if let Some(build) = &mut saved {
            let overlay = Overlay::from_mountinfo(&spec.rootfs(bundle))
                .context(step("files cannot be put back"))?;
            put_back(rootfs::remount_with(build, &overlay)).context(step("put files back"))?;
        }
        return Ok(None);
    }
    if let Some(build) = &mut saved {
        let overlay = Overlay::from_mounts(&mounts).context(step("files cannot be put back"))?;
        put_back(rootfs::put_back(build, &overlay)).context(step("put files back"))?;
    }
    let target = bundle.join("rootfs");
    match fs::create_dir(&target) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(e).context(format_args!("{sandbox}: cannot make {target:?}"));
        }
        _ => {}
    }
    host.mount(&mounts, &target)
        .context(step("mount root file system"))?;
    undo.push({
        let (host, target) = (Arc::clone(host), target.clone());
        move || host.unmount(&target)
    });
    Ok(Some(target))
}

/// The old layer goes once the new one is in its place.
fn put_back(
    replaced: std::result::Result<Replaced, PutBackError>,
) -> std::result::Result<(), String> {
    let replaced = replaced.map_err(|e| e.to_string())?;
    replaced.remove_old().map_err(|e| e.to_string())
}

fn make_netns(
    host: &Arc<dyn Host>,
    sandbox: &SandboxId,
    bundle: &Path,
    run_dir: &RunDir,
) -> Result<()> {
    let path = run_dir.netns();
    host.create_netns(&path)
        .context(format_args!("{sandbox}: make a network namespace"))?;
    spec::set_network_path(bundle, &path).context(sandbox)
}
