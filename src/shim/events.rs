//! Task events, in containerd's order, across restarts of containerd.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use containerd_shim::{
    event::Event,
    protos::{
        events::task::{
            TaskCheckpointed, TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit,
            TaskOOM, TaskPaused, TaskResumed, TaskStart,
        },
        protobuf::MessageDyn,
        ttrpc::context,
    },
    publisher::RemotePublisher,
};
use parking_lot::{Condvar, Mutex};

/// Events kept while containerd is away. Beyond this the oldest go: containerd asks each shim for
/// its state when it is back, so what matters is found out anyway.
const MAX_WAITING: usize = 4096;
const SEND_LIMIT: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// One of containerd's task events.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each is the message of the same name")]
pub enum TaskEvent {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Delete(TaskDelete),
    Paused(TaskPaused),
    Resumed(TaskResumed),
    Checkpointed(TaskCheckpointed),
    Oom(TaskOOM),
}

impl TaskEvent {
    /// Topic and message, as containerd wants them.
    fn unpack(self) -> (String, Box<dyn MessageDyn>) {
        fn of<E: Event + MessageDyn + 'static>(event: E) -> (String, Box<dyn MessageDyn>) {
            (event.topic(), Box::new(event))
        }
        match self {
            Self::Create(e) => of(e),
            Self::Start(e) => of(e),
            Self::ExecAdded(e) => of(e),
            Self::ExecStarted(e) => of(e),
            Self::Exit(e) => of(e),
            Self::Delete(e) => of(e),
            Self::Paused(e) => of(e),
            Self::Resumed(e) => of(e),
            Self::Checkpointed(e) => of(e),
            Self::Oom(e) => of(e),
        }
    }
}

/// Where events go. Sending never waits and keeps the order.
pub trait EventSink: Send + Sync {
    /// Takes one event.
    fn send(&self, event: TaskEvent);
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<TaskEvent>,
    sending: bool,
}

/// Sends to containerd from a thread of its own.
pub struct RemoteSink {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl RemoteSink {
    /// Starts the sending thread. `address` is containerd's ttrpc socket.
    pub fn start(
        publisher: RemotePublisher,
        address: String,
        namespace: String,
    ) -> std::io::Result<Arc<Self>> {
        let sink = Arc::new(Self {
            queue: Mutex::new(Queue::default()),
            changed: Condvar::new(),
        });
        let this = Arc::clone(&sink);
        thread::Builder::new()
            .name("events".into())
            .spawn(move || this.run(publisher, &address, &namespace))?;
        Ok(sink)
    }

    fn run(&self, publisher: RemotePublisher, address: &str, namespace: &str) {
        let mut publisher = Some(publisher);
        loop {
            let event = {
                let mut queue = self.queue.lock();
                while queue.waiting.is_empty() {
                    queue.sending = false;
                    self.changed.notify_all();
                    self.changed.wait(&mut queue);
                }
                queue.sending = true;
                queue.waiting.pop_front()
            };
            let Some(event) = event else { continue };
            let (topic, message) = event.clone().unpack();
            let limit = context::with_duration(SEND_LIMIT);
            let sent = match &publisher {
                Some(p) => p.publish(limit, &topic, namespace, message),
                None => match RemotePublisher::new(address) {
                    Ok(p) => publisher
                        .insert(p)
                        .publish(limit, &topic, namespace, message),
                    Err(e) => Err(e),
                },
            };
            match sent {
                Ok(()) => {}
                Err(e) => {
                    log::warn!("event {topic} not sent, will try again: {e}");
                    publisher = None;
                    self.queue.lock().waiting.push_front(event);
                    thread::sleep(RETRY_AFTER);
                }
            }
        }
    }

    /// Waits until everything has been sent, at most `limit`.
    pub fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut queue = self.queue.lock();
        while !queue.waiting.is_empty() || queue.sending {
            if self.changed.wait_until(&mut queue, end).timed_out() {
                log::warn!("{} events were not sent", queue.waiting.len());
                return;
            }
        }
    }
}

impl EventSink for RemoteSink {
    fn send(&self, event: TaskEvent) {
        let mut queue = self.queue.lock();
        if queue.waiting.len() == MAX_WAITING {
            log::warn!("containerd is away: dropping the oldest event");
            queue.waiting.pop_front();
        }
        queue.waiting.push_back(event);
        self.changed.notify_all();
    }
}
