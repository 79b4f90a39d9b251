//! Roots in which a clone of a template's process can begin: with what the process had written before it was saved, and
//! with nothing else.

use std::{
    ffi::OsStr,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{process::Command, task::spawn_blocking, time::timeout};

use super::{GraftError, Overlay, RootMount, graft::graft};
use crate::files;

/// On a directory in which a container has been started.
pub(super) const USED: &str = "trusted.chsnap.used";

/// On one that is being written to, or made anew, and so is not whole: whoever was killed over that, or gave up, has left it so.
pub(super) const BROKEN: &str = "trusted.chsnap.broken";

/// For a difference to be written: whoever waits for the container boots instead, which takes less by then.
const BEGIN: Duration = Duration::from_secs(120);
/// For a copy to be made anew. The root is worth nothing without.
const TAKE_BACK: Duration = Duration::from_secs(600);

/// A container's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloneRoot {
    /// Layers: the root difference becomes one more.
    Layered(Overlay),
    /// A copy of the image's root in a directory of the container's own, as containerd's native snapshotter makes it: the
    /// root difference is written into it.
    Copied(PathBuf),
}

impl CloneRoot {
    /// What `mounts` are, if a clone can begin there. That a directory is a copy, containerd has to confirm.
    #[must_use]
    pub fn of(mounts: &[RootMount]) -> Option<Self> {
        if let Some(overlay) = Overlay::of(mounts) {
            return Some(Self::Layered(overlay));
        }
        let [mount] = mounts else { return None };
        let dir = PathBuf::from(&mount.source);
        let has = |name| mount.options.iter().any(|option| option == name);
        let bound = mount.fstype == "bind" || has("bind") || has("rbind");
        // A snapshotter says that it can be written to. A directory of the user's own, which nobody says that of, is no copy.
        (bound && has("rw") && !has("ro") && dir.is_absolute()).then_some(Self::Copied(dir))
    }

    /// What the container writes to.
    #[must_use]
    pub fn dir(&self) -> &Path {
        match self {
            Self::Layered(overlay) => &overlay.upper,
            Self::Copied(dir) => dir,
        }
    }

    /// Marks it as one in which a container is being started, in whatever way that is: nothing that is written to it from now
    /// on may be taken back. Of layers, what was written is seen.
    ///
    /// # Errors
    /// Where it could be marked and was not.
    pub fn mark(&self) -> io::Result<()> {
        match self {
            Self::Layered(_) => Ok(()),
            Self::Copied(dir) if xattr::get(dir, BROKEN).is_ok_and(|broken| broken.is_some()) => Err(io::Error::other(
                "what a snapshot has in it was to be written there, or to be taken out again after a failed restore, and \
                 that did not come to its end: remove the container",
            )),
            Self::Copied(dir) => match xattr::set(dir, USED, b"y") {
                // Neither can it be claimed then.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                // Nor is there anything that a container could write.
                Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
                outcome => outcome,
            },
        }
    }

    /// Whether no container has been started in it yet. A directory is marked: the next answer is no.
    ///
    /// # Errors
    /// Where that cannot be told, or not be marked.
    pub fn claim(&self) -> io::Result<bool> {
        match self {
            Self::Layered(overlay) => overlay.is_untouched(),
            Self::Copied(dir) if xattr::get(dir, USED)?.is_some() => Ok(false),
            Self::Copied(dir) => xattr::set(dir, USED, b"y").map(|()| true),
        }
    }

    /// The mounts of the root with `difference` in it, where `mounts` are those without.
    ///
    /// # Errors
    /// Where it cannot be written; a part of it may be there then.
    pub async fn begin(&self, mounts: &[RootMount], difference: &Path) -> Result<Vec<RootMount>, GraftError> {
        let Self::Copied(dir) = self else { return Ok(Overlay::with(mounts, difference)) };
        let (from, to) = (difference.to_owned(), dir.clone());
        let failed = |source| GraftError::Io { path: dir.clone(), source };
        xattr::set(dir, BROKEN, b"y").map_err(failed)?;
        let done = spawn_blocking(move || graft(&from, &to, BEGIN)).await;
        done.unwrap_or_else(|error| Err(failed(io::Error::other(error))))?;
        xattr::remove(dir, BROKEN).map_err(failed)?;
        Ok(mounts.to_vec())
    }

    /// Makes it what it was before: `image` is the root of its image, the topmost layer first.
    ///
    /// # Errors
    /// Where something cannot be removed, or not be copied.
    pub async fn take_back(&self, image: &[PathBuf]) -> io::Result<()> {
        let (dir, [image]) = (match self {
            Self::Layered(overlay) => {
                let overlay = overlay.clone();
                return spawn_blocking(move || overlay.restore()).await?;
            }
            Self::Copied(dir) => (dir, image),
        }) else {
            return Err(io::Error::other("its image's root is not in one directory"));
        };
        xattr::set(dir, BROKEN, b"y")?;
        let emptied = dir.clone();
        spawn_blocking(move || files::empty(&emptied)).await??;
        let args: [&OsStr; 4] = ["-a".as_ref(), "--".as_ref(), image.as_ref(), dir.as_ref()];
        let mut copy = Command::new("cp");
        copy.arg("--reflink=auto").arg("--no-target-directory").args(args).kill_on_drop(true);
        let late = |_| io::Error::other(format!("copying {image:?} took more than {} s", TAKE_BACK.as_secs()));
        let copied = timeout(TAKE_BACK, copy.output()).await.map_err(late)??;
        match copied.status.success() {
            true => xattr::remove(dir, BROKEN),
            false => Err(io::Error::other(String::from_utf8_lossy(&copied.stderr).trim().to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_directory_of_its_own_is_one_too() {
        let bind = |source: &str, options: &[&str]| RootMount {
            fstype: "bind".into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
        };
        let copied = CloneRoot::of(&[bind("/native/3", &["rw", "rbind"])]);
        assert_eq!(copied, Some(CloneRoot::Copied("/native/3".into())));
        let none: [&[RootMount]; 5] = [
            &[],
            &[bind("/home/root", &["rbind"])],
            &[bind("/native/3", &["ro", "rbind"])],
            &[bind("native/3", &["rw", "rbind"])],
            &[RootMount { fstype: "erofs".into(), ..bind("/native/3", &["rw"]) }],
        ];
        for mounts in none {
            assert_eq!(CloneRoot::of(mounts), None, "{mounts:?}");
        }
    }

    #[tokio::test]
    async fn a_copy_is_used_once_and_is_a_copy_again_after_a_failure() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may set an attribute of the host's own");
        }
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        for path in ["image/etc", "difference/etc", "root/etc"] {
            fs::create_dir_all(place(path)).unwrap();
        }
        fs::write(place("image/etc/a"), "1").unwrap();
        fs::write(place("root/etc/a"), "1").unwrap();
        fs::write(place("difference/etc/a"), "2").unwrap();
        let root = CloneRoot::Copied(place("root"));
        assert!(root.claim().unwrap());
        assert!(!root.claim().unwrap());
        root.begin(&[], &place("difference")).await.unwrap();
        root.mark().unwrap();
        assert_eq!(fs::read_to_string(place("root/etc/a")).unwrap(), "2");
        assert!(!root.claim().unwrap(), "the mark stays");
        fs::write(place("root/more"), "").unwrap();
        root.take_back(&[place("image")]).await.unwrap();
        assert_eq!(fs::read_to_string(place("root/etc/a")).unwrap(), "1");
        assert!(!place("root/more").exists() && !root.claim().unwrap());
        assert!(root.take_back(&[place("image"), place("root")]).await.is_err());
        // Half of a difference is none: nobody may start in it.
        root.begin(&[], &place("none")).await.unwrap_err();
        let error = root.mark().unwrap_err().to_string();
        assert!(error.contains("did not come to its end: remove the container"), "{error}");
    }
}
