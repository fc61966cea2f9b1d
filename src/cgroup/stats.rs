//! What `ctr metrics` and `docker stats` show of a sandbox.
//!
//! Which file feeds which field, and in which unit, follows Go's `containerd/cgroups` v3, which
//! containerd's own shim uses: the readers of these numbers were written against it.

use std::{collections::HashMap, fs, path::Path, sync::OnceLock, time::Duration};

use protobuf::{Message, well_known_types::any::Any};

use super::{Cgroup, CgroupError, Layout, gone, stats_v1, stats_v2};

/// The names that Go's typeurl gives the two messages: their protobuf full names, without a host.
const V1_METRICS: &str = "io.containerd.cgroups.v1.Metrics";
const V2_METRICS: &str = "io.containerd.cgroups.v2.Metrics";

impl Cgroup {
    /// The cgroup's numbers as the message that containerd's own shim would send: `type_url`
    /// `io.containerd.cgroups.v1.Metrics` (v1, hybrid) or `io.containerd.cgroups.v2.Metrics`.
    ///
    /// A missing file is no error: its fields stay 0.
    pub fn stats(&self) -> Result<Any, CgroupError> {
        let (type_url, value) = match self.layout() {
            Layout::V1 | Layout::Hybrid => (V1_METRICS, stats_v1::read(self)?.write_to_bytes()),
            Layout::V2 => (V2_METRICS, stats_v2::read(self)?.write_to_bytes()),
        };
        Ok(Any {
            type_url: type_url.to_owned(),
            // Writing to memory fails only for a message over 2 GiB.
            value: value.unwrap_or_default(),
            ..Any::default()
        })
    }
}

impl Cgroup {
    /// The CPU time that its processes have used, the dead ones included.
    pub fn cpu_time(&self) -> Result<Duration, CgroupError> {
        if let Some(dir) = self.v1_dir("cpuacct") {
            return Ok(Duration::from_nanos(number(&dir.join("cpuacct.usage"), 0)?));
        }
        let stat = self.unified_dir().map(|dir| keyed(&dir.join("cpu.stat")));
        let micros = stat
            .transpose()?
            .flatten()
            .map(|stat| stat.get("usage_usec"));
        Ok(Duration::from_micros(micros.unwrap_or_default()))
    }
}

/// A file's text; `None` where there is none (or the kernel has switched it off).
pub(super) fn text(path: &Path) -> Result<Option<String>, CgroupError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
        Err(e) => Err(CgroupError::io("read", path, e)),
    }
}

/// A file's only number; `max` as given, nonsense and nothing as 0.
pub(super) fn number(path: &Path, max: u64) -> Result<u64, CgroupError> {
    Ok(text(path)?.map_or(0, |t| match t.trim() {
        "max" => max,
        t => parse(t),
    }))
}

/// A file of lines `key value`, as a map in which what is missing is 0.
pub(super) fn keyed(path: &Path) -> Result<Option<Keyed>, CgroupError> {
    Ok(text(path)?.map(|t| Keyed::parse(&t)))
}

/// See [`keyed`].
#[derive(Debug, Default)]
pub(super) struct Keyed(HashMap<String, u64>);

impl Keyed {
    pub(super) fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|l| l.split_once(' '))
                .map(|(key, value)| (key.to_owned(), parse(value.trim())))
                .collect(),
        )
    }

    pub(super) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A number; a negative one (v1 kernels print -1 for "no limit") counts as 0, as in Go.
fn parse(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

/// One line of `rdma.current` or `rdma.max`: device, handles, objects; `max` is `u32::MAX`.
pub(super) fn rdma(path: &Path) -> Result<Vec<(String, u32, u32)>, CgroupError> {
    Ok(text(path)?.map(|t| parse_rdma(&t)).unwrap_or_default())
}

fn parse_rdma(text: &str) -> Vec<(String, u32, u32)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let device = fields.next()?;
            let mut values = [0, 0];
            for field in fields {
                let (key, value) = field.split_once('=')?;
                let value = match value {
                    "max" => u32::MAX,
                    v => v.parse().unwrap_or(0),
                };
                match key {
                    "hca_handle" => values[0] = value,
                    "hca_object" => values[1] = value,
                    _ => {}
                }
            }
            Some((device.to_owned(), values[0], values[1]))
        })
        .collect()
}

/// The host's huge page sizes as cgroup file names spell them: `2MB`, `1GB`.
pub(super) fn huge_page_sizes() -> &'static [String] {
    static SIZES: OnceLock<Vec<String>> = OnceLock::new();
    SIZES.get_or_init(|| {
        let mut kib: Vec<u64> = fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| {
                let name = e.file_name().into_string().ok()?;
                name.strip_prefix("hugepages-")?
                    .strip_suffix("kB")?
                    .parse()
                    .ok()
            })
            .collect();
        kib.sort_unstable();
        kib.into_iter().map(huge_page_name).collect()
    })
}

fn huge_page_name(kib: u64) -> String {
    if kib >= 1 << 20 {
        format!("{}GB", kib >> 20)
    } else if kib >= 1 << 10 {
        format!("{}MB", kib >> 10)
    } else {
        format!("{kib}KB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("n");
        for (text, want) in [("42\n", 42), ("max\n", 7), ("-1\n", 0), ("", 0), ("x", 0)] {
            fs::write(&file, text).unwrap();
            assert_eq!(number(&file, 7).unwrap(), want, "{text:?}");
        }
        assert_eq!(number(&dir.path().join("missing"), 7).unwrap(), 0);
    }

    #[test]
    fn rdma_limits_keep_their_devices() {
        assert_eq!(
            parse_rdma(
                "mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\n"
            ),
            [
                ("mlx4_0".to_owned(), 2, 2000),
                ("ocrdma1".to_owned(), 3, u32::MAX)
            ]
        );
    }

    #[test]
    fn huge_pages_are_named_like_the_kernels_files() {
        let names: Vec<_> = [64, 2048, 1_048_576].map(huge_page_name).into();
        assert_eq!(names, ["64KB", "2MB", "1GB"]);
    }
}
