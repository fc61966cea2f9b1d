//! Metrics from cgroup2.

use std::path::Path;

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIStats, PidsStat,
    RdmaEntry, RdmaStat,
};
use protobuf::MessageField;

use super::{
    Cgroup, CgroupError,
    stats::{huge_page_sizes, keyed, number, rdma, text},
};

type Result<T> = std::result::Result<T, CgroupError>;

/// What Go reads for `max` in cgroup2; readers compare limits with the machine's memory.
const NO_LIMIT: u64 = u64::MAX;

pub(super) fn read(cgroup: &Cgroup) -> Result<Metrics> {
    let Some(dir) = cgroup.unified_dir() else {
        return Ok(Metrics::default());
    };
    let value = |name: &str| number(&dir.join(name), NO_LIMIT);
    Ok(Metrics {
        pids: Some(PidsStat {
            current: value("pids.current")?,
            limit: value("pids.max")?,
            ..PidsStat::default()
        })
        .into(),
        cpu: Some(cpu(dir)?).into(),
        memory: Some(memory(dir)?).into(),
        memory_events: memory_events(dir)?.into(),
        io: Some(IOStat {
            usage: text(&dir.join("io.stat"))?
                .unwrap_or_default()
                .lines()
                .filter_map(io_entry)
                .collect(),
            psi: pressure(&dir.join("io.pressure"))?,
            ..IOStat::default()
        })
        .into(),
        hugetlb: hugetlb(dir)?,
        rdma: Some(RdmaStat {
            current: rdma_entries(&dir.join("rdma.current"))?,
            limit: rdma_entries(&dir.join("rdma.max"))?,
            ..RdmaStat::default()
        })
        .into(),
        ..Metrics::default()
    })
}

/// Times in microseconds.
fn cpu(dir: &Path) -> Result<CPUStat> {
    let Some(stat) = keyed(&dir.join("cpu.stat"))? else {
        return Ok(CPUStat::default());
    };
    Ok(CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(&dir.join("cpu.pressure"))?,
        ..CPUStat::default()
    })
}

fn memory(dir: &Path) -> Result<MemoryStat> {
    let Some(stat) = keyed(&dir.join("memory.stat"))? else {
        return Ok(MemoryStat::default());
    };
    let get = |key| stat.get(key);
    let value = |name: &str| number(&dir.join(name), NO_LIMIT);
    Ok(MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault"),
        workingset_activate: get("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: value("memory.current")?,
        usage_limit: value("memory.max")?,
        max_usage: value("memory.peak")?,
        swap_usage: value("memory.swap.current")?,
        swap_limit: value("memory.swap.max")?,
        swap_max_usage: value("memory.swap.peak")?,
        psi: pressure(&dir.join("memory.pressure"))?,
        ..MemoryStat::default()
    })
}

fn memory_events(dir: &Path) -> Result<Option<MemoryEvents>> {
    Ok(keyed(&dir.join("memory.events"))?
        .filter(|events| !events.is_empty())
        .map(|events| MemoryEvents {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
            oom_group_kill: events.get("oom_group_kill"),
            ..MemoryEvents::default()
        }))
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn io_entry(line: &str) -> Option<IOEntry> {
    let mut fields = line.split(' ');
    let (major, minor) = fields.next()?.split_once(':')?;
    let mut entry = IOEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..IOEntry::default()
    };
    let mut any = false;
    for (key, value) in fields.filter_map(|f| f.split_once('=')) {
        any = true;
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    any.then_some(entry)
}

fn hugetlb(dir: &Path) -> Result<Vec<HugeTlbStat>> {
    huge_page_sizes()
        .iter()
        .map(|size| {
            let file = |name| dir.join(format!("hugetlb.{size}.{name}"));
            Ok(HugeTlbStat {
                current: number(&file("current"), NO_LIMIT)?,
                max: number(&file("max"), NO_LIMIT)?,
                failcnt: keyed(&file("events"))?.unwrap_or_default().get("max"),
                pagesize: size.clone(),
                ..HugeTlbStat::default()
            })
        })
        .collect()
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

/// Pressure stall information; none where the kernel does not keep it.
fn pressure(path: &Path) -> Result<MessageField<PSIStats>> {
    Ok(text(path)?.map(|t| parse_pressure(&t)).into())
}

/// `some avg10=0.00 avg60=0.12 avg300=0.05 total=1234`, then the same for `full`.
fn parse_pressure(text: &str) -> PSIStats {
    let mut psi = PSIStats::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let target = match fields.next() {
            Some("some") => &mut psi.some,
            Some("full") => &mut psi.full,
            _ => continue,
        };
        let data = target.mut_or_insert_default();
        for (key, value) in fields.filter_map(|f| f.split_once('=')) {
            let average = || value.parse().unwrap_or(0.0);
            match key {
                "avg10" => data.avg10 = average(),
                "avg60" => data.avg60 = average(),
                "avg300" => data.avg300 = average(),
                "total" => data.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
    psi
}
