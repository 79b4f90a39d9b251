//! Files of the share that a process still has open and that were removed. virtiofsd finds a saved machine's files by their paths, so
//! it could not open such a one for a restored machine; here it can still be told whose it is.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};

/// What /proc appends to the path of such a file.
const MARK: &[u8] = b" (deleted)";
/// Of a process, where /proc has links to its files: open ones, mapped ones, and its directory.
const LINKS: [&str; 2] = ["fd", "map_files"];

/// A file that is gone, and who has it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    pub pid: u32,
    pub program: String,
    pub path: PathBuf,
}

/// One of any process in this guest, if there is one.
pub fn any() -> Option<Removed> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find_map(|pid| of(pid, |file| statfs(file).is_ok_and(|meta| meta.filesystem_type() == FUSE_SUPER_MAGIC)))
}

/// One of this process that is on the share.
fn of(pid: u32, is_shared: impl Fn(&Path) -> bool) -> Option<Removed> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let listed = LINKS.iter().flat_map(|name| fs::read_dir(process.join(name)).into_iter().flatten().flatten());
    let mut links = listed.map(|entry| entry.path()).chain([process.join("cwd")]);
    let path = links.find_map(|link| {
        let target = fs::read_link(&link).ok()?;
        let path = target.as_os_str().as_bytes().strip_suffix(MARK)?;
        // A name may end so, too.
        let removed = fs::metadata(&link).is_ok_and(|meta| meta.nlink() == 0 || meta.is_dir());
        (removed && is_shared(&link)).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
    })?;
    let program = fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
    Some(Removed { pid, program, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_removed_is_told_by_its_path() {
        let me = std::process::id();
        let dir = tempfile::tempdir().unwrap();
        let ours = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(dir.path()));
        let named = fs::File::create(dir.path().join("still here (deleted)")).unwrap();
        let gone = dir.path().join("gone");
        let file = fs::File::create(&gone).unwrap();
        assert_eq!(of(me, ours), None);
        fs::remove_file(&gone).unwrap();
        let found = of(me, ours).unwrap();
        assert_eq!((found.pid, found.path), (me, gone));
        assert!(!found.program.is_empty());
        assert_eq!(of(me, |_| false), None, "what is not on the share is saved with the machine");
        drop((named, file));
        assert_eq!(of(me, ours), None);
    }
}
