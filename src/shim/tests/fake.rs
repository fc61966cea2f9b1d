//! A machine without a kernel: it records what it is asked, fails or stands still on demand, and
//! its processes end when a test says so.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use time::OffsetDateTime;

use super::{
    group::{Group, cgroup_error},
    plan::{Barrier, Blocked, Plan, Verb},
    runtime::{Answer, FakeRuntime, refused},
};
use crate::{
    cgroup::CgroupError,
    config::Config,
    inspector::Joined,
    rootfs::{MountSpec, Overlay},
    runtime::{Checkpoint, OciRuntime},
    sandbox::SandboxId,
    shim::{
        host::{ControlGroup, Host, Target},
        io::Pump,
        reaper::{Exit, Reaper},
        run_dir::RunDir,
    },
};

/// Beyond every kernel's `pid_max`: no real process is ever looked at or signalled.
const FIRST_PID: i32 = 1_000_000_000;

#[derive(Default)]
struct State {
    calls: Vec<String>,
    plans: HashMap<Verb, VecDeque<Plan>>,
    groups: BTreeMap<String, Arc<Group>>,
    last_pid: i32,
    ended: HashSet<i32>,
    /// SIGKILL kills, instead of being written down only.
    mortal: bool,
    incremental: bool,
    checkpoints: Vec<Checkpoint>,
    overlay: Option<PathBuf>,
}

/// The machine. The host and the runtime of every container share it.
pub struct Machine {
    me: Weak<Self>,
    state: Mutex<State>,
    reaper: Arc<Reaper>,
    pump: Arc<Pump>,
    dir: PathBuf,
    config_file: PathBuf,
}

impl Machine {
    /// `dir` holds the configuration, the run directory and the store.
    pub fn new(dir: &Path) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            state: Mutex::default(),
            reaper: Reaper::idle(),
            pump: Pump::new().unwrap(),
            dir: dir.to_owned(),
            config_file: dir.join("config.toml"),
        })
    }

    fn push_plan(&self, verb: Verb, plan: Plan) {
        let mut state = self.state.lock();
        state.plans.entry(verb).or_default().push_back(plan);
    }

    /// The next call of `verb` fails.
    pub fn fail(&self, verb: Verb, why: &str) {
        self.push_plan(verb, Plan::Fail(why.into()));
    }

    /// The next call of `verb` stands still.
    pub fn block(&self, verb: Verb) -> Blocked {
        let (blocked, barrier) = Barrier::new();
        self.push_plan(verb, Plan::Block(barrier));
        blocked
    }

    /// The next call of `verb` leaves no pid file.
    pub fn forget_pid_file(&self, verb: Verb) {
        self.push_plan(verb, Plan::NoPidFile);
    }

    /// The next call of `verb` starts a process that ends before the call returns.
    pub fn end_at_once(&self, verb: Verb, status: u32) {
        self.push_plan(verb, Plan::EndAtOnce(status));
    }

    /// The next call of `verb` returns before those whom it kills are gone.
    pub fn end_later(&self, verb: Verb) {
        self.push_plan(verb, Plan::EndLater);
    }

    /// Forgets what was planned and has not happened.
    pub fn clear_plans(&self) {
        self.state.lock().plans.clear();
    }

    /// From now on SIGKILL kills.
    pub fn make_mortal(&self) {
        self.state.lock().mortal = true;
    }

    /// From now on a dump may build upon the one before.
    pub fn track_memory(&self) {
        self.state.lock().incremental = true;
    }

    /// Whether it may.
    pub fn is_incremental(&self) -> bool {
        self.state.lock().incremental
    }

    /// Gives every container a writable layer.
    pub fn set_upper(&self, upper: &Path) {
        self.state.lock().overlay = Some(upper.to_owned());
    }

    /// What the runtime and the host were asked, one line a call.
    pub fn calls(&self) -> Vec<String> {
        self.state.lock().calls.clone()
    }

    /// How many calls begin with `prefix`.
    pub fn count(&self, prefix: &str) -> usize {
        let state = self.state.lock();
        let calls = state.calls.iter();
        calls.filter(|c| c.starts_with(prefix)).count()
    }

    /// The arguments of every dump.
    pub fn checkpoints(&self) -> Vec<Checkpoint> {
        self.state.lock().checkpoints.clone()
    }

    /// Keeps the arguments of a dump.
    pub fn record_dump(&self, args: &Checkpoint) {
        self.state.lock().checkpoints.push(args.clone());
    }

    /// The processes of a container that the runtime knows.
    pub fn group(&self, id: &str) -> Arc<Group> {
        Arc::clone(&self.state.lock().groups[id])
    }

    /// The runtime does not know a container any more.
    pub fn forget(&self, id: &str) {
        self.state.lock().groups.remove(id);
    }

    /// Whether a container's init runs.
    pub fn lives(&self, id: &str) -> bool {
        let state = self.state.lock();
        state.groups.get(id).is_some_and(|g| g.lives())
    }

    /// Whether the runtime knows a container.
    pub fn knows(&self, id: &str) -> bool {
        self.state.lock().groups.contains_key(id)
    }

    /// Ends a process; one that is gone already stays so.
    pub fn end(&self, pid: i32, status: u32) {
        {
            let mut state = self.state.lock();
            let alive = state.groups.values().any(|group| {
                let mut procs = group.cgroup.procs.lock();
                let place = procs.iter().position(|p| *p == pid);
                place.map(|place| procs.remove(place)).is_some()
            });
            if !alive {
                return;
            }
            state.ended.insert(pid);
        }
        self.reaper.inject(Exit {
            pid,
            status,
            at: OffsetDateTime::now_utc(),
        });
    }

    /// Ends every process of a container, init first, as a pid namespace does.
    pub fn end_all(&self, id: &str, status: u32) {
        let mut pids = self.group(id).cgroup.procs.lock().clone();
        pids.sort_unstable();
        pids.into_iter().for_each(|pid| self.end(pid, status));
    }

    /// Writes down a call.
    pub fn record(&self, call: String) {
        self.state.lock().calls.push(call);
    }

    fn next_plan(&self, verb: Verb) -> Plan {
        let mut state = self.state.lock();
        let plans = state.plans.get_mut(&verb);
        plans.and_then(VecDeque::pop_front).unwrap_or(Plan::GoOn)
    }

    /// Does what was planned for a verb that makes no process.
    pub fn plan(&self, verb: Verb) -> Result<(), String> {
        self.resolve(verb).map(|_| ())
    }

    /// The same, and what else was planned.
    pub fn resolve(&self, verb: Verb) -> Result<Plan, String> {
        match self.next_plan(verb) {
            Plan::Fail(why) => Err(why),
            Plan::Block(barrier) => barrier.pass().map(|()| Plan::GoOn),
            plan => Ok(plan),
        }
    }

    /// A new process in a container, which then stands still or ends as planned.
    pub fn spawn(&self, verb: Verb, name: &'static str, id: &str, file: &Path) -> Answer {
        let plan = match self.next_plan(verb) {
            Plan::Fail(why) => return Err(refused(name, why)),
            plan => plan,
        };
        let pid = {
            let mut state = self.state.lock();
            let group = state.groups.get(id);
            if verb == Verb::Exec && !group.is_some_and(|g| g.lives()) {
                return Err(refused(name, "container not running".into()));
            }
            if verb != Verb::Exec && group.is_some() {
                return Err(refused(name, "container exists already".into()));
            }
            state.last_pid = state.last_pid.max(FIRST_PID) + 1;
            let pid = state.last_pid;
            let group = state
                .groups
                .entry(id.to_owned())
                .or_insert_with(|| Group::of(pid, self.me.clone()));
            group.cgroup.procs.lock().push(pid);
            pid
        };
        if !matches!(plan, Plan::NoPidFile) {
            fs::write(file, pid.to_string()).unwrap();
        }
        match plan {
            Plan::EndAtOnce(status) => self.end(pid, status),
            Plan::Block(barrier) => {
                if let Err(why) = barrier.pass() {
                    self.end(pid, 137);
                    return Err(refused(name, why));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

struct FakeTarget(Arc<Machine>, i32);

impl Target for FakeTarget {
    fn signal(&self, signal: i32) -> io::Result<()> {
        self.0.record(format!("signal {} {signal}", self.1));
        let (alive, mortal) = {
            let state = self.0.state.lock();
            let mut groups = state.groups.values();
            let alive = groups.any(|g| g.cgroup.procs.lock().contains(&self.1));
            (alive, state.mortal)
        };
        if alive && mortal && signal == libc::SIGKILL {
            self.0.end(self.1, 137);
        }
        match alive {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    fn wait_end(&self, limit: Duration) -> io::Result<bool> {
        let end = Instant::now() + limit;
        loop {
            if self.0.state.lock().ended.contains(&self.1) {
                return Ok(true);
            }
            if Instant::now() >= end {
                return Ok(false);
            }
            thread::yield_now();
        }
    }
}

impl Host for Machine {
    fn reaper(&self) -> &Arc<Reaper> {
        &self.reaper
    }

    fn pump(&self) -> &Arc<Pump> {
        &self.pump
    }

    fn config_file(&self) -> &Path {
        &self.config_file
    }

    fn run_dir(&self, sandbox: &SandboxId) -> RunDir {
        RunDir::below(&self.dir.join("run"), sandbox)
    }

    fn runtime(&self, _: &Config, _: &str, _: &Path) -> Arc<dyn OciRuntime> {
        Arc::new(FakeRuntime(self.me.upgrade().unwrap()))
    }

    fn target(&self, pid: i32) -> io::Result<Box<dyn Target>> {
        let me = self.me.upgrade().unwrap();
        Ok(Box::new(FakeTarget(me, pid)))
    }

    fn cgroup(&self, pid: i32) -> Result<Arc<dyn ControlGroup>, CgroupError> {
        self.plan(Verb::Cgroup).map_err(cgroup_error)?;
        let state = self.state.lock();
        let group = state.groups.values().find(|g| g.init == pid);
        Ok(Arc::clone(group.unwrap()) as _)
    }

    fn cgroup_named(&self, path: &Path, _: &str) -> Vec<PathBuf> {
        vec![path.to_owned()]
    }

    fn create_netns(&self, path: &Path) -> io::Result<()> {
        // No file is made there: to unmount one takes root.
        self.record(format!("netns {}", path.display()));
        self.plan(Verb::Netns).map_err(io::Error::other)
    }

    fn mount(&self, mounts: &[MountSpec], target: &Path) -> Result<(), String> {
        self.record(format!("mount {} {}", mounts.len(), target.display()));
        self.plan(Verb::Mount)
    }

    fn overlay(&self, rootfs: &Path) -> Result<Overlay, String> {
        let upper = self.state.lock().overlay.clone();
        let upperdir = upper.ok_or_else(|| format!("{rootfs:?} is no overlay"))?;
        Ok(Overlay {
            lowerdirs: Vec::new(),
            workdir: upperdir.with_extension("work"),
            upperdir,
            options: Vec::new(),
            mountpoint: None,
        })
    }

    fn unmount(&self, target: &Path) -> Result<(), String> {
        self.record(format!("unmount {}", target.display()));
        self.plan(Verb::Unmount)
    }

    fn kill_cgroup(&self, directories: &[PathBuf]) -> Result<(), String> {
        self.record(format!("kill cgroup {directories:?}"));
        Ok(())
    }

    fn remove_cgroup(&self, directories: &[PathBuf]) -> Result<(), String> {
        self.record(format!("remove cgroup {directories:?}"));
        Ok(())
    }

    fn join_inspector(&self) -> Result<Joined, String> {
        Err("no inspector in tests".into())
    }
}
