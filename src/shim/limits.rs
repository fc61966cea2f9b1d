//! Limits that the client has changed since the start.
//!
//! A restore sets those of the specification. After a rollback the client sees the same container,
//! so it has to have the limits that the client knows.

use parking_lot::Mutex;
use serde_json::Value;

use super::{
    container::Container,
    error::{Context, Kind, Result, ShimError},
    state::Request,
};

/// All changes, the later ones over the earlier ones.
#[derive(Default)]
pub(super) struct Limits(Mutex<Option<Value>>);

impl Container {
    /// Changes its limits; `resources` is OCI `LinuxResources` as JSON.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        let _alone = self.alone(Request::Update)?;
        let new: Value = serde_json::from_slice(resources).map_err(|e| {
            let text = format!("{}: update: resources are no JSON: {e}", self.sandbox);
            ShimError::new(Kind::InvalidArgument, text)
        })?;
        self.runtime
            .update(self.sandbox.id(), resources)
            .context(format_args!("{}: update", self.sandbox))?;
        let mut limits = self.limits.0.lock();
        match &mut *limits {
            Some(limits) => merge(limits, new),
            none => *none = Some(new),
        }
        Ok(())
    }

    /// Sets them again, after a restore.
    pub(super) fn update_again(&self) -> Result<()> {
        let limits = self.limits.0.lock().clone();
        match limits {
            None => Ok(()),
            Some(limits) => self
                .runtime
                .update(self.sandbox.id(), limits.to_string().as_bytes())
                .context("set the limits that an update has changed"),
        }
    }
}

/// Objects are merged, anything else is replaced.
fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                match into.get_mut(&key) {
                    Some(old) => merge(old, value),
                    None => {
                        into.insert(key, value);
                    }
                }
            }
        }
        (into, from) => *into = from,
    }
}
