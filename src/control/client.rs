//! The `crab` command's side: which shims are there, and asking them.

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use ttrpc::{Client, Code, context};

use super::{
    LINK, SHIMS,
    api::{
        CheckpointRequest, CheckpointResponse, ControlClient, ListRequest, ListResponse,
        RollbackRequest, Sandbox, TurnRequest,
    },
    is_alive, sweep,
};
use crate::sandbox::{SandboxId, TurnNo};

/// A question about sandboxes must not hang on one stopped shim.
const QUICK: Duration = Duration::from_secs(3);
/// A checkpoint may take as long as the longest dump that can be configured.
const SLOW: Duration = Duration::from_secs(900);
/// As many shims are asked at once.
const AT_ONCE: usize = 32;

/// A shim that could not be asked. Each text begins with whom it is about.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// None of its shims runs.
    #[error("{0} is not running under crab")]
    NotRunning(SandboxId),
    /// The shim said no.
    #[error("{0}")]
    Refused(String),
    /// It does not know what it was asked.
    #[error(
        "{who}: its shim is of another build of crab ({}) than this command ({ours}), and cannot do \
         that: use that build's crab, or stop the container and start it again, under the installed \
         shim",
        theirs.as_deref().unwrap_or("it does not say which")
    )]
    OtherBuild {
        /// Whose shim.
        who: String,
        /// The shim's version, if it says so.
        theirs: Option<String>,
        /// The version of this command.
        ours: &'static str,
    },
    /// It went away before it answered.
    #[error(
        "{who}: its shim went away before it answered, so the sandbox has died or was removed: crab \
         log shows which turns it has kept"
    )]
    Gone {
        /// Whose shim.
        who: String,
    },
    /// It does not answer in time.
    #[error("{who}: its shim does not answer: it is stopped, or the host has no time for it")]
    Silent {
        /// Whose shim.
        who: String,
    },
    /// Something else is in the way.
    #[error("{who}: cannot ask its shim at {}: {reason}", socket.display())]
    Unreachable {
        /// Whose shim.
        who: String,
        /// Where it should be.
        socket: PathBuf,
        /// Why.
        reason: String,
    },
}

/// A shim that is to be asked.
struct Asked<'a> {
    who: String,
    socket: &'a Path,
}

impl Asked<'_> {
    /// Calls `what` on a connection of its own.
    fn call<T>(
        &self,
        limit: Duration,
        what: impl FnOnce(&ControlClient, context::Context) -> ttrpc::Result<T>,
    ) -> Result<T, ControlError> {
        let client = self.connect()?;
        let nanos = i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX);
        what(&client, context::with_timeout(nanos)).map_err(|e| self.wrong(&client, e))
    }

    fn connect(&self) -> Result<ControlClient, ControlError> {
        let stream = open(self.socket).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::Gone {
                who: self.who.clone(),
            },
            // Nobody has accepted the connections that wait.
            io::ErrorKind::WouldBlock => ControlError::Silent {
                who: self.who.clone(),
            },
            _ => self.unreachable(&e),
        })?;
        let client = Client::new(stream.into_raw_fd()).map_err(|e| self.unreachable(&e))?;
        Ok(ControlClient::new(client))
    }

    fn unreachable(&self, reason: &dyn std::fmt::Display) -> ControlError {
        ControlError::Unreachable {
            who: self.who.clone(),
            socket: self.socket.to_owned(),
            reason: reason.to_string(),
        }
    }

    fn wrong(&self, client: &ControlClient, e: ttrpc::Error) -> ControlError {
        let who = self.who.clone();
        match e {
            ttrpc::Error::RpcStatus(status) if is_unknown(&status) => ControlError::OtherBuild {
                who,
                theirs: version(client),
                ours: env!("CARGO_PKG_VERSION"),
            },
            ttrpc::Error::RpcStatus(status) => ControlError::Refused(status.message),
            ttrpc::Error::Socket(_)
            | ttrpc::Error::Eof
            | ttrpc::Error::LocalClosed
            | ttrpc::Error::RemoteClosed => ControlError::Gone { who },
            // The library has no kind of error for it.
            ttrpc::Error::Others(text) if text.contains("timeout") => ControlError::Silent { who },
            e => self.unreachable(&e),
        }
    }
}

/// Whether the server has no such call. The library answers so; others have a code for it.
fn is_unknown(status: &ttrpc::Status) -> bool {
    let code = status.code();
    code == Code::UNIMPLEMENTED
        || code == Code::INVALID_ARGUMENT && status.message.ends_with(" does not exist")
}

fn version(client: &ControlClient) -> Option<String> {
    let nanos = i64::try_from(QUICK.as_nanos()).unwrap_or(i64::MAX);
    let answer = client.list(context::with_timeout(nanos), &ListRequest::new());
    answer.ok().map(|answer| answer.version)
}

/// Connects without waiting: a stopped shim accepts nobody.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let stream = socket(AddressFamily::Unix, SockType::Stream, kind, None)?;
    let address = UnixAddr::new(path)?;
    connect(stream.as_raw_fd(), &address).map_err(|e| match e {
        Errno::EAGAIN => io::ErrorKind::WouldBlock.into(),
        e => io::Error::from(e),
    })?;
    fcntl(&stream, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(stream)
}

/// One running shim, and what it said.
#[derive(Debug)]
pub struct Surveyed {
    /// Whose it is, as far as that is known without asking it.
    pub sandboxes: Vec<SandboxId>,
    /// What it said.
    pub answer: Result<ListResponse, ControlError>,
}

/// Asks all running shims below `run` (`/run/crab`). One that ends meanwhile is not mentioned.
/// `run_dirs`: those of the sandboxes that there may be. A shim whose sandboxes are known and in other
/// namespaces is not asked.
pub fn survey(
    run: &Path,
    run_dirs: &[(SandboxId, PathBuf)],
    namespace: Option<&str>,
) -> Vec<Surveyed> {
    let dir = run.join(SHIMS);
    sweep(&dir);
    let mut owners: BTreeMap<PathBuf, Vec<SandboxId>> = BTreeMap::new();
    for (sandbox, run_dir) in run_dirs {
        if let Ok(socket) = socket_of(run_dir, sandbox) {
            owners.entry(socket).or_default().push(sandbox.clone());
        }
    }
    let sockets = fs::read_dir(&dir).into_iter().flatten();
    let sockets = sockets.flatten().map(|entry| entry.path());
    let mut sockets: Vec<PathBuf> = sockets
        .filter(|path| path.extension().is_some_and(|kind| kind == "sock"))
        .collect();
    let is_wanted = |socket: &PathBuf| {
        let owners = owners.get(socket).filter(|_| namespace.is_some());
        owners.is_none_or(|all| all.iter().any(|one| Some(one.namespace()) == namespace))
    };
    sockets.retain(is_wanted);
    sockets.sort();
    let ask = |socket: &PathBuf| {
        let sandboxes = owners.get(socket).cloned().unwrap_or_default();
        let asked = Asked {
            who: named(socket, &sandboxes),
            socket,
        };
        let answer = asked.call(QUICK, |client, context| {
            client.list(context, &ListRequest::new())
        });
        // With its last sandbox.
        let ended = matches!(answer, Err(ControlError::Gone { .. })) && !socket.exists();
        (!ended).then_some(Surveyed { sandboxes, answer })
    };
    let mut found = Vec::new();
    for some in sockets.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let asking: Vec<_> = some.iter().map(|one| scope.spawn(|| ask(one))).collect();
            found.extend(
                asking
                    .into_iter()
                    .filter_map(|one| one.join().ok().flatten()),
            );
        });
    }
    found
}

/// What a shim is called that has not said its name.
fn named(socket: &Path, sandboxes: &[SandboxId]) -> String {
    let pid = socket.file_stem().unwrap_or_default().to_string_lossy();
    match sandboxes {
        [] => format!("the shim with pid {pid}"),
        some => {
            let names: Vec<String> = some.iter().map(ToString::to_string).collect();
            format!("{} (shim with pid {pid})", names.join(", "))
        }
    }
}

/// Whether a sandbox has a shim that runs, without asking it.
pub fn is_running(run_dir: &Path, sandbox: &SandboxId) -> bool {
    socket_of(run_dir, sandbox).is_ok_and(|socket| {
        let pid = socket.file_stem().and_then(|pid| pid.to_str());
        pid.is_some_and(is_alive)
    })
}

/// What the shim of a sandbox says about it; none if it has no shim, or one that ends just now.
pub fn state(run_dir: &Path, sandbox: &SandboxId) -> Result<Option<Sandbox>, ControlError> {
    let Ok(socket) = socket_of(run_dir, sandbox) else {
        return Ok(None);
    };
    let asked = Asked {
        who: sandbox.to_string(),
        socket: &socket,
    };
    let listed = asked.call(QUICK, |client, context| {
        client.list(context, &ListRequest::new())
    });
    match listed {
        Ok(response) => {
            let mut all = response.sandboxes.into_iter();
            Ok(all.find(|one| one.namespace == sandbox.namespace() && one.id == sandbox.id()))
        }
        Err(ControlError::Gone { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Where the shim of a running sandbox listens. The link's own path may be too long for a socket's.
fn socket_of(run_dir: &Path, sandbox: &SandboxId) -> Result<PathBuf, ControlError> {
    let socket = run_dir.join(LINK).canonicalize();
    socket.map_err(|_| ControlError::NotRunning(sandbox.clone()))
}

/// Takes a running sandbox back to the checkpoint of a turn; returns what was done, as JSON.
pub fn rollback(run_dir: &Path, sandbox: &SandboxId, turn: TurnNo) -> Result<String, ControlError> {
    let request = RollbackRequest {
        id: sandbox.id().to_owned(),
        turn: turn.0,
        ..Default::default()
    };
    let response = ask(run_dir, sandbox, |client, context| {
        client.rollback(context, &request)
    });
    response.map(|response| response.report)
}

/// Ends the turn under way in a running sandbox; returns its line in the journal, as JSON.
pub fn turn(run_dir: &Path, sandbox: &SandboxId) -> Result<String, ControlError> {
    let request = TurnRequest {
        id: sandbox.id().to_owned(),
        ..Default::default()
    };
    let response = ask(run_dir, sandbox, |client, context| {
        client.turn(context, &request)
    });
    response.map(|response| response.line)
}

/// Takes a checkpoint of a running sandbox. `request`: how; its id is filled in.
pub fn checkpoint(
    run_dir: &Path,
    sandbox: &SandboxId,
    mut request: CheckpointRequest,
) -> Result<CheckpointResponse, ControlError> {
    request.id = sandbox.id().to_owned();
    ask(run_dir, sandbox, |client, context| {
        client.checkpoint(context, &request)
    })
}

/// Asks the shim of a sandbox for what may take long.
fn ask<T>(
    run_dir: &Path,
    sandbox: &SandboxId,
    what: impl FnOnce(&ControlClient, context::Context) -> ttrpc::Result<T>,
) -> Result<T, ControlError> {
    let socket = socket_of(run_dir, sandbox)?;
    let asked = Asked {
        who: sandbox.to_string(),
        socket: &socket,
    };
    asked.call(SLOW, what).map_err(|e| match e {
        ControlError::Refused(text) if !text.contains(sandbox.id()) => {
            ControlError::Refused(format!("{sandbox}: {text}"))
        }
        e => e,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::{fs::symlink, net::UnixListener},
        sync::Arc,
    };

    use ttrpc::{Server, TtrpcContext, get_status};

    use super::*;
    use crate::control::{
        ControlSocket,
        api::{self, Control, RollbackResponse, TurnResponse},
    };

    /// A shim with one sandbox, which refuses checkpoints.
    struct Refusing;

    impl Control for Refusing {
        fn checkpoint(
            &self,
            _: &TtrpcContext,
            _: CheckpointRequest,
        ) -> ttrpc::Result<CheckpointResponse> {
            let status = get_status(Code::FAILED_PRECONDITION, "the disk is full");
            Err(ttrpc::Error::RpcStatus(status))
        }

        fn turn(&self, _: &TtrpcContext, _: TurnRequest) -> ttrpc::Result<TurnResponse> {
            Ok(TurnResponse::default())
        }

        fn rollback(
            &self,
            _: &TtrpcContext,
            _: RollbackRequest,
        ) -> ttrpc::Result<RollbackResponse> {
            Ok(RollbackResponse::default())
        }

        fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
            Ok(ListResponse {
                sandboxes: vec![Sandbox {
                    id: "c1".into(),
                    namespace: "default".into(),
                    ..Default::default()
                }],
                version: "0.0.9".into(),
                ..Default::default()
            })
        }
    }

    /// The run directory of default/c1 and the directory of sockets.
    fn places(run: &Path) -> (SandboxId, PathBuf) {
        let sandbox = SandboxId::new("default", "c1").unwrap();
        let run_dir = run.join("s/default/c1");
        fs::create_dir_all(&run_dir).unwrap();
        fs::create_dir_all(run.join(SHIMS)).unwrap();
        (sandbox, run_dir)
    }

    #[test]
    fn what_a_shim_refuses_names_the_sandbox() {
        let run = tempfile::tempdir().unwrap();
        let (sandbox, run_dir) = places(run.path());
        let socket = ControlSocket::serve(&run.path().join(SHIMS), Arc::new(Refusing)).unwrap();
        ControlSocket::link(socket.path(), &run_dir).unwrap();
        assert!(is_running(&run_dir, &sandbox));
        let e = checkpoint(&run_dir, &sandbox, CheckpointRequest::default()).unwrap_err();
        assert_eq!(e.to_string(), "default/c1: the disk is full");
        assert!(state(&run_dir, &sandbox).unwrap().is_some());
        let known = [(sandbox, run_dir)];
        let found = survey(run.path(), &known, Some("default"));
        assert_eq!(found[0].sandboxes[0], known[0].0);
        assert_eq!(found[0].answer.as_ref().unwrap().version, "0.0.9");
        assert!(survey(run.path(), &known, Some("other")).is_empty());
    }

    #[test]
    fn a_call_that_the_shim_does_not_know_is_another_build() {
        let run = tempfile::tempdir().unwrap();
        let (sandbox, run_dir) = places(run.path());
        let path = run.path().join(SHIMS).join("1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut service = api::create_control(Arc::new(Refusing));
        service.remove("/crab.control.v1.Control/Rollback").unwrap();
        let server = Server::new().add_listener(listener.into_raw_fd());
        let mut server = server.unwrap().register_service(service);
        server.start().unwrap();
        symlink(&path, run_dir.join(LINK)).unwrap();
        let e = rollback(&run_dir, &sandbox, TurnNo(1)).unwrap_err();
        assert!(
            e.to_string().contains("of another build of crab (0.0.9)"),
            "{e}"
        );
        server.shutdown();
    }

    #[test]
    fn a_shim_that_is_gone_or_stopped_is_not_waited_for() {
        let run = tempfile::tempdir().unwrap();
        let (sandbox, run_dir) = places(run.path());
        let ask = || rollback(&run_dir, &sandbox, TurnNo(1)).unwrap_err();
        assert!(matches!(ask(), ControlError::NotRunning(_)));
        let path = run.path().join(SHIMS).join("1.sock");
        let listener = UnixListener::bind(&path).unwrap();
        // Nobody accepts, and few may wait.
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        symlink(&path, run_dir.join(LINK)).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = open(&path) {
            waiting.push(stream);
        }
        assert!(matches!(ask(), ControlError::Silent { .. }));
        drop(listener);
        assert!(matches!(ask(), ControlError::Gone { .. }));
        assert!(state(&run_dir, &sandbox).unwrap().is_none());
    }
}
