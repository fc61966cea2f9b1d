//! What the kernel tells of the pages of a process, tried on one of our own.

use super::{Check, Host, Verdict};
use crate::{inspector::offers, memory};

pub(super) fn checks(host: &Host) -> Vec<Check> {
    vec![soft_dirty(), clear_refs(host), pagemap_scan()]
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

fn clear_refs(host: &Host) -> Check {
    let check = Check::new(
        "clear_refs",
        "clearing of soft-dirty pages",
        "as without soft-dirty pages, unless `incremental = true` is set",
    );
    match host.is_root {
        false => check.cannot_tell(),
        true if !memory::is_tracked() => check.is(Verdict::Missing, "no soft-dirty pages to clear"),
        true => check.tried("is seen", offers::sees_marks()),
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
