//! A child on its way to exec.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::OFlag,
    unistd::{pipe2, read, write},
};
use tokio::io::{Interest, unix::AsyncFd};
use ttrpc::Code;

use super::{Exit, Process, Reaper};
use crate::{
    error::{Coded, code_of},
    sys::{self, Namespaces, Plan, REPORT_LEN, Report},
};

/// Why a child did not get to its program.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("cannot start a process")]
    Clone(#[source] io::Error),
    #[error("cannot set up a process: {step}")]
    Step {
        step: String,
        #[source]
        source: io::Error,
    },
    #[error("exec {program:?}")]
    Exec {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("the process ended while it was set up")]
    Died,
    #[error("what sets the process up was ended, with status {0}, before all of it was done")]
    Undone(u32),
    #[error("cannot watch the process")]
    Watch(#[source] io::Error),
    #[error("cannot let the process go")]
    Go(#[source] io::Error),
    #[error("cannot set oom_score_adj to {0}")]
    OomScore(i32, #[source] io::Error),
    #[error("cannot take over the process's terminal")]
    Terminal(#[source] io::Error),
}

impl Coded for LaunchError {
    fn code(&self) -> Code {
        match self {
            Self::Exec { source, .. } => code_of(source),
            Self::Step { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => Code::INVALID_ARGUMENT,
            _ => Code::INTERNAL,
        }
    }
}

/// A child that has been cloned.
#[derive(Debug)]
pub struct Launching {
    report: AsyncFd<OwnedFd>,
    /// Writing here lets a parked child go; closing it ends it.
    start: Option<OwnedFd>,
    /// What the steps were about, for their errors.
    steps: Vec<String>,
    program: String,
}

/// Where a child is born.
#[derive(Debug, Clone, Copy)]
pub struct Birth<'a> {
    pub namespaces: Namespaces,
    pub cgroup: BorrowedFd<'a>,
    /// The process whose PID namespace is joined, and the agent's own.
    pub beside: Option<(&'a sys::Pidfd, &'a File)>,
}

impl Launching {
    /// Clones the child. `start` is the other end of the pipe at which it parks.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn spawn(
        plan: &Plan,
        birth: Birth<'_>,
        start: Option<OwnedFd>,
        process: &Arc<Process>,
        reaper: &Reaper,
    ) -> Result<Self, LaunchError> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| LaunchError::Watch(e.into()))?;
        let report = sys::watch(ours, Interest::READABLE).map_err(LaunchError::Watch)?;
        let clone = || sys::spawn(plan, birth.namespaces, birth.cgroup, theirs.as_fd());
        let clone = || match birth.beside {
            Some((pidfd, own)) => sys::in_pid_namespace(pidfd, own, clone),
            None => clone(),
        };
        reaper.adopt(process, clone).map_err(LaunchError::Clone)?;
        let steps = plan.ops.iter().map(ToString::to_string).collect();
        let name = plan.program.as_ref().and_then(|program| program.args.first());
        let program = name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { report, start, steps, program })
    }

    /// The next report; `None` when the program runs, or the child is gone.
    async fn next(&self) -> Result<Option<Report>, LaunchError> {
        let mut bytes = [0; REPORT_LEN];
        loop {
            let mut ready = self.report.readable().await.map_err(LaunchError::Watch)?;
            match ready.try_io(|fd| Ok(read(fd.get_ref(), &mut bytes)?)) {
                Ok(Ok(0)) => return Ok(None),
                // Reports are shorter than what a pipe keeps together.
                Ok(Ok(_)) => return Ok(Report::decode(bytes)),
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(LaunchError::Watch(e)),
                Err(_would_block) => {}
            }
        }
    }

    fn failure(&self, step: usize, errno: i32) -> LaunchError {
        let source = io::Error::from_raw_os_error(errno);
        match self.steps.get(step) {
            Some(step) => LaunchError::Step { step: step.clone(), source },
            None => LaunchError::Exec { program: self.program.clone(), source },
        }
    }

    /// Waits until the child is parked. Gives the child's descriptor of its terminal.
    ///
    /// # Errors
    /// Of the step that failed.
    pub async fn parked(&self) -> Result<Option<i32>, LaunchError> {
        match self.next().await? {
            Some(Report::Ready { terminal }) => Ok(terminal),
            Some(Report::Failed { step, errno }) => Err(self.failure(step, errno)),
            None => Err(LaunchError::Died),
        }
    }

    /// Lets a parked child go.
    ///
    /// # Errors
    /// If it is not there any more.
    pub fn go(&mut self) -> Result<(), LaunchError> {
        match self.start.take() {
            Some(start) => write(start, b"g").map(drop).map_err(|e| match e {
                nix::errno::Errno::EPIPE => LaunchError::Died,
                e => LaunchError::Go(e.into()),
            }),
            None => Ok(()),
        }
    }

    /// Waits until the program runs.
    ///
    /// # Errors
    /// Of the step that failed, or of the program.
    pub async fn running(&self) -> Result<(), LaunchError> {
        match self.next().await? {
            Some(Report::Failed { step, errno }) => Err(self.failure(step, errno)),
            Some(Report::Ready { .. }) => Err(LaunchError::Died),
            None => Ok(()),
        }
    }

    /// Waits for the end of a child that has no program: `process`, whose end the reaper tells.
    ///
    /// # Errors
    /// Of the step that failed, or if it did not come to an end of its own.
    pub async fn done(&self, process: &Process) -> Result<(), LaunchError> {
        self.running().await?;
        // The pipe closes just so when it is killed half-way.
        match process.wait().await {
            Ok(Exit { status: 0, .. }) => Ok(()),
            Ok(Exit { status, .. }) => Err(LaunchError::Undone(status)),
            Err(_) => Err(LaunchError::Died),
        }
    }
}
