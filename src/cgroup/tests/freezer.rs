//! Freezing and thawing.

use super::*;

#[test]
fn states_are_told_as_they_are() {
    let v1 = Fake::v1();
    for (text, want) in [
        ("FROZEN\n", FreezerState::Frozen),
        ("FREEZING\n", FreezerState::Freezing),
        ("THAWED\n", FreezerState::Thawed),
    ] {
        v1.put("freezer", "freezer.state", text);
        assert_eq!(v1.cgroup().state().unwrap(), want);
    }
    v1.put("freezer", "freezer.state", "melting\n");
    let path = v1.path("freezer", "freezer.state");
    assert_eq!(
        v1.cgroup().state().unwrap_err().to_string(),
        format!("unexpected text in {}: \"melting\\n\"", path.display())
    );
    let v2 = Fake::v2();
    for (asked, events, want) in [
        ("1\n", "populated 1\nfrozen 1\n", FreezerState::Frozen),
        ("1\n", "populated 1\nfrozen 0\n", FreezerState::Freezing),
        ("0\n", "populated 1\nfrozen 0\n", FreezerState::Thawed),
        // An ancestor is frozen.
        ("0\n", "populated 1\nfrozen 1\n", FreezerState::Frozen),
    ] {
        v2.put("", "cgroup.freeze", asked);
        v2.put("", "cgroup.events", events);
        assert_eq!(v2.cgroup().state().unwrap(), want);
    }
}

#[test]
fn a_freeze_is_confirmed() {
    let fake = Fake::v1();
    // A plain file says FROZEN as soon as that is written into it.
    fake.put("freezer", "freezer.state", "THAWED");
    fake.cgroup().freeze(Duration::from_secs(1)).unwrap();
    assert_eq!(fake.cgroup().state().unwrap(), FreezerState::Frozen);
    fake.cgroup().thaw().unwrap();
    assert_eq!(fake.cgroup().state().unwrap(), FreezerState::Thawed);
}

#[test]
fn a_freeze_that_comes_late_is_waited_for() {
    let fake = Fake::v2();
    fake.put("", "cgroup.freeze", "0");
    fake.put("", "cgroup.events", "populated 1\nfrozen 0\n");
    let cgroup = fake.cgroup();
    thread::scope(|scope| {
        let freeze = scope.spawn(|| cgroup.freeze(Duration::from_secs(20)));
        while fs::read_to_string(fake.path("", "cgroup.freeze")).unwrap() != "1" {
            thread::yield_now();
        }
        let events = fake.path("", "cgroup.events");
        fs::write(events.with_extension("new"), "populated 1\nfrozen 1\n").unwrap();
        fs::rename(events.with_extension("new"), events).unwrap();
        freeze.join().unwrap().unwrap();
    });
}

#[test]
fn a_freeze_that_never_comes_is_undone() {
    let fake = Fake::v2();
    fake.put("", "cgroup.freeze", "0");
    fake.put("", "cgroup.events", "populated 1\nfrozen 0\n");
    let start = Instant::now();
    let error = fake.cgroup().freeze(Duration::from_millis(20)).unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(20));
    let text = error.to_string();
    let path = fake.path("", "cgroup.events");
    let start = format!("{} is still FREEZING after ", path.display());
    assert!(text.starts_with(&start), "{text}");
    assert!(text.ends_with("; thawed again"), "{text}");
    let asked = fs::read_to_string(fake.path("", "cgroup.freeze")).unwrap();
    assert_eq!(asked, "0");
}

#[test]
fn a_freezer_that_is_missing_is_named() {
    let fake = Fake::v2();
    let path = fake.path("", "cgroup.freeze");
    assert_eq!(
        fake.cgroup()
            .freeze(Duration::ZERO)
            .unwrap_err()
            .to_string(),
        format!(
            "cannot write 1 to {}: No such file or directory (os error 2)",
            path.display()
        )
    );
    // And not made by asking.
    assert!(!path.exists());
    let cpu = "33 31 0:30 / /cg/cpu rw - cgroup cgroup rw,cpu\n";
    let cgroup = Cgroup::resolve(1, "4:cpu:/a\n", &Mounts::parse(cpu)).unwrap();
    assert_eq!(
        cgroup.state().unwrap_err().to_string(),
        "no freezer for the cgroup /cg/cpu/a"
    );
}
