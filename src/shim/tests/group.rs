//! A cgroup without a kernel.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use containerd_shim::protos::protobuf::well_known_types::any::Any;
use parking_lot::Mutex;

use super::{fake::Machine, plan::Verb};
use crate::{
    cgroup::{CgroupError, OomWatch},
    coordinator::freeze::{Freezable, fake::FakeCgroup},
    shim::host::ControlGroup,
};

/// One container's processes.
#[derive(Default)]
pub struct Group {
    pub init: i32,
    pub cgroup: FakeCgroup,
    freezes: Mutex<u32>,
    machine: Weak<Machine>,
    on_oom: Mutex<Option<Box<dyn Fn() + Send + Sync>>>,
}

impl Group {
    /// Of a container whose init has this pid.
    pub fn of(init: i32, machine: Weak<Machine>) -> Arc<Self> {
        Arc::new(Self {
            init,
            machine,
            ..Default::default()
        })
    }

    /// Whether its init runs.
    pub fn lives(&self) -> bool {
        self.cgroup.procs.lock().contains(&self.init)
    }

    pub fn is_frozen(&self) -> bool {
        *self.cgroup.frozen.lock()
    }

    /// How often it was frozen.
    pub fn freezes(&self) -> u32 {
        *self.freezes.lock()
    }

    /// Pretends that the kernel has killed for lack of memory.
    pub fn out_of_memory(&self) {
        self.on_oom.lock().as_ref().expect("nobody watches")();
    }
}

impl Freezable for Group {
    fn freeze(&self) -> Result<(), CgroupError> {
        *self.freezes.lock() += 1;
        if let Some(machine) = self.machine.upgrade() {
            machine.plan(Verb::Freeze).map_err(cgroup_error)?;
        }
        self.cgroup.freeze()
    }

    fn thaw(&self) -> Result<(), CgroupError> {
        self.cgroup.thaw()
    }

    fn is_frozen(&self) -> Result<bool, CgroupError> {
        self.cgroup.is_frozen()
    }

    fn procs(&self) -> Result<Vec<i32>, CgroupError> {
        self.cgroup.procs()
    }

    fn hangs_on_stopped(&self) -> bool {
        self.cgroup.hangs_on_stopped()
    }

    fn cpu_time(&self) -> Result<Duration, CgroupError> {
        self.cgroup.cpu_time()
    }

    fn unified_dir(&self) -> Option<&Path> {
        self.cgroup.unified_dir()
    }
}

impl ControlGroup for Group {
    fn directories(&self) -> Vec<PathBuf> {
        vec!["/sys/fs/cgroup/fake".into()]
    }

    fn stats(&self) -> Result<Any, CgroupError> {
        Ok(Any::new())
    }

    fn watch_oom(&self, on_oom: Box<dyn Fn() + Send + Sync>) -> Option<OomWatch> {
        *self.on_oom.lock() = Some(on_oom);
        None
    }

    fn freezable(self: Arc<Self>) -> Arc<dyn Freezable> {
        self
    }
}

/// The kernel says no.
pub fn cgroup_error(why: String) -> CgroupError {
    CgroupError::Io {
        action: "use",
        path: "/sys/fs/cgroup/fake".into(),
        source: io::Error::other(why),
    }
}
