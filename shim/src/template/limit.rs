//! What a template's process may write to its root file system while it initialises. That is looked at from time to time: once
//! it is ready, it may have filled a disk on which others are, too.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use thiserror::Error;
use tokio::{task::spawn_blocking, time::sleep};

/// Between two looks.
const EVERY: Duration = Duration::from_millis(500);
/// Each is copied, linked or at least looked at whenever a pod starts from it.
const MAX_ENTRIES: u64 = 1 << 18;
/// A directory in the other: what is written into a root holds each of them open.
const MAX_DEPTH: usize = 512;

/// The process has written too much.
#[derive(Debug, Error)]
pub enum ExcessError {
    /// Bytes on the disk.
    #[error("the process wrote {bytes} bytes to its root file system, and [snapshot] root_limit is {limit}")]
    Bytes {
        /// Those that were there when somebody looked.
        bytes: u64,
        /// What may be.
        limit: u64,
    },
    /// Files and directories.
    #[error("the process made more than {MAX_ENTRIES} files and directories in its root file system")]
    Entries,
    /// Directories in directories.
    #[error("the process nested more than {MAX_DEPTH} directories in its root file system")]
    Depth,
    /// That cannot be told.
    #[error("cannot look at {path:?}, which the process wrote")]
    Look {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Does `work`, for as long as there is no more in `root` than `limit` bytes, and not too many things.
pub async fn within<T, E: From<ExcessError>>(
    root: &Path,
    limit: u64,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let exceeded = async {
        loop {
            sleep(EVERY).await;
            if let Err(error) = look(root, limit).await {
                return error;
            }
        }
    };
    tokio::select! {
        done = work => {
            let done = done?;
            look(root, limit).await?;
            Ok(done)
        }
        error = exceeded => Err(error.into()),
    }
}

async fn look(root: &Path, limit: u64) -> Result<(), ExcessError> {
    let top = root.to_owned();
    let looked = spawn_blocking(move || measure(top, limit)).await;
    looked.unwrap_or_else(|error| Err(ExcessError::Look { path: root.into(), source: io::Error::other(error) }))
}

/// While somebody writes to it: what is gone by then was not much. Holes take no room, and get none in a copy either.
fn measure(top: PathBuf, limit: u64) -> Result<(), ExcessError> {
    let (mut bytes, mut entries, mut linked) = (0, 0, BTreeSet::new());
    let Some(root) = there(&top, File::open(&top))? else { return Ok(()) };
    let mut below = vec![(PathBuf::from("."), 0)];
    while let Some((dir, depth)) = below.pop() {
        if depth > MAX_DEPTH {
            return Err(ExcessError::Depth);
        }
        let Some(open) = there(&dir, inside(&root, &dir))? else { continue };
        let names = fs::read_dir(format!("/proc/self/fd/{}", open.as_raw_fd()));
        let Some(names) = there(&dir, names)? else { continue };
        for entry in names {
            let Some(entry) = there(&dir, entry)? else { continue };
            let path = dir.join(entry.file_name());
            let Some(meta) = there(&path, entry.metadata())? else { continue };
            entries += 1;
            if meta.is_dir() {
                below.push((path, depth + 1));
            } else if meta.nlink() == 1 || linked.insert(meta.ino()) {
                bytes += meta.blocks() * 512;
            }
            if bytes > limit {
                return Err(ExcessError::Bytes { bytes, limit });
            }
            if entries > MAX_ENTRIES {
                return Err(ExcessError::Entries);
            }
        }
    }
    Ok(())
}

/// A directory below `root`, which is somebody's who may put a link in its place at any time.
fn inside(root: &File, dir: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC).resolve(resolve);
    Ok(openat2(root, dir, how)?)
}

fn there<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>, ExcessError> {
    match found {
        Ok(found) => Ok(Some(found)),
        // Gone, or something else by now.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENAMETOOLONG) => Err(ExcessError::Depth),
        Err(source) => Err(ExcessError::Look { path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn a_process_is_stopped_while_it_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        fs::create_dir(path.join("d")).unwrap();
        let writes = async {
            sleep(Duration::from_millis(100)).await;
            fs::write(path.join("d/much"), vec![1; 3 << 20]).unwrap();
            pending::<Result<(), ExcessError>>().await
        };
        let error = within(&path, 2 << 20, writes).await.unwrap_err();
        assert!(matches!(error, ExcessError::Bytes { limit: 0x20_0000, .. }), "{error}");
        assert!(error.to_string().contains("[snapshot] root_limit is 2097152"), "{error}");
        // Between two looks.
        let done = within(&path, 2 << 20, async { Ok::<_, ExcessError>(()) }).await;
        assert!(matches!(done, Err(ExcessError::Bytes { .. })));
        assert_eq!(within(&path, 4 << 20, async { Ok::<_, ExcessError>(7) }).await.unwrap(), 7);
    }

    #[test]
    fn each_file_counts_once_and_a_hole_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), vec![1; 1 << 20]).unwrap();
        (0..5).for_each(|number| fs::hard_link(dir.path().join("a"), dir.path().join(number.to_string())).unwrap());
        File::create(dir.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert!(inside(&root, Path::new("./link")).is_err() && inside(&root, Path::new("./link/etc")).is_err());
        measure(dir.path().into(), 2 << 20).unwrap();
        measure(dir.path().join("none"), 0).unwrap();
        // As deep as a path allows.
        let deep: PathBuf = std::iter::once(dir.path().to_owned()).chain((0..MAX_DEPTH).map(|_| "d".into())).collect();
        fs::create_dir_all(&deep).unwrap();
        measure(dir.path().into(), 2 << 20).unwrap();
        fs::create_dir(deep.join("d")).unwrap();
        assert!(matches!(measure(dir.path().into(), 2 << 20), Err(ExcessError::Depth)));
    }
}
