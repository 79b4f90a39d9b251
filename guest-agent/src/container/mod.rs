//! The room of containers: from an OCI specification to namespaces, mounts, a cgroup and processes.
//!
//! A container's first process is cloned when the container is created, does everything up to its program, and is
//! parked there until it is started. Containers outlive sessions.

mod capabilities;
mod cgroup;
mod create;
mod exec;
mod frozen;
mod mounts;
mod oom;
mod passwd;
mod plan;
mod spec;
mod stats;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use ttrpc::Code;

use crate::{
    error::Coded,
    process::{LaunchError, Process, ProcessError, Reaper, StdioError, valid_signal},
    stream::Streams,
    sys::{self, Pidfd},
};

pub use cgroup::{Cgroup, CgroupError};
pub use frozen::Adoption;
pub use passwd::open_inside;
pub use plan::PlanError;
pub use spec::Process as ProcessSpec;

/// Why a container is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    #[error("{0:?} cannot name a container or a process: 1 to 128 letters, digits, '_', '.' or '-', and no dot first")]
    BadId(String),
    #[error("there is no container {0:?}")]
    NotFound(String),
    #[error("there is no process {exec_id:?} in container {container_id:?}")]
    NoProcess { container_id: String, exec_id: String },
    #[error("{0:?} exists already")]
    Exists(String),
    #[error("container {0:?} does not run")]
    NotRunning(String),
    #[error("cannot open a terminal in the container (is a devpts mounted at /dev/pts?)")]
    Terminal(#[source] io::Error),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl Coded for ContainerError {
    fn code(&self) -> Code {
        match self {
            Self::BadId(_) => Code::INVALID_ARGUMENT,
            Self::NotFound(_) | Self::NoProcess { .. } => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::NotRunning(_) => Code::FAILED_PRECONDITION,
            Self::Terminal(_) => Code::INTERNAL,
            Self::Plan(e) => e.code(),
            Self::Cgroup(e) => e.code(),
            Self::Launch(e) => e.code(),
            Self::Stdio(e) => e.code(),
            Self::Process(e) => e.code(),
        }
    }
}

/// A container and its processes.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    /// Held while it is deleted, so that a second caller waits for the first.
    deleting: tokio::sync::Mutex<()>,
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    cgroup_root: PathBuf,
    pub streams: Streams,
    pub reaper: Reaper,
    own_pid_namespace: File,
    /// The limit of open files for processes whose specification has none.
    open_files: u64,
    /// Whether the machine has the name of its pod.
    named: AtomicBool,
    /// `None` while one is being created.
    all: Mutex<HashMap<String, Option<Arc<Container>>>>,
}

fn check_id(id: &str) -> Result<(), ContainerError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if (1..=128).contains(&id.len()) && !id.starts_with('.') && id.chars().all(allowed) {
        Ok(())
    } else {
        Err(ContainerError::BadId(id.to_owned()))
    }
}

impl Containers {
    /// No containers yet.
    ///
    /// # Errors
    /// If /proc is not there.
    pub fn new(cgroup_root: PathBuf, open_files: u64) -> io::Result<Self> {
        Ok(Self {
            cgroup_root,
            streams: Streams::default(),
            reaper: Reaper::default(),
            own_pid_namespace: sys::init_pid_namespace()?,
            open_files,
            named: AtomicBool::default(),
            all: Mutex::default(),
        })
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The container with this id.
    ///
    /// # Errors
    /// If there is none (yet).
    pub fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        self.all().get(id).cloned().flatten().ok_or_else(|| ContainerError::NotFound(id.to_owned()))
    }

    /// The process; an empty `exec_id` means the container's own.
    ///
    /// # Errors
    /// If there is none.
    pub fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        let container = self.get(container_id)?;
        if exec_id.is_empty() {
            return Ok(container.init.clone());
        }
        let process = container.execs().get(exec_id).cloned();
        process.ok_or_else(|| ContainerError::NoProcess {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        })
    }

    /// The container with this id, if need be when its creation is over: a shim that got no answer in time takes back
    /// what it asked for.
    async fn created(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let wait = async {
            while matches!(self.all().get(id), Some(None)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(cgroup::PATIENCE), wait).await;
        self.get(id)
    }

    /// Kills what is left and forgets the container.
    ///
    /// # Errors
    /// If there is none, or something in it survives.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.created(id).await?;
        let _first = container.deleting.lock().await;
        // Somebody else may have deleted it meanwhile.
        self.get(id)?;
        container.cgroup.kill()?;
        // Of a container that was started, its process is reaped before anything is taken away.
        if container.init.child().is_some() {
            let end = tokio::time::timeout(Duration::from_secs(cgroup::PATIENCE), container.init.wait()).await;
            end.map_err(|_| CgroupError::Alive(cgroup::PATIENCE))??;
        }
        container.cgroup.remove().await?;
        container.init.close_streams(&self.streams);
        for exec in container.execs().values() {
            exec.close_streams(&self.streams);
        }
        self.all().remove(id);
        Ok(())
    }

    /// Forgets a process that does not run.
    ///
    /// # Errors
    /// If there is none, or it runs.
    pub fn delete_process(&self, container_id: &str, exec_id: &str) -> Result<(), ContainerError> {
        let process = self.process(container_id, exec_id)?;
        if process.child().is_some() && !process.has_ended() {
            return Err(ProcessError::Running.into());
        }
        process.close_streams(&self.streams);
        // A container's own process goes with the container.
        self.get(container_id)?.execs().remove(exec_id);
        Ok(())
    }

    /// Sends a signal to one process, or to all of its container.
    ///
    /// # Errors
    /// If there is none, or it does not run.
    pub fn signal(&self, container_id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), ContainerError> {
        let process = self.process(container_id, exec_id)?;
        if !all {
            return Ok(process.signal(signal)?);
        }
        let number = valid_signal(signal)?;
        let container = self.get(container_id)?;
        if number == libc::SIGKILL {
            return Ok(container.cgroup.kill()?);
        }
        for pid in container.cgroup.processes()? {
            // One that has ended since needs no signal.
            let Ok(pidfd) = Pidfd::open(pid as i32) else { continue };
            let _ = pidfd.signal(number);
        }
        Ok(())
    }

    /// The numbers of all processes in the container.
    ///
    /// # Errors
    /// If there is no such container.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, ContainerError> {
        Ok(self.get(id)?.cgroup.processes()?)
    }

    /// What the container has used.
    ///
    /// # Errors
    /// If there is no such container.
    pub fn stats(&self, id: &str) -> Result<chsnap_protocol::agent::StatsResponse, ContainerError> {
        Ok(self.get(id)?.cgroup.stats())
    }
}

/// Adjusts how likely the kernel kills the process for want of memory.
fn set_oom_score(pid: i32, score: Option<i32>) -> Result<(), LaunchError> {
    let Some(score) = score else { return Ok(()) };
    match fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        // Its own report will say why.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|e| LaunchError::OomScore(score, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_name() {
        for good in ["a", "web-1_x.y", &"x".repeat(128)] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "../x", "a\0", "\u{e4}", &"x".repeat(129)] {
            assert!(matches!(check_id(bad), Err(ContainerError::BadId(_))), "{bad}");
        }
    }
}
