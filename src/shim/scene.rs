//! What a cut must know of a container's processes.

use std::{path::PathBuf, sync::Arc};

use super::{container::Container, io::ProcessIo, process::Process, proto};
use crate::{coordinator::cut::Scene, runtime::descriptors::Stream};

impl Scene for Container {
    fn network(&self) -> Result<PathBuf, String> {
        if let Some(path) = self.spec.network_path() {
            Ok(path.to_owned())
        } else if self.spec.wants_private_network() {
            Ok(self.run_dir.netns())
        } else if self.spec.has_network_namespace() {
            Err("its network belongs to its user namespace, and the runtime makes it".into())
        } else {
            Err("it shares the host's network".into())
        }
    }

    /// Without an overlay CRIU finds watched files by itself, or says that it cannot.
    fn layers(&self) -> Vec<PathBuf> {
        let overlay = self.host.overlay(&self.rootfs()).ok();
        let layers = overlay.into_iter().flat_map(|overlay| {
            let lower = overlay.lowerdirs.into_iter();
            std::iter::once(overlay.upperdir).chain(lower)
        });
        layers.collect()
    }

    fn init_pid(&self) -> i32 {
        self.init.live_pid()
    }

    fn drain(&self) {
        for (exec_id, _, io) in all_io(self) {
            if let Err(e) = io.drain_frozen() {
                log::warn!("{}: exec {exec_id:?}: cannot drain: {e}", self.sandbox);
            }
        }
    }

    fn streams(&self) -> Result<Vec<Stream>, String> {
        let mut streams = Vec::new();
        for (exec_id, targets, io) in all_io(self) {
            let wrong = |e| format!("stdio of {exec_id:?}: {e}");
            for pipe in io.stdio_pipes().map_err(wrong)? {
                let pending = match pipe.fd {
                    0 => io.pending_stdin().map_err(wrong)?,
                    _ => Vec::new(),
                };
                streams.push(Stream {
                    exec_id: exec_id.clone(),
                    fd: pipe.fd,
                    inode: pipe.inode,
                    target: targets[usize::from(pipe.fd.min(2))].clone(),
                    pending: proto::to_hex(&pending),
                });
            }
        }
        Ok(streams)
    }
}

/// All pipes between its processes and the shim: of init, of execs, of what execs left.
fn all_io(container: &Container) -> Vec<(String, [String; 3], Arc<ProcessIo>)> {
    let named = |p: &Arc<Process>| {
        let s = &p.stdio;
        let targets = [s.stdin.clone(), s.stdout.clone(), s.stderr.clone()];
        p.io().map(|io| (p.exec_id.clone(), targets, io))
    };
    let execs: Vec<Arc<Process>> = container.inner.lock().execs.values().cloned().collect();
    let mut all: Vec<_> = named(&container.init).into_iter().collect();
    all.extend(execs.iter().filter_map(named));
    let mut leftovers = container.leftovers.lock();
    leftovers.retain(|l| l.io.is_live());
    all.extend(leftovers.iter().map(|l| {
        let [out, err] = l.targets.clone();
        (
            l.exec_id.clone(),
            [String::new(), out, err],
            Arc::clone(&l.io),
        )
    }));
    all
}
