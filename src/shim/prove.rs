//! A trial restore (D9b): brings a checkpoint up beside the running sandbox and throws it away.
//!
//! The trial has a name, a cgroup, a network, pipes and a writable layer of its own, and is frozen
//! before the first instruction of any process; what is left of it is killed while it stands still.
//! It shares what belongs to the host (volumes, bind mounts), and nothing ever writes there.

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::bounded;
use serde_json::Value;

use super::{
    container::Container,
    hold,
    host::Host,
    io::ConsoleSocket,
    run_dir::RunDir,
    spec::{self, Spec},
};
use crate::{
    cgroup::{Cgroup, Mounts},
    config::Tcp,
    coordinator::freeze::Freezable,
    packet_lock::PacketLock,
    rootfs::{Overlay, parse_mountinfo},
    runtime::{
        self, OciRuntime, Stdio,
        criu_conf::{self, CriuConf},
        descriptors::{self, RestoreImage},
        runc,
    },
    sandbox::SandboxId,
    store::{Checkpoint, Store},
};

/// What its runtime calls a trial, after the sandbox's id. A sandbox has one at a time.
const SUFFIX: &str = ".crab-trial";
/// How long what was killed may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(20);
/// The same, and how long a restore is waited for, after the shim's death, when containerd waits
/// for five seconds in all.
const CLEAN_LIMIT: Duration = Duration::from_millis(2000);

/// A trial's files of this boot: below the sandbox's own.
struct Place(PathBuf);

impl Place {
    fn of(run_dir: &RunDir) -> Self {
        Self(run_dir.path().join("trial"))
    }

    fn netns(&self) -> PathBuf {
        self.0.join("netns")
    }

    fn rootfs(&self) -> PathBuf {
        self.0.join("rootfs")
    }

    fn work(&self) -> PathBuf {
        self.0.join("criu-work")
    }

    /// What `/proc/PID/cgroup` says of its processes.
    fn cgroup(&self) -> PathBuf {
        self.0.join("cgroup")
    }

    fn pid_file(&self) -> PathBuf {
        self.0.join("init.pid")
    }
}

fn trial_id(sandbox: &SandboxId) -> String {
    format!("{}{SUFFIX}", sandbox.id())
}

/// Restores a checkpoint of the running container and throws it away.
///
/// # Errors
/// Why it could not be restored, or not be tried.
pub(super) fn prove(container: &Container, checkpoint: &Checkpoint) -> Result<(), String> {
    let place = Place::of(&container.run_dir);
    let begun = can_be_tried(container).and_then(|()| {
        // The rest of one that was interrupted.
        remove_of(container);
        fs::create_dir_all(place.rootfs()).map_err(|e| format!("{:?}: {e}", place.0))
    });
    let proved = begun.and_then(|()| attempt(container, checkpoint, &place));
    remove_of(container);
    proved
}

/// Whether a trial would be felt by nobody.
fn can_be_tried(container: &Container) -> Result<(), String> {
    if !container.spec.has_network_namespace() {
        return Err(
            "not tried: the sandbox shares the host's network, where its sockets are in use".into(),
        );
    }
    let volumes = container.spec.bind_mounts();
    let sockets = fs::read_to_string(format!("/proc/{}/net/unix", container.init.live_pid()))
        .map_err(|e| format!("not tried: the sandbox's sockets cannot be listed: {e}"))?;
    match socket_in(&sockets, &volumes) {
        Some(path) => Err(format!(
            "not tried: a socket is bound at {path:?}, in a volume; a restore beside the running \
             sandbox would bind it anew and take it away from its server"
        )),
        None => Ok(()),
    }
}

/// A bound socket of `/proc/net/unix` (path in the eighth column) below one of the directories.
fn socket_in<'a>(sockets: &'a str, directories: &[PathBuf]) -> Option<&'a str> {
    let paths = sockets
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7));
    paths.filter(|path| path.starts_with('/')).find(|path| {
        directories
            .iter()
            .any(|dir| Path::new(path).starts_with(dir))
    })
}

fn attempt(container: &Container, checkpoint: &Checkpoint, place: &Place) -> Result<(), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    // On the checkpoints' file system: images are linked, not copied, and overlays work there.
    let scratch = Store::open(&container.config.store)
        .map_err(|e| text(&e))?
        .sandbox(&container.sandbox)
        .scratch_dir();
    let laid = checkpoint.lay_out_all(&scratch).map_err(|e| text(&e))?;
    let scratch = tempfile::Builder::new()
        .prefix("trial-")
        .tempdir_in(&scratch)
        .map_err(|e| format!("{scratch:?}: {e}"))?;
    mount(container, &laid.upper_dir(), scratch.path(), place)?;
    write_bundle(container, place)?;
    let image = laid.image_dir();
    let streams = descriptors::load(&image).map_err(|e| text(&e))?;
    let pipes = Pipes::new(streams.iter().filter(|s| !s.exec_id.is_empty()))?;
    let mut linked = descriptors::prepare_restore(
        &image,
        &[scratch.path()],
        pipes.theirs,
        descriptors::of_this_boot(&image),
    )
    .map_err(|e| text(&e))?;
    restore(container, place, &image, &mut linked)
}

/// The saved layer is one more lower layer: nothing is copied, and nothing writes into it.
fn mount(container: &Container, saved: &Path, scratch: &Path, place: &Place) -> Result<(), String> {
    let overlay = container.host.overlay(&container.rootfs())?;
    let mut lowerdirs = vec![saved.to_owned()];
    lowerdirs.extend(overlay.lowerdirs);
    let trial = Overlay {
        lowerdirs,
        upperdir: scratch.join("upper"),
        workdir: scratch.join("work"),
        options: overlay.options,
        mountpoint: None,
    };
    for dir in [&trial.upperdir, &trial.workdir] {
        fs::create_dir(dir).map_err(|e| format!("{dir:?}: {e}"))?;
    }
    container.host.mount(&[trial.mount_spec()], &place.rootfs())
}

/// The container's own configuration, with places of the trial's own, and without hooks: those tell
/// others of a container.
fn write_bundle(container: &Container, place: &Place) -> Result<(), String> {
    let of = |e: &dyn std::fmt::Display| format!("the trial's {}: {e}", spec::CONFIG);
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", container.init.live_pid()));
    groups
        .and_then(|groups| fs::write(place.cgroup(), beside(&groups)))
        .map_err(|e| format!("the trial's cgroup: {e}"))?;
    let from = container.bundle.join(spec::CONFIG);
    let bytes = fs::read(&from).map_err(|e| of(&e))?;
    let mut config: Value = serde_json::from_slice(&bytes).map_err(|e| of(&e))?;
    if let Some(config) = config.as_object_mut() {
        config.remove("hooks");
    }
    if let Some(root) = config.get_mut("root") {
        root["path"] = Value::from(place.rootfs().to_string_lossy());
    }
    if let Some(path) = config.pointer_mut("/linux/cgroupsPath")
        && let Some(own) = path.as_str()
    {
        *path = Value::from(format!("{own}{SUFFIX}"));
    }
    let to = place.0.join(spec::CONFIG);
    let bytes = serde_json::to_vec(&config).map_err(|e| of(&e))?;
    fs::write(&to, bytes).map_err(|e| of(&e))?;
    // The shim may have given it one since the container's own was read.
    let spec = Spec::load(&place.0).map_err(|e| of(&e))?;
    if spec.network_path().is_some() {
        container
            .host
            .create_netns(&place.netns())
            .map_err(|e| format!("the trial's network namespace: {e}"))?;
        spec::set_network_path(&place.0, &place.netns()).map_err(|e| of(&e))?;
    }
    Ok(())
}

/// Pipes in the place of those that lead to clients. Nobody reads or writes them.
struct Pipes {
    theirs: Vec<(u64, OwnedFd)>,
    /// Open as long as the trial lives: a pipe without a reader is another state.
    _ours: Vec<OwnedFd>,
}

impl Pipes {
    fn new<'a>(streams: impl Iterator<Item = &'a descriptors::Stream>) -> Result<Self, String> {
        let mut pipes = Self {
            theirs: Vec::new(),
            _ours: Vec::new(),
        };
        // The same pipe may be at several descriptors.
        let mut made: BTreeMap<u64, ()> = BTreeMap::new();
        for stream in streams {
            if made.insert(stream.inode, ()).is_none() {
                let (theirs, ours) = pipe_end(stream.fd)?;
                pipes.theirs.push((stream.inode, theirs));
                pipes._ours.push(ours);
            }
        }
        Ok(pipes)
    }
}

/// The process's end and ours, of a pipe at its descriptor 0, 1 or 2.
fn pipe_end(fd: u8) -> Result<(OwnedFd, OwnedFd), String> {
    let (reader, writer) = std::io::pipe().map_err(|e| format!("a pipe for the trial: {e}"))?;
    Ok(match fd {
        0 => (reader.into(), writer.into()),
        _ => (writer.into(), reader.into()),
    })
}

fn restore(
    container: &Container,
    place: &Place,
    image: &Path,
    linked: &mut RestoreImage,
) -> Result<(), String> {
    let id = trial_id(&container.sandbox);
    let script = hold::write_script(&place.0).map_err(|e| e.to_string())?;
    let keep_tcp = container.config.tcp == Tcp::Keep || descriptors::has_no_outside_tcp(image);
    let home = CriuConf::for_restore(!keep_tcp, Some(&script))
        .write(&place.0.join("criu"))
        .map_err(|e| e.to_string())?;
    fs::create_dir_all(place.work()).map_err(|e| e.to_string())?;
    let (stdio, _kept) = stdio(container, place)?;
    let watch = container.host.reaper().watch();
    let extra_fds = linked.take_fds();
    let locked = keep_tcp.then(|| PacketLock::for_restore(image, &Ok(place.netns())));
    let restored = container.runtime.restore(runtime::Restore {
        id: &id,
        bundle: &place.0,
        image_path: linked.path(),
        work_path: &place.work(),
        pid_file: &place.pid_file(),
        stdio,
        extra_fds,
        tcp_established: keep_tcp,
        shell_job: container.init.stdio.terminal,
        file_locks: true,
        no_pivot_root: container.config.no_pivot_root,
        home: Some(home),
    });
    drop(locked);
    restored.map_err(|e| {
        let log = criu_conf::log_tail(&place.work().join("restore.log"));
        format!("{e}; CRIU's log says:\n{log}")
    })?;
    let pid = runc::read_pid(&place.pid_file()).map_err(|e| e.to_string())?;
    let (tell, ended) = bounded(1);
    watch.claim(pid, move |_| {
        // Nobody waits any more: then it is gone anyway.
        let _ = tell.send(());
    });
    let group = container.host.cgroup(pid).map_err(|e| e.to_string())?;
    kill(&*container.host, &*group.freezable())?;
    ended
        .recv_timeout(END_LIMIT)
        .map_err(|_| format!("the trial (host pid {pid}) does not die"))
}

/// What the trial's init gets as stdin, stdout and stderr, and what must stay open meanwhile.
fn stdio(container: &Container, place: &Place) -> Result<(Stdio, Kept), String> {
    if container.init.stdio.terminal {
        let socket = ConsoleSocket::new_in(&place.0).map_err(|e| e.to_string())?;
        let path = socket.path().to_owned();
        return Ok((Stdio::Console(path), Kept(Vec::new(), Some(socket))));
    }
    let [stdin, stdout, stderr] = [pipe_end(0)?, pipe_end(1)?, pipe_end(2)?];
    let kept = vec![stdin.1, stdout.1, stderr.1];
    Ok((Stdio::Fds([stdin.0, stdout.0, stderr.0]), Kept(kept, None)))
}

/// The other ends.
struct Kept(
    #[expect(dead_code, reason = "held open")] Vec<OwnedFd>,
    #[expect(dead_code, reason = "held open")] Option<ConsoleSocket>,
);

/// Kills a trial that stands still. Every process has its SIGKILL before any is let go, so that
/// none runs.
fn kill(host: &dyn Host, group: &dyn Freezable) -> Result<(), String> {
    for pid in group.procs().map_err(|e| e.to_string())? {
        // One that is gone already needs no signal.
        if let Ok(target) = host.target(pid) {
            let _ = target.signal(libc::SIGKILL);
        }
    }
    group.thaw().map_err(|e| e.to_string())
}

/// The trial's cgroup, in the words of `/proc/PID/cgroup`: beside that of the sandbox.
fn beside(proc_cgroup: &str) -> String {
    let lines = proc_cgroup.lines().filter(|line| !line.ends_with(":/"));
    let own = lines.map(|line| match line.strip_suffix(".scope") {
        Some(unit) => format!("{unit}{SUFFIX}.scope\n"),
        None => format!("{line}{SUFFIX}\n"),
    });
    own.collect()
}

fn remove_of(container: &Container) {
    let root = container.config.root.join(container.sandbox.namespace());
    let Container {
        host,
        runtime,
        sandbox,
        run_dir,
        ..
    } = container;
    remove(&**host, &**runtime, &root, sandbox, run_dir);
}

/// Removes all that there may be of a trial, also after the shim's death. `root`: the runtime's
/// directory of states.
pub(super) fn remove(
    host: &dyn Host,
    runtime: &dyn OciRuntime,
    root: &Path,
    sandbox: &SandboxId,
    run_dir: &RunDir,
) {
    let place = Place::of(run_dir);
    if !place.0.exists() {
        return;
    }
    let attempt = |step: &str, done: Result<(), String>| {
        if let Err(e) = done {
            log::error!("{sandbox}: trial restore: {step}: {e}");
        }
    };
    wait_for_restore(&trial_id(sandbox));
    // A frozen process does not die, and the runtime would wait for it.
    let group = fs::read_to_string(place.cgroup()).ok().and_then(|text| {
        let mounts = Mounts::of_self().ok()?;
        Cgroup::resolve(0, &text, &mounts).ok()
    });
    if let Some(group) = &group {
        attempt("kill", end_all(host, group));
    }
    let deleted = runtime.delete(&trial_id(sandbox), true);
    attempt("delete", deleted.map_err(|e| e.to_string()));
    // Of a trial that was interrupted the runtime may know nothing.
    if let Some(group) = &group {
        attempt("cgroup", group.remove().map_err(|e| e.to_string()));
    }
    let state = root.join(trial_id(sandbox));
    for dir in [&state, &place.0] {
        attempt("clean up", remove_unmounted(host, dir));
    }
}

/// A restore that outlives the shim is let come to its end, which is a frozen trial: a CRIU that is
/// killed leaves mounts behind.
fn wait_for_restore(id: &str) {
    let begin = Instant::now();
    while begin.elapsed() < CLEAN_LIMIT && is_restoring(id) {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a runtime restores this container.
fn is_restoring(id: &str) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .any(|line| {
            let mut words = line.split(|byte| *byte == 0);
            let restores = words.any(|word| word == b"restore");
            restores && words.any(|word| word == id.as_bytes())
        })
}

/// Removes a directory once nothing is mounted below it: what is mounted belongs to others.
fn remove_unmounted(host: &dyn Host, dir: &Path) -> Result<(), String> {
    let text = fs::read("/proc/self/mountinfo").map_err(|e| format!("mountinfo: {e}"))?;
    let points = parse_mountinfo(&text).map(|mount| mount.mountpoint);
    let mut points: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    // The last one is on top.
    points.reverse();
    for point in points {
        host.unmount(&point)?;
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("{dir:?}: {e}")),
        _ => Ok(()),
    }
}

/// Kills what is in the trial's cgroup until there is nothing: CRIU, which forks the processes from
/// within it, may still be at work.
fn end_all(host: &dyn Host, group: &Cgroup) -> Result<(), String> {
    let begin = Instant::now();
    while group.exists() && !group.procs().map_err(|e| e.to_string())?.is_empty() {
        kill(host, group)?;
        if begin.elapsed() > CLEAN_LIMIT {
            return Err("some of its processes do not die".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_has_a_cgroup_beside_the_sandboxs() {
        let of_init = "5:freezer:/a/c\n4:name=systemd:/\n0::/s.slice/docker-c.scope\n";
        let wanted = "5:freezer:/a/c.crab-trial\n0::/s.slice/docker-c.crab-trial.scope\n";
        assert_eq!(beside(of_init), wanted);
    }

    #[test]
    fn a_socket_in_a_volume_is_found() {
        let sockets = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff8: 00000002 00000000 00010000 0001 01 58 /run/own\n\
            ffff8: 00000002 00000000 00010000 0001 01 59 @/data/abstract\n\
            ffff8: 00000002 00000000 00010000 0001 01 60\n";
        let volumes = [PathBuf::from("/data")];
        assert_eq!(socket_in(sockets, &volumes), None);
        let more = format!("{sockets}ffff8: 00000002 00000000 00010000 0001 01 61 /data/s\n");
        assert_eq!(socket_in(&more, &volumes), Some("/data/s"));
        assert_eq!(socket_in(&more, &["/dat".into()]), None);
    }
}
