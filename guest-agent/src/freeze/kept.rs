//! What a container keeps in the guest's own memory: files in a tmpfs of its. They are saved with the machine; where a pod has
//! something of its own mounted over them, the process would not find them again.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use chsnap_protocol::PUBLIC_MOUNT;

/// Of each directory in which there are any, one: a pod's mount over a single file finds that by itself.
///
/// # Errors
/// If the mounts of that process cannot be read.
pub fn kept(pid: i32) -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let mut found = BTreeSet::new();
    for place in memory(&mounts) {
        let top = root.join(place.strip_prefix("/").unwrap_or(&place));
        if let Ok(meta) = fs::symlink_metadata(&top) {
            add(&top, meta.dev(), &mut found);
        }
    }
    Ok(found.iter().filter_map(|path| Some(Path::new("/").join(path.strip_prefix(&root).ok()?))).collect())
}

/// Where file systems in memory are mounted, see proc_pid_mountinfo(5).
fn memory(mountinfo: &str) -> Vec<PathBuf> {
    let places = mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let place = left.split(' ').nth(4).filter(|_| right.starts_with("tmpfs "))?;
        // What is escaped besides is in no path that makes sense.
        Some(PathBuf::from(place.replace("\\040", " ")))
    });
    // The agent's, who keeps it right.
    places.filter(|place| place != Path::new(PUBLIC_MOUNT)).collect()
}

fn add(dir: &Path, device: u64, found: &mut BTreeSet<PathBuf>) {
    let mut has_one = false;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.metadata() else { continue };
        let kind = meta.file_type();
        if meta.dev() == device && kind.is_dir() {
            add(&entry.path(), device, found);
        } else if !has_one && (kind.is_file() && meta.len() > 0 || kind.is_socket() || kind.is_fifo()) {
            has_one = true;
            found.insert(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_in_memory_are_found_by_their_type() {
        let mountinfo = "21 1 0:20 / / rw - virtiofs share rw\n22 21 0:21 / /dev rw,nosuid - tmpfs tmpfs rw,size=1k\n\
                         23 22 0:22 / /dev/a\\040b rw shared:1 - tmpfs shm rw\n24 22 0:23 / /dev/chsnap ro - tmpfs x rw\n";
        assert_eq!(memory(mountinfo), [Path::new("/dev"), Path::new("/dev/a b")]);
    }

    #[test]
    fn one_file_of_each_directory_that_has_any_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a/b", "empty", "marks"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        for name in ["a/one", "a/two", "a/b/three"] {
            fs::write(at(name), "x").unwrap();
        }
        fs::write(at("marks/empty"), "").unwrap();
        std::os::unix::fs::symlink("a", at("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let mut found = BTreeSet::new();
        add(dir.path(), fs::metadata(dir.path()).unwrap().dev(), &mut found);
        let names: Vec<_> = found.iter().map(|path| path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert!(
            names.len() == 3 && names[0] == "a/b/three" && names[1].starts_with("a/") && names[2] == "socket",
            "{names:?}"
        );
        // Another file system is looked at by itself.
        let mut found = BTreeSet::new();
        add(dir.path(), 0, &mut found);
        assert_eq!(found.len(), 1, "{found:?}");
    }
}
