//! What the kernel tells of the pages of a process, tried on one of our own.

use super::{Check, Verdict};
use crate::memory;

pub(super) fn checks() -> Vec<Check> {
    vec![soft_dirty(), pagemap_scan()]
}

fn soft_dirty() -> Check {
    let check = Check::new(
        "soft_dirty",
        "soft-dirty pages",
        "each dump writes all memory of the processes, and none of it before they stand still",
    );
    match memory::tracks_writes() {
        Ok(true) => check.is(Verdict::Ok, "yes"),
        Ok(false) => check.is(Verdict::Missing, "no CONFIG_MEM_SOFT_DIRTY"),
        Err(e) => check.is(Verdict::Missing, e.to_string()),
    }
}

fn pagemap_scan() -> Check {
    let check = Check::new(
        "pagemap_scan",
        "PAGEMAP_SCAN",
        "CRIU reads the state of every page by itself: large dumps take longer",
    );
    check.tried("yes", memory::scans().map_err(|e| e.to_string()))
}
