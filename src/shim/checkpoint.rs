//! containerd's Checkpoint: CRIU images into a directory that the client names.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim::protos::{
    api::CheckpointTaskRequest,
    events::task::TaskCheckpointed,
    protobuf::{Message, UnknownValueRef},
    shim::oci::CheckpointOptions,
};

use super::{
    container::Container,
    error::{Context, Kind, Result, ShimError},
    events::TaskEvent,
    state::Request,
};
use crate::{
    coordinator::cut::{self, CutError},
    runtime::{self, criu_conf::CriuConf},
};

/// `parent_path` of CheckpointOptions, which the protos of our crate don't name yet.
const PARENT_PATH: u32 = 10;

/// Serves a Checkpoint request.
pub fn for_client(container: &Container, request: &CheckpointTaskRequest) -> Result<()> {
    let _alone = container.alone(Request::Checkpoint)?;
    let options = match request.options.as_ref() {
        Some(any) => CheckpointOptions::parse_from_bytes(&any.value).map_err(|e| {
            let text = format!("{}: checkpoint options: {e}", container.sandbox);
            ShimError::new(Kind::InvalidArgument, text)
        })?,
        // Docker and nerdctl cannot say what they want of a runtime that they don't know.
        None => CheckpointOptions {
            exit: container.config.checkpoint_stops,
            ..Default::default()
        },
    };
    log::debug!("{}: checkpoint: {options:?}", container.sandbox);
    let image = image_path(container, &options, &request.path)?;
    let step = format!("{}: checkpoint into {image:?}", container.sandbox);
    fs::create_dir_all(&image).context(&step)?;
    let work = work_path(container, &options);
    fs::create_dir_all(&work).context(&step)?;
    let home = CriuConf::for_dump(options.open_tcp)
        .write(&container.run_dir.criu_home("dump"))
        .context(&step)?;
    let args = runtime::Checkpoint {
        pre_dump: false,
        image_path: image.clone(),
        work_path: work.clone(),
        parent_path: parent_path(&options),
        leave_running: !options.exit,
        tcp_established: options.open_tcp,
        external_unix_sockets: options.external_unix_sockets,
        shell_job: options.terminal || container.init.stdio.terminal,
        file_locks: options.file_locks,
        empty_namespaces: options.empty_namespaces.clone(),
        cgroups_mode: Some(options.cgroups_mode.clone()).filter(|m| !m.is_empty()),
        home: Some(home),
        limit: container.config.dump_timeout,
    };
    // With --exit CRIU kills it, as the client wants.
    let asked_before = container.inner.lock().asked_to_end;
    container.inner.lock().asked_to_end |= options.exit;
    let done = container.cut_parts()?.cut(&args, None, || Ok(()));
    if let Err(e) = done {
        container.inner.lock().asked_to_end = asked_before;
        keep_log(
            &work.join("dump.log"),
            &container.bundle.join("criu-dump.log"),
        );
        let kind = match e {
            CutError::LiveExecs { .. } => Kind::FailedPrecondition,
            _ => Kind::Failed,
        };
        return Err(ShimError::new(kind, format!("{step}: {e}")));
    }
    if work == container.run_dir.criu_work() {
        fs::remove_dir_all(&work).context(&step)?;
    }
    container
        .events
        .send(TaskEvent::Checkpointed(TaskCheckpointed {
            container_id: container.sandbox.id().to_owned(),
            checkpoint: image.to_string_lossy().into_owned(),
            ..Default::default()
        }));
    Ok(())
}

/// Where the images go: where the options say, else the request's own path.
///
/// containerd 1.7 heeds `image_path` for its own runtime alone and makes a directory of its own
/// for any other; the user wants the images where they said.
fn image_path(container: &Container, options: &CheckpointOptions, path: &str) -> Result<PathBuf> {
    let configured = container.config.criu_image_path.as_deref();
    let path = [options.image_path.as_str(), path]
        .into_iter()
        .find(|p| !p.is_empty())
        .map(Path::new)
        .or(configured)
        .ok_or_else(|| {
            let text = format!("{}: checkpoint: no image path", container.sandbox);
            ShimError::new(Kind::InvalidArgument, text)
        })?;
    if !path.is_absolute() {
        let text = format!(
            "{}: checkpoint: {path:?} is no absolute path",
            container.sandbox
        );
        return Err(ShimError::new(Kind::InvalidArgument, text));
    }
    Ok(path.to_owned())
}

fn work_path(container: &Container, options: &CheckpointOptions) -> PathBuf {
    match options.work_path.as_str() {
        "" => container
            .config
            .criu_work_path
            .clone()
            .unwrap_or_else(|| container.run_dir.criu_work()),
        path => PathBuf::from(path),
    }
}

fn parent_path(options: &CheckpointOptions) -> Option<PathBuf> {
    match options.special_fields.unknown_fields().get(PARENT_PATH) {
        Some(UnknownValueRef::LengthDelimited(path)) if !path.is_empty() => {
            Some(PathBuf::from(String::from_utf8_lossy(path).into_owned()))
        }
        _ => None,
    }
}

/// Keeps CRIU's log where containerd's own shim keeps it.
fn keep_log(from: &Path, to: &Path) {
    if let Err(e) = fs::copy(from, to) {
        log::warn!("cannot keep {from:?}: {e}");
    }
}

impl Container {
    /// What takes part in a cut of this container.
    pub(super) fn cut_parts(&self) -> Result<cut::Sandbox<'_>> {
        Ok(cut::Sandbox {
            id: self.sandbox.id(),
            runtime: &*self.runtime,
            freeze: Arc::clone(&self.place()?.freeze),
            doors: &self.doors,
            scene: self,
        })
    }
}
