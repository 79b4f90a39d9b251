//! Where snapshots are: `<dir>/<key>/`, complete or absent.
//!
//! | name | what | lock on the directory |
//! |---|---|---|
//! | `<key>` | a snapshot | shared by those who use it |
//! | `.new-<key>` | one that is being built | its builder's |
//! | `.old-<key>-<n>` | one that is being removed | its remover's |
//!
//! The locks are the kernel's (`flock`): they end with their process however that ends. So what begins with a point
//! and is not locked was left by a process that was killed, and whoever comes next removes it. A snapshot appears by
//! a rename after everything in it is on the disk, and disappears by one before anything of it does.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::{stat::futimens, time::TimeSpec},
};

use super::{
    BuildError, FindError, Inputs, Key, ListError, Manifest, OpenError, Refusal,
    manifest::{Stock, take_stock},
};
use crate::{files, state::timestamp};

pub(super) const NEW: &str = ".new-";
pub(super) const OLD: &str = ".old-";
/// A publisher or a remover has a snapshot to itself for a moment.
const MOMENT: Duration = Duration::from_millis(1);
const MOMENTS: u32 = 50;

/// All snapshots of a host.
#[derive(Debug, Clone)]
pub struct Store {
    pub(super) root: PathBuf,
    pub(super) budget: u64,
}

/// A snapshot that stays while this lives.
#[derive(Debug)]
pub struct InUse {
    dir: PathBuf,
    manifest: Manifest,
    _lock: Flock<File>,
}

/// A snapshot that is being built, by nobody else. Gone when dropped.
#[derive(Debug)]
pub struct Building {
    root: PathBuf,
    dir: PathBuf,
    inputs: Inputs,
    budget: u64,
    began: SystemTime,
    lock: Option<Flock<File>>,
}

/// A snapshot as it is told of.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub key: Key,
    /// What it consists of, or why that cannot be told.
    pub manifest: Result<Manifest, FindError>,
    /// On the disk.
    pub bytes: u64,
    /// When it was last restored or built.
    pub used_at: SystemTime,
}

impl Store {
    /// The store in `root`, which is made where it is missing.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(root: &Path, budget: u64) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { path: root.into(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
        let meta = fs::metadata(root).map_err(failed)?;
        if meta.uid() != nix::unistd::geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            return Err(OpenError::Open { path: root.into() });
        }
        Ok(Self { root: root.into(), budget })
    }

    /// The snapshot of that key, for use.
    ///
    /// # Errors
    /// Where there is one that cannot be used.
    pub fn find(&self, key: &Key) -> Result<Option<InUse>, FindError> {
        let dir = self.root.join(key.as_str());
        let failed = |source| FindError::Io { path: dir.clone(), source };
        let Some(lock) = self.lock_shared(&dir).map_err(failed)? else { return Ok(None) };
        let manifest = Manifest::read(&dir, key)?;
        manifest.check(&dir, false)?;
        // For those who have to choose which to let go of.
        futimens(&*lock, &TimeSpec::UTIME_OMIT, &TimeSpec::UTIME_NOW).map_err(|error| failed(error.into()))?;
        Ok(Some(InUse { dir, manifest, _lock: lock }))
    }

    /// Takes all digests anew.
    ///
    /// # Errors
    /// Where one is wrong; and where there is no such snapshot.
    pub fn verify(&self, key: &Key) -> Result<(), FindError> {
        let dir = self.root.join(key.as_str());
        let failed = |source| FindError::Io { path: dir.clone(), source };
        let lock = self.lock_shared(&dir).map_err(failed)?;
        let _lock = lock.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        Manifest::read(&dir, key)?.check(&dir, true)
    }

    /// A place to build a snapshot of these inputs in.
    ///
    /// # Errors
    /// See [`BuildError`]; [`BuildError::Busy`] where somebody else does it.
    pub fn build(&self, inputs: Inputs) -> Result<Building, BuildError> {
        let key = inputs.key();
        if self.is_fit(&key) {
            return Err(BuildError::Exists { key });
        }
        let building = self.build_again(inputs)?;
        // Published between the first look and the lock.
        if self.is_fit(&key) {
            return Err(BuildError::Exists { key });
        }
        self.displace(&key).map_err(|source| BuildError::Io { path: self.root.join(key.as_str()), source })?;
        Ok(building)
    }

    /// The same where there is one, which stays until [`Self::displace`].
    ///
    /// # Errors
    /// See [`BuildError`].
    pub fn build_again(&self, inputs: Inputs) -> Result<Building, BuildError> {
        let key = inputs.key();
        let dir = self.root.join(format!("{NEW}{key}"));
        let failed = |source| BuildError::Io { path: dir.clone(), source };
        loop {
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
            let lock = match lock(&dir, FlockArg::LockExclusiveNonblock) {
                Ok(Some(lock)) => lock,
                Ok(None) => return Err(BuildError::Busy { key }),
                // Its builder has just published it, or given up.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            if !is_still(&dir, &lock) {
                continue;
            }
            // Of a builder that was killed.
            files::empty(&dir).map_err(failed)?;
            let (root, budget) = (self.root.clone(), self.budget);
            let began = SystemTime::now();
            return Ok(Building { root, dir: dir.clone(), inputs, budget, began, lock: Some(lock) });
        }
    }

    /// Whether there is one that can be used, or whose fitness cannot be told. One that is spoilt makes room for the
    /// one that is built in its place: else every pod to come would do without.
    fn is_fit(&self, key: &Key) -> bool {
        let dir = self.root.join(key.as_str());
        let checked = || Manifest::read(&dir, key)?.check(&dir, false);
        dir.exists() && !matches!(checked(), Err(FindError::Spoilt { .. }))
    }

    /// Whether somebody has it locked now.
    fn is_in_use(&self, key: &Key) -> bool {
        matches!(lock(&self.root.join(key.as_str()), FlockArg::LockExclusiveNonblock), Ok(None))
    }

    /// All of them, the most recently used first.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, ListError> {
        let failed = |source| ListError { path: self.root.clone(), source };
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(key) = entry.file_name().to_str().and_then(|name| name.parse::<Key>().ok()) else { continue };
            let dir = entry.path();
            // It may have gone meanwhile.
            let Ok(used_at) = fs::metadata(&dir).and_then(|meta| meta.modified()) else { continue };
            let manifest = Manifest::read(&dir, &key);
            if manifest.is_err() && !dir.exists() {
                continue;
            }
            let bytes = manifest.as_ref().map_or_else(|_| files::disk_usage(&dir), |manifest| manifest.bytes(&dir));
            entries.push(Entry { key, manifest, bytes, used_at });
        }
        entries.sort_by(|a, b| b.used_at.cmp(&a.used_at).then_with(|| a.key.cmp(&b.key)));
        Ok(entries)
    }

    /// Locks a snapshot for use; `None` where there is none.
    fn lock_shared(&self, dir: &Path) -> io::Result<Option<Flock<File>>> {
        for _ in 0..MOMENTS {
            match lock(dir, FlockArg::LockSharedNonblock) {
                Ok(Some(lock)) if is_still(dir, &lock) => return Ok(Some(lock)),
                Ok(_) => thread::sleep(MOMENT),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl InUse {
    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it consists of.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl Building {
    /// Where its files are to be.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is to be found by.
    #[must_use]
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// Throws away what was built so far; the place is still taken.
    ///
    /// # Errors
    /// Where something cannot be removed.
    pub fn clear(&self) -> Result<(), BuildError> {
        files::empty(&self.dir).map_err(|source| BuildError::Io { path: self.dir.clone(), source })
    }

    /// Everything in the directory is the snapshot from now on, for everybody. `root_limit` is what its root difference
    /// may have, in bytes.
    ///
    /// # Errors
    /// Then nothing of it is left.
    pub fn publish(self, refusals: Vec<Refusal>, root_limit: u64) -> Result<Key, BuildError> {
        self.publish_with(refusals, root_limit, &sync)
    }

    pub(super) fn publish_with(
        mut self,
        refusals: Vec<Refusal>,
        root_limit: u64,
        sync: &dyn Fn(&Path) -> io::Result<()>,
    ) -> Result<Key, BuildError> {
        let key = self.inputs.key();
        let Stock { files, root, verified } = take_stock(&self.dir)?;
        if let Some(root) = root.as_ref().filter(|root| root.bytes > root_limit) {
            return Err(BuildError::RootTooLarge { bytes: root.bytes, limit: root_limit });
        }
        let now = SystemTime::now();
        let build_ms = now.duration_since(self.began).unwrap_or_default().as_millis().try_into().unwrap_or(u64::MAX);
        let inputs = self.inputs.clone();
        let manifest = Manifest { key: key.clone(), inputs, created_at: timestamp(), build_ms, refusals, files, root };
        manifest.write(&self.dir, &verified)?;
        let bytes = manifest.bytes(&self.dir);
        if bytes > self.budget {
            return Err(BuildError::TooLarge { bytes, budget: self.budget });
        }
        let to = self.root.join(key.as_str());
        let failed = |path: &Path, source| BuildError::Io { path: path.into(), source };
        // Two at once would both find the room that is there for one.
        let _alone = files::lock_dir(&self.root).map_err(|error| failed(&self.root, error))?;
        self.make_room(bytes)?;
        sync(&self.dir).map_err(|error| failed(&self.dir, error))?;
        fs::rename(&self.dir, &to).map_err(|error| failed(&to, error))?;
        self.lock = None;
        // It is there for everybody now.
        if let Err(error) = sync(&self.root) {
            log::warn!(
                "the snapshot {} may not outlive a power cut: cannot write {:?}: {error}",
                key.short(),
                self.root
            );
        }
        Ok(key)
    }

    /// Else the newest would have to go again, where all others are in use, and the next pod would have it built anew.
    fn make_room(&self, bytes: u64) -> Result<(), BuildError> {
        let store = Store { root: self.root.clone(), budget: self.budget };
        let failed = |error: ListError| BuildError::Io { path: error.path, source: error.source };
        let room = |in_use: u64| match in_use + bytes <= self.budget {
            true => Ok(()),
            false => Err(BuildError::Full { bytes, in_use, budget: self.budget }),
        };
        // Nothing is let go of in vain.
        let in_use = store.list().map_err(failed)?.into_iter().filter(|entry| store.is_in_use(&entry.key));
        let displaced = || store.displaced().map_err(failed);
        room(in_use.map(|entry| entry.bytes).sum::<u64>() + displaced()?)?;
        store.prune(self.budget.saturating_sub(bytes)).map_err(failed)?.log();
        room(store.list().map_err(failed)?.iter().map(|entry| entry.bytes).sum::<u64>() + displaced()?)
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        // Locked until it is gone: published, it is no longer ours.
        if let Some(_lock) = self.lock.take()
            && let Err(error) = files::remove_tree(&self.dir)
        {
            log::warn!("cannot remove {:?}: {error}", self.dir);
        }
    }
}

/// Locks a directory; `None` where another has it.
pub(super) fn lock(dir: &Path, how: FlockArg) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(File::open(dir)?, how) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// Whether what was locked is still what has that name.
pub(super) fn is_still(dir: &Path, lock: &File) -> bool {
    let of = |meta: fs::Metadata| (meta.dev(), meta.ino());
    matches!((fs::symlink_metadata(dir).map(of), lock.metadata().map(of)), (Ok(a), Ok(b)) if a == b)
}

/// Puts a directory's entries on the disk.
fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
