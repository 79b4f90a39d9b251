//! The pod's cgroup on the host, in which VMM and virtiofsd run. v1 (a directory in every hierarchy) and v2 (one).
//!
//! Written to directly, also where the path has systemd's form: the directory is then the one systemd would have
//! made for the scope, so that the kubelet's accounting finds it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use thiserror::Error;

/// A cgroup could not be made.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A directory of it.
    #[error("cannot create the cgroup {path:?}")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path in the OCI specification.
    #[error("linux.cgroupsPath {path:?} is neither an absolute path nor slice:prefix:name")]
    Path {
        /// What it said.
        path: String,
    },
}

/// A pod's cgroup.
#[derive(Debug, Default)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the cgroup at `cgroups_path` (as in the OCI specification) in every hierarchy of this host. What exists
    /// is used as it is.
    ///
    /// # Errors
    /// See [`CgroupError`]; nothing is left then.
    pub fn create(cgroups_path: &str) -> Result<Self, CgroupError> {
        let mut cgroup = Self { dirs: Vec::new() };
        for dir in dirs_of(cgroups_path)? {
            if let Err(source) = fs::create_dir_all(&dir) {
                cgroup.remove();
                return Err(CgroupError::Create { path: dir, source });
            }
            inherit_cpuset(&dir);
            cgroup.dirs.push(dir);
        }
        Ok(cgroup)
    }

    /// Finds what [`Cgroup::create`] made, for a shim that is gone.
    ///
    /// # Errors
    /// Where the path has no known form.
    pub fn find(cgroups_path: &str) -> Result<Self, CgroupError> {
        Ok(Self { dirs: dirs_of(cgroups_path)?.into_iter().filter(|d| d.is_dir()).collect() })
    }

    /// Its directories.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Kills what is still inside and removes the directories.
    pub fn remove(&mut self) {
        for dir in std::mem::take(&mut self.dirs) {
            // The kernel lets go of a dead process a little after it was reaped.
            for pause in [0, 1, 2, 5, 10, 20, 50, 100, 200] {
                thread::sleep(Duration::from_millis(pause));
                match fs::remove_dir(&dir) {
                    Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) => kill_all(&dir),
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        log::warn!("cannot remove the cgroup {}: {e}", dir.display());
                        break;
                    }
                    _ => break,
                }
            }
        }
    }
}

fn kill_all(dir: &Path) {
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid > 1) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// A v1 cpuset takes no process before it has CPUs and memory nodes.
fn inherit_cpuset(dir: &Path) {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = dir.join(name);
        let Some(parent) = dir.parent() else { return };
        if fs::read_to_string(&file).is_ok_and(|s| s.trim().is_empty()) {
            if fs::read_to_string(parent.join(name)).is_ok_and(|s| s.trim().is_empty()) {
                inherit_cpuset(parent);
            }
            if let Ok(value) = fs::read_to_string(parent.join(name)) {
                let _ = fs::write(&file, value.trim());
            }
        }
    }
}

fn dirs_of(cgroups_path: &str) -> Result<Vec<PathBuf>, CgroupError> {
    let relative = relative(cgroups_path).ok_or_else(|| CgroupError::Path { path: cgroups_path.into() })?;
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    Ok(hierarchies(&mountinfo).into_iter().map(|h| h.join(&relative)).collect())
}

/// Mount points of all hierarchies: the v2 one where there is nothing else, else those of v1.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let (mut v1, mut v2) = (Vec::new(), Vec::new());
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(place) = left.split(' ').nth(4) else { continue };
        match right.split(' ').next() {
            Some("cgroup") => v1.push(PathBuf::from(place)),
            Some("cgroup2") => v2.push(PathBuf::from(place)),
            _ => {}
        }
    }
    if v1.is_empty() {
        v2.truncate(1)
    } else {
        v2.clear()
    }
    v1.append(&mut v2);
    v1
}

/// The path below a hierarchy's root; `None` where it would lead out of it or has no known form.
fn relative(cgroups_path: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = match parts[..] {
        [slice, prefix, name] => {
            let mut path = PathBuf::new();
            let mut so_far = String::new();
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            // `a-b.slice` lies in `a.slice`.
            for part in slice.strip_suffix(".slice")?.split('-') {
                if !so_far.is_empty() {
                    so_far.push('-');
                }
                so_far.push_str(part);
                path.push(format!("{so_far}.slice"));
            }
            if prefix.is_empty() {
                path.push(format!("{name}.scope"));
            } else {
                path.push(format!("{prefix}-{name}.scope"));
            }
            path
        }
        _ => PathBuf::from(cgroups_path.strip_prefix('/')?),
    };
    let plain = path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_path() {
        assert_eq!(relative("/default/web").unwrap(), Path::new("default/web"));
        assert_eq!(
            relative("kubepods-burstable-pod1.slice:cri-containerd:abc").unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
        );
        assert_eq!(relative(":runc:abc").unwrap(), Path::new("system.slice/runc-abc.scope"));
        for bad in ["", "/", "relative", "/a/../../etc", "a:b", "nodot:x:y"] {
            assert!(relative(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn hybrid_hosts_use_v1() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(hierarchies(v2), [Path::new("/sys/fs/cgroup")]);
        let hybrid = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 23 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(hierarchies(hybrid), [Path::new("/sys/fs/cgroup/cpu")]);
    }

    #[test]
    fn made_and_removed() {
        let path = format!("/chsnap-test/{}", std::process::id());
        let Ok(mut cgroup) = Cgroup::create(&path) else {
            chsnap_test_skip::skip("no writable cgroup hierarchy here");
            return;
        };
        let dirs = cgroup.dirs().to_vec();
        assert!(dirs.iter().all(|d| d.is_dir()));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        for dir in &dirs {
            fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        let killer = thread::spawn(move || child.wait().unwrap());
        cgroup.remove();
        assert!(!killer.join().unwrap().success(), "what was inside is killed");
        assert!(dirs.iter().all(|d| !d.exists()));
        for dir in dirs {
            let _ = fs::remove_dir(dir.parent().unwrap());
        }
    }
}
