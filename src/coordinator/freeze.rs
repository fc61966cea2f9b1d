//! Freezing has owners (D7b): the client's Pause, and crab's own cut.
//!
//! The processes stand still while anybody wants them to. What a client is told depends on the
//! client's own wish alone, so a checkpoint is never seen as PAUSED and never undoes a Pause.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

use crate::cgroup::{Cgroup, CgroupError, FreezerState, Layout};

/// How long the kernel may take to freeze everything.
const LIMIT: Duration = Duration::from_secs(10);

/// What the coordinator does with a cgroup. A trait so that tests need no kernel.
pub trait Freezable: Send + Sync {
    /// Freezes every process and returns once all of them stand still.
    fn freeze(&self) -> Result<(), CgroupError>;
    /// Lets them run.
    fn thaw(&self) -> Result<(), CgroupError>;
    /// Whether all of them stand still now.
    fn is_frozen(&self) -> Result<bool, CgroupError>;
    /// Host pids of every process inside, descendants included.
    fn procs(&self) -> Result<Vec<i32>, CgroupError>;
    /// Whether CRIU hangs on stopped tasks with this freezer, as it does with that of v1.
    fn hangs_on_stopped(&self) -> bool;
    /// The CPU time that all processes together have used, the dead ones included.
    fn cpu_time(&self) -> Result<Duration, CgroupError>;
    /// Its directory in the hierarchy of cgroup v2, whose ids the inspector goes by.
    fn unified_dir(&self) -> Option<&Path>;
}

impl Freezable for Cgroup {
    fn freeze(&self) -> Result<(), CgroupError> {
        Cgroup::freeze(self, LIMIT)
    }

    fn thaw(&self) -> Result<(), CgroupError> {
        Cgroup::thaw(self)
    }

    fn is_frozen(&self) -> Result<bool, CgroupError> {
        Ok(self.state()? == FreezerState::Frozen)
    }

    fn procs(&self) -> Result<Vec<i32>, CgroupError> {
        Cgroup::procs(self)
    }

    fn hangs_on_stopped(&self) -> bool {
        self.layout() != Layout::V2
    }

    fn cpu_time(&self) -> Result<Duration, CgroupError> {
        Cgroup::cpu_time(self)
    }

    fn unified_dir(&self) -> Option<&Path> {
        Cgroup::unified_dir(self)
    }
}

#[derive(Default)]
struct Owners {
    client: bool,
    crab: bool,
    /// How long crab has held it, all together.
    held: Duration,
    /// Once a sandbox is to die it is never frozen again.
    dying: bool,
}

/// One sandbox's freezer and who holds it.
pub struct Freeze {
    cgroup: Arc<dyn Freezable>,
    /// Held while the kernel freezes: one at a time. Locked before `owners`.
    freezing: Mutex<()>,
    /// Never held while the kernel freezes: death does not wait for that.
    owners: Mutex<Owners>,
}

/// Why a freeze did not happen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The sandbox is being killed.
    #[error("the sandbox is being killed")]
    Dying,
    /// The kernel said no.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Freeze {
    /// A freezer that nobody holds.
    pub fn new(cgroup: Arc<dyn Freezable>) -> Arc<Self> {
        Arc::new(Self {
            cgroup,
            freezing: Mutex::default(),
            owners: Mutex::default(),
        })
    }

    /// A freezer for the processes that take the place of `former`'s: the client's wish, and the
    /// sandbox's death, are theirs too.
    pub fn succeed(former: &Self, cgroup: Arc<dyn Freezable>) -> Arc<Self> {
        let this = Self::new(cgroup);
        {
            let (mut ours, theirs) = (this.owners.lock(), former.owners.lock());
            ours.client = theirs.client;
            ours.dying = theirs.dying;
        }
        this
    }

    /// The cgroup below.
    pub fn cgroup(&self) -> &dyn Freezable {
        &*self.cgroup
    }

    /// The client's Pause.
    pub fn pause(&self) -> Result<(), FreezeError> {
        self.freeze(|owners| owners.client = true)
    }

    /// Somebody may have thawed it who asks nobody: freezes it again if the client has paused it.
    pub fn keep_paused(&self) -> Result<(), FreezeError> {
        let _freezing = self.freezing.lock();
        let paused = {
            let owners = self.owners.lock();
            owners.client && !owners.dying
        };
        match paused {
            true => self.freeze_alone(|_| ()),
            false => Ok(()),
        }
    }

    fn freeze(&self, own: impl FnOnce(&mut Owners)) -> Result<(), FreezeError> {
        let _freezing = self.freezing.lock();
        self.freeze_alone(own)
    }

    /// With `freezing` locked.
    fn freeze_alone(&self, own: impl FnOnce(&mut Owners)) -> Result<(), FreezeError> {
        if self.is_dying() {
            return Err(FreezeError::Dying);
        }
        let frozen = self.cgroup.freeze();
        let mut owners = self.owners.lock();
        if owners.dying {
            // It may have been frozen after it was let go.
            if_not_gone(self.cgroup.thaw())?;
            return Err(FreezeError::Dying);
        }
        frozen?;
        own(&mut owners);
        Ok(())
    }

    /// Keeps it awake until the returned value is dropped, unless the client has paused it, or it is to die:
    /// a Pause waits.
    pub fn awake(&self) -> Option<MutexGuard<'_, ()>> {
        let freezing = self.freezing.lock();
        let owners = self.owners.lock();
        (!owners.client && !owners.crab && !owners.dying).then_some(freezing)
    }

    /// The client's Resume. The processes go on unless crab holds them.
    pub fn resume(&self) -> Result<(), FreezeError> {
        let _freezing = self.freezing.lock();
        let mut owners = self.owners.lock();
        owners.client = false;
        if !owners.crab {
            self.cgroup.thaw()?;
        }
        Ok(())
    }

    /// crab's own freeze, until the returned value is dropped.
    pub fn hold(self: &Arc<Self>) -> Result<Held, FreezeError> {
        let begin = Instant::now();
        // Also when the client holds it already: this confirms that it stands still.
        self.freeze(|owners| owners.crab = true)?;
        Ok(Held {
            freeze: Arc::clone(self),
            begin,
            killed: false,
        })
    }

    /// How long crab has held it so far, all together: from the beginning of each freeze to its thaw.
    pub fn held(&self) -> Duration {
        self.owners.lock().held
    }

    /// The sandbox is to die: whoever holds it, let it go, and never hold it again. A v1 freezer
    /// keeps even SIGKILL waiting.
    pub fn release_for_death(&self) {
        let mut owners = self.owners.lock();
        owners.dying = true;
        // Also when nobody holds it: a freeze may be under way, or a restore have left it frozen.
        if let Err(e) = if_not_gone(self.cgroup.thaw()) {
            log::warn!("cannot thaw a dying sandbox: {e}");
        }
    }

    /// Its processes are dead, and others are about to take their place: these may be frozen.
    pub fn revive(&self) {
        self.owners.lock().dying = false;
    }

    /// Whether [`Freeze::release_for_death`] was called.
    pub fn is_dying(&self) -> bool {
        self.owners.lock().dying
    }
}

/// crab's hold on a frozen sandbox.
pub struct Held {
    freeze: Arc<Freeze>,
    begin: Instant,
    killed: bool,
}

impl Held {
    /// The freezer is CRIU's until the returned value is dropped: CRIU thaws the sandbox while it works on
    /// its processes, and hangs on one that somebody freezes meanwhile. A Pause and a Resume wait.
    pub fn lend(&self) -> MutexGuard<'_, ()> {
        self.freeze.freezing.lock()
    }

    /// Everything in it has been killed: lets it die, also what the client has paused. A v1 freezer
    /// keeps even SIGKILL waiting.
    pub fn let_die(mut self) -> Result<(), FreezeError> {
        self.killed = true;
        let _freezing = self.freeze.freezing.lock();
        if_not_gone(self.freeze.cgroup.thaw()).map_err(Into::into)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let freezing = self.freeze.freezing.lock();
        let mut owners = self.freeze.owners.lock();
        owners.crab = false;
        owners.held += self.begin.elapsed();
        let stays = owners.client && !owners.dying;
        if !stays && let Err(e) = if_not_gone(self.freeze.cgroup.thaw()) {
            log::error!("cannot thaw the sandbox: {e}");
        }
        drop(owners);
        drop(freezing);
        // A CRIU that has failed may have left it thawed.
        if stays
            && !self.killed
            && let Err(e) = self.freeze.keep_paused()
        {
            log::error!("cannot keep the sandbox paused: {e}");
        }
    }
}

/// With the cgroup gone there is nobody left to thaw.
fn if_not_gone(thawed: Result<(), CgroupError>) -> Result<(), CgroupError> {
    match thawed {
        Err(e) if e.is_gone() => Ok(()),
        thawed => thawed,
    }
}

#[cfg(test)]
pub(crate) mod fake {
    use super::*;

    /// A cgroup that remembers whether it is frozen.
    #[derive(Default)]
    pub struct FakeCgroup {
        pub frozen: Mutex<bool>,
        pub procs: Mutex<Vec<i32>>,
    }

    impl Freezable for FakeCgroup {
        fn freeze(&self) -> Result<(), CgroupError> {
            *self.frozen.lock() = true;
            Ok(())
        }
        fn thaw(&self) -> Result<(), CgroupError> {
            *self.frozen.lock() = false;
            Ok(())
        }
        fn is_frozen(&self) -> Result<bool, CgroupError> {
            Ok(*self.frozen.lock())
        }
        fn procs(&self) -> Result<Vec<i32>, CgroupError> {
            Ok(self.procs.lock().clone())
        }
        fn hangs_on_stopped(&self) -> bool {
            true
        }
        fn cpu_time(&self) -> Result<Duration, CgroupError> {
            Ok(Duration::ZERO)
        }
        fn unified_dir(&self) -> Option<&Path> {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{fake::FakeCgroup, *};

    fn freeze() -> (Arc<FakeCgroup>, Arc<Freeze>) {
        let cgroup = Arc::new(FakeCgroup::default());
        let freeze = Freeze::new(Arc::clone(&cgroup) as Arc<dyn Freezable>);
        (cgroup, freeze)
    }

    #[test]
    fn a_cut_leaves_a_paused_sandbox_paused() {
        let (cgroup, freeze) = freeze();
        freeze.pause().unwrap();
        drop(freeze.hold().unwrap());
        assert!(*cgroup.frozen.lock());
        freeze.resume().unwrap();
        assert!(!*cgroup.frozen.lock());
    }

    #[test]
    fn a_resume_during_a_cut_takes_effect_after_it() {
        let (cgroup, freeze) = freeze();
        freeze.pause().unwrap();
        let held = freeze.hold().unwrap();
        freeze.resume().unwrap();
        assert!(*cgroup.frozen.lock());
        drop(held);
        assert!(!*cgroup.frozen.lock());
    }

    #[test]
    fn what_criu_has_left_thawed_is_paused_again_unless_it_was_killed() {
        let (cgroup, freeze) = freeze();
        freeze.pause().unwrap();
        let held = freeze.hold().unwrap();
        cgroup.thaw().unwrap();
        drop(held);
        assert!(*cgroup.frozen.lock());
        freeze.hold().unwrap().let_die().unwrap();
        assert!(!*cgroup.frozen.lock());
    }

    #[test]
    fn a_pause_waits_while_criu_has_the_freezer() {
        const SOON: Duration = Duration::from_secs(20);
        let (cgroup, freeze) = freeze();
        let held = freeze.hold().unwrap();
        let lent = held.lend();
        // As CRIU does.
        cgroup.thaw().unwrap();
        std::thread::scope(|scope| {
            let pause = scope.spawn(|| freeze.pause());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!pause.is_finished() && !*cgroup.frozen.lock());
            drop(lent);
            let end = Instant::now() + SOON;
            while !pause.is_finished() {
                assert!(Instant::now() < end);
                std::thread::yield_now();
            }
            pause.join().unwrap().unwrap();
        });
        drop(held);
        assert!(*cgroup.frozen.lock(), "paused");
    }

    #[test]
    fn how_long_crab_holds_it_adds_up() {
        const MOMENT: Duration = Duration::from_millis(5);
        let (_, freeze) = freeze();
        freeze.pause().unwrap();
        std::thread::sleep(MOMENT);
        assert_eq!(freeze.held(), Duration::ZERO, "that is the client's");
        for times in 1..=2 {
            let held = freeze.hold().unwrap();
            std::thread::sleep(MOMENT);
            drop(held);
            assert!(freeze.held() >= MOMENT * times);
        }
    }

    #[test]
    fn nothing_freezes_a_dying_sandbox() {
        let (cgroup, freeze) = freeze();
        let held = freeze.hold().unwrap();
        freeze.release_for_death();
        assert!(!*cgroup.frozen.lock());
        drop(held);
        assert!(freeze.hold().is_err());
        assert!(freeze.pause().is_err());
        assert!(!*cgroup.frozen.lock());
    }
}
