//! A container's cgroup (v2).

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use ttrpc::Code;

use super::{
    oom::{self, EVENTS, OomKills},
    spec::Resources,
    stats::field,
};
use crate::error::{Coded, code_of};

/// Below the root of the hierarchy; holds one directory a container.
const PARENT: &str = "chsnap";
/// What the agent wants of the kernel's controllers.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// Seconds in which processes must be gone after SIGKILL. One that hangs in the kernel is not.
pub(super) const PATIENCE: u64 = 10;
/// A container may make cgroups of its own; how many of them are looked into.
const MAX_CGROUPS: usize = 4096;

/// Why a cgroup is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot make the cgroup {0}")]
    Make(PathBuf, #[source] io::Error),
    #[error("cannot set {file} of the container's cgroup to {value:?}")]
    Limit {
        file: String,
        value: String,
        #[source]
        source: io::Error,
    },
    #[error("the resource {0:?} is not the name of a cgroup file")]
    BadName(String),
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("processes of the container are still alive {0} s after SIGKILL")]
    Alive(u64),
    #[error("processes of the container do not stand still {0} s after they were told to")]
    Restless(u64),
    #[error("cannot remove the cgroup {0}")]
    Remove(PathBuf, #[source] io::Error),
}

impl Coded for CgroupError {
    fn code(&self) -> Code {
        match self {
            Self::Limit { source, .. } => code_of(source),
            Self::BadName(_) => Code::INVALID_ARGUMENT,
            // Not DEADLINE_EXCEEDED: that would say that the agent did not answer.
            Self::Alive(_) | Self::Restless(_) => Code::FAILED_PRECONDITION,
            Self::Make(..) | Self::Read(..) | Self::Remove(..) => Code::INTERNAL,
        }
    }
}

/// One container's.
#[derive(Debug)]
pub struct Cgroup {
    pub(super) path: PathBuf,
    pub(super) fd: OwnedFd,
}

/// Enables in the children of `path` what the kernel has of [`CONTROLLERS`].
fn enable_controllers(path: &Path) -> io::Result<()> {
    let available = fs::read_to_string(path.join("cgroup.controllers"))?;
    let enabled = fs::read_to_string(path.join("cgroup.subtree_control"))?;
    let wanted = CONTROLLERS.into_iter().filter(|c| {
        let listed = |list: &str| list.split_whitespace().any(|name| name == *c);
        listed(&available) && !listed(&enabled)
    });
    for controller in wanted {
        fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"))?;
    }
    Ok(())
}

impl Cgroup {
    /// Makes the container's cgroup below `root` and sets its limits.
    ///
    /// # Errors
    /// If the kernel refuses, or lacks the controller of a limit.
    pub fn create(root: &Path, id: &str, resources: &Resources) -> Result<Self, CgroupError> {
        let parent = root.join(PARENT);
        let path = parent.join(id);
        let make = || -> io::Result<OwnedFd> {
            enable_controllers(root)?;
            fs::create_dir_all(&parent)?;
            enable_controllers(&parent)?;
            fs::create_dir(&path)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            Ok(open(&path, flags, Mode::empty())?)
        };
        let fd = make().map_err(|e| CgroupError::Make(path.clone(), e))?;
        let cgroup = Self { path, fd };
        if let Err(error) = cgroup.limit(resources) {
            // Nobody was in it yet.
            let _ = fs::remove_dir(&cgroup.path);
            return Err(error);
        }
        Ok(cgroup)
    }

    /// Sets its limits.
    ///
    /// # Errors
    /// If the kernel refuses, or lacks the controller of one.
    pub fn limit(&self, resources: &Resources) -> Result<(), CgroupError> {
        for (file, value) in limits(resources)? {
            let result = fs::write(self.path.join(&file), &value);
            match result {
                // A kernel without swap has nothing to limit.
                Err(e) if file == "memory.swap.max" && e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(CgroupError::Limit { file, value, source }),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.path.join(EVENTS)).map_or(0, |text| oom::count(&text))
    }

    /// To hear of more.
    ///
    /// # Errors
    /// If the kernel does not count them.
    pub fn watch_oom_kills(&self) -> io::Result<OomKills> {
        OomKills::open(&self.path.join(EVENTS))
    }

    /// The numbers of all processes, in the agent's PID namespace.
    ///
    /// # Errors
    /// If the cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let mut pids = Vec::new();
        for directory in self.tree() {
            let path = directory.join("cgroup.procs");
            match fs::read_to_string(&path) {
                // 0: a process the agent's PID namespace does not see.
                Ok(text) => pids.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|pid| *pid != 0)),
                // The container took it away meanwhile, or made it a threaded one, whose parent lists the same.
                Err(_) if directory != self.path => {}
                Err(e) => return Err(CgroupError::Read(path, e)),
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// This cgroup and those the container made below it, parents first.
    fn tree(&self) -> Vec<PathBuf> {
        let mut found = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = found.get(next).cloned() {
            next += 1;
            let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
            let below = entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path());
            found.extend(below.take(MAX_CGROUPS.saturating_sub(next)));
            found.truncate(MAX_CGROUPS);
        }
        found
    }

    /// Kills everything in it.
    ///
    /// # Errors
    /// If the cgroup cannot be written.
    pub fn kill(&self) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.kill");
        fs::write(&path, "1").map_err(|e| CgroupError::Read(path, e))
    }

    /// Stops everything in it, and waits until it stands still. A process may well be in a call to the kernel that has to
    /// end first.
    ///
    /// # Errors
    /// If something goes on.
    pub async fn freeze(&self) -> Result<(), CgroupError> {
        const STEP: Duration = Duration::from_millis(1);
        self.set_frozen(true)?;
        let mut waited = Duration::ZERO;
        while !fs::read_to_string(self.path.join("cgroup.events")).is_ok_and(|text| field(&text, "frozen") != 0) {
            if waited.as_secs() >= PATIENCE {
                return Err(CgroupError::Restless(PATIENCE));
            }
            tokio::time::sleep(STEP).await;
            waited += STEP;
        }
        Ok(())
    }

    /// Lets everything in it go on.
    ///
    /// # Errors
    /// If the cgroup cannot be written.
    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.set_frozen(false)
    }

    fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        let (file, value) = ("cgroup.freeze", if frozen { "1" } else { "0" });
        fs::write(self.path.join(file), value).map_err(|source| CgroupError::Limit {
            file: file.into(),
            value: value.into(),
            source,
        })
    }

    /// The cgroup that a process of the container is in, this one or one below.
    ///
    /// # Errors
    /// If the process is somewhere else, or gone.
    pub fn of_process(&self, pid: i32) -> Result<OwnedFd, CgroupError> {
        let table = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let open_it = || -> io::Result<OwnedFd> {
            let text = fs::read_to_string(&table)?;
            let id = self.path.file_name().unwrap_or_default().to_string_lossy();
            let mark = format!("/{PARENT}/{id}");
            let path = text.lines().find_map(|line| line.strip_prefix("0::"));
            let below = path.and_then(|path| path.split_once(&mark)).map(|(_, below)| below.trim_start_matches('/'));
            let below = below.ok_or(io::ErrorKind::NotFound)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            Ok(open(&self.path.join(below), flags, Mode::empty())?)
        };
        open_it().map_err(|e| CgroupError::Read(table.clone(), e))
    }

    fn is_populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events")).is_ok_and(|text| field(&text, "populated") != 0)
    }

    /// Kills what is left, waits for its end and removes the cgroup.
    ///
    /// # Errors
    /// If something survives.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        const STEP: Duration = Duration::from_millis(2);
        self.kill()?;
        let mut waited = Duration::ZERO;
        while self.is_populated() {
            if waited.as_secs() >= PATIENCE {
                return Err(CgroupError::Alive(PATIENCE));
            }
            tokio::time::sleep(STEP).await;
            waited += STEP;
        }
        for directory in self.tree().into_iter().rev() {
            match fs::remove_dir(&directory) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(CgroupError::Remove(directory, e)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The files of the limits with their values, in the order in which they are written.
///
/// CPU sets, block devices and the device list are the host's business: they number its hardware, not the guest's.
fn limits(resources: &Resources) -> Result<Vec<(String, String)>, CgroupError> {
    let limit = |value: i64| if value <= 0 { "max".to_owned() } else { value.to_string() };
    let mut files = Vec::new();
    let mut set = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(bytes) = resources.memory.limit {
        set("memory.max", limit(bytes));
        set("memory.swap.max", "0".to_owned());
    }
    if let Some(bytes) = resources.memory.reservation.filter(|bytes| *bytes > 0) {
        set("memory.low", bytes.to_string());
    }
    if let Some(count) = resources.pids.limit.filter(|count| *count != 0) {
        set("pids.max", limit(count));
    }
    // The scale of v1's shares, 2 to 262144, onto that of v2's weights, 1 to 10000.
    if let Some(shares) = resources.cpu.shares.filter(|shares| *shares != 0) {
        set("cpu.weight", (1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142).to_string());
    }
    let period = resources.cpu.period.filter(|period| *period != 0);
    if resources.cpu.quota.is_some() || period.is_some() {
        let quota = limit(resources.cpu.quota.unwrap_or(-1));
        set("cpu.max", format!("{quota} {}", period.unwrap_or(100_000)));
    }
    if let Some(burst) = resources.cpu.burst {
        set("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = resources.cpu.idle {
        set("cpu.idle", idle.to_string());
    }
    for (file, value) in &resources.unified {
        if file.contains('/') || !file.contains('.') || file.starts_with('.') {
            return Err(CgroupError::BadName(file.clone()));
        }
        set(file, value.clone());
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_translated() {
        let json = r#"{"memory": {"limit": 1048576, "swap": 2097152}, "pids": {"limit": 7},
            "cpu": {"shares": 1024, "quota": 50000, "period": 100000, "burst": 5, "idle": 0}, "unified": {"memory.high": "4096"}}"#;
        let files = limits(&serde_json::from_str(json).unwrap()).unwrap();
        let expected = [
            ("memory.max", "1048576"),
            ("memory.swap.max", "0"),
            ("pids.max", "7"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpu.max.burst", "5"),
            ("cpu.idle", "0"),
            ("memory.high", "4096"),
        ];
        let files: Vec<_> = files.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
        assert_eq!(files, expected);
    }

    #[test]
    fn no_limit_is_max() {
        let json = r#"{"memory": {"limit": -1}, "pids": {"limit": -1}, "cpu": {"quota": -1}}"#;
        let files = limits(&serde_json::from_str(json).unwrap()).unwrap();
        assert!(files.contains(&("memory.max".into(), "max".into())));
        assert!(files.contains(&("pids.max".into(), "max".into())));
        assert!(files.contains(&("cpu.max".into(), "max 100000".into())));
    }

    #[test]
    fn a_path_is_no_resource() {
        let json = r#"{"unified": {"../memory.max": "1"}}"#;
        assert!(limits(&serde_json::from_str(json).unwrap()).is_err());
    }
}
