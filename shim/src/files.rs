//! Files that several processes read and write: how to know one again, and how to replace one in whole.

use std::{
    fs::{self, File},
    io,
    io::Write,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag},
    unistd::{Whence, lseek},
};
use serde::{Deserialize, Serialize};

use crate::proc;

/// What changes when a file is replaced or written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// Of the file that `path` leads to.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        Ok(Self::from(&fs::metadata(path)?))
    }

    /// Bytes from its beginning to its end.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

impl From<&fs::Metadata> for Identity {
    fn from(meta: &fs::Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// What the names of files that are not yet in place begin with. Their maker comes next, and a hyphen.
const UNFINISHED: &str = ".tmp-";
/// One that does not tell its maker is of a process that was killed, if nobody has finished it by then.
const UNFINISHED_FOR: Duration = Duration::from_secs(600);

/// Whether a file of that name is yet to be put in its place.
pub(crate) fn is_unfinished(name: &str) -> bool {
    name.starts_with(UNFINISHED)
}

/// Removes a file that is not in its place, and that nobody is left to put there.
pub(crate) fn remove_if_left(path: &Path) -> io::Result<()> {
    let removed = fs::symlink_metadata(path).and_then(|meta| {
        let is_left = match maker(path) {
            Some(maker) => !maker.lives(),
            None => meta.modified()?.elapsed().is_ok_and(|since| since >= UNFINISHED_FOR),
        };
        if is_left && meta.is_file() { fs::remove_file(path) } else { Ok(()) }
    });
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes from a directory the files that processes did not put in their places before they were killed.
pub(crate) fn remove_left(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if is_unfinished(&entry.file_name().to_string_lossy())
            && let Err(error) = remove_if_left(&entry.path())
        {
            log::debug!("cannot remove {:?}: {error}", entry.path());
        }
    }
}

/// Who makes that file, as its name says.
fn maker(path: &Path) -> Option<proc::Identity> {
    path.file_name()?.to_str()?.strip_prefix(UNFINISHED)?.split_once('-')?.0.parse().ok()
}

/// Of this process's files.
fn prefix() -> String {
    let own = proc::Identity::own();
    // Where /proc tells nothing, others would take it for one that has ended.
    if own.lives() { format!("{UNFINISHED}{own}-") } else { UNFINISHED.into() }
}

/// Puts a file with these contents, for its owner alone, in the place of what has that name. A reader sees the old one
/// or the new one, on the disk too, and whoever is killed meanwhile leaves the old one, and his own for the next.
pub(crate) fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(&prefix()).tempfile_in(dir)?;
    file.write_all(contents)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    remove_left(dir);
    Ok(())
}

/// Has the directory to itself among those who ask for that, until the lock is dropped.
pub(crate) fn lock_dir(dir: &Path) -> io::Result<Flock<File>> {
    Flock::lock(File::open(dir)?, FlockArg::LockExclusive).map_err(|(_, error)| error.into())
}

/// The first place from `at` on that is in no hole; `None` where there is none before `length`, the file's.
pub(crate) fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<u64>> {
    // A file system that does not tell holes has none.
    Ok(Some(seek(file, at, length, Whence::SeekData)?.unwrap_or(at)).filter(|found| *found < length))
}

/// The first place from `at` on that is in a hole; the end of the file, where there is none.
pub(crate) fn next_hole(file: &File, at: u64, length: u64) -> io::Result<u64> {
    Ok(seek(file, at, length, Whence::SeekHole)?.unwrap_or(length).min(length))
}

fn seek(file: &File, at: u64, length: u64, whence: Whence) -> io::Result<Option<u64>> {
    if at >= length {
        return Ok(Some(length));
    }
    match lseek(file, i64::try_from(at).map_err(io::Error::other)?, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(Some(length)),
        Err(Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Bytes on the disk of everything in a directory.
pub(crate) fn disk_usage(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => disk_usage(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    bytes.sum()
}

/// Removes a directory and everything in it, and follows no link.
pub(crate) fn remove_tree(dir: &Path) -> io::Result<()> {
    empty(dir)?;
    fs::remove_dir(dir)
}

/// Removes everything in a directory, and follows no link. However deep its directories are: a guest's may be deeper than
/// there are descriptors, or bytes in a path. What is in one of them is moved up beside it before it is removed.
pub(crate) fn empty(dir: &Path) -> io::Result<()> {
    empty_open(&opened(dir)?.0)
}

/// The same of a directory that is open, whatever has its name by now.
pub(crate) fn empty_open(dir: &File) -> io::Result<()> {
    let top = path_of(dir);
    let mut moved = 0_u64;
    loop {
        let mut found = false;
        for entry in fs::read_dir(&top)? {
            let entry = entry?;
            found = true;
            if !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
                continue;
            }
            let (_open, below) = opened(&entry.path())?;
            for entry in fs::read_dir(&below)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    move_up(&entry.path(), &top, &mut moved)?
                } else {
                    fs::remove_file(entry.path())?
                }
            }
            fs::remove_dir(entry.path())?;
        }
        if !found {
            return Ok(());
        }
    }
}

/// Under a name that nothing else has there. One that is empty may be in the way, and goes.
fn move_up(dir: &Path, top: &Path, moved: &mut u64) -> io::Result<()> {
    loop {
        *moved += 1;
        match fs::rename(dir, top.join(format!("{moved}"))) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory
                ) => {}
            outcome => return outcome,
        }
    }
}

/// The directory, if it is one, and a path of it that stays the same one and short.
fn opened(dir: &Path) -> io::Result<(File, PathBuf)> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let open = fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(dir)?;
    let path = path_of(&open);
    Ok((open, path))
}

fn path_of(open: &File) -> PathBuf {
    format!("/proc/self/fd/{}", open.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_in_whole_and_known_to_be_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, b"one").unwrap();
        let (one, open) = (Identity::of(&path).unwrap(), fs::File::open(&path).unwrap());
        assert_eq!(Identity::of(&path).unwrap(), one);
        replace(&path, b"two").unwrap();
        assert_eq!(io::read_to_string(open).unwrap(), "one");
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_ne!(Identity::of(&path).unwrap(), one);
        assert!(replace(&dir.path().join("none/file"), b"").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_killed_processes_did_not_put_in_place_goes_with_the_next_that_is() {
        let dir = tempfile::tempdir().unwrap();
        let own = proc::Identity::own();
        let dead = proc::Identity { start: own.start + 1, ..own };
        let names = [format!(".tmp-{dead}-aB3"), format!(".tmp-{own}-aB3"), ".tmp-aB3".into(), format!("{dead}-aB3")];
        let paths = names.map(|name| dir.path().join(name));
        let there = || paths.each_ref().map(|path| path.exists());
        paths.iter().for_each(|path| fs::write(path, "half").unwrap());
        replace(&dir.path().join("file"), b"").unwrap();
        assert_eq!(there(), [false, true, true, true]);
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        paths[1..].iter().for_each(|path| File::open(path).unwrap().set_modified(hour_ago).unwrap());
        replace(&dir.path().join("file"), b"").unwrap();
        assert_eq!(there(), [false, true, false, true], "a maker that lives may be slow");
        // And its own name tells of it.
        assert_eq!(maker(Path::new(&format!("/x/{}aB3", prefix()))), Some(own));
    }

    /// More than a process may have open by default, and than a path may have bytes.
    #[test]
    fn a_tree_of_any_depth_is_removed_and_no_link_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (kept, tree) = (dir.path().join("kept"), dir.path().join("tree"));
        fs::create_dir(&kept).unwrap();
        fs::write(kept.join("file"), "").unwrap();
        fs::create_dir(&tree).unwrap();
        // From the inside to the outside, since a path to the innermost would be too long.
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        for number in 0..3000 {
            fs::write(inner.join("file"), "").unwrap();
            // A name that is given to what is moved up.
            let next = dir.path().join("next");
            fs::create_dir(&next).unwrap();
            fs::rename(&inner, next.join(format!("{}", number % 3))).unwrap();
            fs::rename(&next, &inner).unwrap();
        }
        fs::rename(&inner, tree.join("2")).unwrap();
        fs::create_dir_all(tree.join("1/full")).unwrap();
        fs::write(tree.join("3"), "").unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("1/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists() && kept.join("file").exists());
        std::os::unix::fs::symlink(&kept, &tree).unwrap();
        assert!(remove_tree(&tree).is_err() && kept.join("file").exists());
    }
}
