//! Which programs tell of changes on this kernel.

use std::path::Path;

use libbpf_rs::btf::{
    Btf,
    types::{Func, Struct, Typedef},
};

/// The kernel's own description of its types.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// That of overlay's, if it is a module.
const OVERLAY: &str = "/sys/kernel/btf/overlay";

/// A set of programs that together miss nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeSet {
    /// BTF tracepoints, among them those of time stamps (kernel 6.13 and newer).
    TpBtf,
    /// Functions of the kernel, with the BTF tracepoints that older kernels have.
    Fentry,
}

/// Tracepoints that tell of files, in both sets.
const FILES: [&str; 2] = ["writeback_mark_inode_dirty", "ma_write"];

/// Tracepoints that tell of processes, in both sets.
const TASKS: [&str; 6] = [
    "sched_process_fork",
    "sched_process_exec",
    "sched_process_exit",
    "signal_generate",
    "sock_send_length",
    "sock_recv_length",
];

/// The function by which marks of written pages are cleared. It is no part of a set: where it cannot be had,
/// everything but that is told.
pub(super) const MARKS: &str = "clear_refs_write";

/// A function of overlay's: of a module's types nothing is known here.
const OF_OVERLAY: &str = "ovl_copyattr";

impl ProbeSet {
    /// In the order in which they are preferred.
    pub(super) const ALL: [Self; 2] = [Self::TpBtf, Self::Fentry];

    /// The set that this kernel can have, or why there is none.
    pub fn choose() -> Result<Self, String> {
        let kernel = Btf::from_vmlinux()
            .map_err(|e| format!("the kernel does not describe its types at {KERNEL}: {e}"))?;
        // The programs look behind its inodes. Whoever mounts a sandbox has loaded it.
        if kernel.type_by_name::<Struct<'_>>("ovl_inode").is_none() && !Path::new(OVERLAY).exists()
        {
            return Err("overlay is a module that is not loaded (modprobe overlay)".into());
        }
        let mut reasons = Vec::new();
        for set in Self::ALL {
            let missing = set.missing(&kernel);
            if missing.is_empty() {
                return Ok(set);
            }
            reasons.push(format!("{} lacks {}", set.name(), missing.join(", ")));
        }
        Err(format!(
            "this kernel has what no set of programs wants ({}); 6.8 or newer has",
            reasons.join("; ")
        ))
    }

    /// What of this set the kernel does not have.
    pub(super) fn missing(self, kernel: &Btf<'_>) -> Vec<&'static str> {
        let has = |name: &str| match self.is_function(name) {
            true => kernel.type_by_name::<Func<'_>>(name).is_some(),
            false => {
                let name = format!("btf_trace_{name}");
                kernel.type_by_name::<Typedef<'_>>(&name).is_some()
            }
        };
        let all = self.probes().into_iter();
        all.filter(|name| *name != OF_OVERLAY && !has(name))
            .collect()
    }

    fn is_function(self, name: &str) -> bool {
        self == Self::Fentry && !FILES.contains(&name) && !TASKS.contains(&name)
    }

    /// Its name, as `crab doctor` and the log show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::Fentry => "fentry",
        }
    }

    /// The program that no other set has.
    pub(super) fn mark(self) -> &'static str {
        match self {
            Self::TpBtf => "inode_set_ctime_to_ts",
            Self::Fentry => OF_OVERLAY,
        }
    }

    /// The programs that see files change: none of them may miss an event.
    pub(super) fn of_files(self) -> Vec<&'static str> {
        let its: &[_] = match self {
            Self::TpBtf => &["inode_set_ctime_to_ts", "ctime_ns_xchg", "ctime_xchg_skip"],
            Self::Fentry => &[
                OF_OVERLAY,
                "d_instantiate",
                "d_instantiate_new",
                "insert_inode_locked",
                "insert_inode_locked4",
                "inc_nlink",
                "d_delete",
                "d_move",
                "d_exchange",
                "notify_change",
                "vfs_setxattr",
                "vfs_removexattr",
                "vfs_set_acl",
                "vfs_remove_acl",
                "vfs_fileattr_set",
                "vfs_fallocate",
                "file_update_time",
                "file_modified",
                "kiocb_modified",
                "file_remove_privs",
            ],
        };
        [its, &FILES].concat()
    }

    /// The programs that see what processes do.
    pub(super) fn of_tasks(self) -> Vec<&'static str> {
        let its: &[_] = match self {
            Self::TpBtf => &[],
            Self::Fentry => &["load_msg", "store_msg", "mem_open"],
        };
        [its, &TASKS].concat()
    }

    /// What the programs are attached to, and the programs' names.
    pub(super) fn probes(self) -> Vec<&'static str> {
        [self.of_files(), self.of_tasks()].concat()
    }

    /// Whether a program is for kernels that have another set alone.
    pub(super) fn leaves_out(self, program: &str) -> bool {
        let has = |set: &Self| set.probes().contains(&program);
        !has(&self) && Self::ALL.iter().any(has)
    }
}
