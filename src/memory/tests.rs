use std::fs::File;

use super::{scan::Scan, *};

/// What the kernel has is no matter of ours; that it is asked in the right way is.
#[test]
fn a_page_of_our_own_is_asked_about_and_nothing_else() {
    let page = Page::new().unwrap();
    assert_eq!(page.address() % page.size, 0);
    page.is_soft_dirty(&File::open("/proc/self/pagemap").unwrap())
        .unwrap();
    assert_eq!(size_of::<Scan>(), 96);
    for asked in [scans(), dirty_bytes(std::process::id() as i32).map(drop)] {
        match asked {
            Ok(()) => {}
            Err(e) => assert!(matches!(e.raw_os_error(), Some(libc::ENOTTY)), "{e}"),
        }
    }
}

#[test]
fn what_a_process_has_of_its_own_is_counted() {
    let own = std::process::id() as i32;
    let mut block = vec![0u8; 64 << 20];
    block.fill(1);
    assert!(own_bytes(own).unwrap() >= 64 << 20);
    drop(block);
}

/// Where the kernel tells: what this process writes is counted, and nothing without a write.
#[test]
fn what_is_written_counts_as_dirty() {
    let own = std::process::id() as i32;
    if !is_tracked() || scans().is_err() {
        // `dirty_bytes` finds nothing there; the virtual machine's kernel tells.
        return;
    }
    let mut block = vec![0u8; 8 << 20];
    block.fill(1);
    assert!(dirty_bytes(own).unwrap() >= 8 << 20);
}
