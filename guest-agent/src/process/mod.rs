//! The room of processes: their start, their stdio, and their one end.

mod launch;
mod reaper;
mod stdio;

use std::{
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use tokio::sync::watch;
use ttrpc::Code;

use crate::{
    container::{Cgroup, CgroupError},
    error::{Coded, code_of},
    stream::{Channel, StreamError, Streams},
    sys::Child,
};

pub use launch::{Birth, LaunchError, Launching};
pub use reaper::Reaper;
pub use stdio::{Ends, StdioError, StreamIds, Wanted, pipes, terminal};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0-255, or 128 + signal.
    pub status: u32,
    /// Wall clock.
    pub at_ns: i64,
    /// Processes of its container that the OOM killer ended.
    pub oom_kills: u64,
}

/// What is left to do before the program runs.
#[derive(Debug)]
pub enum Pending {
    /// The child waits, all set up.
    Parked(Launching),
    /// There is no child yet.
    Exec(Box<ExecPlan>),
    /// It ran in a template, and stands still.
    Frozen,
}

/// All that an exec is started with.
#[derive(Debug)]
pub struct ExecPlan {
    pub spec: crate::container::ProcessSpec,
    pub ends: Ends,
}

/// Why a process did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("the process has been started already")]
    Started,
    #[error("the process has not been started")]
    NotStarted,
    #[error("the process has ended")]
    Ended,
    #[error("the process is still running; kill it first")]
    Running,
    #[error("{0} is not a signal")]
    BadSignal(u32),
    #[error("cannot send the signal")]
    Signal(#[source] io::Error),
    #[error("the process has no terminal")]
    NoTerminal,
    #[error("a terminal of {0}x{1} is not possible")]
    BadSize(u32, u32),
    #[error("cannot resize the terminal")]
    Resize(#[source] io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Coded for ProcessError {
    fn code(&self) -> Code {
        match self {
            Self::Started | Self::NotStarted | Self::Running | Self::NoTerminal => Code::FAILED_PRECONDITION,
            Self::Ended => Code::NOT_FOUND,
            Self::BadSignal(_) | Self::BadSize(..) => Code::INVALID_ARGUMENT,
            Self::Signal(e) | Self::Resize(e) => code_of(e),
            Self::Launch(e) => e.code(),
            Self::Stdio(e) => e.code(),
            Self::Cgroup(e) => e.code(),
            Self::Stream(e) => e.code(),
        }
    }
}

/// One process, a container's own or an exec.
#[derive(Debug)]
pub struct Process {
    stdio: OnceLock<(StreamIds, Option<Arc<Channel>>)>,
    pending: Mutex<Option<Pending>>,
    child: OnceLock<Child>,
    exit: watch::Sender<Option<Exit>>,
    cgroup: Arc<Cgroup>,
    /// OOM kills in the cgroup before this process was there.
    oom_before: u64,
}

impl Process {
    pub fn new(cgroup: Arc<Cgroup>) -> Self {
        Self {
            stdio: OnceLock::new(),
            pending: Mutex::new(None),
            child: OnceLock::new(),
            exit: watch::Sender::new(None),
            oom_before: cgroup.oom_kills(),
            cgroup,
        }
    }

    /// Gives the process its streams; the first ones stay.
    pub fn attach(&self, streams: StreamIds, terminal: Option<Arc<Channel>>) {
        let _ = self.stdio.set((streams, terminal));
    }

    pub fn streams(&self) -> StreamIds {
        self.stdio.get().map(|(streams, _)| *streams).unwrap_or_default()
    }

    /// Says what is to be done at the start.
    pub fn prepare(&self, pending: Pending) {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner) = Some(pending);
    }

    /// What is to be done at the start; only once.
    pub fn take_pending(&self) -> Result<Pending, ProcessError> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or(ProcessError::Started)
    }

    /// The number, once there is a child.
    pub fn pid(&self) -> Option<i32> {
        self.child.get().map(|child| child.pid)
    }

    pub fn child(&self) -> Option<&Child> {
        self.child.get()
    }

    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// Waits for the end, also of a process that ended long ago.
    pub async fn wait(&self) -> Result<Exit, ProcessError> {
        let mut exit = self.exit.subscribe();
        let seen = exit.wait_for(Option::is_some).await;
        // The sender is this process itself.
        seen.ok().and_then(|exit| *exit).ok_or(ProcessError::Ended)
    }

    /// Waits for the OOM killer to have ended more than `known` processes of the container, or for this process's end.
    pub async fn wait_oom(&self, known: u64) -> u64 {
        let more = async {
            // Without the file there is no limit that could be reached.
            let Ok(kills) = self.cgroup.watch_oom_kills() else { return std::future::pending().await };
            loop {
                match kills.next().await {
                    Ok(count) if count > known => return,
                    Ok(_) => {}
                    Err(_) => return std::future::pending().await,
                }
            }
        };
        tokio::select! {
            () = more => {}
            _ = self.wait() => {}
        }
        self.cgroup.oom_kills()
    }

    /// Sends a signal to this process alone.
    ///
    /// # Errors
    /// If it has not begun or has ended.
    pub fn signal(&self, signal: u32) -> Result<(), ProcessError> {
        let child = self.child.get().ok_or(ProcessError::NotStarted)?;
        if self.has_ended() {
            return Err(ProcessError::Ended);
        }
        let number = valid_signal(signal)?;
        child.pidfd.signal(number).map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => ProcessError::Ended,
            Some(libc::EINVAL) => ProcessError::BadSignal(signal),
            _ => ProcessError::Signal(e),
        })
    }

    /// Changes the terminal's size.
    ///
    /// # Errors
    /// If there is none.
    pub fn resize(&self, columns: u32, rows: u32) -> Result<(), ProcessError> {
        let terminal = self.stdio.get().and_then(|(_, terminal)| terminal.as_ref()).ok_or(ProcessError::NoTerminal)?;
        let (Ok(x), Ok(y)) = (u16::try_from(columns), u16::try_from(rows)) else {
            return Err(ProcessError::BadSize(columns, rows));
        };
        terminal.resize(x, y).map_err(ProcessError::Resize)
    }

    /// Forgets the streams. Whoever waits in them is told.
    pub fn close_streams(&self, streams: &Streams) {
        for id in self.streams().all() {
            streams.close(id);
        }
    }

    /// The reaper's news.
    fn ended(&self, status: u32) {
        let oom_kills = self.cgroup.oom_kills().saturating_sub(self.oom_before);
        let exit = Exit { status, at_ns: crate::clock::wall_ns(), oom_kills };
        self.exit.send_replace(Some(exit));
    }
}

/// A signal's number as the kernel takes it.
///
/// # Errors
/// If it is none.
pub fn valid_signal(signal: u32) -> Result<i32, ProcessError> {
    match i32::try_from(signal) {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err(ProcessError::BadSignal(signal)),
    }
}
