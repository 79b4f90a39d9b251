//! Further processes in a container, and the start of any.

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use nix::{
    fcntl::OFlag,
    libc,
    unistd::{Uid, fchown},
};

use super::{
    Container, ContainerError, Containers, check_id, passwd,
    plan::{self, PlanError, Setting},
    set_oom_score,
    spec::Process as ProcessSpec,
};
use crate::{
    process::{self, Birth, Ends, ExecPlan, LaunchError, Launching, Pending, Process, StreamIds, Wanted},
    sys::{self, Child, Namespaces},
};

impl Containers {
    /// Makes a further process known. It comes into being when it is started.
    ///
    /// # Errors
    /// If the container does not run, or for what cannot be done, by name.
    pub fn create_exec(
        &self,
        container_id: &str,
        exec_id: &str,
        spec: &[u8],
        wanted: Wanted,
    ) -> Result<StreamIds, ContainerError> {
        check_id(exec_id)?;
        let container = self.get(container_id)?;
        let spec: ProcessSpec = serde_json::from_slice(spec).map_err(PlanError::Json)?;
        let child = running(&container)?;
        if container.execs().contains_key(exec_id) {
            return Err(ContainerError::Exists(exec_id.to_owned()));
        }
        let process = Arc::new(Process::new(container.cgroup.clone()));
        let ends = match wanted.terminal {
            false => {
                let (ids, ends) = process::pipes(wanted, spec.user.uid, &self.streams)?;
                process.attach(ids, None);
                ends
            }
            true => {
                let (master, slave) = terminal(child, spec.user.uid).map_err(ContainerError::Terminal)?;
                let (ids, channel) = process::terminal(wanted, master, &self.streams)?;
                process.attach(ids, Some(channel));
                Ends::Terminal(slave)
            }
        };
        if let Some(size) = spec.console_size.filter(|s| wanted.terminal && s.width != 0 && s.height != 0) {
            process.resize(size.width, size.height).inspect_err(|_| process.close_streams(&self.streams))?;
        }
        process.prepare(Pending::Exec(Box::new(ExecPlan { spec, ends })));
        let streams = process.streams();
        container.execs().insert(exec_id.to_owned(), process);
        Ok(streams)
    }

    /// Lets a process begin. Answers when its program runs.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn start(&self, container_id: &str, exec_id: &str) -> Result<u32, ContainerError> {
        let process = self.process(container_id, exec_id)?;
        let launching = match process.take_pending()? {
            Pending::Frozen => {
                self.get(container_id)?.cgroup.thaw()?;
                return Ok(number(&process));
            }
            Pending::Parked(mut launching) => {
                launching.go()?;
                launching
            }
            Pending::Exec(plan) => {
                let container = self.get(container_id)?;
                self.launch_exec(&container, &process, *plan)?
            }
        };
        launching.running().await?;
        Ok(number(&process))
    }

    fn launch_exec(
        &self,
        container: &Container,
        process: &Arc<Process>,
        exec: ExecPlan,
    ) -> Result<Launching, ContainerError> {
        let child = running(container)?;
        let setting = Setting {
            stdio: Some(exec.ends.fds()),
            terminal: matches!(exec.ends, Ends::Terminal(_)),
            home: passwd::home(&root_of(child), exec.spec.user.uid),
            open_files: self.open_files,
        };
        let plan = plan::exec(&exec.spec, &setting, &child.pidfd)?;
        let beside = Some((&child.pidfd, &self.own_pid_namespace));
        let launch = |cgroup| {
            let birth = Birth { namespaces: Namespaces::Same, cgroup, beside };
            Launching::spawn(&plan, birth, None, process, &self.reaper)
        };
        let launching = match launch(container.cgroup.as_fd()) {
            // The container manages cgroups itself (systemd does), and its outermost one may hold no process then.
            Err(LaunchError::Clone(e)) if e.raw_os_error() == Some(libc::EBUSY) => {
                launch(container.cgroup.of_process(child.pid)?.as_fd())?
            }
            result => result?,
        };
        if let Some(pid) = process.pid()
            && let Err(error) = set_oom_score(pid, exec.spec.oom_score_adj)
        {
            // What is said not to have started must not run.
            let _ = process.signal(libc::SIGKILL.unsigned_abs());
            return Err(error.into());
        }
        Ok(launching)
    }
}

fn number(process: &Process) -> u32 {
    process.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0)
}

/// The container's own process, if it is alive.
pub(super) fn running(container: &Container) -> Result<&Child, ContainerError> {
    let child = container.init.child().filter(|_| !container.init.has_ended());
    child.ok_or_else(|| ContainerError::NotRunning(container.id.clone()))
}

fn root_of(child: &Child) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", child.pid))
}

/// A terminal of the container's own devpts: the agent's side and the process's.
fn terminal(child: &Child, uid: u32) -> std::io::Result<(OwnedFd, OwnedFd)> {
    let master: File = passwd::open_inside(&root_of(child), "dev/ptmx", OFlag::O_RDWR)?;
    sys::open_terminal(master.as_fd())?;
    let slave = sys::terminal_peer(master.as_fd())?;
    fchown(&slave, Some(Uid::from_raw(uid)), None)?;
    Ok((master.into(), slave))
}
