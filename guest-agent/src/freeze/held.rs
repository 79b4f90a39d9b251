//! Files of the share that processes hold: open, mapped, or as their directory. virtiofsd finds a saved machine's files by
//! their paths. So it could not open one that was removed for a restored machine; and where a pod has files of its own at
//! such a path, the process would go on with those, in the middle of what it took for the image's.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};

/// What /proc appends to the path of a file that was removed.
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

/// The paths of all files that any process in this guest has open or mapped, as in its container; or one that was removed.
pub fn open() -> Result<Vec<PathBuf>, Removed> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_shared = |file: &Path| statfs(file).is_ok_and(|meta| meta.filesystem_type() == FUSE_SUPER_MAGIC);
    let mut found = BTreeMap::new();
    pids.try_for_each(|pid| add(pid, is_shared, &mut found))?;
    Ok(found.into_iter().filter_map(|(path, is_held)| is_held.then_some(path)).collect())
}

/// Adds those of this process, each looked at once.
fn add(pid: u32, is_shared: impl Fn(&Path) -> bool, found: &mut BTreeMap<PathBuf, bool>) -> Result<(), Removed> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let listed = LINKS.iter().flat_map(|name| fs::read_dir(process.join(name)).into_iter().flatten().flatten());
    for link in listed.map(|entry| entry.path()).chain([process.join("cwd")]) {
        let Ok(target) = fs::read_link(&link) else { continue };
        if !target.is_absolute() || found.contains_key(&target) {
            continue;
        }
        let meta = fs::metadata(&link);
        let is_dir = meta.as_ref().is_ok_and(fs::Metadata::is_dir);
        let shared = meta.is_ok() && is_shared(&link);
        // A name may end so, too.
        if let Some(path) = target.as_os_str().as_bytes().strip_suffix(MARK)
            && shared
            && (is_dir || meta.is_ok_and(|meta| meta.nlink() == 0))
        {
            let program = fs::read_to_string(process.join("comm")).unwrap_or_default().trim().to_owned();
            return Err(Removed { pid, program, path: OsStr::from_bytes(path).into() });
        }
        // Of a directory nothing is remembered but where it is.
        found.insert(target, shared && !is_dir);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_held_are_told_by_their_paths_and_removed_ones_refused() {
        let me = std::process::id();
        let dir = tempfile::tempdir().unwrap();
        let ours = |link: &Path| fs::read_link(link).is_ok_and(|target| target.starts_with(dir.path()));
        let held = |is_shared: &dyn Fn(&Path) -> bool| {
            let mut found = BTreeMap::new();
            add(me, is_shared, &mut found)?;
            Ok::<_, Removed>(
                found.into_iter().filter(|(_, is_held)| *is_held).map(|(path, _)| path).collect::<Vec<_>>(),
            )
        };
        let named = dir.path().join("still here (deleted)");
        let file = fs::File::create(&named).unwrap();
        let directory = fs::File::open(dir.path()).unwrap();
        assert_eq!(held(&ours).unwrap(), std::slice::from_ref(&named), "a file, and no directory");
        assert!(held(&|_| true).unwrap().len() > 1, "the program itself, too");
        let gone = dir.path().join("gone");
        let other = fs::File::create(&gone).unwrap();
        assert_eq!(held(&ours).unwrap(), [gone.clone(), named.clone()]);
        fs::remove_file(&gone).unwrap();
        let found = held(&ours).unwrap_err();
        assert_eq!((found.pid, found.path), (me, gone));
        assert!(!found.program.is_empty());
        assert_eq!(
            held(&|_| false).unwrap(),
            Vec::<PathBuf>::new(),
            "what is not on the share is saved with the machine"
        );
        drop((file, directory, other));
        assert_eq!(held(&ours).unwrap(), Vec::<PathBuf>::new());
    }
}
