//! Which programs tell of changes on this kernel.

use std::path::Path;

use libbpf_rs::btf::{Btf, types::Typedef};

/// The kernel's own description of its types.
pub(super) const KERNEL: &str = "/sys/kernel/btf/vmlinux";

/// A set of programs that together miss nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeSet {
    /// BTF tracepoints, among them those of time stamps (kernel 6.13 and newer).
    TpBtf,
}

impl ProbeSet {
    /// The set that this kernel can have, or why there is none.
    pub fn choose() -> Result<Self, String> {
        let set = Self::TpBtf;
        let kernel = Btf::from_path(Path::new(KERNEL))
            .map_err(|e| format!("the kernel does not describe its types at {KERNEL}: {e}"))?;
        let missing: Vec<_> = set
            .tracepoints()
            .iter()
            .filter(|name| {
                let name = format!("btf_trace_{name}");
                kernel.type_by_name::<Typedef<'_>>(&name).is_none()
            })
            .copied()
            .collect();
        if missing.is_empty() {
            return Ok(set);
        }
        // Kernels before 6.13 have no tracepoints of time stamps: there fentry programs at the same
        // places take over. They come with the virtual machine that can test them.
        Err(format!(
            "the kernel has no tracepoint {} (6.13 or newer has)",
            missing.join(", ")
        ))
    }

    /// Its name, as `crab doctor` and the log show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
        }
    }

    /// The programs that see files change: none of them may miss an event.
    pub(super) fn of_files(self) -> &'static [&'static str] {
        match self {
            Self::TpBtf => &[
                "inode_set_ctime_to_ts",
                "ctime_ns_xchg",
                "ctime_xchg_skip",
                "writeback_mark_inode_dirty",
                "ma_write",
            ],
        }
    }

    /// The programs that see what processes do.
    pub(super) fn of_tasks(self) -> &'static [&'static str] {
        match self {
            Self::TpBtf => &[
                "sched_process_fork",
                "sched_process_exec",
                "sched_process_exit",
                "signal_generate",
                "sock_send_length",
                "sock_recv_length",
            ],
        }
    }

    /// Where the programs are attached; a program bears the name of its tracepoint.
    pub(super) fn tracepoints(self) -> Vec<&'static str> {
        [self.of_files(), self.of_tasks()].concat()
    }
}
