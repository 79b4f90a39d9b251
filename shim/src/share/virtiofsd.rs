//! virtiofsd: serves the share to the guest over vhost-user.
//!
//! It gets its listening socket as a descriptor, so the VMM can connect before virtiofsd has even been scheduled and
//! nobody polls for a path to appear.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;
use tokio::{process::Child, task::JoinHandle, time::timeout};

use crate::{
    child,
    config::{CacheMode, ShareConfig},
    program::{Scout, in_path, is_executable, numbers},
    ring::Ring,
};

/// virtiofsd could not be started, or ended early.
#[derive(Debug, Error)]
pub enum VirtiofsdError {
    /// Not on this host.
    #[error(
        "cannot run virtiofsd as {program:?}; install virtiofsd {NEEDED} or newer, or name it in [share] virtiofsd"
    )]
    Spawn {
        /// What was tried.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another program, or one that cannot be loaded.
    #[error(
        "{program:?} does not say that it is virtiofsd ({said}): install virtiofsd {NEEDED} or newer, or name it in \
         [share] virtiofsd"
    )]
    Mute {
        /// What was asked.
        program: PathBuf,
        /// Its answer.
        said: String,
    },
    /// Too old a one.
    #[error(
        "{program:?} is {found}, but virtiofsd {NEEDED} or newer is needed: install it, or name it in [share] virtiofsd"
    )]
    Old {
        /// What was asked.
        program: PathBuf,
        /// What it is.
        found: String,
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

/// The first that a VM with it can be restored from, which a snapshot does.
const OLDEST: (u64, u64) = (1, 14);
const NEEDED: &str = "1.14";

/// How long the pipe of a dead one may stay open.
const DRAIN: Duration = Duration::from_millis(200);

/// Where distributions put it, beside the directories of PATH.
const LIBEXEC: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"];

/// A virtiofsd that can be used.
#[derive(Debug, Clone)]
pub struct Program {
    /// Where.
    pub path: PathBuf,
    /// Such as `1.14.0`.
    pub version: String,
}

/// Finds it: as configured, else in PATH, else where distributions put it.
///
/// # Errors
/// See [`VirtiofsdError`].
pub async fn find(config: &ShareConfig, scout: &mut Scout) -> Result<Program, VirtiofsdError> {
    let libexec = || LIBEXEC.iter().map(PathBuf::from).find(|path| is_executable(path));
    let path = config.virtiofsd.clone().or_else(|| in_path("virtiofsd")).or_else(libexec);
    // A name that is found nowhere is for the error's text.
    let path = path.unwrap_or_else(|| "virtiofsd".into());
    if let Err(source) = path.metadata() {
        return Err(VirtiofsdError::Spawn { program: path, source });
    }
    match scout.version(&path, own_version).await {
        // Version 7.2.0 of QEMU's is older than 1.14.0.
        Ok(version) if version.starts_with(OLD_ONES) => {
            Err(VirtiofsdError::Old { program: path, found: format!("QEMU's old virtiofsd, {version}") })
        }
        Ok(version) if numbers(&version) < Some(OLDEST) => {
            Err(VirtiofsdError::Old { program: path, found: format!("version {version}") })
        }
        Ok(version) => Ok(Program { path, version }),
        Err(said) => Err(VirtiofsdError::Mute { program: path, said }),
    }
}

/// QEMU's, in C, says "virtiofsd version 7.2.22"; the new one, in Rust, "virtiofsd 1.14.0".
const OLD_ONES: &str = "version ";

fn own_version(line: &str) -> Option<String> {
    let version = line.strip_prefix("virtiofsd ")?;
    let known = version.starts_with(OLD_ONES) || numbers(version).is_some();
    known.then(|| version.trim().to_owned())
}

/// virtiofsd's own word for it.
const fn word(cache: CacheMode) -> &'static str {
    match cache {
        // Where nobody knows better, the one that is right everywhere.
        CacheMode::Auto | CacheMode::Revalidate => "auto",
        CacheMode::Never => "never",
        CacheMode::Always => "always",
    }
}

/// How virtiofsd ended.
#[derive(Debug)]
pub struct Ended {
    /// By itself and well: it does so when its VMM goes, and that is then what has to be explained.
    pub clean: bool,
    /// Status, and the last it wrote.
    pub how: String,
}

/// Kept of what it writes to stderr, and how much of that is told.
const STDERR_BYTES: usize = 8 << 10;
const STDERR_LINES: usize = 8;

/// A running virtiofsd. Dropping it kills it.
#[derive(Debug)]
pub struct Virtiofsd {
    child: Child,
    socket: PathBuf,
    stderr: Ring,
    /// Reads as it comes: one that writes much would stand still before a full pipe.
    reader: JoinHandle<()>,
}

impl Virtiofsd {
    /// Serves `dir` on `socket`.
    ///
    /// # Errors
    /// See [`VirtiofsdError`]. What virtiofsd itself finds wrong shows in [`Virtiofsd::ended`].
    pub fn spawn(
        program: &Program,
        cache: CacheMode,
        dir: &Path,
        socket: &Path,
        cgroups: &[PathBuf],
    ) -> Result<Self, VirtiofsdError> {
        let listener =
            UnixListener::bind(socket).map_err(|source| VirtiofsdError::Socket { path: socket.into(), source })?;
        let listener: OwnedFd = listener.into();
        let number = child::fd_number(&listener);
        let failed = |source| VirtiofsdError::Spawn { program: program.path.clone(), source };
        let mut command = child::command(&program.path, cgroups, vec![listener]).map_err(failed)?;
        command
            .arg(format!("--fd={number}"))
            .arg("--shared-dir")
            .arg(dir)
            .args(["--sandbox=namespace", "--seccomp=kill", "--log-level=error"])
            // overlayfs has no file handles to offer, and a snapshot finds its inodes by path.
            .args(["--inode-file-handles=never", "--migration-mode=find-paths"])
            .args(["--announce-submounts", "--xattr"])
            .arg(format!("--cache={}", word(cache)))
            .stdout(std::process::Stdio::null());
        let mut child = command.spawn().map_err(failed)?;
        let (stderr, pipe) = (Ring::new(STDERR_BYTES), child.stderr.take());
        let ring = stderr.clone();
        let reader = tokio::spawn(async move {
            if let Some(pipe) = pipe {
                ring.fill_from(pipe).await;
            }
        });
        Ok(Self { child, socket: socket.into(), stderr, reader })
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it has ended, and says how.
    pub async fn ended(&mut self) -> Ended {
        let status = self.child.wait().await;
        // Bounded, since a grandchild may hold the pipe.
        if !self.reader.is_finished() {
            let _ = timeout(DRAIN, &mut self.reader).await;
        }
        let clean = status.as_ref().is_ok_and(|s| s.success());
        let status = status.map_or_else(|e| e.to_string(), |s| s.to_string());
        let how = match self.stderr.last_lines(STDERR_LINES) {
            said if said.is_empty() => status,
            said => format!("{status}: {said}"),
        };
        Ended { clean, how }
    }

    /// Ends it and waits.
    pub async fn kill(&mut self) {
        if timeout(child::KILLED, self.child.kill()).await.is_err() {
            log::error!("virtiofsd (process {:?}) does not end although it was killed", self.child.id());
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        self.reader.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::{
        Freshness,
        testing::{program, scout},
    };

    async fn found(dir: &Path, says: &str) -> Result<Program, String> {
        let mut scout = scout(dir, Freshness::Now, Duration::from_secs(60));
        let config = ShareConfig { virtiofsd: Some(program(dir, "v", says)), ..ShareConfig::default() };
        find(&config, &mut scout).await.map_err(|e| e.to_string())
    }

    #[tokio::test]
    async fn only_one_that_is_new_enough_is_used() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(found(dir.path(), "echo virtiofsd 1.14.0").await.unwrap().version, "1.14.0");
        for (says, error) in [
            (
                "echo virtiofsd 1.13.3",
                "/v\" is version 1.13.3, but virtiofsd 1.14 or newer is needed: install it, or name",
            ),
            (
                "echo virtiofsd version 7.2.22; echo using FUSE",
                "is QEMU's old virtiofsd, version 7.2.22, but virtiofsd 1.14",
            ),
            (
                "echo GNU coreutils 9.1",
                "does not say that it is virtiofsd (exit status: 0; \"GNU coreutils 9.1\" \"\")",
            ),
            ("echo broken >&2; exit 3", "(exit status: 3; \"\" \"broken\")"),
        ] {
            let text = found(dir.path(), says).await.unwrap_err();
            assert!(text.contains(error) && text.ends_with("[share] virtiofsd"), "{text}");
        }
        let mut scout = scout(dir.path(), Freshness::Now, Duration::from_secs(60));
        let config = ShareConfig { virtiofsd: Some(dir.path().join("none")), ..ShareConfig::default() };
        assert!(matches!(find(&config, &mut scout).await, Err(VirtiofsdError::Spawn { .. })));
    }

    #[tokio::test]
    async fn one_that_writes_much_is_not_held_up_and_its_last_words_are_told() {
        let dir = tempfile::tempdir().unwrap();
        // More than a pipe holds, twenty times over.
        let path = program(dir.path(), "v", "yes noise | head -c 1200000 >&2; echo 'no more room' >&2; exit 3");
        let program = Program { path, version: "1.14.0".into() };
        let socket = dir.path().join("s");
        let mut virtiofsd = Virtiofsd::spawn(&program, CacheMode::Auto, dir.path(), &socket, &[]).unwrap();
        // Given up half-way, as by whoever waits for the machine as well.
        let _ = timeout(Duration::from_millis(1), virtiofsd.ended()).await;
        let ended = timeout(Duration::from_secs(20), virtiofsd.ended()).await.unwrap();
        assert!(
            ended.how.starts_with("exit status: 3: noise | ") && ended.how.ends_with(" | no more room"),
            "{ended:?}"
        );
        assert!(!ended.clean && ended.how.lines().count() == 1 && ended.how.len() < 200, "{ended:?}");
        assert_eq!(virtiofsd.ended().await.how, ended.how);
    }
}
