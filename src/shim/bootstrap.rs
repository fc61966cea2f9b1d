//! The shim's binary: `start`, `delete`, `-v`, `-info`, and serving.

use std::{
    env, fs,
    io::{Read, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use containerd_shim::{
    Config, Error, ExitSignal, Flags, Shim, StartOpts,
    api::DeleteResponse,
    protos::{
        protobuf::{Message, MessageField, well_known_types::any::Any},
        types::introspection::{RuntimeInfo, RuntimeRequest, RuntimeVersion},
    },
    publisher::RemotePublisher,
    socket_address, spawn,
    util::write_address,
};

use super::{
    control::ControlService,
    delete,
    events::RemoteSink,
    hold,
    host::{Host, Linux},
    io::Pump,
    logger, orphans,
    reaper::Reaper,
    run_dir::RUN,
    service::{Service, Stop},
    spec::Spec,
};
use crate::{
    config,
    control::{ControlSocket, SHIMS},
    inspector,
    rootfs::Mounted,
    runtime::{criu_version, empty_tar, start_line},
    sandbox::SandboxId,
};

/// The runtime's name in containerd.
pub const RUNTIME: &str = "io.containerd.crab.v2";
/// Annotations whose value names a group of containers that share a shim, as in containerd's own
/// shim: the first that is there counts.
const GROUPS: [&str; 2] = ["dev.crab.group", "io.kubernetes.cri.sandbox-id"];
/// How long the last events may take to reach containerd.
const FLUSH: Duration = Duration::from_secs(5);

/// Does what the command line says.
pub fn main() -> anyhow::Result<()> {
    if empty_tar::is_called() {
        return Ok(empty_tar::main()?);
    }
    if criu_version::is_called() {
        return Ok(criu_version::main()?);
    }
    let args: Vec<_> = env::args_os().skip(1).collect();
    if args.first().is_some_and(|word| word == hold::WORD) {
        return hold::main();
    }
    if let [word, dir] = &args[..]
        && word == start_line::WORD
    {
        return Ok(start_line::wait_at(Path::new(dir))?);
    }
    if let [word, run] = &args[..]
        && word == inspector::WORD
    {
        // As a line: who has started us puts it into the journal.
        return inspector::load(Path::new(run)).map_err(|why| {
            eprintln!("{why}");
            std::process::exit(1)
        });
    }
    let flags = containerd_shim::parse(&args)?;
    if flags.version {
        println!("{}:", env::args().next().unwrap_or_default());
        println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
        println!("  Runtime:  {RUNTIME}");
        return Ok(());
    }
    if flags.info {
        return info();
    }
    if flags.namespace.is_empty() {
        bail!(
            "this program is started by containerd: use --runtime {RUNTIME} with ctr, docker or \
             nerdctl, and see the crab command for the rest"
        );
    }
    small_memory();
    let config = Config {
        no_setup_logger: true,
        no_reaper: true,
        ..Config::default()
    };
    containerd_shim::run::<Crab>(RUNTIME, Some(config));
    Ok(())
}

/// One heap for all threads: an idle shim is mostly allocator arenas otherwise.
fn small_memory() {
    // SAFETY: called before any other thread exists; both parameters are documented ones.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 128 * 1024);
    }
}

/// `-info`: which features the runtime below has; containerd asks before it uses ID-mapped mounts.
fn info() -> anyhow::Result<()> {
    let mut input = Vec::new();
    std::io::stdin().read_to_end(&mut input)?;
    let options = request_options(&input);
    let config = config::Config::load(
        Path::new(config::FILE),
        options.as_ref(),
        std::iter::empty(),
    )?;
    let features = std::process::Command::new(&config.runtime)
        .arg("features")
        .output();
    let features = match features {
        Ok(output) if output.status.success() => MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into(),
            value: output.stdout,
            ..Default::default()
        }),
        // Older runtimes have no such command.
        _ => MessageField::none(),
    };
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        options: options.map_or_else(MessageField::none, MessageField::some),
        features,
        ..Default::default()
    };
    std::io::stdout().write_all(&info.write_to_bytes()?)?;
    Ok(())
}

/// What containerd writes to stdin: the options themselves, or (newer) a request around them.
fn request_options(input: &[u8]) -> Option<Any> {
    let wrapped = RuntimeRequest::parse_from_bytes(input)
        .ok()
        .and_then(|r| r.options.into_option())
        .filter(|o| !o.type_url.is_empty());
    wrapped.or_else(|| {
        Any::parse_from_bytes(input)
            .ok()
            .filter(|o| o.type_url.contains("Options"))
    })
}

/// What `containerd_shim::run` drives.
struct Crab {
    namespace: String,
    id: String,
    address: String,
    socket: String,
    debug: bool,
    exit: Arc<ExitSignal>,
    running: parking_lot::Mutex<Option<Running>>,
}

/// What lives as long as the serving shim.
struct Running {
    host: Arc<dyn Host>,
    events: Arc<RemoteSink>,
    control: Option<ControlSocket>,
}

impl Stop for ExitSignal {
    fn stop(&self) {
        self.signal();
    }
}

impl Shim for Crab {
    type T = Service;

    fn new(_: &str, args: &Flags, _: &mut Config) -> Self {
        Self {
            namespace: args.namespace.clone(),
            id: args.id.clone(),
            address: args.address.clone(),
            socket: args.socket.clone(),
            debug: args.debug,
            exit: Arc::default(),
            running: parking_lot::Mutex::default(),
        }
    }

    fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let bundle = env::current_dir().map_err(|e| failed("bundle", e))?;
        Spec::load(&bundle).map_err(|e| failed("start", e))?;
        let group = group(&bundle, &opts.id);
        let (pid, address) = spawn(opts, &group, Vec::new())?;
        containerd_shim::cgroup::set_cgroup_and_oom_score(pid)?;
        write_address(&address)?;
        Ok(address)
    }

    fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        // containerd runs this in the bundle; the id may be that of another container of a group.
        let bundle = env::current_dir()
            .ok()
            .and_then(|d| Some(d.parent()?.join(&self.id)))
            .ok_or_else(|| failed("delete", "no bundle"))?;
        let sandbox = SandboxId::new(&self.namespace, &self.id).map_err(|e| failed("delete", e))?;
        let host = linux().map_err(|e| failed("delete", e))?;
        if let Err(e) = inspector::sweep(Path::new(RUN)) {
            log::warn!("the inspector: {e}");
        }
        // The bundle's `address` may not have been written yet.
        let address = socket_address(&self.address, &self.namespace, &group(&bundle, &self.id));
        orphans::remove_dead_socket(Path::new(socket_path(&address)));
        let response = delete::after_death(&host, &sandbox, &bundle);
        orphans::sweep(&host, Path::new(RUN));
        Ok(response)
    }

    fn wait(&mut self) {
        self.exit.wait();
        // containerd may have removed the bundle, and with it the file that names the socket.
        let _ = fs::remove_file(socket_path(&self.socket));
        let running = self.running.lock().take();
        let run = Path::new(RUN);
        if let Some(running) = running {
            running.events.flush(FLUSH);
            drop(running.control);
            orphans::forget(run);
            orphans::sweep(&*running.host, run);
        }
        // Everything is done; joining the server's threads would wait for its clients.
        std::process::exit(0);
    }

    fn create_task_service(&self, publisher: RemotePublisher) -> Service {
        match self.serve(publisher) {
            Ok(service) => service,
            Err(e) => {
                eprintln!("{RUNTIME}: {e:#}");
                std::process::exit(1);
            }
        }
    }
}

fn socket_path(address: &str) -> &str {
    address.trim_start_matches("unix://")
}

/// The containers of one group share a shim; most are a group of their own.
fn group(bundle: &Path, id: &str) -> String {
    let annotations = Spec::load(bundle).map(|spec| spec.annotations);
    let annotations = annotations.unwrap_or_default();
    let group = GROUPS.iter().find_map(|label| annotations.get(*label));
    group.map_or_else(|| id.to_owned(), Clone::clone)
}

fn failed(step: &str, e: impl std::fmt::Display) -> Error {
    Error::Other(format!("{step}: {e}"))
}

fn linux() -> anyhow::Result<Linux> {
    Ok(Linux {
        reaper: Reaper::start().context("reaper")?,
        pump: Pump::new().context("stdio")?,
        config_file: config::FILE.into(),
        mounted: Mounted::default(),
    })
}

impl Crab {
    fn serve(&self, publisher: RemotePublisher) -> anyhow::Result<Service> {
        logger::init(self.debug).context("log")?;
        let address = env::var("TTRPC_ADDRESS").context("TTRPC_ADDRESS")?;
        let events = RemoteSink::start(publisher, address, self.namespace.clone())?;
        let host: Arc<dyn Host> = Arc::new(linux()?);
        let service = Service::new(
            &self.namespace,
            Arc::clone(&host),
            Arc::clone(&events) as _,
            Arc::clone(&self.exit) as _,
        );
        let control = ControlService(service.clone());
        let control = ControlSocket::serve(&Path::new(RUN).join(SHIMS), Arc::new(control))
            .inspect_err(|e| log::error!("no control socket: {e}"))
            .ok();
        if let Some(control) = &control {
            service.set_control(control.path().to_owned());
        }
        orphans::record(Path::new(RUN), Path::new(socket_path(&self.socket)))
            .unwrap_or_else(|e| log::warn!("should this shim be killed, its socket stays: {e}"));
        *self.running.lock() = Some(Running {
            host,
            events,
            control,
        });
        Ok(service)
    }
}
