//! The pod's root file systems as the guest sees them: one directory on the host, served by virtiofsd.
//!
//! The shim lives in a mount namespace of its own (see [`enter_private_mounts`]), so every mount made here vanishes
//! with the pod's last process, whatever was killed when. virtiofsd makes itself a further namespace that is a slave
//! of ours: roots that are mounted after it started still reach the guest. Mounts do, that is, but not what is done to
//! their flags later: a root is put together beside the share, where nobody sees it, and moved in when it is whole.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use thiserror::Error;

mod bind;
mod clone;
mod graft;
mod options;
mod overlay;
mod virtiofsd;

pub use bind::{Bind, BindError};
pub use clone::CloneRoot;
pub use graft::GraftError;
pub use options::{MountError, RootMount, for_guest, is_read_only, unknown_of_bind, words_of_bind};
pub use overlay::Overlay;
pub use virtiofsd::{Ended, Program as VirtiofsdProgram, Virtiofsd, VirtiofsdError, find as find_virtiofsd};

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
    /// A copy of an image, to which a container is about to write.
    #[error("cannot mark the root file system of container {container:?} as used")]
    Mark {
        /// Whose.
        container: String,
        /// Why not.
        #[source]
        source: io::Error,
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

static HOME: OnceLock<File> = OnceLock::new();

/// The mount namespace that [`enter_private_mounts`] has left.
pub(crate) fn home() -> Option<&'static File> {
    HOME.get()
}

/// Gives this process a mount namespace of its own that still receives the host's later mounts.
///
/// To be called before any thread is started: a thread keeps the namespace it was born in.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn enter_private_mounts() -> nix::Result<()> {
    if let Ok(home) = File::open("/proc/self/ns/mnt") {
        let _ = HOME.set(home);
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
}

/// A place in the root that the guest mounts over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mountpoint {
    /// In the container.
    pub path: PathBuf,
    /// Else it is a file.
    pub is_dir: bool,
}

/// What is bound into a container's root, by places that [`Assembly::resolve`] has answered.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    /// Bound into the root.
    pub binds: &'a [Bind],
    /// Bound beside the root, for the guest to bind further; destinations are relative.
    pub staged: &'a [Bind],
    /// What the root must have.
    pub mountpoints: &'a [Mountpoint],
    /// Closes the root for writing.
    pub readonly: bool,
}

/// Names in the pod's directory.
const SHARE: &str = "share";
const WORKSHOP: &str = "new";
/// In the workshop, and in each container's directory of the share.
const ROOT: &str = "rootfs";

/// A pod's share.
#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
    workshop: PathBuf,
}

/// A container's root that is being put together; given up when dropped.
#[derive(Debug)]
pub struct Assembly<'a> {
    share: &'a Share,
    container: &'a str,
    home: &'a str,
}

impl Share {
    /// Makes the share of the pod whose directory is `pod`.
    ///
    /// # Errors
    /// Where the directory cannot be made or mounted.
    pub fn create(pod: &Path) -> Result<Self, ShareError> {
        let (dir, workshop) = (pod.join(SHARE), pod.join(WORKSHOP));
        fs::create_dir_all(&dir).map_err(|source| ShareError::Create { path: dir.clone(), source })?;
        let failed = |source| ShareError::Propagation { path: dir.clone(), source };
        mount(Some(&dir), &dir, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed)?;
        mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>).map_err(failed)?;
        Ok(Self { dir, workshop })
    }

    /// The directory that virtiofsd serves.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Mounts a container's root from containerd's mounts, not yet where the guest would see it: in the directory `home`.
    /// One at a time. From now on a copy of an image is one that was used, whoever else looked at it, or did not.
    ///
    /// # Errors
    /// Where a mount fails.
    pub fn assemble<'a>(
        &'a self,
        container: &'a str,
        home: &'a str,
        mounts: &[RootMount],
    ) -> Result<Assembly<'a>, ShareError> {
        let assembly = Assembly { share: self, container, home };
        let root = assembly.root();
        fs::create_dir_all(&root).map_err(|source| ShareError::Create { path: root.clone(), source })?;
        let marked = CloneRoot::of(mounts).map_or(Ok(()), |root| root.mark());
        marked.map_err(|source| ShareError::Mark { container: container.into(), source })?;
        for m in mounts {
            m.mount(&root).map_err(|source| ShareError::Root { container: container.into(), source })?;
        }
        Ok(assembly)
    }

    /// Unmounts what belongs to the container in the directory `home`. The guest's writes are on the host already: the
    /// share has no write-back cache.
    pub fn remove_container(&self, home: &str) {
        take_apart(&self.dir.join(home));
    }
}

impl Assembly<'_> {
    fn root(&self) -> PathBuf {
        self.share.workshop.join(ROOT)
    }

    fn failed(&self, source: BindError) -> ShareError {
        ShareError::Bind { container: self.container.into(), source }
    }

    /// Where in the root `place` leads, symbolic links followed; nothing is looked up below `hidden`, where the guest
    /// mounts something.
    ///
    /// # Errors
    /// Where a link leads in circles.
    pub fn resolve(&self, place: &Path, hidden: &[PathBuf]) -> Result<PathBuf, ShareError> {
        bind::resolve(&self.root(), place, hidden).map_err(|e| self.failed(e))
    }

    /// Adds `content`, and shows the guest the whole.
    ///
    /// # Errors
    /// Where a mount fails; nothing of the container is left then.
    pub fn publish(self, content: &Content<'_>) -> Result<(), ShareError> {
        let root = self.root();
        for place in content.mountpoints {
            bind::make_mountpoint(&root, &place.path, place.is_dir).map_err(|e| self.failed(e))?;
        }
        for b in content.binds {
            b.mount(&root).map_err(|e| self.failed(e))?;
        }
        for b in content.staged {
            b.mount(&self.share.workshop).map_err(|e| self.failed(e))?;
        }
        if content.readonly {
            bind::make_readonly(&root).map_err(|e| self.failed(e))?;
        }
        let staged = content.staged.iter().map(|b| b.destination.as_path());
        let moved = staged.chain([Path::new(ROOT)]).try_for_each(|name| self.move_in(name));
        if moved.is_err() {
            self.share.remove_container(self.home);
        }
        moved
    }

    /// A mount that is moved is received with its flags and with everything mounted below it.
    fn move_in(&self, name: &Path) -> Result<(), ShareError> {
        let home = self.share.dir.join(self.home);
        let from = self.share.workshop.join(name);
        let is_dir = fs::metadata(&from).is_ok_and(|m| m.is_dir());
        let created = |source| ShareError::Create { path: home.clone(), source };
        fs::create_dir_all(&home).map_err(created)?;
        bind::make_mountpoint(&home, &Path::new("/").join(name), is_dir).map_err(|e| self.failed(e))?;
        let to = home.join(name);
        mount(Some(&from), &to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|source| self.failed(BindError::Mount { from, path: to.clone(), source }))
    }
}

impl Drop for Assembly<'_> {
    fn drop(&mut self) {
        take_apart(&self.share.workshop);
    }
}

/// Unmounts and removes the root in `home` and what is staged beside it.
fn take_apart(home: &Path) {
    let root = home.join(ROOT);
    // Detached: virtiofsd may still hold descriptors; in turns, since mounts can be stacked.
    while umount2(&root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    let staged = home.join("binds");
    for entry in fs::read_dir(&staged).into_iter().flatten().flatten() {
        while umount2(&entry.path(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    }
    remove_empty(home);
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        remove_shared(&self.dir);
    }
}

/// Removes the directories of the share of a pod whose shim was killed. Knows them by name and removes only what is
/// empty: were a mount still there, a recursive removal would empty the user's volume.
pub fn remove_leftovers(pod: &Path) {
    remove_empty(&pod.join(WORKSHOP));
    remove_shared(&pod.join(SHARE));
}

fn remove_shared(dir: &Path) {
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
    for dir in [&staged, &home.join(ROOT), home] {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a look for a snapshot, as where that is off or fails.
    #[test]
    fn every_copy_of_an_image_is_marked_and_no_directory_of_the_user_s() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may set an attribute of the host's own");
        }
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        let share = Share { dir: place("share"), workshop: place("new") };
        for name in ["share", "copy", "own"] {
            fs::create_dir(place(name)).unwrap();
        }
        let root = |name: &str, options: &[&str]| RootMount {
            fstype: "bind".into(),
            source: place(name).display().to_string(),
            options: options.iter().map(ToString::to_string).collect(),
        };
        let copy = CloneRoot::of(&[root("copy", &["rw", "rbind"])]).unwrap();
        // Whether the mount works here is another matter.
        drop(share.assemble("web", "web", &[root("copy", &["rw", "rbind"])]));
        drop(share.assemble("web", "web", &[root("own", &["rbind"])]));
        assert!(!copy.claim().unwrap(), "the next start would take it for a fresh one");
        assert_eq!(xattr::list(place("own")).unwrap().filter(|name| name == clone::USED).count(), 0);
    }
}
