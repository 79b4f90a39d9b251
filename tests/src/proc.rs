//! Processes that belong to a test run: they carry its directory in their environment or arguments.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use nix::{sys::signal, unistd::Pid};

/// The variable through which every descendant of a test's containerd is known.
pub(crate) const MARK: &str = "CHSNAP_TEST_RUN";

/// This process's `PATH` with the run's directory as its last, by which a VMM is known: it has no other variables.
pub(crate) fn path(run: &Path) -> String {
    format!("{}:{}", std::env::var("PATH").unwrap_or_default(), run.display())
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its arguments with blanks between.
    pub args: String,
}

impl Process {
    /// Whether its program's name contains `name`.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        let program = self.args.split(' ').next().unwrap_or_default();
        Path::new(program).file_name().is_some_and(|f| f.to_string_lossy().contains(name))
    }
}

/// Every process that is marked with `run`, zombies excepted.
#[must_use]
pub fn marked(run: &Path) -> Vec<Process> {
    let mark = format!("{MARK}={}", run.display());
    let dir = run.display().to_string();
    let mut found: Vec<Process> = pids()
        .into_iter()
        .filter(|pid| *pid != std::process::id() as i32)
        .filter_map(|pid| {
            let args = args(pid)?;
            let environ = text(Path::new(&format!("/proc/{pid}/environ"))).unwrap_or_default();
            // A VMM has no other variables, and Cloud Hypervisor is given descriptors only.
            let in_path = |v: &str| v.strip_prefix("PATH=").is_some_and(|dirs| dirs.split(':').any(|d| d == dir));
            let ours = environ.split('\0').any(|v| v == mark || in_path(v)) || args.contains(&dir);
            (ours && !args.is_empty()).then_some(Process { pid, args })
        })
        .collect();
    found.sort_by_key(|p| p.pid);
    found
}

/// Who else has `file` (as a link in `/proc/<pid>/fd` names it) open.
pub(crate) fn holders(file: &Path) -> Vec<String> {
    let me = std::process::id() as i32;
    let holds = |pid: &i32| {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        open.into_iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|link| link == file))
    };
    let told = |pid| format!("process {pid}: {}", args(pid).unwrap_or_default());
    pids().into_iter().filter(|pid| *pid != me).filter(holds).map(told).collect()
}

/// Sends a signal.
pub fn kill(pid: i32, signal: signal::Signal) -> Result<()> {
    signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to process {pid}"))
}

/// What there is to say of a process's resident memory: anonymous, of files, shared.
#[must_use]
pub fn rss_parts(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let lines: Vec<&str> = status.lines().filter(|line| line.starts_with("Rss")).collect();
    lines.join(", ").replace('\t', " ")
}

/// Resident memory.
pub fn rss_kib(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).with_context(|| line.to_owned())
}

pub(crate) fn pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect()
}

/// With blanks between; empty for a zombie.
fn args(pid: i32) -> Option<String> {
    let args = text(Path::new(&format!("/proc/{pid}/cmdline")))?.replace('\0', " ");
    Some(args.trim().into())
}

fn text(path: &Path) -> Option<String> {
    fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}
