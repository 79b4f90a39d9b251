//! containerd's task API (runtime v2): the door through which everything comes.
//!
//! One service serves a pod: its first container starts the machine, its last one's deletion ends it. A sandbox container, as
//! Kubernetes has one, is none of these, see `pause`.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
    time::Duration,
};

use containerd_shim::ExitSignal;
use tokio::{sync::Mutex, task::JoinSet, time::timeout};

mod callers;
mod clean_up;
mod create;
mod error;
mod events;
mod info;
mod options;
mod pause;
mod process;
mod run;
pub mod server;
mod service;
mod stats;
mod stdio;

pub use error::{TaskError, chain};
pub use events::Events;
pub use pause::{Role, role};
pub use process::{Exit, Life, Process};
pub use service::Api;

use self::{callers::Callers, pause::Pod};
use crate::sandbox::Sandbox;

/// A container and its processes.
#[derive(Debug)]
struct Container {
    id: String,
    bundle: String,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

impl Container {
    /// Waits until the ends of all execs that were started have been told.
    async fn execs_settled(&self) {
        let execs: Vec<_> = self.execs.lock().await.values().cloned().collect();
        for exec in execs {
            exec.settled().await;
        }
    }
}

/// The state behind the API.
pub struct Service {
    namespace: String,
    /// containerd's, for its client.
    address: String,
    /// The sandbox's id: that of the container for which the shim was started.
    id: String,
    events: Arc<Events>,
    exit: Arc<ExitSignal>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Held for as long as the machine starts or stops, so that there is one at most.
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    /// What was said of the pod before it had a container to run.
    pod: Mutex<Option<Pod>>,
    watchers: Watchers,
    callers: Callers,
    /// Whoever creates a container has a clone.
    creating: Arc<()>,
    /// containerd asked for everything in the log, whatever the configuration says.
    debug: bool,
}

/// The tasks that tell how processes end.
#[derive(Debug, Default)]
struct Watchers(std::sync::Mutex<JoinSet<()>>);

impl Watchers {
    fn add(&self, watcher: impl Future<Output = ()> + Send + 'static) {
        let mut watchers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while watchers.try_join_next().is_some() {}
        watchers.spawn(watcher);
    }

    /// Waits until all have told, at most `bound`.
    async fn finish(&self, bound: Duration) {
        let watchers = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if timeout(bound, watchers.join_all()).await.is_err() {
            log::warn!("the end of a process was not told within {bound:?}");
        }
    }
}

/// Longest wait for the last events on the way out.
const FLUSH: Duration = Duration::from_secs(5);

impl Service {
    /// A service without containers.
    #[must_use]
    pub fn new(namespace: &str, id: &str, events: Arc<Events>, exit: Arc<ExitSignal>, debug: bool) -> Self {
        Self {
            namespace: namespace.into(),
            id: id.into(),
            address: String::new(),
            events,
            exit,
            containers: Mutex::default(),
            sandbox: Mutex::default(),
            pod: Mutex::default(),
            watchers: Watchers::default(),
            callers: Callers::default(),
            creating: Arc::default(),
            debug,
        }
    }

    /// The same, with the address of containerd's socket.
    #[must_use]
    pub fn of(self, address: &str) -> Self {
        Self { address: address.into(), ..self }
    }

    /// Nothing is there, and nothing is on its way.
    fn is_unused(&self) -> bool {
        let machine = self.sandbox.try_lock().map_or(true, |sandbox| sandbox.is_some());
        !machine
            && Arc::strong_count(&self.creating) == 1
            && self.containers.try_lock().is_ok_and(|containers| containers.is_empty())
    }

    async fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let containers = self.containers.lock().await;
        containers.get(id).cloned().ok_or_else(|| TaskError::NotFound { what: "container", id: id.into() })
    }

    async fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>, TaskError> {
        let container = self.container(id).await?;
        if exec.is_empty() {
            return Ok(Arc::clone(&container.init));
        }
        let execs = container.execs.lock().await;
        execs.get(exec).cloned().ok_or_else(|| TaskError::NotFound { what: "exec", id: exec.into() })
    }

    async fn machine(&self) -> Result<Arc<Sandbox>, TaskError> {
        match self.sandbox.lock().await.as_ref() {
            Some(sandbox) => Ok(Arc::clone(sandbox)),
            None => Err(TaskError::Gone("it was stopped".into())),
        }
    }

    /// Ends everything, e.g. on SIGTERM.
    pub async fn stop(&self) {
        if let Some(sandbox) = self.sandbox.lock().await.take() {
            sandbox.stop().await;
        }
        self.watchers.finish(FLUSH).await;
        self.events.flush(FLUSH).await;
    }
}
