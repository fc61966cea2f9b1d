//! The task service over a machine without a kernel: no root, no runtime, no containerd.
//!
//! A test speaks the task API as containerd does, says when a process ends or a call of the
//! runtime stands still ([`fake::Machine`]), and reads the events and the runtime's calls as
//! lines of text.

use std::{
    fmt::Debug,
    fs,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use containerd_shim::{
    Task, TtrpcContext,
    protos::{
        api::{
            CheckpointTaskRequest, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
            DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest,
            ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
            StateResponse, Status, WaitRequest, WaitResponse,
        },
        protobuf::well_known_types::any::Any,
        ttrpc::{self, Code},
    },
};
use crossbeam_channel::{Receiver, Sender, bounded};

use self::{
    fake::Machine,
    plan::{Barrier, Blocked},
    sink::{Sink, Stopped},
};
use super::{container::Container, service::Service};

mod budget;
mod chains;
mod create;
mod delete;
mod events;
mod exec;
mod fake;
mod fallen;
mod freezing;
mod group;
mod kill;
mod plan;
mod random;
mod recover;
mod restore;
mod rollback;
mod rollback_failures;
mod runtime;
mod sink;
mod slow;
mod states;
mod triggers;
mod turns;
mod without_processes;

/// No test waits longer than this for anything.
const LIMIT: Duration = Duration::from_secs(20);
/// A call that should wait is watched for so long.
const A_MOMENT: Duration = Duration::from_millis(50);

type Answer<T> = ttrpc::Result<T>;

/// A service and the machine below it. Clones share both.
#[derive(Clone)]
struct Bed {
    dir: Arc<tempfile::TempDir>,
    machine: Arc<Machine>,
    sink: Arc<Sink>,
    stopped: Arc<Stopped>,
    service: Service,
}

/// A request that is under way in a thread of its own.
struct Call<T>(Receiver<T>);

impl<T> Call<T> {
    /// Its answer.
    fn get(self) -> T {
        self.0.recv_timeout(LIMIT).expect("the call does not end")
    }

    /// Whether it waits for something.
    fn waits(&self) -> bool {
        self.0.recv_timeout(A_MOMENT).is_err()
    }
}

/// A request's context, which lasts as long as the sender.
fn context() -> (Sender<()>, TtrpcContext) {
    let (client, cancel_rx) = bounded(0);
    let context = TtrpcContext {
        fd: -1,
        cancel_rx,
        mh: ttrpc::MessageHeader::default(),
        res_tx: std::sync::mpsc::channel().0,
        metadata: Default::default(),
        timeout_nano: 0,
    };
    (client, context)
}

/// What kind of no it was, and what it said.
fn refusal<T: Debug>(answer: Answer<T>) -> (Code, String) {
    match answer.expect_err("it was not refused") {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("no status: {other}"),
    }
}

fn code<T: Debug>(answer: Answer<T>) -> Code {
    refusal(answer).0
}

/// Checks that a failure was named by all of `words`.
fn assert_names<T: Debug>(answer: Answer<T>, expected: Code, words: &[&str]) {
    let (code, message) = refusal(answer);
    assert_eq!(code, expected, "{message}");
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

impl Bed {
    fn new() -> Self {
        Self::with("")
    }

    /// With a configuration of the host; the store is below the bed's own directory.
    fn with(config: &str) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let store = dir.path().join("store");
        let config = format!("store = {store:?}\nexec_linger = \"0s\"\n{config}");
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let (machine, sink) = (Machine::new(dir.path()), Arc::<Sink>::default());
        let stopped = Arc::<Stopped>::default();
        let host = Arc::clone(&machine) as _;
        let service = Service::new(
            "test",
            host,
            Arc::clone(&sink) as _,
            Arc::clone(&stopped) as _,
        );
        Self {
            dir,
            machine,
            sink,
            stopped,
            service,
        }
    }

    /// A bed with a running container `c`.
    fn running() -> Self {
        let bed = Self::new();
        bed.run("c");
        bed
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run_dir(&self, id: &str) -> PathBuf {
        self.path("run").join("s/test").join(id)
    }

    /// A Create request with a new bundle, whose config.json has these namespaces.
    fn request_with(&self, id: &str, namespaces: &[&str]) -> CreateTaskRequest {
        let bundle = self.path("bundles").join(id);
        let _ = fs::remove_dir_all(&bundle);
        fs::create_dir_all(&bundle).unwrap();
        let namespaces: Vec<_> = namespaces
            .iter()
            .map(|n| format!("{{\"type\":{n:?}}}"))
            .collect();
        let config = format!(
            "{{\"linux\":{{\"namespaces\":[{}]}}}}",
            namespaces.join(",")
        );
        fs::write(bundle.join("config.json"), config).unwrap();
        CreateTaskRequest {
            id: id.into(),
            bundle: bundle.to_str().unwrap().into(),
            ..Default::default()
        }
    }

    fn request(&self, id: &str) -> CreateTaskRequest {
        self.request_with(id, &["pid", "ipc"])
    }

    /// A directory that looks like CRIU's images.
    fn images(&self) -> String {
        let images = self.path("to-restore");
        fs::create_dir_all(&images).unwrap();
        fs::write(images.join("inventory.img"), "").unwrap();
        fs::write(images.join("descriptors.json"), "[]").unwrap();
        images.to_str().unwrap().into()
    }

    /// A request to restore.
    fn request_from_images(&self, id: &str) -> CreateTaskRequest {
        let mut request = self.request(id);
        request.checkpoint = self.images();
        request
    }

    fn create_as(&self, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        self.service.create(&context().1, request)
    }

    fn create(&self, id: &str) -> Answer<CreateTaskResponse> {
        self.create_as(self.request(id))
    }

    /// Creates and starts a container; its init's pid.
    fn run(&self, id: &str) -> i32 {
        self.create(id).unwrap();
        self.start(id, "").unwrap().pid as i32
    }

    fn start(&self, id: &str, exec_id: &str) -> Answer<StartResponse> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.service.start(&context().1, request)
    }

    fn exec(&self, id: &str, exec_id: &str) -> Answer<Empty> {
        self.exec_spec(id, exec_id, r#"{"args":["true"]}"#)
    }

    fn exec_spec(&self, id: &str, exec_id: &str, spec: &str) -> Answer<Empty> {
        let spec = Any {
            value: spec.as_bytes().to_vec(),
            ..Default::default()
        };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(spec).into(),
            ..Default::default()
        };
        self.service.exec(&context().1, request)
    }

    /// Adds and starts an exec; its pid.
    fn run_exec(&self, id: &str, exec_id: &str) -> i32 {
        self.exec(id, exec_id).unwrap();
        self.start(id, exec_id).unwrap().pid as i32
    }

    fn state(&self, id: &str, exec_id: &str) -> Answer<StateResponse> {
        let request = StateRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.service.state(&context().1, request)
    }

    fn status(&self, id: &str, exec_id: &str) -> Status {
        self.state(id, exec_id).unwrap().status.unwrap()
    }

    fn pids(&self, id: &str) -> Vec<i32> {
        let request = PidsRequest {
            id: id.into(),
            ..Default::default()
        };
        let answer = self.service.pids(&context().1, request).unwrap();
        answer.processes.iter().map(|p| p.pid as i32).collect()
    }

    fn wait(&self, id: &str, exec_id: &str) -> Answer<WaitResponse> {
        let (_client, context) = context();
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.service.wait(&context, request)
    }

    fn kill(&self, id: &str, exec_id: &str, signal: i32) -> Answer<Empty> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal: signal as u32,
            ..Default::default()
        };
        self.service.kill(&context().1, request)
    }

    fn pause(&self, id: &str) -> Answer<Empty> {
        let request = PauseRequest {
            id: id.into(),
            ..Default::default()
        };
        self.service.pause(&context().1, request)
    }

    fn resume(&self, id: &str) -> Answer<Empty> {
        let request = ResumeRequest {
            id: id.into(),
            ..Default::default()
        };
        self.service.resume(&context().1, request)
    }

    /// A checkpoint without options, into `images` in the bed's directory.
    fn checkpoint(&self, id: &str) -> Answer<Empty> {
        let request = CheckpointTaskRequest {
            id: id.into(),
            path: self.path("images").to_str().unwrap().into(),
            ..Default::default()
        };
        self.service.checkpoint(&context().1, request)
    }

    fn delete(&self, id: &str, exec_id: &str) -> Answer<DeleteResponse> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.service.delete(&context().1, request)
    }

    /// Asks the shim to end; whether it does.
    fn shutdown(&self) -> bool {
        let before = self.stopped.0.load(Ordering::SeqCst);
        let request = ShutdownRequest::default();
        self.service.shutdown(&context().1, request).unwrap();
        self.stopped.0.load(Ordering::SeqCst) > before
    }

    fn container(&self, id: &str) -> Arc<Container> {
        self.service.container(id).unwrap()
    }

    /// Makes a request in a thread of its own.
    fn go<T: Send + 'static>(&self, call: impl FnOnce(&Self) -> T + Send + 'static) -> Call<T> {
        let (sender, receiver) = bounded(1);
        let bed = self.clone();
        thread::spawn(move || sender.send(call(&bed)));
        Call(receiver)
    }

    /// Ends a process and waits until the client has been told of `event`.
    fn end(&self, pid: i32, status: u32, event: &str) {
        self.machine.end(pid, status);
        self.wait_event(event);
    }

    /// Whoever tells `line` next stands still before.
    fn hold_event(&self, line: &str) -> Blocked {
        let (blocked, barrier) = Barrier::new();
        *self.sink.held.lock() = Some((line.to_owned(), barrier));
        blocked
    }

    fn events(&self) -> Vec<String> {
        self.sink.lines.lock().clone()
    }

    fn wait_event(&self, line: &str) {
        let deadline = Instant::now() + LIMIT;
        let mut lines = self.sink.lines.lock();
        while !lines.iter().any(|l| l == line) {
            let late = self.sink.changed.wait_until(&mut lines, deadline);
            assert!(!late.timed_out(), "no {line:?} in {lines:?}");
        }
    }
}
