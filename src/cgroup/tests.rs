//! Tests on directories of plain files that stand for cgroups, with text captured from kernels
//! 6.18 (hybrid) and 6.12 (v2).

use std::{
    os::fd::BorrowedFd,
    sync::{Arc, mpsc},
    thread,
    time::Instant,
};

use containerd_shim::protos::{cgroups, cgroups_v2};
use protobuf::Message;
use tempfile::TempDir;

use super::*;

const V1_CONTROLLERS: [&str; 8] = [
    "cpu", "cpuacct", "memory", "freezer", "blkio", "pids", "devices", "cpuset",
];

/// A fake `/sys/fs/cgroup`, and the text that would have a sandbox at `/default/box` in it.
struct Fake {
    root: TempDir,
    mountinfo: String,
    proc_cgroup: String,
}

impl Fake {
    fn v1() -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut mountinfo = String::new();
        let mut proc_cgroup = String::new();
        for (n, name) in V1_CONTROLLERS.iter().enumerate() {
            let point = root.path().join(name);
            fs::create_dir_all(point.join("default/box")).unwrap();
            mountinfo += &format!(
                "3{n} 31 0:3{n} / {} rw,relatime - cgroup cgroup rw,{name}\n",
                point.display()
            );
            proc_cgroup += &format!("{n}:{name}:/default/box\n");
        }
        Self {
            root,
            mountinfo,
            proc_cgroup,
        }
    }

    fn hybrid() -> Self {
        let mut fake = Self::v1();
        let point = fake.root.path().join("unified");
        fs::create_dir_all(point.join("default/box")).unwrap();
        fake.mountinfo += &format!(
            "41 31 0:38 / {} rw,relatime - cgroup2 cgroup2 rw\n",
            point.display()
        );
        fake.proc_cgroup += "0::/default/box\n";
        fake
    }

    fn v2() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("default/box")).unwrap();
        let mountinfo = format!(
            "35 24 0:31 / {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
            root.path().display()
        );
        Self {
            root,
            mountinfo,
            proc_cgroup: "0::/default/box\n".to_owned(),
        }
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::resolve(1, &self.proc_cgroup, &Mounts::parse(&self.mountinfo)).unwrap()
    }

    /// Writes a file of the sandbox's cgroup, `controller` being `""` for v2.
    fn put(&self, controller: &str, file: &str, text: &str) {
        fs::write(self.path(controller, file), text).unwrap();
    }

    fn path(&self, controller: &str, file: &str) -> PathBuf {
        self.root
            .path()
            .join(controller)
            .join("default/box")
            .join(file)
    }
}

#[test]
fn a_cgroup_is_found_in_every_layout() {
    for (fake, layout) in [
        (Fake::v1(), Layout::V1),
        (Fake::hybrid(), Layout::Hybrid),
        (Fake::v2(), Layout::V2),
    ] {
        let cgroup = fake.cgroup();
        assert_eq!(cgroup.layout(), layout);
        assert_eq!(cgroup.id().is_some(), layout != Layout::V1);
        assert!(cgroup.exists());
        let root = fake.root.path();
        let freezer = match layout {
            Layout::V2 => root.join("default/box"),
            _ => root.join("freezer/default/box"),
        };
        assert_eq!(cgroup.freezer_dir(), Some(freezer.as_path()));
    }
}

#[test]
fn the_id_outlives_the_directory() {
    let fake = Fake::v2();
    let cgroup = fake.cgroup();
    let inode = fs::metadata(fake.path("", "")).unwrap().ino();
    fs::remove_dir(fake.path("", "")).unwrap();
    assert!(!cgroup.exists());
    assert_eq!(cgroup.id(), Some(inode));
    assert_eq!(cgroup.procs().unwrap(), [0; 0]);
    assert!(cgroup.thaw().unwrap_err().is_gone());
    assert!(cgroup.stats().is_ok());
}

/// One mount line, one membership, and where that leads.
#[test]
fn paths_are_relative_to_what_is_mounted() {
    let v2 = |root: &str| {
        format!("35 24 0:31 {root} /sys/fs/cgroup rw shared:9 master:1 - cgroup2 cgroup2 rw\n")
    };
    let systemd = "37 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n";
    let cpu = "33 31 0:30 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
    for (mountinfo, proc_cgroup, want) in [
        (v2("/"), "0::/a/b\n", Some("/sys/fs/cgroup/a/b")),
        // A path with a colon, as systemd's scopes have; a cgroup that is being removed.
        (
            v2("/"),
            "0::/cri:box (deleted)\n",
            Some("/sys/fs/cgroup/cri:box"),
        ),
        // A subtree is mounted (docker in docker, in the host's cgroup namespace).
        (
            v2("/docker/x"),
            "0::/docker/x/a\n",
            Some("/sys/fs/cgroup/a"),
        ),
        (v2("/docker/x"), "0::/docker/xa\n", None),
        (v2("/docker/x"), "0::/other\n", None),
        // Within a cgroup namespace whose mount shows the directory above.
        (v2("/.."), "0::/../a\n", Some("/sys/fs/cgroup/a")),
        (v2("/"), "0::/../a\n", None),
        (v2("/.."), "0::/../../a\n", None),
        // Never the whole host.
        (v2("/"), "0::/\n", None),
        (v2("/a\\040b"), "0::/a b/c\n", Some("/sys/fs/cgroup/c")),
        (
            systemd.to_owned(),
            "9:name=systemd:/a\n",
            Some("/sys/fs/cgroup/systemd/a"),
        ),
        (systemd.to_owned(), "9:systemd:/a\n", None),
        (systemd.to_owned(), "0::/a\n", None),
        (
            cpu.to_owned(),
            "4:cpu,cpuacct:/a\n",
            Some("/cg/cpu,cpuacct/a"),
        ),
        (
            "garbage\n1 2 3 - cgroup\n".to_owned(),
            "0::/a\nx\n:\n",
            None,
        ),
    ] {
        let found = Cgroup::resolve(7, proc_cgroup, &Mounts::parse(&mountinfo)).ok();
        let dirs: Vec<_> = found.iter().flat_map(Cgroup::dirs).collect();
        assert_eq!(dirs.first().copied(), want.map(Path::new), "{proc_cgroup}");
    }
}

#[test]
fn a_cgroup_that_no_mount_shows_is_named() {
    let error = Cgroup::resolve(7, "4:memory:/a\n0::/a\n", &Mounts::parse("")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no cgroup mount shows the cgroup of process 7 (/proc/7/cgroup: 4:memory:/a 0::/a)"
    );
}

#[test]
fn a_mount_that_shows_the_directory_is_preferred() {
    let fake = Fake::v2();
    let covered = "34 24 0:31 / /nonexistent rw - cgroup2 cgroup2 rw\n".to_owned();
    let mounts = Mounts::parse(&(covered + &fake.mountinfo));
    let cgroup = Cgroup::resolve(1, &fake.proc_cgroup, &mounts).unwrap();
    assert_eq!(cgroup, fake.cgroup());
}

#[test]
fn processes_of_descendants_count_once() {
    let fake = Fake::hybrid();
    fs::create_dir_all(fake.path("freezer", "inner/most")).unwrap();
    fake.put("freezer", "cgroup.procs", "12\n10\n12\n");
    fake.put("freezer", "inner/cgroup.procs", "0\n11\n");
    fake.put("freezer", "inner/most/cgroup.procs", "9\n10\n");
    assert_eq!(fake.cgroup().procs().unwrap(), [9, 10, 11, 12]);
    // Without the freezer's directory another hierarchy answers.
    fs::remove_dir_all(fake.path("freezer", "")).unwrap();
    fake.put("unified", "cgroup.procs", "5\n");
    assert_eq!(fake.cgroup().procs().unwrap(), [5]);
}

#[test]
fn our_own_cgroup_can_be_resolved_or_is_refused() {
    // What it finds depends on where the tests run; it must find something or say why.
    let pid = i32::try_from(std::process::id()).unwrap();
    if let Ok(cgroup) = Cgroup::of_pid(pid) {
        assert!(cgroup.exists());
    }
    let error = Cgroup::of_pid(i32::MAX).unwrap_err();
    assert!(error.is_gone());
    assert_eq!(
        error.to_string(),
        "cannot read /proc/2147483647/cgroup: No such file or directory (os error 2)"
    );
}

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

#[test]
fn v1_metrics_are_those_of_gos_library() {
    let fake = Fake::hybrid();
    for (controller, file, text) in [
        ("cpuacct", "cpuacct.stat", "user 466\nsystem 147\n"),
        ("cpuacct", "cpuacct.usage", "6136650284\n"),
        (
            "cpuacct",
            "cpuacct.usage_percpu",
            "2910788467 3225862375 \n",
        ),
        (
            "cpu",
            "cpu.stat",
            "nr_periods 5\nnr_throttled 2\nthrottled_time 77000\nnr_bursts 0\nburst_time 0\n",
        ),
        ("pids", "pids.current", "3\n"),
        ("pids", "pids.max", "max\n"),
        (
            "memory",
            "memory.stat",
            "cache 8192\nrss 4096\npgpgin 12\nhierarchical_memory_limit 9223372036854771712\n\
             total_cache 16384\ntotal_inactive_file 512\ntotal_unevictable 0\n",
        ),
        (
            "memory",
            "memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        ),
        ("memory", "memory.usage_in_bytes", "20480\n"),
        ("memory", "memory.max_usage_in_bytes", "40960\n"),
        ("memory", "memory.limit_in_bytes", "9223372036854771712\n"),
        ("memory", "memory.failcnt", "6\n"),
        ("memory", "memory.kmem.usage_in_bytes", "1024\n"),
        ("memory", "memory.kmem.tcp.limit_in_bytes", "2048\n"),
        (
            "blkio",
            "blkio.throttle.io_service_bytes",
            "254:0 Read 4096\n254:0 Write 0\n254:0 Total 4096\nTotal 4096\n",
        ),
    ] {
        fake.put(controller, file, text);
    }
    let any = fake.cgroup().stats().unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
    let m = cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
    assert_eq!(m.cpu.usage.total, 6_136_650_284);
    assert_eq!(m.cpu.usage.user, 4_660_000_000);
    assert_eq!(m.cpu.usage.kernel, 1_470_000_000);
    assert_eq!(m.cpu.usage.per_cpu, [2_910_788_467, 3_225_862_375]);
    assert_eq!(m.cpu.throttling.periods, 5);
    assert_eq!(m.cpu.throttling.throttled_periods, 2);
    assert_eq!(m.cpu.throttling.throttled_time, 77_000);
    assert_eq!((m.pids.current, m.pids.limit), (3, 0));
    assert_eq!((m.memory.cache, m.memory.rss), (8192, 4096));
    assert_eq!(m.memory.pg_pg_in, 12);
    assert_eq!(
        m.memory.hierarchical_memory_limit,
        9_223_372_036_854_771_712
    );
    assert_eq!(m.memory.total_inactive_file, 512);
    assert_eq!(m.memory.usage.usage, 20_480);
    assert_eq!(m.memory.usage.max, 40_960);
    assert_eq!(m.memory.usage.limit, 9_223_372_036_854_771_712);
    assert_eq!(m.memory.usage.failcnt, 6);
    assert_eq!(m.memory.kernel.usage, 1024);
    assert_eq!(m.memory.kernel_tcp.limit, 2048);
    assert_eq!(m.memory.swap.usage, 0);
    assert_eq!(m.memory_oom_control.oom_kill, 1);
    let io: Vec<_> = m
        .blkio
        .io_service_bytes_recursive
        .iter()
        .map(|e| (e.major, e.minor, e.op.as_str(), e.value))
        .collect();
    assert_eq!(
        io,
        [
            (254, 0, "Read", 4096),
            (254, 0, "Write", 0),
            (254, 0, "Total", 4096)
        ]
    );
}

#[test]
fn v2_metrics_are_those_of_gos_library() {
    let fake = Fake::v2();
    for (file, text) in [
        (
            "cpu.stat",
            "usage_usec 281873\nuser_usec 100000\nsystem_usec 181873\nnice_usec 0\n\
             core_sched.force_idle_usec 0\nnr_periods 4\nnr_throttled 1\nthrottled_usec 99\n\
             nr_bursts 3\nburst_usec 8\n",
        ),
        (
            "cpu.pressure",
            "some avg10=0.25 avg60=0.00 avg300=0.00 total=1234\n\
             full avg10=0.00 avg60=1.50 avg300=0.00 total=99\n",
        ),
        ("pids.current", "2\n"),
        ("pids.max", "max\n"),
        (
            "memory.stat",
            "anon 11\nfile 22\nkernel_stack 33\ninactive_file 44\npgfault 55\n\
             workingset_refault_anon 0\nthp_collapse_alloc 66\n",
        ),
        ("memory.current", "4096\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "8192\n"),
        ("memory.swap.current", "0\n"),
        ("memory.swap.max", "1048576\n"),
        (
            "memory.events",
            "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
        ),
        (
            "io.stat",
            "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:16 \n8:0\n",
        ),
    ] {
        fake.put("", file, text);
    }
    let any = fake.cgroup().stats().unwrap();
    assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
    let m = cgroups_v2::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
    assert_eq!(m.cpu.usage_usec, 281_873);
    assert_eq!((m.cpu.user_usec, m.cpu.system_usec), (100_000, 181_873));
    assert_eq!((m.cpu.nr_periods, m.cpu.nr_throttled), (4, 1));
    assert_eq!((m.cpu.throttled_usec, m.cpu.nr_bursts), (99, 3));
    assert_eq!(m.cpu.burst_usec, 8);
    assert_eq!(m.cpu.psi.some.total, 1234);
    assert!((m.cpu.psi.full.avg60 - 1.5).abs() < 1e-9);
    assert_eq!((m.pids.current, m.pids.limit), (2, u64::MAX));
    assert_eq!((m.memory.anon, m.memory.file), (11, 22));
    assert_eq!((m.memory.kernel_stack, m.memory.inactive_file), (33, 44));
    assert_eq!(m.memory.thp_collapse_alloc, 66);
    assert_eq!((m.memory.usage, m.memory.usage_limit), (4096, u64::MAX));
    assert_eq!((m.memory.max_usage, m.memory.swap_limit), (8192, 1 << 20));
    assert!(m.memory.psi.is_none());
    assert_eq!((m.memory_events.high, m.memory_events.oom_kill), (1, 4));
    assert_eq!(m.io.usage.len(), 1);
    let io = &m.io.usage[0];
    assert_eq!(
        (io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios),
        (254, 0, 4096, 8192, 1, 2)
    );
}

#[test]
fn cfqs_counters_win_over_the_throttling_layers() {
    let fake = Fake::v1();
    let throttled = "254:0 Read 1\nTotal 1\n";
    fake.put("blkio", "blkio.throttle.io_serviced", throttled);
    fake.put(
        "blkio",
        "blkio.io_serviced_recursive",
        "254:0 Read 9\nTotal 9\n",
    );
    fake.put("blkio", "blkio.time_recursive", "254:0 77\n");
    let any = fake.cgroup().stats().unwrap();
    let m = cgroups::metrics::Metrics::parse_from_bytes(&any.value).unwrap();
    assert_eq!(m.blkio.io_serviced_recursive.len(), 1);
    assert_eq!(m.blkio.io_serviced_recursive[0].value, 9);
    assert_eq!(m.blkio.io_time_recursive[0].value, 77);
}

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
