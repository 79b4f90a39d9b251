//! virtiofsd: serves the share to the guest over vhost-user.
//!
//! It gets its listening socket as a descriptor, so the VMM can connect before virtiofsd has even been scheduled and
//! nobody polls for a path to appear.

use std::{
    env, io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tokio::{io::AsyncReadExt, process::Child, time::timeout};

use crate::{child, config::ShareConfig};

/// virtiofsd could not be started, or ended early.
#[derive(Debug, Error)]
pub enum VirtiofsdError {
    /// Not on this host.
    #[error("cannot run virtiofsd as {program:?}; install virtiofsd 1.14 or newer, or name it in [share] virtiofsd")]
    Spawn {
        /// What was tried.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its socket.
    #[error("cannot listen on {path:?}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where distributions put it, beside the directories of PATH.
const LIBEXEC: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// The program: as configured, else from PATH, else from where distributions put it. A name that is found nowhere is
/// answered as it is, for the error message.
#[must_use]
pub fn program(config: &ShareConfig) -> PathBuf {
    if let Some(path) = &config.virtiofsd {
        return path.clone();
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join("virtiofsd")).chain(LIBEXEC.iter().map(PathBuf::from));
    found.into_iter().find(|p| p.is_file()).unwrap_or_else(|| "virtiofsd".into())
}

/// How virtiofsd ended.
#[derive(Debug)]
pub struct Ended {
    /// By itself and well: it does so when its VMM goes, and that is then what has to be explained.
    pub clean: bool,
    /// Status, and the last it wrote.
    pub how: String,
}

/// A running virtiofsd. Dropping it kills it.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    socket: PathBuf,
}

impl Virtiofsd {
    /// Serves `dir` on `socket`.
    ///
    /// # Errors
    /// See [`VirtiofsdError`]. What virtiofsd itself finds wrong shows in [`Virtiofsd::ended`].
    pub fn spawn(config: &ShareConfig, dir: &Path, socket: &Path, cgroups: &[PathBuf]) -> Result<Self, VirtiofsdError> {
        let program = program(config);
        let listener =
            UnixListener::bind(socket).map_err(|source| VirtiofsdError::Socket { path: socket.into(), source })?;
        let listener: OwnedFd = listener.into();
        let number = child::fd_number(&listener);
        let failed = |source| VirtiofsdError::Spawn { program: program.clone(), source };
        let mut command = child::command(&program, cgroups, vec![listener]).map_err(failed)?;
        command
            .arg(format!("--fd={number}"))
            .arg("--shared-dir")
            .arg(dir)
            .args(["--sandbox=namespace", "--seccomp=kill", "--log-level=error"])
            // overlayfs has no file handles to offer, and a snapshot finds its inodes by path.
            .args(["--inode-file-handles=never", "--migration-mode=find-paths"])
            .args(["--announce-submounts", "--xattr"])
            .arg(format!("--cache={}", config.cache))
            .stdout(std::process::Stdio::null());
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child, socket: socket.into() })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it has ended, and says how.
    pub async fn ended(&mut self) -> Ended {
        let status = self.child.wait().await;
        let mut said = String::new();
        if let Some(stderr) = self.child.stderr.take() {
            // Bounded in length, and in time since a grandchild may hold the pipe.
            let mut stderr = stderr.take(8192);
            let _ = timeout(Duration::from_millis(200), stderr.read_to_string(&mut said)).await;
        }
        let clean = status.as_ref().is_ok_and(|s| s.success());
        let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
        let how = match said.trim() {
            "" => status,
            said => format!("{status}: {said}"),
        };
        Ended { clean, how }
    }

    /// Ends it and waits.
    pub async fn kill(&mut self) {
        let _ = self.child.kill().await;
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}
