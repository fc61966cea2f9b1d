//! containerd's task API: each call finds its container and hands over.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use containerd_shim::{
    Task, TtrpcContext,
    protos::{
        api::{
            CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse,
            CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
            ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
            ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
            StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest,
            WaitRequest, WaitResponse,
        },
        events::task::{TaskCreate, TaskIO},
        protobuf::{EnumOrUnknown, MessageField},
        ttrpc,
    },
};
use parking_lot::Mutex;

use super::{
    checkpoint,
    container::Container,
    create, delete,
    error::{Context, Kind, Result, ShimError},
    events::{EventSink, TaskEvent},
    host::Host,
    proto, start,
};

/// Ends the shim.
pub trait Stop: Send + Sync {
    /// No container is left.
    fn stop(&self);
}

enum Slot {
    /// A Create is under way.
    Reserved,
    Taken(Arc<Container>),
}

/// The containers of one shim: one, or those of a pod. Clones share them.
#[derive(Clone)]
pub struct Service(Arc<Shared>);

struct Shared {
    namespace: String,
    host: Arc<dyn Host>,
    events: Arc<dyn EventSink>,
    stop: Arc<dyn Stop>,
    containers: Mutex<HashMap<String, Slot>>,
    control: OnceLock<PathBuf>,
}

/// An id that is given back when its container does not come to be.
struct Reserved<'a> {
    containers: &'a Mutex<HashMap<String, Slot>>,
    id: &'a str,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.containers.lock().remove(self.id);
    }
}

type Answer<T> = ttrpc::Result<T>;

impl Service {
    /// A service without containers.
    pub fn new(
        namespace: &str,
        host: Arc<dyn Host>,
        events: Arc<dyn EventSink>,
        stop: Arc<dyn Stop>,
    ) -> Self {
        Self(Arc::new(Shared {
            namespace: namespace.to_owned(),
            host,
            events,
            stop,
            containers: Mutex::default(),
            control: OnceLock::new(),
        }))
    }

    /// Says where the control API is served, before the first container is made.
    pub fn set_control(&self, socket: PathBuf) {
        // A second socket would never be asked: the first one stays.
        let _ = self.0.control.set(socket);
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.0.containers.lock().get(id) {
            Some(Slot::Taken(container)) => Ok(Arc::clone(container)),
            _ => Err(ShimError::not_found(format!("container {id}"))),
        }
    }

    /// All containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let containers = self.0.containers.lock();
        let taken = containers.values().filter_map(|slot| match slot {
            Slot::Taken(container) => Some(Arc::clone(container)),
            Slot::Reserved => None,
        });
        taken.collect()
    }

    fn do_create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let id = request.id.clone();
        {
            let mut containers = self.0.containers.lock();
            if containers.contains_key(&id) {
                let text = format!("container {id} exists already");
                return Err(ShimError::new(Kind::AlreadyExists, text));
            }
            containers.insert(id.clone(), Slot::Reserved);
        }
        let world = create::World {
            namespace: &self.0.namespace,
            host: &self.0.host,
            events: &self.0.events,
            control: self.0.control.get().map(PathBuf::as_path),
        };
        let reserved = Reserved {
            containers: &self.0.containers,
            id: &id,
        };
        let container = create::create(&world, &request)?;
        std::mem::forget(reserved);
        let pid = container.init.pid() as u32;
        self.0.events.send(TaskEvent::Create(TaskCreate {
            container_id: id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            checkpoint: request.checkpoint,
            pid,
            ..Default::default()
        }));
        // Nobody finds it, and its end is not told, before its creation is.
        container.init_told();
        let mut containers = self.0.containers.lock();
        containers.insert(id, Slot::Taken(container));
        drop(containers);
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    fn do_state(&self, request: &StateRequest) -> Result<StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let exit = process.exit();
        let id = match request.exec_id.as_str() {
            "" => request.id.clone(),
            exec_id => exec_id.to_owned(),
        };
        Ok(StateResponse {
            id,
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: process.pid() as u32,
            status: EnumOrUnknown::new(container.status(&process)),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exit.map_or(0, |e| e.status),
            exited_at: exit.map_or_else(MessageField::none, |e| {
                MessageField::some(proto::timestamp(e.at))
            }),
            ..Default::default()
        })
    }

    fn do_delete(&self, request: &DeleteRequest) -> Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        if !request.exec_id.is_empty() {
            return delete::delete_exec(&container, &request.exec_id);
        }
        let response = delete::delete_container(&container)?;
        self.0.containers.lock().remove(&request.id);
        Ok(response)
    }

    fn do_start(&self, request: &StartRequest) -> Result<StartResponse> {
        let container = self.container(&request.id)?;
        let pid = match request.exec_id.as_str() {
            "" => start::start_init(&container)?,
            exec_id => start::start_exec(&container, exec_id)?,
        };
        Ok(StartResponse {
            pid: pid as u32,
            ..Default::default()
        })
    }

    fn do_wait(&self, context: &TtrpcContext, request: &WaitRequest) -> Result<WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait(&context.cancel_rx)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(proto::timestamp(exit.at)),
            ..Default::default()
        })
    }

    fn do_resize(&self, request: &ResizePtyRequest) -> Result<()> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let side = |length: u32| u16::try_from(length).unwrap_or(u16::MAX);
        match process.io() {
            Some(io) => io
                .resize(side(request.width), side(request.height))
                .context(format_args!("{}: resize", request.id)),
            None => Ok(()),
        }
    }

    fn do_close_io(&self, request: &CloseIORequest) -> Result<()> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if let (true, Some(io)) = (request.stdin, process.io()) {
            io.close_stdin();
        }
        Ok(())
    }

    fn do_update(&self, request: &UpdateTaskRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        container.update(&request.resources.as_ref().unwrap_or_default().value)
    }
}

/// Says a failure in the shim's own log as well: clients cut long messages.
fn answer<T>(call: &str, id: &str, result: Result<T>) -> Answer<T> {
    result.map_err(|e| {
        log::debug!("{call} {id}: {e}");
        e.into()
    })
}

impl Task for Service {
    fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        answer("State", &request.id, self.do_state(&request))
    }

    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let id = request.id.clone();
        answer("Create", &id, self.do_create(request))
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        answer("Start", &request.id, self.do_start(&request))
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        answer("Delete", &request.id, self.do_delete(&request))
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let pids = self.container(&request.id).and_then(|c| c.pids());
        let processes = answer("Pids", &request.id, pids)?;
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let paused = self.container(&request.id).and_then(|c| c.pause());
        answer("Pause", &request.id, paused).map(|()| Empty::new())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let resumed = self.container(&request.id).and_then(|c| c.resume());
        answer("Resume", &request.id, resumed).map(|()| Empty::new())
    }

    fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> Answer<Empty> {
        let done = self
            .container(&request.id)
            .and_then(|c| checkpoint::for_client(&c, &request));
        answer("Checkpoint", &request.id, done).map(|()| Empty::new())
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let killed = self
            .container(&request.id)
            .and_then(|c| c.kill(&request.exec_id, request.signal, request.all));
        answer("Kill", &request.id, killed).map(|()| Empty::new())
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let added = self
            .container(&request.id)
            .and_then(|c| start::add_exec(&c, &request));
        answer("Exec", &request.id, added).map(|()| Empty::new())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        answer("ResizePty", &request.id, self.do_resize(&request)).map(|()| Empty::new())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        answer("CloseIO", &request.id, self.do_close_io(&request)).map(|()| Empty::new())
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        answer("Update", &request.id, self.do_update(&request)).map(|()| Empty::new())
    }

    fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        answer("Wait", &request.id, self.do_wait(context, &request))
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let stats = self.container(&request.id).and_then(|c| c.stats());
        let stats = answer("Stats", &request.id, stats)?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        let pid = self.container(&request.id).map_or(0, |c| c.init.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: pid as u32,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        if self.0.containers.lock().is_empty() {
            self.0.stop.stop();
        }
        Ok(Empty::new())
    }
}
