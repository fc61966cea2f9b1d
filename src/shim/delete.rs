//! How processes and containers go: Delete, and what is done after the shim's own death.

use std::{path::Path, sync::Arc, time::Duration};

use containerd_shim::protos::{
    api::DeleteResponse, events::task::TaskDelete, protobuf::MessageField,
};
use crossbeam_channel::after;
use time::OffsetDateTime;

use super::{
    container::{Container, Leftover},
    create::Remains,
    error::{Context, Kind, Result, ShimError},
    events::TaskEvent,
    host::Host,
    process::{Process, Step},
    proto, prove,
    state::{Phase, Request},
};
use crate::{config::Config, sandbox::SandboxId};

/// How long the end of an init that the runtime has killed may take to be seen.
const END_LIMIT: Duration = Duration::from_secs(10);
/// What containerd hears of a container whose shim was killed.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

fn response(process: &Process) -> DeleteResponse {
    let exit = process.exit();
    DeleteResponse {
        pid: process.pid() as u32,
        exit_status: exit.map_or(0, |e| e.status),
        exited_at: exit.map_or_else(MessageField::none, |e| {
            MessageField::some(proto::timestamp(e.at))
        }),
        ..Default::default()
    }
}

/// Delete of an exec. Its background processes go on.
pub fn delete_exec(container: &Container, exec_id: &str) -> Result<DeleteResponse> {
    let process = container.process(exec_id)?;
    if matches!(process.step(), Step::Starting | Step::Running) {
        let text = format!(
            "{}: cannot delete running exec {exec_id}",
            container.sandbox
        );
        return Err(ShimError::new(Kind::FailedPrecondition, text));
    }
    if let Some(io) = process.take_io() {
        io.finish(container.config.exec_linger);
        if io.is_live() {
            container.leftovers.lock().push(Leftover {
                exec_id: exec_id.to_owned(),
                targets: [process.stdio.stdout.clone(), process.stdio.stderr.clone()],
                io,
            });
        }
    }
    container.inner.lock().execs.remove(exec_id);
    Ok(response(&process))
}

/// Delete of the container.
pub fn delete_container(container: &Arc<Container>) -> Result<DeleteResponse> {
    let _alone = container.alone(Request::Delete)?;
    let phase = container.phase();
    container.stop_turns();
    if let Some(io) = container.init.take_io() {
        io.finish(container.config.exec_linger);
    }
    container.leftovers.lock().clear();
    if phase != Phase::CreatedCheckpoint {
        container
            .runtime
            .delete(container.sandbox.id(), false)
            .context(&container.sandbox)?;
    }
    if phase == Phase::Created {
        // The runtime has killed it, and its end is told before its deletion.
        container.init.wait(&after(END_LIMIT)).map_err(|_| {
            let text = format!(
                "{}: delete: init has not ended within {END_LIMIT:?}",
                container.sandbox
            );
            ShimError::new(Kind::Failed, text)
        })?;
    }
    if let Some(rootfs) = &container.mounted {
        container
            .host
            .unmount(rootfs)
            .context(format_args!("{}: unmount", container.sandbox))?;
    }
    container
        .run_dir
        .remove()
        .context(format_args!("{}: clean up", container.sandbox))?;
    let response = response(&container.init);
    let event = TaskEvent::Delete(TaskDelete {
        container_id: container.sandbox.id().to_owned(),
        pid: response.pid,
        exit_status: response.exit_status,
        exited_at: response.exited_at.clone(),
        ..Default::default()
    });
    container.enter_phase(Phase::Deleted, event);
    Ok(response)
}

/// `containerd-shim-crab-v2 delete`: the shim is gone, and so shall be all it had.
pub fn after_death(host: &dyn Host, sandbox: &SandboxId, bundle: &Path) -> DeleteResponse {
    let remains = Remains::load(&host.run_dir(sandbox));
    clear(host, sandbox, remains.as_ref());
    // Also a shim that died before it wrote anything down may have been given a mounted rootfs.
    if remains.is_none() && bundle.join("rootfs").exists() {
        attempt(sandbox, "unmount", host.unmount(&bundle.join("rootfs")));
    }
    let pid = crate::runtime::runc::read_pid(&bundle.join("init.pid")).unwrap_or(0);
    DeleteResponse {
        pid: pid as u32,
        exit_status: KILLED,
        exited_at: MessageField::some(proto::timestamp(OffsetDateTime::now_utc())),
        ..Default::default()
    }
}

/// Removes what is left of a sandbox whose shim is dead. Every step is tried, whatever the others
/// come to.
pub(super) fn clear(host: &dyn Host, sandbox: &SandboxId, remains: Option<&Remains>) {
    let run_dir = host.run_dir(sandbox);
    // The runtime needs a place for its log, also when the shim died before it made one.
    attempt(sandbox, "clean up", run_dir.create());
    let mut config = Config::default();
    if let Some(remains) = remains {
        config.runtime.clone_from(&remains.runtime);
        config.root.clone_from(&remains.root);
        config.systemd_cgroup = remains.systemd_cgroup;
    }
    let runtime = host.runtime(&config, sandbox.namespace(), run_dir.path());
    let states = config.root.join(sandbox.namespace());
    // By its name where it died before it knew more. Both may be more than the runtime knows: in a
    // rollback that was made to forget the container.
    let cgroup = || {
        let mut dirs = remains.map_or_else(Vec::new, |r| r.cgroup.clone());
        if let Some(path) = remains.and_then(|r| r.cgroups_path.as_deref()) {
            dirs.extend(host.cgroup_named(path, sandbox.id()));
        }
        dirs.sort_unstable();
        dirs.dedup();
        dirs
    };
    prove::remove(host, &*runtime, &states, sandbox, &run_dir);
    // It may have died in a Create, a dump or a rollback: what goes on without it would make cgroups
    // and freeze them behind our back.
    attempt(
        sandbox,
        "end the runtime's calls",
        runtime.end_calls(sandbox.id()),
    );
    // Before the runtime is asked: the shim may have died while it froze the sandbox, and runc 1.1
    // waits without a limit for a cgroup that is FREEZING. It stays so while one of its threads
    // waits in execve for the end of others that are frozen already.
    attempt(sandbox, "kill", host.kill_cgroup(&cgroup()));
    attempt(sandbox, "delete", runtime.delete(sandbox.id(), true));
    // A runtime that ended with its shim, half-way, may have made a cgroup and no state.
    attempt(sandbox, "remove the cgroup", host.remove_cgroup(&cgroup()));
    if let Some(rootfs) = remains.and_then(|r| r.mounted.as_deref())
        && rootfs.exists()
    {
        attempt(sandbox, "unmount", host.unmount(rootfs));
    }
    attempt(sandbox, "clean up", run_dir.remove());
}

fn attempt<E: std::fmt::Display>(
    sandbox: &SandboxId,
    step: &str,
    done: std::result::Result<(), E>,
) {
    if let Err(e) = done {
        log::error!("{sandbox}: {step}: {e}");
    }
}
