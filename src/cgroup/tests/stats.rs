//! Statistics, as the Go library has them.

use containerd_shim::protos::{cgroups, cgroups_v2};
use protobuf::Message;

use super::*;

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
