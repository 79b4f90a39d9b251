//! Binds of the OCI specification, made on the host into the container's root.
//!
//! The image is not trusted: a mount point is looked up with openat2(2) `RESOLVE_IN_ROOT`, so that no symbolic link
//! in the image leads a mount out of the root, and everything is done on descriptors of what was found.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat},
    mount::{MsFlags, mount},
    sys::stat::{Mode, SFlag, fstat, mkdirat},
};
use thiserror::Error;

use super::options;
use crate::sys;

/// A file or directory of the host in the container.
#[derive(Debug, Clone)]
pub struct Bind {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub destination: PathBuf,
    /// Options as in mount(8).
    pub options: Vec<String>,
}

/// A bind failed.
#[derive(Debug, Error)]
pub enum BindError {
    /// The source on the host.
    #[error("the source {path:?} on the host cannot be read")]
    Source {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The mount point in the container.
    #[error("the mount point {path:?} in the container cannot be made")]
    Mountpoint {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// mount(2) does not cover the one with the other.
    #[error(
        "{path:?} in the container is {}, but what is to be mounted there is {}: a directory covers a directory, a file a file",
        kind(!.directory), kind(*.directory)
    )]
    Kind {
        /// Where.
        path: PathBuf,
        /// Whether what is to be mounted is one.
        directory: bool,
    },
    /// mount(2) said no.
    #[error("cannot mount {from:?} on {path:?}")]
    Mount {
        /// What.
        from: PathBuf,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: nix::Error,
    },
}

const fn kind(directory: bool) -> &'static str {
    if directory { "a directory" } else { "a file" }
}

impl Bind {
    pub(super) fn mount(&self, root: &Path) -> Result<(), BindError> {
        let meta = std::fs::metadata(&self.source)
            .map_err(|source| BindError::Source { path: self.source.clone(), source })?;
        let target = make_mountpoint(root, &self.destination, meta.is_dir())?;
        let parsed = options::parse(&self.options);
        let failed = |source| BindError::Mount { from: self.source.clone(), path: self.destination.clone(), source };
        let recursive = parsed.flags & MsFlags::MS_REC;
        mount(Some(&self.source), &proc_path(&target), None::<&str>, MsFlags::MS_BIND | recursive, None::<&str>)
            .map_err(failed)?;
        let rest = parsed.flags - MsFlags::MS_BIND - MsFlags::MS_REC;
        if !rest.is_empty() {
            // The descriptor is of what lies below the new mount: look the place up again.
            let target = open_in_root(root, &self.destination, OFlag::O_PATH, Mode::empty()).map_err(failed)?;
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest;
            mount(None::<&str>, &proc_path(&target), None::<&str>, flags, None::<&str>).map_err(failed)?;
        }
        if !parsed.recursive.is_empty() {
            let tree = open_in_root(root, &self.destination, OFlag::O_PATH, Mode::empty()).map_err(failed)?;
            sys::restrict_tree(&tree, parsed.recursive).map_err(failed)?;
        }
        Ok(())
    }
}

/// Closes `root` itself for writing; what is bound below keeps its own flags.
pub(super) fn make_readonly(root: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Mount { from: root.into(), path: root.into(), source };
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, root, None::<&str>, flags, None::<&str>).map_err(failed)
}

/// As many symbolic links as the kernel follows.
const MAX_LINKS: u32 = 40;

/// Where in `root` the path `place` leads, every symbolic link followed as a process inside would see it; what is
/// missing is taken as it is written. Nothing is looked up below `hidden`: the guest mounts something there.
pub(super) fn resolve(root: &Path, place: &Path, hidden: &[PathBuf]) -> Result<PathBuf, BindError> {
    let failed = |source| BindError::Mountpoint { path: place.into(), source };
    let mut rest: Vec<OsString> = names(place);
    let mut done = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            done.pop();
            continue;
        }
        if hidden.iter().any(|h| done.starts_with(h)) {
            done.push(name);
            continue;
        }
        let target = open_in_root(root, &done, OFlag::O_PATH, Mode::empty())
            .and_then(|parent| readlinkat(parent.as_fd(), name.as_os_str()));
        match target {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(failed(Errno::ELOOP));
                }
                if Path::new(&target).is_absolute() {
                    done = PathBuf::from("/");
                }
                rest.extend(names(Path::new(&target)));
            }
            // No link, or not there.
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => done.push(name),
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(done)
}

/// The parts of a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(name.into()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    parts.collect()
}

/// Opens the mount point at `place`, made with its parents where it is missing, as runc does.
pub(super) fn make_mountpoint(root: &Path, place: &Path, directory: bool) -> Result<OwnedFd, BindError> {
    let failed = |source| BindError::Mountpoint { path: place.into(), source };
    match open_in_root(root, place, OFlag::O_PATH, Mode::empty()) {
        Ok(found) => {
            let is = SFlag::from_bits_truncate(fstat(&found).map_err(failed)?.st_mode & SFlag::S_IFMT.bits());
            return match (is == SFlag::S_IFDIR) == directory {
                true => Ok(found),
                false => Err(BindError::Kind { path: place.into(), directory }),
            };
        }
        Err(Errno::ENOENT) => {}
        Err(e) => return Err(failed(e)),
    }
    let names: Vec<&OsStr> = place
        .components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut here = PathBuf::from("/");
    for (i, name) in names.iter().enumerate() {
        let parent = open_in_root(root, &here, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty()).map_err(failed)?;
        here.push(name);
        let last = i + 1 == names.len();
        if last && !directory {
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_NONBLOCK;
            open_in_root(root, &here, flags, Mode::from_bits_truncate(0o644)).map_err(failed)?;
        } else {
            match mkdirat(parent.as_fd(), *name, Mode::from_bits_truncate(0o755)) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }
    open_in_root(root, place, OFlag::O_PATH, Mode::empty()).map_err(failed)
}

fn open_in_root(root: &Path, place: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .mode(mode)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let root = nix::fcntl::open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    openat2(root, place, how)
}

fn proc_path(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_in_the_image_does_not_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        std::fs::create_dir_all(&root).unwrap();
        std::fs::create_dir_all(&outside).unwrap();
        symlink(&outside, root.join("escape")).unwrap();
        symlink("../../../..", root.join("up")).unwrap();
        // The link's target does not exist inside the root, and must not be made outside.
        assert!(make_mountpoint(&root, Path::new("/escape/file"), false).is_err());
        make_mountpoint(&root, Path::new("/up/file"), false).unwrap();
        assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
        assert!(root.join("file").exists(), "`..` stops at the root");
    }

    #[test]
    fn links_are_followed_as_seen_from_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        std::fs::create_dir_all(root.join("var")).unwrap();
        std::fs::create_dir_all(root.join("run")).unwrap();
        std::fs::create_dir_all(root.join("etc")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../run/resolve/stub.conf", root.join("etc/resolv.conf")).unwrap();
        symlink("../../../../etc", root.join("up")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("/etc", root.join("run/link")).unwrap();
        let hidden = [PathBuf::from("/run")];
        for (place, hidden, expected) in [
            ("/var/run/x/y", &hidden[..], "/run/x/y"),
            ("/etc/resolv.conf", &[], "/run/resolve/stub.conf"),
            ("/up/hosts", &[], "/etc/hosts"),
            ("/a/../../b/./c", &[], "/b/c"),
            ("/run/link/x", &[], "/etc/x"),
            // What the image has there is not seen once the guest has mounted something on it.
            ("/run/link/x", &hidden[..], "/run/link/x"),
            ("/", &[], "/"),
        ] {
            assert_eq!(resolve(root, Path::new(place), hidden).unwrap(), Path::new(expected), "{place}");
        }
        assert!(resolve(root, Path::new("/loop/x"), &[]).is_err());
    }

    #[test]
    fn parents_are_made() {
        let root = tempfile::tempdir().unwrap();
        make_mountpoint(root.path(), Path::new("/a/b/c.txt"), false).unwrap();
        assert!(root.path().join("a/b/c.txt").is_file());
        make_mountpoint(root.path(), Path::new("/a/d/e"), true).unwrap();
        assert!(root.path().join("a/d/e").is_dir());
    }

    #[test]
    fn what_is_there_has_to_be_of_the_same_kind() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        symlink("/", root.path().join("up")).unwrap();
        for (place, directory) in [("/file", true), ("/up", false)] {
            make_mountpoint(root.path(), Path::new(place), !directory).unwrap();
            let error = make_mountpoint(root.path(), Path::new(place), directory).unwrap_err();
            assert!(matches!(error, BindError::Kind { .. }), "{error}");
        }
    }
}
