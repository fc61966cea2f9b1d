//! Dumps that build upon each other (D9).
//!
//! Where the kernel tells which pages are written to, a dump has those alone that were since the dump before.
//! That one must be the last *final* dump, or a pre-dump upon it; everything else loses pages. So the chain
//! ends, and the next dump has everything, with whatever may have cleared the kernel's marks or replaced the
//! processes: a dump that came to nothing, one of a client's, a rollback or a recovery, another shim.
//!
//! A process may clear the marks, too, its own or another one's. The inspector sees it. If that was before a
//! dump begins, it has everything; if it was later, until the sandbox stood still, the dump is thrown away
//! and made anew. What the inspector has seen is forgotten in the freeze of each dump, once CRIU has cleared the
//! marks itself: from there on it counts for the next one.

use std::time::{Duration, Instant};

use super::{
    budget::bytes_in,
    cut::CutError,
    inspection::Inspection,
    known::Taken,
    subject::Subject,
    take::{Order, dump_args, remark},
    worker::Worker,
};
use crate::{
    config::Incremental,
    memory,
    store::{Checkpoint, FileEntry, JournalLine, Pending, Staging},
};

/// Why a dump has everything.
const CLEARED: &str =
    "somebody cleared the kernel's marks of written pages, so the dump has all of them";

/// What the next dump can build upon.
pub(super) struct Chain {
    /// The images of the last dump, which later checkpoints of files alone have, too.
    image: Vec<FileEntry>,
    /// Host pid of init then.
    init: i32,
    /// Which of the sandbox's dumps it was.
    number: u64,
}

/// One turn's part of a chain.
#[derive(Default)]
pub(super) struct Link {
    /// The dumps of this sandbox build upon each other.
    pub(super) is_tracking: bool,
    /// Somebody has cleared marks since the last dump: a pre-dump would not tell that from a later time.
    is_cleared: bool,
    /// Which of the sandbox's dumps the next one builds upon; none: it has everything.
    pub(super) upon: Option<u64>,
    /// For how long pre-dumps have frozen the sandbox.
    pub(super) frozen: Duration,
    /// Bytes that they have captured.
    pub(super) captured: u64,
    /// When the last one began.
    pub(super) since: Option<Instant>,
}

impl Worker {
    /// Begins a turn's part of the chain. Whatever becomes of it, the chain ends here unless
    /// [`Worker::goes_on_with`] says otherwise.
    pub(super) fn link(
        &mut self,
        subject: &dyn Subject,
        order: &Order,
        pending: &mut Pending,
    ) -> Result<Link, String> {
        let parts = subject.parts()?;
        let obstacle = self.obstacle();
        if parts.runtime.is_incremental() && obstacle != self.obstacle {
            if let Some(why) = &obstacle {
                log::warn!("{}: each dump has everything: {why}", self.store.id());
            }
            self.obstacle.clone_from(&obstacle);
        }
        let inspection = self.inspection.as_ref();
        let mut link = Link {
            is_tracking: parts.runtime.is_incremental() && obstacle.is_none(),
            is_cleared: inspection.is_some_and(Inspection::marks_cleared),
            ..Link::default()
        };
        let init = parts.scene.init_pid();
        if let Some(chain) = self.chain.take()
            && let Some(parent) = &order.parent
            && link.is_tracking
            && !link.is_cleared
            && chain.fits(parent, init, self.doors.dumps())
        {
            pending.build_upon(parent);
            link.upon = Some(chain.number);
        }
        Ok(link)
    }

    /// Why dumps must not build upon each other though the kernel marks what is written to; None if they may.
    pub(super) fn obstacle(&self) -> Option<String> {
        match (self.settings.incremental, &self.inspection) {
            (Incremental::Always, _) => None,
            (Incremental::Never, _) => Some("`incremental` is false".into()),
            (Incremental::Auto, None) => Some("`skip_unchanged` is false".into()),
            (Incremental::Auto, Some(inspection)) => inspection.sees_marks().err(),
        }
    }

    /// Whether a dump may lack pages: it builds upon another one, and somebody has cleared marks in between.
    pub(super) fn may_lack_pages(&self, link: &Link, seen: Option<&Taken>) -> bool {
        let cleared = match seen {
            Some(seen) => seen.marks_cleared,
            // Nobody looked.
            None => self.settings.incremental != Incremental::Always,
        };
        link.upon.is_some() && cleared
    }

    /// The next dump builds upon this one, which is in the store.
    pub(super) fn goes_on_with(
        &mut self,
        (checkpoint, staging): (&Checkpoint, &Staging),
        init: i32,
        number: u64,
    ) {
        match staging.leave_as_parent() {
            Ok(()) => {
                self.doors.mark_since(number);
                self.chain = Some(Chain {
                    image: checkpoint.manifest.contents.image.clone(),
                    init,
                    number,
                });
            }
            Err(e) => log::warn!("{}: the next dump has everything: {e}", self.store.id()),
        }
    }

    /// How much memory a dump would have, if pre-dumps of it are possible.
    pub(super) fn memory(&self, subject: &dyn Subject) -> Option<u64> {
        let parts = subject.parts().ok()?;
        if !parts.runtime.is_incremental() || self.obstacle().is_some() {
            return None;
        }
        let procs = parts.freeze.cgroup().procs().ok()?;
        let of = |pid: &i32| match self.chain.is_some() {
            true => memory::dirty_bytes(*pid),
            false => memory::own_bytes(*pid),
        };
        // One that is gone by now has none.
        let bytes = procs.iter().map(|pid| of(pid).unwrap_or(0));
        Some(bytes.fold(0, u64::saturating_add))
    }

    /// Takes pre-dumps, as many as are planned, unless somebody comes to the door.
    pub(super) fn pre_dump(
        &self,
        subject: &dyn Subject,
        planned: u32,
        pending: &mut Pending,
        link: &mut Link,
        line: &mut JournalLine,
    ) -> Result<(), String> {
        let parts = subject.parts()?;
        if link.is_tracking && link.is_cleared {
            remark(line, Some(CLEARED.into()));
            return Ok(());
        }
        while line.pre_dumps < planned && link.is_tracking {
            if self.doors.is_awaited() {
                remark(line, Some("no more pre-dumps: somebody waits".into()));
                break;
            }
            let parent_path = pending.parent_path();
            let mut args = dump_args(subject, pending, link, self.settings.dump_limit, "pre")?;
            args.pre_dump = true;
            args.parent_path = parent_path;
            let mut made = None;
            let done = parts.pre_dump(link.upon, || {
                let dir = pending.add_pre_dump();
                args.image_path = dir.map_err(|e| CutError::Capture(e.to_string()))?;
                made = Some(args.image_path.clone());
                Ok(args)
            });
            match done {
                Ok(None) => break,
                Ok(Some(done)) => {
                    line.pre_dumps += 1;
                    link.upon = Some(done.number);
                    link.frozen += done.frozen;
                    link.since = Some(done.began);
                    link.captured += made.as_deref().map_or(0, bytes_in);
                }
                Err(e) => {
                    // It may have cleared marks.
                    pending.build_upon_nothing();
                    link.upon = None;
                    link.since = None;
                    line.pre_dumps = 0;
                    remark(line, Some(format!("a pre-dump failed: {e}")));
                    break;
                }
            }
        }
        if line.pre_dumps > 0 {
            let mb = link.captured as f64 / 1e6;
            let (count, ms) = (line.pre_dumps, link.frozen.as_millis());
            let said = format!("{count} pre-dump(s): {mb:.1} MB, frozen for {ms} ms");
            remark(line, Some(said));
        }
        Ok(())
    }
}

/// A dump is thrown away, since it may lack pages.
pub(super) fn dumped_in_vain(line: &mut JournalLine, frozen: Duration) {
    line.pre_dumps = 0;
    let ms = frozen.as_millis();
    let said = format!("a dump that froze the sandbox for {ms} ms was in vain: {CLEARED}");
    remark(line, Some(said));
}

impl Chain {
    /// Whether a dump of these processes can build upon it.
    fn fits(&self, parent: &Checkpoint, init: i32, dumps: u64) -> bool {
        self.init == init && self.number == dumps && self.image == parent.manifest.contents.image
    }
}
