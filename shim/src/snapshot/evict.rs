//! Letting go of snapshots: when somebody asks, and when there are too many.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::fcntl::FlockArg;

use super::{
    EvictError, Key, ListError, Store,
    store::{NEW, OLD, is_still, lock},
};

/// Of one key, snapshots on their way out at once.
const MOST: u32 = 16;

/// A snapshot that was removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evicted {
    /// Which.
    pub key: Key,
    /// What that gave back.
    pub bytes: u64,
}

impl Store {
    /// Removes a snapshot that nobody uses.
    ///
    /// # Errors
    /// See [`EvictError`].
    pub fn remove(&self, key: &Key) -> Result<(), EvictError> {
        let dir = self.root.join(key.as_str());
        let failed = |path: &Path, source| EvictError::Io { path: path.into(), source };
        let locked = match lock(&dir, FlockArg::LockExclusiveNonblock) {
            Ok(Some(locked)) if is_still(&dir, &locked) => locked,
            Ok(Some(_)) => return Err(EvictError::Missing { key: key.clone() }),
            Ok(None) => return Err(EvictError::InUse { key: key.clone() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(EvictError::Missing { key: key.clone() });
            }
            Err(error) => return Err(failed(&dir, error)),
        };
        let old = self.set_aside(&dir, key).map_err(|error| failed(&dir, error))?;
        fs::remove_dir_all(&old).map_err(|error| failed(&old, error))?;
        drop(locked);
        Ok(())
    }

    /// Has it out of the way, and removed once nobody uses it any more; there may be none.
    pub(super) fn displace(&self, key: &Key) -> io::Result<()> {
        match self.set_aside(&self.root.join(key.as_str()), key) {
            Ok(old) => self.sweep_one(&old),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Renames it to where nobody looks for it. One of the same key may be on its way out there, if it was built again
    /// meanwhile.
    fn set_aside(&self, dir: &Path, key: &Key) -> io::Result<PathBuf> {
        let mut taken = io::Error::from(io::ErrorKind::AlreadyExists);
        for number in 0..MOST {
            let old = self.root.join(format!("{OLD}{key}-{number}"));
            // Of one that was killed over the same.
            self.sweep_one(&old)?;
            match fs::rename(dir, &old) {
                Ok(()) => return Ok(old),
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => taken = error,
                Err(error) => return Err(error),
            }
        }
        Err(taken)
    }

    /// Removes those that were not used for longest until the rest has at most `budget` bytes, and what killed
    /// processes left. Those in use stay.
    ///
    /// # Errors
    /// Where the store cannot be listed.
    pub fn prune(&self, budget: u64) -> Result<Vec<Evicted>, ListError> {
        self.sweep().map_err(|source| ListError { path: self.root.clone(), source })?;
        let mut entries = self.list()?;
        let mut total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut evicted = Vec::new();
        while total > budget
            && let Some(entry) = entries.pop()
        {
            match self.remove(&entry.key) {
                Ok(()) => {
                    total -= entry.bytes;
                    evicted.push(Evicted { key: entry.key, bytes: entry.bytes });
                }
                // Another prunes as well.
                Err(EvictError::Missing { .. }) => total -= entry.bytes,
                Err(EvictError::InUse { .. }) => {}
                Err(error @ EvictError::Io { .. }) => log::warn!("snapshot {}: {error}", entry.key.short()),
            }
        }
        Ok(evicted)
    }

    /// Keeps the budget.
    ///
    /// # Errors
    /// Where the store cannot be listed.
    pub fn keep_budget(&self) -> Result<Vec<Evicted>, ListError> {
        self.prune(self.budget)
    }

    /// Removes what processes left that were killed.
    ///
    /// # Errors
    /// Where something cannot be removed.
    pub fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            if [NEW, OLD].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                self.sweep_one(&entry.path())?;
            }
        }
        Ok(())
    }

    fn sweep_one(&self, dir: &Path) -> io::Result<()> {
        match lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(Some(locked)) if is_still(dir, &locked) => match fs::remove_dir_all(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}
