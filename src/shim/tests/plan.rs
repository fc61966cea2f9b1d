//! What the calls of the fake machine come to, and how a test stops and goes on with one.

use crossbeam_channel::{Receiver, Sender, bounded};

use super::LIMIT;

/// Something that the machine can be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    Create,
    Start,
    Exec,
    KillAll,
    Delete,
    Forget,
    Checkpoint,
    Restore,
    Update,
    Mount,
    Unmount,
    Netns,
    Cgroup,
    Freeze,
}

/// What one call of a verb comes to, instead of going well.
pub enum Plan {
    Fail(String),
    Block(Barrier),
    /// It goes well, and leaves no pid file.
    NoPidFile,
    /// It goes well, and the process is gone before the call returns.
    EndAtOnce(u32),
    /// It goes well, and those whom it kills live a while longer.
    EndLater,
    GoOn,
}

/// Where a call stands still.
pub struct Barrier {
    entered: Sender<()>,
    released: Receiver<Plan>,
}

impl Barrier {
    /// The two sides: the test's, and the call's.
    pub fn new() -> (Blocked, Self) {
        let (begun, entered) = bounded(1);
        let (release, released) = bounded(1);
        let barrier = Self {
            entered: begun,
            released,
        };
        (Blocked { entered, release }, barrier)
    }

    /// Tells that the call has begun, and waits; how it shall fail, if it shall.
    pub fn pass(&self) -> Result<(), String> {
        // A test that is over waits for nothing.
        let _ = self.entered.send(());
        match self.released.recv() {
            Ok(Plan::Fail(why)) => Err(why),
            _ => Ok(()),
        }
    }
}

/// A call that stands still until it is released, or this is dropped.
pub struct Blocked {
    entered: Receiver<()>,
    release: Sender<Plan>,
}

impl Blocked {
    /// Waits until the call is under way.
    pub fn wait(&self) {
        self.entered.recv_timeout(LIMIT).expect("nobody called it");
    }

    /// Lets it go on.
    pub fn release(self) {
        self.release.send(Plan::GoOn).expect("nobody waits");
    }

    /// Lets it fail.
    pub fn fail(self, why: &str) {
        self.release
            .send(Plan::Fail(why.into()))
            .expect("nobody waits");
    }
}
