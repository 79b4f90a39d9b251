//! What the kernel tells of processes (proc(5)).

use std::{fs, path::PathBuf};

/// The directories of a process's threads.
pub(crate) fn threads(pid: u32) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|thread| thread.path())
}

/// Of all threads: each has its own.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let lists = threads(pid).filter_map(|thread| fs::read_to_string(thread.join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// A process of that name, which has 15 bytes at most.
pub(crate) fn named(name: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name))
}

#[cfg(test)]
mod tests {
    use super::named;

    #[test]
    fn a_process_is_found_by_its_name() {
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(named(own.trim_end()).is_some());
        assert_eq!(named("no such process"), None);
    }
}
