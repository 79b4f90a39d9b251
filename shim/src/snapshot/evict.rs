//! Letting go of snapshots: when somebody asks, and when there are too many.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::FlockArg;

use super::{
    EvictError, Key, ListError, Store,
    store::{NEW, OLD, is_still, lock},
};
use crate::{files, task::chain};

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

/// What came of a pruning.
#[derive(Debug, Default)]
pub struct Pruned {
    /// Those that were removed.
    pub evicted: Vec<Evicted>,
    /// What should have been, and stays.
    pub stayed: Vec<EvictError>,
}

impl Pruned {
    /// For those whom nobody asks.
    pub fn log(&self) {
        self.stayed.iter().for_each(|error| log::warn!("{}", chain(error)));
    }
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
        remove_locked(&old, &locked).map_err(|error| failed(&old, error))
    }

    /// Has it out of the way, and removed once nobody uses it any more; there may be none.
    ///
    /// # Errors
    /// Where it stays.
    pub fn displace(&self, key: &Key) -> io::Result<()> {
        match self.set_aside(&self.root.join(key.as_str()), key) {
            Ok(old) => {
                self.sweep_or_log(&old);
                Ok(())
            }
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
            // Of one that was killed over the same. Where it stays, there are further numbers.
            self.sweep_or_log(&old);
            match fs::rename(dir, &old) {
                Ok(()) => return Ok(old),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory
                    ) =>
                {
                    taken = error
                }
                Err(error) => return Err(error),
            }
        }
        Err(taken)
    }

    /// Removes those that were not used for longest until the rest has at most `budget` bytes, and what killed
    /// processes left. Those in use stay. What cannot be removed keeps nothing else from being removed.
    ///
    /// # Errors
    /// Where the store cannot be listed.
    pub fn prune(&self, budget: u64) -> Result<Pruned, ListError> {
        let mut pruned = Pruned { stayed: self.sweep()?, ..Pruned::default() };
        let mut entries = self.list()?;
        let mut total = entries.iter().map(|entry| entry.bytes).sum::<u64>() + self.displaced()?;
        while total > budget
            && let Some(entry) = entries.pop()
        {
            match self.remove(&entry.key) {
                Ok(()) => {
                    total -= entry.bytes;
                    pruned.evicted.push(Evicted { key: entry.key, bytes: entry.bytes });
                }
                // Another prunes as well.
                Err(EvictError::Missing { .. }) => total -= entry.bytes,
                Err(EvictError::InUse { .. }) => {}
                Err(error @ EvictError::Io { .. }) => pruned.stayed.push(error),
            }
        }
        Ok(pruned)
    }

    /// Bytes of those that were displaced while somebody used them, and still does: they are on the disk, too.
    pub(super) fn displaced(&self) -> Result<u64, ListError> {
        let failed = |source| ListError { path: self.root.clone(), source };
        let mut bytes = 0;
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let has = |how| matches!(lock(&path, how), Ok(Some(_)));
            // What another removes at this moment is his alone, and as good as gone.
            if entry.file_name().to_string_lossy().starts_with(OLD)
                && !has(FlockArg::LockExclusiveNonblock)
                && has(FlockArg::LockSharedNonblock)
            {
                bytes += files::disk_usage(&path);
            }
        }
        Ok(bytes)
    }

    /// Keeps the budget.
    ///
    /// # Errors
    /// Where the store cannot be listed.
    pub fn keep_budget(&self) -> Result<Pruned, ListError> {
        self.prune(self.budget)
    }

    /// Removes what processes left that were killed, and tells what of it stays.
    ///
    /// # Errors
    /// Where the store cannot be listed.
    pub fn sweep(&self) -> Result<Vec<EvictError>, ListError> {
        let failed = |source| ListError { path: self.root.clone(), source };
        let mut stayed = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.to_string_lossy();
            let swept = if [NEW, OLD].iter().any(|prefix| name.starts_with(prefix)) {
                self.sweep_one(&path)
            } else if files::is_unfinished(&name) {
                files::remove_if_left(&path)
            } else {
                Ok(())
            };
            if let Err(source) = swept {
                stayed.push(EvictError::Io { path, source });
            }
        }
        Ok(stayed)
    }

    fn sweep_or_log(&self, dir: &Path) {
        if let Err(source) = self.sweep_one(dir) {
            log::warn!("{}", chain(&EvictError::Io { path: dir.into(), source }));
        }
    }

    fn sweep_one(&self, dir: &Path) -> io::Result<()> {
        match lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(Some(locked)) if is_still(dir, &locked) => remove_locked(dir, &locked),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Once it is empty, the next of its key may take its place on the way out: then it is gone, and the rest is that one's remover's.
/// So what is emptied is what was locked, whatever has its name by now.
fn remove_locked(dir: &Path, locked: &File) -> io::Result<()> {
    match files::empty_open(locked).and_then(|()| fs::remove_dir(dir)) {
        Err(_) if !is_still(dir, locked) => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remover_empties_what_it_has_locked_and_not_what_has_its_name_by_now() {
        let dir = tempfile::tempdir().unwrap();
        let (old, next) = (dir.path().join(".old-k-0"), dir.path().join("k"));
        fs::create_dir(&old).unwrap();
        let locked = lock(&old, FlockArg::LockExclusiveNonblock).unwrap().unwrap();
        // Another has emptied it, and set the next one aside, which is in use.
        fs::create_dir(&next).unwrap();
        fs::write(next.join("memory"), "in use").unwrap();
        fs::rename(&next, &old).unwrap();
        remove_locked(&old, &locked).unwrap();
        assert!(old.join("memory").exists());
        // Its own goes.
        let locked = lock(&old, FlockArg::LockExclusiveNonblock).unwrap().unwrap();
        remove_locked(&old, &locked).unwrap();
        assert!(!old.exists());
    }
}
