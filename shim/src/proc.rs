//! What the kernel tells of processes (proc(5)).

use std::{fmt, fs, path::PathBuf, str::FromStr};

/// A process, told apart from a later one with its number, and written `<pid>.<clock ticks from boot to its start>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub pid: u32,
    pub start: u64,
}

impl Identity {
    /// This process.
    pub fn own() -> Self {
        let pid = std::process::id();
        Self { pid, start: start_ticks(pid).unwrap_or_default() }
    }

    /// Whether it still runs.
    pub fn lives(self) -> bool {
        start_ticks(self.pid) == Some(self.start)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pid, self.start)
    }
}

impl FromStr for Identity {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (pid, start) = text.split_once('.').ok_or(())?;
        Ok(Self { pid: pid.parse().map_err(drop)?, start: start.parse().map_err(drop)? })
    }
}

/// Field 22 of `/proc/<pid>/stat`; none where there is no such process, or only its zombie.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command's name, which may hold blanks and brackets; the third comes after the last ')'.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The directories of a process's threads.
pub(crate) fn threads(pid: u32) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten().map(|thread| thread.path())
}

/// Of all threads: each has its own.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let lists = threads(pid).filter_map(|thread| fs::read_to_string(thread.join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Whether a process has this among its arguments, or in one.
pub(crate) fn is_argument(text: &str) -> bool {
    let has = |line: Vec<u8>| line.windows(text.len()).any(|part| part == text.as_bytes());
    pids().any(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(has))
}

fn pids() -> impl Iterator<Item = u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process of that name, which has 15 bytes at most.
pub(crate) fn named(name: &str) -> Option<u32> {
    pids().find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_by_its_name() {
        let own = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert!(named(own.trim_end()).is_some());
        assert_eq!(named("no such process"), None);
    }

    #[test]
    fn a_process_is_not_another_one_with_its_number() {
        let own = Identity::own();
        assert!(own.lives() && own.to_string().parse() == Ok(own));
        assert!(!Identity { start: own.start + 1, ..own }.lives());
        // Neither is one that has ended and waits for its parent.
        let mut child = Command::new("true").spawn().unwrap();
        let ended = Identity { pid: child.id(), start: start_ticks(child.id()).unwrap_or(1) };
        while ended.lives() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        for none in ["", "1", "1.", ".1", "x.1", "1.1.1"] {
            assert!(none.parse::<Identity>().is_err(), "{none}");
        }
    }

    #[test]
    fn a_word_is_found_in_the_arguments_of_any_process() {
        let word = format!("chsnap-test-{}", Identity::own());
        assert!(!is_argument(&word));
        let mut child =
            Command::new("sh").args(["-c", "read line", &word]).stdin(std::process::Stdio::piped()).spawn().unwrap();
        // exec(2) has succeeded a moment before a process has its arguments.
        let found = (0..1000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            is_argument(&word)
        });
        assert!(found);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
