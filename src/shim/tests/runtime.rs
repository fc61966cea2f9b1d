//! An OCI runtime without containers.

use std::{fs, sync::Arc};

use super::{
    fake::Machine,
    plan::{Plan, Verb},
};
use crate::runtime::{Checkpoint, Create, Exec, OciRuntime, Restore, RuntimeError, start_line};

pub type Answer = Result<(), RuntimeError>;

/// The runtime says no.
pub fn refused(verb: &'static str, message: String) -> RuntimeError {
    RuntimeError::Refused {
        runtime: "fake".into(),
        verb,
        message,
    }
}

/// The runtime of all containers of one [`Machine`].
pub struct FakeRuntime(pub Arc<Machine>);

impl OciRuntime for FakeRuntime {
    fn create(&self, args: Create<'_>) -> Answer {
        self.0.record(format!("create {}", args.id));
        self.0.spawn(Verb::Create, "create", args.id, args.pid_file)
    }

    fn start(&self, id: &str) -> Answer {
        self.0.record(format!("start {id}"));
        let plan = self.0.resolve(Verb::Start);
        if let Plan::EndAtOnce(status) = plan.map_err(|e| refused("start", e))? {
            self.0.end(self.0.group(id).init, status);
        }
        Ok(())
    }

    fn exec(&self, args: Exec<'_>) -> Answer {
        let spec = fs::read_to_string(args.process).unwrap();
        self.0.record(format!("exec {} {spec}", args.id));
        self.0.spawn(Verb::Exec, "exec", args.id, args.pid_file)
    }

    fn kill_all(&self, id: &str, signal: i32) -> Answer {
        self.0.record(format!("kill --all {id} {signal}"));
        let done = self.0.plan(Verb::KillAll);
        // As runc does, whoever else has frozen it.
        *self.0.group(id).cgroup.frozen.lock() = false;
        done.map_err(|e| refused("kill", e))
    }

    fn delete(&self, id: &str, force: bool) -> Answer {
        let flag = if force { "--force " } else { "" };
        self.0.record(format!("delete {flag}{id}"));
        let plan = self.0.resolve(Verb::Delete);
        let plan = plan.map_err(|e| refused("delete", e))?;
        if self.0.knows(id) && !matches!(plan, Plan::EndLater) {
            self.0.end_all(id, 137);
            self.0.forget(id);
        }
        Ok(())
    }

    fn forget(&self, id: &str) -> Answer {
        self.0.record(format!("forget {id}"));
        let done = self.0.plan(Verb::Forget);
        done.map_err(|e| refused("forget", e))?;
        assert!(!self.0.lives(id), "forgotten alive");
        self.0.forget(id);
        Ok(())
    }

    fn end_calls(&self, id: &str) -> Answer {
        self.0.record(format!("end calls {id}"));
        Ok(())
    }

    fn checkpoint(&self, id: &str, args: &Checkpoint, _: &dyn Fn() -> bool) -> Answer {
        self.0.record(format!("checkpoint {id}"));
        self.0.record_dump(args);
        fs::write(args.work_path.join("dump.log"), "CRIU was here\n").unwrap();
        if args.leave_running && !args.pre_dump {
            let home = args.home.as_ref().unwrap();
            start_line::wait_at(home).map_err(|e| refused("checkpoint", e.to_string()))?;
        }
        let done = self.0.plan(Verb::Checkpoint);
        done.map_err(|e| refused("checkpoint", e))?;
        fs::write(args.image_path.join("descriptors.json"), "[]").unwrap();
        fs::write(args.image_path.join("inventory.img"), "").unwrap();
        Ok(())
    }

    fn restore(&self, args: Restore<'_>) -> Answer {
        self.0.record(format!("restore {}", args.id));
        self.0
            .spawn(Verb::Restore, "restore", args.id, args.pid_file)
    }

    fn is_incremental(&self) -> bool {
        self.0.is_incremental()
    }

    fn update(&self, id: &str, resources: &[u8]) -> Answer {
        let resources = String::from_utf8_lossy(resources);
        self.0.record(format!("update {id} {resources}"));
        let done = self.0.plan(Verb::Update);
        done.map_err(|e| refused("update", e))
    }
}
