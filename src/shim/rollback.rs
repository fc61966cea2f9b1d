//! Rollback in place: a running sandbox goes back to one of its checkpoints, and its clients see
//! the same container (D13).
//!
//! ```text
//! latch → freeze → drain → new pipes ─┬→ kill → wait → forget → files → restore → thaw
//!                                     └ from here on there is no way back to what was
//! ```
//!
//! The pid that the client was told at the start stays, as an unreaped zombie, until the task ends;
//! the runtime is made to forget the container instead of deleting it, so that the cgroup stays.
//! Once the processes have been killed, a failure is the end of the task: its exit is told, the
//! checkpoints are as they were, and an armed start goes on from one of them.

use std::{
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use time::OffsetDateTime;

use super::{
    artefacts,
    container::{Container, Place},
    error::{Context, Kind, Result, ShimError},
    going_back::GoingBack,
    host::Target,
    reaper::{self, Exit},
    restore::{self, Source},
    start::discard,
    state::Request,
};
use crate::{
    coordinator::{
        freeze::Held,
        rollback::{Failure, Replacement, RolledBack, Step, Steps},
    },
    rootfs::{self, Overlay, Replaced},
    sandbox::TurnNo,
    store::{self, Laid},
};

/// How long execs that are being started may take.
pub(super) const LATCH_LIMIT: Duration = Duration::from_secs(30);
/// How long killed processes may take to be gone.
pub(super) const DEATH_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at processes that are about to be gone.
const PAUSE: Duration = Duration::from_millis(1);
/// What the client is told of an init that could not be brought back.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// Takes a container back to the checkpoint of `turn`, and returns when its processes go on.
///
/// # Errors
/// When nothing was touched, and when the task had to be ended; the text says which.
pub fn roll_back(container: &Arc<Container>, turn: TurnNo) -> Result<RolledBack> {
    let alone = container.alone(Request::Rollback)?;
    let step = format!("{}: roll back to turn {turn}", container.sandbox);
    if !reaper::lists_children() {
        let why = "this kernel does not list the children of a process (CONFIG_PROC_CHILDREN)";
        return Err(ShimError::new(
            Kind::Failed,
            format!("{step}: {why}: nothing was touched"),
        ));
    }
    let turns = container.turns.get().ok_or_else(|| {
        let why = container.why_unprotected().unwrap_or_default();
        ShimError::new(Kind::FailedPrecondition, format!("{step}: {why}"))
    })?;
    let this = Arc::clone(container);
    let done = turns.roll_back(turn, Box::new(move |with| go_back(&this, turn, with)));
    // As long as we are alone here, a recovery only waits.
    let goes_on = match container.is_recovering() {
        true => "it goes on from its last checkpoint",
        false => "nothing was touched",
    };
    match &done {
        Err(Failure::Ended(_)) => end(container),
        _ => {
            if let Some(exit) = container.end_going_back() {
                drop(alone);
                container.init_exited(exit);
            }
        }
    }
    done.map_err(|failure| match failure {
        Failure::Untouched(why) => {
            ShimError::new(Kind::Failed, format!("{step}: {why}: {goes_on}"))
        }
        Failure::Ended(why) => ShimError::new(
            Kind::Failed,
            format!(
                "{step}: {why}\nThe sandbox had to be ended. Its checkpoints are as they were: \
                 `crab restore {id}@{turn} --start` goes on from this one, `crab log {id}` lists \
                 them all.",
                id = container.sandbox.id()
            ),
        ),
    })
}

/// The shim's part, between the checks and the line in the journal.
pub(super) fn go_back(
    container: &Arc<Container>,
    turn: TurnNo,
    with: Replacement<'_>,
) -> std::result::Result<Steps, Failure> {
    let is_half_way = with.half_way.is_some();
    let gone = replace_running(container, turn, with);
    match gone {
        // Killed before it was let go; of one that had died all is put back by its recovery.
        Err(Failure::Untouched(why)) if is_half_way && !container.is_recovering() => {
            Err(Failure::Ended(why))
        }
        gone => gone,
    }
}

/// Replaces processes and files of a sandbox that runs.
fn replace_running(
    container: &Arc<Container>,
    turn: TurnNo,
    with: Replacement<'_>,
) -> std::result::Result<Steps, Failure> {
    let Replacement {
        laid,
        scratch,
        half_way,
    } = with;
    let untouched = |e: ShimError| Failure::Untouched(e.message);
    let ended = |e: ShimError| Failure::Ended(e.message);
    let mut half_way = HalfWay {
        container,
        held: half_way,
    };
    let mut steps = Steps::begin();
    container.begin_going_back().map_err(untouched)?;
    let _latched = container.doors.latch(LATCH_LIMIT).ok_or_else(|| {
        Failure::Untouched(format!("an exec has been starting for {LATCH_LIMIT:?}"))
    })?;
    // Execs that are killed end no turn.
    let void = container.doors.void_turn();
    let is_half_way = half_way.held.is_some();
    let stopping = container
        .place()
        .and_then(|place| Stopping::prepare(container, &place, &mut half_way.held));
    let stopping = match stopping {
        Ok(stopping) => stopping,
        Err(e) => {
            // Of one that goes on as it was an exec may have ended meanwhile, and a turn with it.
            if !is_half_way && void.take_back() {
                container.turn_ended();
            }
            return Err(untouched(e));
        }
    };
    steps.done(Step::Freeze);
    stopping.kill(container).map_err(ended)?;
    steps.done(Step::Kill);
    let laid = laid.map_err(Failure::Ended)?;
    replace(container, turn, &laid, scratch, &mut steps).map_err(ended)?;
    Ok(steps)
}

/// Puts the files and the processes of a checkpoint into the place of those of dead processes.
pub(super) fn replace(
    container: &Arc<Container>,
    turn: TurnNo,
    laid: &Arc<Laid>,
    scratch: &Path,
    steps: &mut Steps,
) -> Result<()> {
    container.still_wanted()?;
    container
        .runtime
        .forget(container.sandbox.id())
        .context("make the runtime forget the old processes")?;
    put_back(container, laid)?;
    steps.done(Step::Files);
    container.still_wanted()?;
    let source = Source::Armed {
        turn,
        kind: store::Kind::Full,
        laid: Arc::clone(laid),
        scratch: scratch.to_owned(),
    };
    let limits = container.limits.lock().clone();
    container.begin_returning();
    let restored = restore::restore(container, &source);
    if limits.is_some() {
        // Whatever comes of this: not those of then.
        container.limits.lock().clone_from(&limits);
    }
    restored?;
    // The client sees the same container, with the limits that it has set since. If that fails, its
    // processes go on, with less or more than the client wanted.
    if let Some(limits) = limits
        && let Err(e) = artefacts::set_limits(container, limits)
    {
        log::error!("{}: {e}", container.sandbox);
    }
    steps.done(Step::Restore);
    Ok(())
}

/// A sandbox that stands still, and whose files are half-way to what they are to be.
struct HalfWay<'c> {
    container: &'c Container,
    held: Option<Held>,
}

impl Drop for HalfWay<'_> {
    /// Unless it was taken over: nothing in it may run on.
    fn drop(&mut self) {
        let Some(held) = self.held.take() else {
            return;
        };
        let container = self.container;
        // Their end is that of the task: no recovery. Unless it had died before.
        let mut inner = container.inner.lock();
        if inner.going_back != Some(GoingBack::Recovering) {
            inner.going_back = Some(GoingBack::Replacing);
        }
        drop(inner);
        let mut pids = vec![container.init.live_pid()];
        if let Ok(place) = container.place() {
            pids.extend(place.cgroup.procs().unwrap_or_default());
        }
        for pid in pids {
            match container
                .host
                .target(pid)
                .and_then(|it| it.signal(libc::SIGKILL))
            {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    log::error!("{}: kill: {e}", container.sandbox);
                }
                _ => {}
            }
        }
        if let Err(e) = held.let_die() {
            log::error!("{}: {e}", container.sandbox);
        }
    }
}

/// A sandbox that stands still and is about to be killed.
struct Stopping {
    place: Arc<Place>,
    held: Held,
    init: Box<dyn Target>,
    others: Vec<Box<dyn Target>>,
}

impl Stopping {
    /// Freezes, takes over what was written until now, and puts new pipes behind the client's side.
    /// The last step decides: after an error the sandbox is as it was, and thawed.
    /// `half_way`: it is frozen already, and must not be thawed after an error. It is taken if there is none.
    fn prepare(
        container: &Container,
        place: &Arc<Place>,
        half_way: &mut Option<Held>,
    ) -> Result<Self> {
        use crate::coordinator::cut::Scene;
        let fresh = match half_way {
            Some(_) => None,
            None => Some(place.freeze.hold().context("freeze it")?),
        };
        let init = container
            .host
            .target(container.init.live_pid())
            .context("find its init")?;
        let mut others = Vec::new();
        for pid in place.cgroup.procs().context("list its processes")? {
            if pid != container.init.live_pid() {
                // One that ends while frozen was killed before.
                others.extend(container.host.target(pid).ok());
            }
        }
        container.drain();
        let pipes = match container.init.io() {
            Some(io) => Some((io.make_pipes().context("make new pipes")?, io)),
            None => None,
        };
        container.begin_replacing()?;
        // Before they are killed, so that their end is not taken for that of the streams.
        if let Some((pipes, io)) = pipes {
            io.switch_to(pipes);
        }
        let held = fresh.or_else(|| half_way.take());
        Ok(Self {
            place: Arc::clone(place),
            held: held.ok_or_else(|| ShimError::new(Kind::Failed, "nobody holds it"))?,
            init,
            others,
        })
    }

    /// Kills all of them at one moment: none sees another one die. Returns when they are gone.
    fn kill(self, container: &Container) -> Result<()> {
        for target in self.others.iter().chain([&self.init]) {
            match target.signal(libc::SIGKILL) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    log::warn!("{}: kill: {e}", container.sandbox);
                }
                _ => {}
            }
        }
        self.held.let_die().context("thaw what was killed")?;
        // With it end all of its pid namespace; the kernel has it wait for them.
        if !self
            .init
            .wait_end(DEATH_LIMIT)
            .context("wait for its init")?
        {
            return Err(late());
        }
        wait_for_the_dead(container, &self.place)
    }
}

fn late() -> ShimError {
    let text = format!("killed processes are not gone after {DEATH_LIMIT:?}");
    ShimError::new(Kind::Failed, text)
}

/// Waits until none of the processes of a dead init is left, and the end of every exec was told.
pub(super) fn wait_for_the_dead(container: &Container, place: &Place) -> Result<()> {
    let end = Instant::now() + DEATH_LIMIT;
    loop {
        match place.cgroup.procs() {
            Ok(pids) if pids.is_empty() => break,
            Err(e) if e.is_gone() => break,
            Err(e) => return Err(e).context("list its processes"),
            Ok(_) if Instant::now() > end => return Err(late()),
            Ok(_) => thread::sleep(PAUSE),
        }
    }
    container.wait_for_execs(DEATH_LIMIT)
}

/// Puts the checkpoint's files into the place of what is mounted, and mounts them.
fn put_back(container: &Container, laid: &Laid) -> Result<()> {
    let mut build = |new: &Path, old: &Path| laid.write_upper(new, old).map_err(|e| e.to_string());
    let replaced = match &container.mounted {
        Some(target) => {
            let overlay =
                Overlay::from_mounts(&container.mounts).context("the files cannot be put back")?;
            let host = &container.host;
            host.unmount(target).context("unmount the files")?;
            let replaced = rootfs::put_back(&mut build, &overlay).context("put the files back");
            // Also when that has failed: what cleans up after us finds what it expects.
            let mounted = host.mount(&container.mounts, target);
            let replaced = replaced?;
            mounted.context("the files are put back, but cannot be mounted")?;
            replaced
        }
        None => {
            let rootfs = container.spec.rootfs(&container.bundle);
            let overlay = container.host.overlay(&rootfs);
            let overlay = overlay.context("the files cannot be put back")?;
            rootfs::remount_with(&mut build, &overlay).context("put the files back")?
        }
    };
    remove_later(container, replaced)
}

/// Deleting the replaced files takes as long as there are many; nobody has to wait for that but the
/// next rollback.
fn remove_later(container: &Container, replaced: Replaced) -> Result<()> {
    let mut tidying = container.tidying.lock();
    if let Some(before) = tidying.take()
        && before.join().is_err()
    {
        log::error!(
            "{}: removing replaced files has panicked",
            container.sandbox
        );
    }
    let sandbox = container.sandbox.clone();
    let thread = thread::Builder::new().name("tidy".into()).spawn(move || {
        if let Err(e) = replaced.remove_old() {
            log::warn!("{sandbox}: cannot remove replaced files: {e}");
        }
    });
    *tidying = Some(thread.context("remove replaced files")?);
    Ok(())
}

/// The processes are killed and could not be brought back: that is the end of the task.
fn end(container: &Arc<Container>) {
    let killed = Exit {
        pid: container.init.pid(),
        status: KILLED,
        at: OffsetDateTime::now_utc(),
    };
    let fallen = container
        .inner
        .lock()
        .take_fallen(container.init.live_pid());
    end_with(container, fallen.map_or(killed, |it| container.as_told(it)));
}

/// The same; `exit` is what is told, unless init's own end is known.
pub(super) fn end_with(container: &Arc<Container>, exit: Exit) {
    container.note_end(exit);
    container.doors.give_up();
    discard(container);
    if let Ok(place) = container.place() {
        // The runtime may know nothing of it any more.
        if let Err(e) = container.host.remove_cgroup(&place.cgroup.directories()) {
            log::error!("{}: {e}", container.sandbox);
        }
    }
    // The new pipes, if nobody has them: so their streams end, for which clients wait.
    if let Some(io) = container.init.io() {
        if let Err(e) = io.start() {
            log::error!("{}: {e}", container.sandbox);
        }
        io.leader_exited();
        io.deliver();
    }
    let mut inner = container.inner.lock();
    inner.going_back = None;
    inner.kill_at_start = None;
    inner.fell_again = None;
    inner.init_gone = true;
    inner.init_exit.get_or_insert(exit);
    container.tell_init_exit(inner);
}
