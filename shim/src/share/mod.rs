//! The pod's root file systems as the guest sees them: one directory on the host, served by virtiofsd.
//!
//! The shim lives in a mount namespace of its own (see [`enter_private_mounts`]), so every mount made here vanishes
//! with the pod's last process, whatever was killed when. virtiofsd makes itself a further namespace that is a slave
//! of ours: roots that are mounted after it started still reach the guest.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use thiserror::Error;

mod bind;
mod options;
mod virtiofsd;

pub use bind::{Bind, BindError};
pub use options::{MountError, RootMount};
pub use virtiofsd::{Ended, Virtiofsd, VirtiofsdError, program as virtiofsd_program};

/// Preparing the share failed.
#[derive(Debug, Error)]
pub enum ShareError {
    /// A directory of the share.
    #[error("cannot create {path:?}")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The share's own bind mount, or its propagation.
    #[error("cannot make {path:?} a shared mount")]
    Propagation {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// A mount that containerd asked for.
    #[error("cannot mount the root file system of container {container:?}")]
    Root {
        /// Whose.
        container: String,
        /// Why.
        #[source]
        source: MountError,
    },
    /// A bind mount of the OCI specification.
    #[error("cannot bind into the root file system of container {container:?}")]
    Bind {
        /// Whose.
        container: String,
        /// Why.
        #[source]
        source: BindError,
    },
}

/// Gives this process a mount namespace of its own that still receives the host's later mounts.
///
/// To be called before any thread is started: a thread keeps the namespace it was born in.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn enter_private_mounts() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
}

/// What a container's part of the share is made of.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// The root, from containerd.
    pub mounts: &'a [RootMount],
    /// Bound into the root.
    pub binds: &'a [Bind],
    /// Bound beside the root, for the guest to bind further; destinations are relative.
    pub staged: &'a [Bind],
    /// Directories that the root must have.
    pub mountpoints: &'a [PathBuf],
    /// Closes the root for writing.
    pub readonly: bool,
}

/// A pod's share.
#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
}

impl Share {
    /// Makes `dir` a share.
    ///
    /// # Errors
    /// Where the directory cannot be made or mounted.
    pub fn create(dir: &Path) -> Result<Self, ShareError> {
        fs::create_dir_all(dir).map_err(|source| ShareError::Create { path: dir.into(), source })?;
        let failed = |source| ShareError::Propagation { path: dir.into(), source };
        mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed)?;
        mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>).map_err(failed)?;
        Ok(Self { dir: dir.into() })
    }

    /// The directory that virtiofsd serves.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Mounts a container's root and what is bound into it.
    ///
    /// # Errors
    /// Where a mount fails; what was mounted for this container is then unmounted again.
    pub fn add_container(&self, container: &str, content: &Content<'_>) -> Result<(), ShareError> {
        let added = self.fill(container, content);
        if added.is_err() {
            self.remove_container(container);
        }
        added
    }

    fn fill(&self, container: &str, content: &Content<'_>) -> Result<(), ShareError> {
        let home = self.dir.join(container);
        let root = home.join("rootfs");
        fs::create_dir_all(&root).map_err(|source| ShareError::Create { path: root.clone(), source })?;
        for m in content.mounts {
            m.mount(&root).map_err(|source| ShareError::Root { container: container.into(), source })?;
        }
        let failed = |source| ShareError::Bind { container: container.into(), source };
        for place in content.mountpoints {
            bind::make_mountpoint(&root, place, true).map_err(failed)?;
        }
        for b in content.binds {
            b.mount(&root).map_err(failed)?;
        }
        for b in content.staged {
            b.mount(&home).map_err(failed)?;
        }
        if content.readonly {
            bind::make_readonly(&root).map_err(failed)?;
        }
        Ok(())
    }

    /// Unmounts what belongs to a container. The guest's writes are on the host already: the share has no
    /// write-back cache.
    pub fn remove_container(&self, container: &str) {
        let home = self.dir.join(container);
        let root = home.join("rootfs");
        // Detached: virtiofsd may still hold descriptors; in turns, since mounts can be stacked.
        while umount2(&root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        let staged = home.join("binds");
        for entry in fs::read_dir(&staged).into_iter().flatten().flatten() {
            while umount2(&entry.path(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        }
        remove_empty(&home);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        remove_leftovers(&self.dir);
    }
}

/// Removes a share's directories, here or after a shim that was killed. Knows them by name and removes only what is
/// empty: were a mount still there, a recursive removal would empty the user's volume.
pub fn remove_leftovers(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        remove_empty(&entry.path());
    }
    let _ = fs::remove_dir(dir);
}

fn remove_empty(home: &Path) {
    let staged = home.join("binds");
    for entry in fs::read_dir(&staged).into_iter().flatten().flatten() {
        let place = entry.path();
        let _ = fs::remove_dir(&place).or_else(|_| match fs::metadata(&place) {
            Ok(m) if m.is_file() && m.len() == 0 => fs::remove_file(&place),
            _ => Ok(()),
        });
    }
    for dir in [&staged, &home.join("rootfs"), home] {
        let _ = fs::remove_dir(dir);
    }
}
