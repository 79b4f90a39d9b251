//! What the kernel's OOM killer does in a cgroup: counted in `memory.events`, which a poll finds changed.

use std::{fs::File, io, os::fd::OwnedFd, path::Path};

use nix::sys::uio::pread;
use tokio::io::{Interest, unix::AsyncFd};

use super::stats::field;
use crate::sys;

/// In a cgroup's directory.
pub(super) const EVENTS: &str = "memory.events";

/// The processes that were ended, by the text of the file.
pub(super) fn count(text: &str) -> u64 {
    field(text, "oom_kill")
}

/// The file, open.
#[derive(Debug)]
pub struct OomKills(AsyncFd<OwnedFd>);

impl OomKills {
    /// # Errors
    /// If there is none.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(sys::watch(File::open(path)?.into(), Interest::PRIORITY)?))
    }

    /// The count, at first, and then whenever something in the file has changed.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn next(&self) -> io::Result<u64> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        // A change is measured by what was read of this descriptor.
        let mut text = [0; 512];
        let read = pread(self.0.get_ref(), &mut text, 0)?;
        Ok(count(&String::from_utf8_lossy(&text[..read])))
    }
}
