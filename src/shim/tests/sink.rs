//! Where events go, and who is told that the shim shall end.

use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use super::plan::Barrier;
use crate::shim::{
    events::{EventSink, TaskEvent},
    service::Stop,
};

/// Events as lines: `exit c 137`, `started c/e`.
#[derive(Default)]
pub struct Sink {
    /// All that were told.
    pub lines: Mutex<Vec<String>>,
    pub changed: Condvar,
    /// The event that stands still before it is told.
    pub held: Mutex<Option<(String, Barrier)>>,
}

impl EventSink for Sink {
    fn send(&self, event: TaskEvent) {
        let line = match event {
            TaskEvent::Create(e) => format!("create {}", e.container_id),
            TaskEvent::Start(e) => format!("start {}", e.container_id),
            TaskEvent::ExecAdded(e) => format!("added {}/{}", e.container_id, e.exec_id),
            TaskEvent::ExecStarted(e) => format!("started {}/{}", e.container_id, e.exec_id),
            TaskEvent::Exit(e) if e.id == e.container_id => {
                format!("exit {} {}", e.id, e.exit_status)
            }
            TaskEvent::Exit(e) => format!("exit {}/{} {}", e.container_id, e.id, e.exit_status),
            TaskEvent::Delete(e) => format!("delete {} {}", e.container_id, e.exit_status),
            TaskEvent::Paused(e) => format!("paused {}", e.container_id),
            TaskEvent::Resumed(e) => format!("resumed {}", e.container_id),
            TaskEvent::Checkpointed(e) => format!("checkpointed {}", e.container_id),
            TaskEvent::Oom(e) => format!("oom {}", e.container_id),
        };
        let held = self.held.lock().take_if(|(held, _)| *held == line);
        if let Some((_, barrier)) = held {
            barrier.pass().unwrap();
        }
        self.lines.lock().push(line);
        self.changed.notify_all();
    }
}

/// Counts how often the shim was told to end.
#[derive(Default)]
pub struct Stopped(pub AtomicUsize);

impl Stop for Stopped {
    fn stop(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
