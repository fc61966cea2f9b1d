//! Out of memory.

use super::*;

/// A v1 cgroup whose event_control is a plain file: the test plays the kernel.
#[test]
fn an_oom_is_told_once_and_a_dropped_watch_hears_no_more() {
    let fake = Fake::v1();
    fake.put("memory", "memory.oom_control", "oom_kill 0\n");
    fake.put("memory", "cgroup.event_control", "");
    let (tx, rx) = mpsc::channel();
    let watch = OomWatch::new(&fake.cgroup(), move || tx.send(()).unwrap()).unwrap();

    let line = fs::read_to_string(fake.path("memory", "cgroup.event_control")).unwrap();
    let fd: i32 = line.split(' ').next().unwrap().parse().unwrap();
    // SAFETY: the watch owns this eventfd and lives until after the clone is made.
    let event = unsafe { BorrowedFd::borrow_raw(fd) };
    let event = event.try_clone_to_owned().unwrap();
    let kernel = |n: u64| nix::unistd::write(&event, &n.to_ne_bytes()).unwrap();

    kernel(1);
    rx.recv_timeout(Duration::from_secs(20)).unwrap();
    kernel(3);
    rx.recv_timeout(Duration::from_secs(20)).unwrap();
    drop(watch);
    // Its callback is gone, and the sender with it, as soon as the thread has let go.
    assert!(rx.recv_timeout(Duration::from_secs(20)).is_err());
    kernel(1);
}

#[test]
fn a_watch_may_be_dropped_by_its_own_callback() {
    let fake = Fake::v1();
    fake.put("memory", "memory.oom_control", "oom_kill 0\n");
    fake.put("memory", "cgroup.event_control", "");
    let slot = Arc::new(parking_lot::Mutex::new(None::<OomWatch>));
    let (tx, rx) = mpsc::channel();
    let in_callback = Arc::clone(&slot);
    let mut guard = slot.lock();
    *guard = Some(
        OomWatch::new(&fake.cgroup(), move || {
            let watch = in_callback.lock().take();
            drop(watch);
            tx.send(()).unwrap();
        })
        .unwrap(),
    );
    let line = fs::read_to_string(fake.path("memory", "cgroup.event_control")).unwrap();
    let fd: i32 = line.split(' ').next().unwrap().parse().unwrap();
    // SAFETY: the watch owns this eventfd and lives until the guard is dropped.
    let event = unsafe { BorrowedFd::borrow_raw(fd) };
    nix::unistd::write(event, &1u64.to_ne_bytes()).unwrap();
    drop(guard);
    rx.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn a_cgroup_without_memory_control_cannot_be_watched() {
    let fake = Fake::v2();
    let path = fake.path("", "memory.events");
    assert_eq!(
        OomWatch::new(&fake.cgroup(), || {})
            .unwrap_err()
            .to_string(),
        format!(
            "cannot open {}: No such file or directory (os error 2)",
            path.display()
        )
    );
}
