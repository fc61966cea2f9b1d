//! Metrics from v1 controllers.

use std::{collections::HashMap, path::Path};

use containerd_shim::protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
    MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
};
use nix::unistd::{SysconfVar, sysconf};

use super::{
    Cgroup, CgroupError,
    stats::{Keyed, huge_page_sizes, keyed, number, rdma, text},
};

type Result<T> = std::result::Result<T, CgroupError>;

/// `/proc/partitions`, where block devices have their names.
const PARTITIONS: &str = "/proc/partitions";

pub(super) fn read(cgroup: &Cgroup) -> Result<Metrics> {
    let mut metrics = Metrics {
        cpu: Some(cpu(cgroup)?).into(),
        ..Metrics::default()
    };
    if let Some(dir) = cgroup.v1_dir("pids") {
        metrics.pids = Some(PidsStat {
            current: number(&dir.join("pids.current"), 0)?,
            // Go gives 0 for "no limit" here, and docker relies on it.
            limit: number(&dir.join("pids.max"), 0)?,
            ..PidsStat::default()
        })
        .into();
    }
    if let Some(dir) = cgroup.v1_dir("memory")
        && let Some(stat) = keyed(&dir.join("memory.stat"))?
    {
        metrics.memory = Some(memory(dir, &stat)?).into();
        metrics.memory_oom_control = keyed(&dir.join("memory.oom_control"))?
            .map(|oom| MemoryOomControl {
                oom_kill_disable: oom.get("oom_kill_disable"),
                under_oom: oom.get("under_oom"),
                oom_kill: oom.get("oom_kill"),
                ..MemoryOomControl::default()
            })
            .into();
    }
    if let Some(dir) = cgroup.v1_dir("blkio") {
        let names = text(Path::new(PARTITIONS))?.unwrap_or_default();
        metrics.blkio = Some(blkio(dir, &devices(&names))?).into();
    }
    if let Some(dir) = cgroup.v1_dir("hugetlb") {
        for size in huge_page_sizes() {
            let value = |name| number(&dir.join(format!("hugetlb.{size}.{name}")), 0);
            metrics.hugetlb.push(HugetlbStat {
                usage: value("usage_in_bytes")?,
                max: value("max_usage_in_bytes")?,
                failcnt: value("failcnt")?,
                pagesize: size.clone(),
                ..HugetlbStat::default()
            });
        }
    }
    if let Some(dir) = cgroup.v1_dir("rdma") {
        metrics.rdma = Some(RdmaStat {
            current: rdma_entries(&dir.join("rdma.current"))?,
            limit: rdma_entries(&dir.join("rdma.max"))?,
            ..RdmaStat::default()
        })
        .into();
    }
    Ok(metrics)
}

/// Times in nanoseconds.
fn cpu(cgroup: &Cgroup) -> Result<CPUStat> {
    let mut usage = CPUUsage::default();
    let mut throttling = Throttle::default();
    if let Some(dir) = cgroup.v1_dir("cpuacct") {
        let ticks = keyed(&dir.join("cpuacct.stat"))?.unwrap_or_default();
        usage.total = number(&dir.join("cpuacct.usage"), 0)?;
        usage.user = ticks_to_ns(ticks.get("user"));
        usage.kernel = ticks_to_ns(ticks.get("system"));
        usage.per_cpu = text(&dir.join("cpuacct.usage_percpu"))?
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
    }
    if let Some(dir) = cgroup.v1_dir("cpu") {
        let stat = keyed(&dir.join("cpu.stat"))?.unwrap_or_default();
        throttling.periods = stat.get("nr_periods");
        throttling.throttled_periods = stat.get("nr_throttled");
        throttling.throttled_time = stat.get("throttled_time");
    }
    Ok(CPUStat {
        usage: Some(usage).into(),
        throttling: Some(throttling).into(),
        ..CPUStat::default()
    })
}

/// cpuacct.stat counts in USER_HZ, which user space sees as `_SC_CLK_TCK`: 100 everywhere.
fn ticks_to_ns(ticks: u64) -> u64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    let per_second = u64::try_from(per_second).unwrap_or(100).max(1);
    ticks.saturating_mul(1_000_000_000 / per_second)
}

fn memory(dir: &Path, stat: &Keyed) -> Result<MemoryStat> {
    let entry = |module: &str| -> Result<_> {
        let value = |name| number(&dir.join(format!("memory.{module}{name}")), 0);
        Ok(Some(MemoryEntry {
            usage: value("usage_in_bytes")?,
            max: value("max_usage_in_bytes")?,
            failcnt: value("failcnt")?,
            limit: value("limit_in_bytes")?,
            ..MemoryEntry::default()
        })
        .into())
    };
    let get = |key| stat.get(key);
    Ok(MemoryStat {
        usage: entry("")?,
        swap: entry("memsw.")?,
        kernel: entry("kmem.")?,
        kernel_tcp: entry("kmem.tcp.")?,
        cache: get("cache"),
        rss: get("rss"),
        rss_huge: get("rss_huge"),
        mapped_file: get("mapped_file"),
        dirty: get("dirty"),
        writeback: get("writeback"),
        pg_pg_in: get("pgpgin"),
        pg_pg_out: get("pgpgout"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: get("hierarchical_memory_limit"),
        hierarchical_swap_limit: get("hierarchical_memsw_limit"),
        total_cache: get("total_cache"),
        total_rss: get("total_rss"),
        total_rss_huge: get("total_rss_huge"),
        total_mapped_file: get("total_mapped_file"),
        total_dirty: get("total_dirty"),
        total_writeback: get("total_writeback"),
        total_pg_pg_in: get("total_pgpgin"),
        total_pg_pg_out: get("total_pgpgout"),
        total_pg_fault: get("total_pgfault"),
        total_pg_maj_fault: get("total_pgmajfault"),
        total_inactive_anon: get("total_inactive_anon"),
        total_active_anon: get("total_active_anon"),
        total_inactive_file: get("total_inactive_file"),
        total_active_file: get("total_active_file"),
        total_unevictable: get("total_unevictable"),
        ..MemoryStat::default()
    })
}

/// The recursive counters of CFQ, where the kernel still has them and they count anything;
/// else the two of the throttling layer, which Go puts into the same fields.
fn blkio(dir: &Path, names: &Devices) -> Result<BlkIOStat> {
    let entries = |name: &str| -> Result<Vec<BlkIOEntry>> {
        let lines = text(&dir.join(format!("blkio.{name}")))?.unwrap_or_default();
        Ok(lines
            .lines()
            .filter_map(|l| blkio_entry(l, names))
            .collect())
    };
    let cfq = BlkIOStat {
        sectors_recursive: entries("sectors_recursive")?,
        io_service_bytes_recursive: entries("io_service_bytes_recursive")?,
        io_serviced_recursive: entries("io_serviced_recursive")?,
        io_queued_recursive: entries("io_queued_recursive")?,
        io_service_time_recursive: entries("io_service_time_recursive")?,
        io_wait_time_recursive: entries("io_wait_time_recursive")?,
        io_merged_recursive: entries("io_merged_recursive")?,
        io_time_recursive: entries("time_recursive")?,
        ..BlkIOStat::default()
    };
    if cfq != BlkIOStat::default() {
        return Ok(cfq);
    }
    Ok(BlkIOStat {
        io_serviced_recursive: entries("throttle.io_serviced")?,
        io_service_bytes_recursive: entries("throttle.io_service_bytes")?,
        ..BlkIOStat::default()
    })
}

/// `8:0 Read 4096` or `8:0 4096`; a line `Total 4096` is none.
fn blkio_entry(line: &str, names: &Devices) -> Option<BlkIOEntry> {
    let mut fields = line.split([' ', ':']).filter(|f| !f.is_empty());
    let (major, minor) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (third, fourth) = (fields.next()?, fields.next());
    let (op, value) = fourth.map_or(("", third), |value| (third, value));
    Some(BlkIOEntry {
        op: op.to_owned(),
        device: names.get(&(major, minor)).cloned().unwrap_or_default(),
        major,
        minor,
        value: value.parse().ok()?,
        ..BlkIOEntry::default()
    })
}

/// Major and minor number to `/dev/…`.
type Devices = HashMap<(u64, u64), String>;

fn devices(partitions: &str) -> Devices {
    let mut devices = Devices::new();
    for line in partitions.lines().skip(2) {
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [major, minor, _blocks, name] = fields[..]
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
        {
            devices
                .entry((major, minor))
                .or_insert_with(|| format!("/dev/{name}"));
        }
    }
    devices
}

fn rdma_entries(path: &Path) -> Result<Vec<RdmaEntry>> {
    Ok(rdma(path)?
        .into_iter()
        .map(|(device, hca_handles, hca_objects)| RdmaEntry {
            device,
            hca_handles,
            hca_objects,
            ..RdmaEntry::default()
        })
        .collect())
}
