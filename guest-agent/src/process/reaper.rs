//! The one who waits for children. The agent is the guest's pid 1, so every orphan is its child too.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::errno::Errno;
use tokio::signal::unix::{SignalKind, signal};

use super::Process;
use crate::sys::{self, Child};

/// Knows which child is whose.
#[derive(Debug, Default)]
pub struct Reaper {
    children: Mutex<HashMap<i32, Arc<Process>>>,
}

impl Reaper {
    fn children(&self) -> MutexGuard<'_, HashMap<i32, Arc<Process>>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a child that is `process`. Its end cannot be missed, since nothing is reaped meanwhile.
    ///
    /// # Errors
    /// Of `start`.
    pub fn adopt(&self, process: &Arc<Process>, start: impl FnOnce() -> io::Result<Child>) -> io::Result<i32> {
        let mut children = self.children();
        let child = start()?;
        let pid = child.pid;
        children.insert(pid, process.clone());
        // Only ever started once: the plan is taken out first.
        let _ = process.child.set(child);
        Ok(pid)
    }

    /// Reaps for ever.
    ///
    /// # Errors
    /// If SIGCHLD cannot be heard.
    pub async fn run(&self) -> io::Result<()> {
        let mut news = signal(SignalKind::child())?;
        loop {
            // Also before the first signal: something may have ended before it could be heard.
            self.reap();
            if news.recv().await.is_none() {
                return Err(io::Error::other("signals are no longer delivered"));
            }
        }
    }

    fn reap(&self) {
        loop {
            let mut children = self.children();
            let (pid, status) = match sys::reap() {
                Ok(Some(ended)) => ended,
                Ok(None) => return,
                Err(error) if error.raw_os_error() == Some(Errno::ECHILD as i32) => return,
                Err(error) => {
                    eprintln!("chsnap-agent: cannot reap: {error}");
                    return;
                }
            };
            let process = children.remove(&pid);
            drop(children);
            if let Some(process) = process {
                process.ended(status);
            }
        }
    }
}
