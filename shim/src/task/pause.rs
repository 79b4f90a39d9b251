//! A pod's sandbox container, as CRI implementations make one before they know what the pod is to run: on Linux a process
//! that sleeps and holds the pod's namespaces. Here it is an entry in this process, which behaves as that process would,
//! and costs no VM. What is asked of the pod as a whole is kept for its first real container, which starts the VM.

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use chsnap_protocol::agent::CreateProcessResponse;
use containerd_shim_protos::{
    api::ProcessInfo,
    events::task::{TaskCreate, TaskStart},
};
use nix::sys::signal::Signal;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use tokio::sync::Mutex;

use super::{
    Container, Exit, Life, Process, Service, TaskError,
    clean_up::note_pid,
    run::{ends_by_default, tell_exit},
    stdio::{Local, Paths},
};
use crate::config::Overrides;

/// Annotations that tell a sandbox container from a real one, and its value there.
const TYPES: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOX: &str = "sandbox";
/// The limits of all of the pod's containers together, as containerd's CRI plugin tells them to the sandbox; 0 for none.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It holds the pod.
    Sandbox,
    /// It runs in it.
    Container,
}

/// What a pod has as a whole.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    pub overrides: Overrides,
    pub cgroups_path: String,
    /// Containers in its namespace of names are not told it.
    pub hostname: Option<String>,
    /// Its network namespace. Containers are told that of the sandbox's process, which here is this one's.
    pub network: Option<PathBuf>,
    /// Their sum, to which a container without any adds nothing; `None` where it is not known.
    pub limits: Option<LinuxResources>,
}

/// What these annotations say a container is in its pod, where somebody says so.
#[must_use]
pub fn role(annotations: &HashMap<String, String>) -> Option<Role> {
    let value = TYPES.iter().find_map(|name| annotations.get(*name))?;
    Some(if value == SANDBOX { Role::Sandbox } else { Role::Container })
}

/// Whether these annotations are a sandbox container's.
pub(super) fn is_pause(annotations: &HashMap<String, String>) -> bool {
    role(annotations) == Some(Role::Sandbox)
}

/// Those of the whole pod.
pub(super) fn limits(annotations: &HashMap<String, String>) -> Option<LinuxResources> {
    let number = |name| annotations.get(name)?.trim().parse::<i64>().ok().filter(|number| *number > 0);
    let mut limits = LinuxResources::default();
    if let Some(bytes) = number(MEMORY) {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(bytes));
        limits.set_memory(Some(memory));
    }
    if let Some(quota) = number(CPU_QUOTA) {
        let mut cpu = LinuxCpu::default();
        cpu.set_quota(Some(quota)).set_period(number(CPU_PERIOD).and_then(|period| u64::try_from(period).ok()));
        limits.set_cpu(Some(cpu));
    }
    (limits != LinuxResources::default()).then_some(limits)
}

impl Service {
    pub(super) async fn create_pause(
        &self,
        mut created: TaskCreate,
        paths: Paths,
        pod: Pod,
    ) -> Result<Arc<Container>, TaskError> {
        let id = created.container_id.clone();
        let local = Local::open(&paths).await?;
        let pid = std::process::id();
        let init = Process::new(&id, "", paths, CreateProcessResponse::default(), local, pid).pausing();
        let bundle = created.bundle.clone();
        let container = Arc::new(Container { id: id.clone(), bundle, init: Arc::new(init), execs: Mutex::default() });
        let mut containers = self.containers.lock().await;
        if containers.contains_key(&id) {
            return Err(TaskError::Exists { what: "container", id });
        }
        *self.pod.lock().await = Some(pod);
        containers.insert(id, Arc::clone(&container));
        drop(containers);
        created.pid = pid;
        note_pid(&created.bundle, pid);
        self.events.publish(created).await;
        Ok(container)
    }

    /// To be called with its turn.
    pub(super) async fn start_pause(&self, process: &Process) -> u32 {
        process.running(0);
        let mut event = TaskStart::new();
        event.container_id = process.container.clone();
        event.pid = process.pid();
        self.events.publish(event).await;
        process.pid()
    }

    /// The signals on which Kubernetes' pause ends by itself, it answers with success; the others do what they do.
    pub(super) async fn kill_pause(&self, process: &Process, signal: u32) {
        if !ends_by_default(signal) {
            return;
        }
        let well = [Signal::SIGTERM, Signal::SIGINT].iter().any(|known| *known as u32 == signal);
        let exit = Exit::now(if well { 0 } else { 128 + signal });
        if process.stopped(exit.clone()) {
            // Whoever reads its streams waits for their end.
            process.close().await;
            tell_exit(&self.events, process, &exit).await;
        }
        process.told();
    }
}

/// Its only process.
pub(super) fn pids(process: &Process) -> Vec<ProcessInfo> {
    if process.life() != Life::Running {
        return Vec::new();
    }
    let mut info = ProcessInfo::new();
    info.pid = process.pid();
    vec![info]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(all: &[(&str, &str)]) -> HashMap<String, String> {
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_sandbox_is_told_by_its_type() {
        assert!(is_pause(&annotations(&[("io.kubernetes.cri.container-type", "sandbox")])));
        assert!(is_pause(&annotations(&[("io.kubernetes.cri-o.ContainerType", "sandbox")])));
        assert!(!is_pause(&annotations(&[("io.kubernetes.cri.container-type", "container")])));
        assert!(!is_pause(&annotations(&[])));
    }

    #[test]
    fn a_pod_s_limits_are_those_that_are_set() {
        let of = |all: &[(&str, &str)]| limits(&annotations(all));
        assert_eq!(of(&[(MEMORY, "0"), (CPU_QUOTA, "0"), (CPU_PERIOD, "100000")]), None);
        let both = of(&[(MEMORY, "1073741824"), (CPU_QUOTA, "150000"), (CPU_PERIOD, "100000")]).unwrap();
        assert_eq!(both.memory().as_ref().unwrap().limit(), Some(1 << 30));
        let cpu = both.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(150_000), Some(100_000)));
        assert_eq!(of(&[(MEMORY, "much")]), None);
    }
}
