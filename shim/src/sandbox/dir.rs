//! A pod's directory: `<state>/<namespace>/<id>`. One living shim has it, and removes only what it has.
//!
//! The lock on it is the kernel's: it ends with the shim however that ends, so what is found unlocked are remains.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use thiserror::Error;

use crate::{share, state::State, vmm};

/// The longest path of a UNIX socket: 108 bytes of which one ends it.
const MAX_SOCKET: usize = 107;
/// The longest name of a socket in a pod's directory: `vsock_1024`, `65535.sock`.
const MAX_NAME: usize = 10;
/// The longest path of a pod's directory.
const MAX_DIR: usize = MAX_SOCKET - MAX_NAME - 1;

/// The pod's directory could not be taken.
#[derive(Debug, Error)]
pub enum DirError {
    /// No socket could have a path in it.
    #[error(
        "the path of the pod's directory {path:?} has {} bytes, and {MAX_DIR} is the most for the sockets in it: use an \
         id shorter than {id:?}, which has {} bytes, or a shorter namespace or [state] dir",
        path.as_os_str().len(),
        id.len()
    )]
    TooLong {
        /// The pod's.
        id: String,
        /// What it would be.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("cannot create the pod's directory {path:?}")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another shim has it.
    #[error(
        "the pod's directory {path:?} belongs to another pod of that name, which runs{by}: delete that one first, or \
         give each containerd its own [state] dir"
    )]
    Taken {
        /// Which.
        path: PathBuf,
        /// Its shim, where known; begins with a separator.
        by: String,
    },
}

/// `<state>/<namespace>/<id>`.
///
/// # Errors
/// Where that is too long for the sockets in it.
pub fn dir_of(state: &Path, namespace: &str, id: &str) -> Result<PathBuf, DirError> {
    let path = state.join(namespace).join(id);
    if path.as_os_str().len() > MAX_DIR {
        return Err(DirError::TooLong { id: id.into(), path });
    }
    Ok(path)
}

/// A pod's directory, taken.
#[derive(Debug)]
pub struct PodDir {
    path: PathBuf,
    _lock: Flock<File>,
}

/// Shims that make and remove directories beside us; each can be in our way only so often.
const ATTEMPTS: u32 = 1000;

impl PodDir {
    /// Takes `path`, which is [`dir_of`] the pod, and empties it of what a shim that was killed has left.
    ///
    /// # Errors
    /// See [`DirError`].
    pub fn claim(path: &Path) -> Result<Self, DirError> {
        let failed = |source| DirError::Create { path: path.into(), source };
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for _ in 0..ATTEMPTS {
            match try_claim(path) {
                Ok(Some(lock)) => {
                    if let Some(pid) = State::living_shim(path) {
                        return Err(DirError::Taken { path: path.into(), by: format!(" (its shim is process {pid})") });
                    }
                    clear(path);
                    return Ok(Self { path: path.into(), _lock: lock });
                }
                Ok(None) => {
                    let by = State::living_shim(path).map(|pid| format!(" (its shim is process {pid})"));
                    return Err(DirError::Taken { path: path.into(), by: by.unwrap_or_default() });
                }
                // The namespace's directory goes with its last pod, and may have gone in between.
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists) => last = e,
                Err(e) => return Err(failed(e)),
            }
        }
        Err(failed(last))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it, and its namespace's with the last one. Never recursive, see [`share::remove_leftovers`].
    pub fn remove(&self) {
        if let Err(e) = self.try_remove() {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }

    /// The same for a pod whose shim was killed: what ran in it is dying, and may still be making files.
    pub fn remove_of_dying(&self) {
        for pause in [5, 10, 20, 50, 100, 200, 500, 1000] {
            if self.try_remove().is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(pause));
        }
        self.remove();
    }

    fn try_remove(&self) -> io::Result<()> {
        clear(&self.path);
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        if let Some(parent) = self.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// `None` where somebody else holds the lock.
fn try_claim(path: &Path) -> io::Result<Option<Flock<File>>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let lock = match Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
        Err((_, e)) => return Err(e.into()),
    };
    // Its last owner may have removed it before we had the lock, and somebody else made another.
    let (ours, there) = (lock.metadata()?, fs::symlink_metadata(path)?);
    if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(Some(lock))
}

fn clear(path: &Path) {
    share::remove_leftovers(path);
    if let Err(error) = vmm::remove_leftovers(path) {
        log::warn!("what a restore has left in {} stays: {error}", path.display());
    }
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| !t.is_dir()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn the_longest_id_has_sockets_in_the_default_directory() {
        let state = crate::config::Config::default().state.dir;
        let path = dir_of(&state, "default", &"x".repeat(76)).unwrap();
        dir_of(&state, "k8s.io", &"f".repeat(64)).unwrap();
        assert_eq!(path.join("65535.sock").as_os_str().len(), MAX_SOCKET);
        let id = "x".repeat(77);
        let error = dir_of(&state, "default", &id).unwrap_err().to_string();
        assert!(error.contains(&format!("{id:?}, which has 77 bytes")) && error.contains("96 is the most"), "{error}");
    }

    #[test]
    fn a_pod_that_runs_keeps_its_directory() {
        let state = tempfile::tempdir().unwrap();
        let path = dir_of(state.path(), "default", "web").unwrap();
        let first = PodDir::claim(&path).unwrap();
        fs::write(path.join("8080.sock"), "").unwrap();
        let error = PodDir::claim(&path).unwrap_err();
        assert!(matches!(error, DirError::Taken { .. }), "{error}");
        assert!(path.join("8080.sock").exists(), "the other's socket is gone");
        first.remove();
        assert!(!state.path().join("default").exists());
        // Although the first still holds the lock of what it removed.
        PodDir::claim(&path).unwrap().remove();
        drop(first);
    }

    #[test]
    fn a_recorded_shim_that_lives_keeps_it_too() {
        let state = tempfile::tempdir().unwrap();
        let path = dir_of(state.path(), "default", "web").unwrap();
        fs::create_dir_all(&path).unwrap();
        let mut shim = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        crate::state::testing::state("web", shim.id()).write(&path).unwrap();
        let error = PodDir::claim(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", shim.id())), "{error}");
        assert!(path.join("state.json").exists());
        shim.kill().unwrap();
        shim.wait().unwrap();
        PodDir::claim(&path).unwrap();
    }

    #[test]
    fn remains_are_cleared_away() {
        let state = tempfile::tempdir().unwrap();
        let path = dir_of(state.path(), "default", "web").unwrap();
        fs::create_dir_all(path.join("share/web/rootfs")).unwrap();
        fs::write(path.join("state.json"), "{").unwrap();
        fs::write(path.join("8080.sock"), "").unwrap();
        // A restore: with links to a snapshot, which stays.
        let snapshot = state.path().join("snapshot");
        fs::create_dir(&snapshot).unwrap();
        fs::write(snapshot.join("memory-ranges"), "memory").unwrap();
        fs::create_dir(path.join("restore")).unwrap();
        fs::write(path.join("restore/config.json"), "{}").unwrap();
        for name in ["memory-ranges", "state.json", "."] {
            let link = path.join("restore").join(name.replace('.', "-"));
            std::os::unix::fs::symlink(snapshot.join(name), link).unwrap();
        }
        let dir = PodDir::claim(&path).unwrap();
        assert_eq!(fs::read_to_string(snapshot.join("memory-ranges")).unwrap(), "memory");
        assert!(fs::read_dir(&path).unwrap().next().is_none());
        dir.remove();
    }

    #[test]
    fn pods_that_come_and_go_together_do_not_hinder_each_other() {
        let state = tempfile::tempdir().unwrap();
        thread::scope(|scope| {
            for id in ["a", "b", "c"] {
                let path = dir_of(state.path(), "default", id).unwrap();
                scope.spawn(move || (0..300).for_each(|_| PodDir::claim(&path).unwrap().remove()));
            }
        });
        assert!(!state.path().join("default").exists());
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join("file"), "").unwrap();
        let error = PodDir::claim(&state.path().join("file/default/web")).unwrap_err();
        assert!(matches!(error, DirError::Create { .. }), "{error}");
    }
}
