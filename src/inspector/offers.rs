//! What this kernel offers for programs of the inspector, tried out: for `crab doctor`.
//!
//! Whether a place can be had is seen by attaching a program to it that does nothing, for an instant.

use std::{io, os::fd::OwnedFd};

use libbpf_rs::btf::{
    Btf, TypeId,
    types::{Func, Typedef},
};
use libbpf_sys::{
    BPF_PROG_TYPE_SOCKET_FILTER, BPF_PROG_TYPE_TRACING, BPF_TRACE_FENTRY, BPF_TRACE_RAW_TP,
    bpf_attach_type, bpf_insn, bpf_prog_load_opts, bpf_prog_type,
};

use super::{load, probes::ProbeSet, sys};

/// `r0 = 0`, `exit`: codes of linux/bpf.h.
const DO_NOTHING: [u8; 2] = [0xb7, 0x95];
/// A function of every kernel since 2.6 that is called seldom and can be traced.
const SELDOM_CALLED: &str = "vfs_truncate";

/// What a kernel says of itself.
pub struct Offers {
    kernel: Btf<'static>,
}

impl Offers {
    /// Those of this kernel, or why it does not describe its types.
    pub fn of_kernel() -> Result<Self, String> {
        let kernel = Btf::from_vmlinux().map_err(|e| e.to_string())?;
        Ok(Self { kernel })
    }

    /// The names of all tracepoints that the inspector listens to where there are tracepoints of time
    /// stamps, and those of them that cannot be had, each with the reason.
    pub fn tracepoints(&self) -> (Vec<&'static str>, Vec<(&'static str, String)>) {
        let all = ProbeSet::TpBtf.probes();
        let refused = all
            .iter()
            .filter_map(|name| Some((*name, self.tracepoint(name).err()?)));
        let refused = refused.collect();
        (all, refused)
    }

    fn tracepoint(&self, name: &str) -> Result<(), String> {
        let its = self
            .kernel
            .type_by_name::<Typedef<'_>>(&format!("btf_trace_{name}"));
        let its = its.ok_or("the kernel has none of that name")?;
        attach(BPF_TRACE_RAW_TP, its.type_id()).map_err(|e| e.to_string())
    }

    /// Whether programs can be run at the functions of the kernel (`fentry`) that the inspector wants where
    /// there are no tracepoints of time stamps.
    pub fn functions(&self) -> Result<(), String> {
        let missing = ProbeSet::Fentry.missing(&self.kernel);
        if !missing.is_empty() {
            return Err(format!("the kernel has no {}", missing.join(", ")));
        }
        let its = self.kernel.type_by_name::<Func<'_>>(SELDOM_CALLED);
        let its = its.ok_or_else(|| format!("the kernel has no function {SELDOM_CALLED}"))?;
        attach(BPF_TRACE_FENTRY, its.type_id()).map_err(|e| e.to_string())
    }
}

/// Whether programs are compiled, or else interpreted.
pub fn compiles() -> io::Result<bool> {
    let program = load_empty(BPF_PROG_TYPE_SOCKET_FILTER, 0, None)?;
    Ok(sys::info(&program)?.jited_prog_len > 0)
}

/// Which set of programs tells of changes here. They are loaded as they are for a sandbox, and attached
/// to nothing that is called often.
pub fn chosen() -> Result<ProbeSet, String> {
    let set = ProbeSet::choose()?;
    load::try_out(set)?;
    if set == ProbeSet::Fentry {
        Offers::of_kernel()?.functions()?;
    }
    Ok(set)
}

/// Whether it can be seen that somebody clears marks of written pages: dumps build upon each other only
/// where it is.
pub fn sees_marks() -> Result<(), String> {
    load::try_marks()
}

/// Attaches for an instant.
fn attach(how: bpf_attach_type, to: TypeId) -> io::Result<()> {
    let program = load_empty(BPF_PROG_TYPE_TRACING, how, Some(to))?;
    sys::attach(&program).map(drop)
}

fn load_empty(
    kind: bpf_prog_type,
    how: bpf_attach_type,
    to: Option<TypeId>,
) -> io::Result<OwnedFd> {
    let code = DO_NOTHING.map(|code| bpf_insn {
        code,
        ..Default::default()
    });
    let options = bpf_prog_load_opts {
        sz: size_of::<bpf_prog_load_opts>() as _,
        attempts: 1,
        expected_attach_type: how,
        attach_btf_id: to.map_or(0, u32::from),
        ..Default::default()
    };
    sys::load(kind, &code, options)
}
