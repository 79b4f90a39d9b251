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
pub use virtiofsd::{Cache, Virtiofsd, VirtiofsdError};

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

    /// Mounts a container's root, binds the host's files into it and, if `readonly`, closes it for writing.
    /// `mountpoints` are further places (in the container) where the guest will mount something.
    ///
    /// # Errors
    /// Where a mount fails; what was mounted for this container is then unmounted again.
    pub fn add_root(
        &self,
        container: &str,
        mounts: &[RootMount],
        binds: &[Bind],
        mountpoints: &[PathBuf],
        readonly: bool,
    ) -> Result<(), ShareError> {
        let root = self.root(container);
        fs::create_dir_all(&root).map_err(|source| ShareError::Create { path: root.clone(), source })?;
        let added = self.fill_root(container, &root, mounts, binds, mountpoints, readonly);
        if added.is_err() {
            self.remove_root(container);
        }
        added
    }

    fn fill_root(
        &self,
        container: &str,
        root: &Path,
        mounts: &[RootMount],
        binds: &[Bind],
        mountpoints: &[PathBuf],
        readonly: bool,
    ) -> Result<(), ShareError> {
        for m in mounts {
            m.mount(root).map_err(|source| ShareError::Root { container: container.into(), source })?;
        }
        let failed = |source| ShareError::Bind { container: container.into(), source };
        for place in mountpoints {
            bind::make_mountpoint(root, place, true).map_err(failed)?;
        }
        for b in binds {
            b.mount(root).map_err(failed)?;
        }
        if readonly {
            bind::make_readonly(root).map_err(failed)?;
        }
        Ok(())
    }

    /// Unmounts a container's root; writes of the guest are on the host already, the share has no write-back cache.
    pub fn remove_root(&self, container: &str) {
        let root = self.root(container);
        // Detached: virtiofsd may still hold a descriptor, and a stacked bind needs several turns.
        while umount2(&root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
        // Not recursive: if an unmount failed, what lies below is the user's.
        let _ = fs::remove_dir(&root);
        if let Some(parent) = root.parent() {
            let _ = fs::remove_dir(parent);
        }
    }

    /// Where a container's root is mounted on the host, in this mount namespace.
    #[must_use]
    pub fn root(&self, container: &str) -> PathBuf {
        self.dir.join(container).join("rootfs")
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.dir);
    }
}
