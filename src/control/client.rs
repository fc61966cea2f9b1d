//! The `crab` command's side: which shims are there, and asking them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ttrpc::{Client, context};

use super::{
    LINK, SHIMS,
    api::{
        CheckpointRequest, CheckpointResponse, ControlClient, ListRequest, RollbackRequest,
        Sandbox, TurnRequest,
    },
    sweep,
};
use crate::sandbox::{SandboxId, TurnNo};

/// A question about sandboxes must not hang on one stopped shim.
const QUICK: i64 = 3_000_000_000;
/// A checkpoint may take as long as the longest dump that can be configured.
const SLOW: i64 = 900_000_000_000;

/// A shim that could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// None of its shims runs.
    #[error("{0} is not running under crab")]
    NotRunning(SandboxId),
    /// The shim said no.
    #[error("{0}")]
    Refused(String),
    /// It did not answer.
    #[error("cannot ask the shim at {}: {source}", socket.display())]
    Unreachable {
        /// Where it should be.
        socket: PathBuf,
        /// Why.
        source: ttrpc::Error,
    },
}

fn wrong(socket: &Path) -> impl FnOnce(ttrpc::Error) -> ControlError + '_ {
    move |source| match source {
        ttrpc::Error::RpcStatus(status) => ControlError::Refused(status.message),
        source => ControlError::Unreachable {
            socket: socket.to_owned(),
            source,
        },
    }
}

fn connect(socket: &Path) -> Result<ControlClient, ControlError> {
    let client = Client::connect(&format!("unix://{}", socket.display())).map_err(wrong(socket))?;
    Ok(ControlClient::new(client))
}

/// All sandboxes of all running shims below `run` (`/run/crab`), and the shims that don't answer.
pub fn list(run: &Path) -> (Vec<Sandbox>, Vec<ControlError>) {
    let mut sandboxes = Vec::new();
    let mut errors = Vec::new();
    let dir = run.join(SHIMS);
    sweep(&dir);
    let sockets = fs::read_dir(&dir).into_iter().flatten();
    let sockets = sockets.flatten().map(|entry| entry.path());
    for socket in sockets.filter(|path| path.extension().is_some_and(|kind| kind == "sock")) {
        let listed = connect(&socket).and_then(|client| {
            client
                .list(context::with_timeout(QUICK), &ListRequest::new())
                .map_err(wrong(&socket))
        });
        match listed {
            Ok(response) => sandboxes.extend(response.sandboxes),
            Err(e) => errors.push(e),
        }
    }
    (sandboxes, errors)
}

/// Where the shim of a running sandbox listens.
fn socket_of(run_dir: &Path, sandbox: &SandboxId) -> Result<PathBuf, ControlError> {
    let socket = run_dir.join(LINK);
    match socket.exists() {
        true => Ok(socket),
        false => Err(ControlError::NotRunning(sandbox.clone())),
    }
}

/// Takes a running sandbox back to the checkpoint of a turn; returns what was done, as JSON.
pub fn rollback(run_dir: &Path, sandbox: &SandboxId, turn: TurnNo) -> Result<String, ControlError> {
    let socket = socket_of(run_dir, sandbox)?;
    let request = RollbackRequest {
        id: sandbox.id().to_owned(),
        turn: turn.0,
        ..Default::default()
    };
    connect(&socket)?
        .rollback(context::with_timeout(SLOW), &request)
        .map(|response| response.report)
        .map_err(wrong(&socket))
}

/// Ends the turn under way in a running sandbox; returns its line in the journal, as JSON.
pub fn turn(run_dir: &Path, sandbox: &SandboxId) -> Result<String, ControlError> {
    let socket = socket_of(run_dir, sandbox)?;
    let request = TurnRequest {
        id: sandbox.id().to_owned(),
        ..Default::default()
    };
    connect(&socket)?
        .turn(context::with_timeout(SLOW), &request)
        .map(|response| response.line)
        .map_err(wrong(&socket))
}

/// Takes a checkpoint of a running sandbox. `request`: how; its id is filled in.
pub fn checkpoint(
    run_dir: &Path,
    sandbox: &SandboxId,
    mut request: CheckpointRequest,
) -> Result<CheckpointResponse, ControlError> {
    let socket = socket_of(run_dir, sandbox)?;
    request.id = sandbox.id().to_owned();
    connect(&socket)?
        .checkpoint(context::with_timeout(SLOW), &request)
        .map_err(wrong(&socket))
}
