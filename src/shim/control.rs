//! The shim's side of the control API.

use std::sync::Arc;

use ttrpc::{Code, TtrpcContext, get_status};

use super::{
    error::{Kind, Result, ShimError},
    rollback::roll_back,
    service::Service,
};
use crate::{
    control::api::{
        CheckpointRequest, CheckpointResponse, Control, ListRequest, ListResponse, RollbackRequest,
        RollbackResponse, Sandbox, TurnRequest, TurnResponse,
    },
    coordinator::turns::{Asked, Proof},
    sandbox::TurnNo,
};

/// Answers the `crab` command.
pub struct ControlService(pub Service);

impl ControlService {
    fn do_checkpoint(&self, request: &CheckpointRequest) -> Result<CheckpointResponse> {
        let container = self.0.container(&request.id)?;
        let (line, proof) = container.checkpoint_now(Asked {
            name: Some(request.name.clone()).filter(|n| !n.is_empty()),
            prove: request.prove,
            or_files: request.or_files,
        })?;
        Ok(CheckpointResponse {
            line: json(&line)?,
            not_proved: match proof {
                Proof::Failed(why) => why,
                Proof::Done | Proof::NotAsked => String::new(),
            },
            ..Default::default()
        })
    }

    fn do_turn(&self, request: &TurnRequest) -> Result<TurnResponse> {
        let line = self.0.container(&request.id)?.end_turn()?;
        Ok(TurnResponse {
            line: json(&line)?,
            ..Default::default()
        })
    }

    fn do_rollback(&self, request: &RollbackRequest) -> Result<RollbackResponse> {
        let container = self.0.container(&request.id)?;
        let done = roll_back(&container, TurnNo(request.turn))?;
        Ok(RollbackResponse {
            report: json(&done)?,
            ..Default::default()
        })
    }
}

fn json(what: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(what).map_err(|e| ShimError::new(Kind::Failed, e.to_string()))
}

fn refusal(e: ShimError) -> ttrpc::Error {
    let code = match e.kind {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
        _ => Code::UNKNOWN,
    };
    ttrpc::Error::RpcStatus(get_status(code, e.message))
}

impl Control for ControlService {
    fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointRequest,
    ) -> ttrpc::Result<CheckpointResponse> {
        self.do_checkpoint(&request).map_err(refusal)
    }

    fn turn(&self, _: &TtrpcContext, request: TurnRequest) -> ttrpc::Result<TurnResponse> {
        self.do_turn(&request).map_err(refusal)
    }

    fn rollback(
        &self,
        _: &TtrpcContext,
        request: RollbackRequest,
    ) -> ttrpc::Result<RollbackResponse> {
        self.do_rollback(&request).map_err(refusal)
    }

    fn list(&self, _: &TtrpcContext, _: ListRequest) -> ttrpc::Result<ListResponse> {
        let sandbox = |c: Arc<super::container::Container>| {
            let why_not = c.why_unprotected();
            Sandbox {
                id: c.sandbox.id().to_owned(),
                namespace: c.sandbox.namespace().to_owned(),
                phase: c.phase().to_string(),
                pid: c.init.live_pid(),
                is_protected: why_not.is_none(),
                why_not: why_not.unwrap_or_default(),
                execs: c.doors.inside(),
                exposed: c.exposed_work().unwrap_or_default(),
                doing: c.doors.machine().work.to_string(),
                ..Default::default()
            }
        };
        Ok(ListResponse {
            sandboxes: self.0.all().into_iter().map(sandbox).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }
}
