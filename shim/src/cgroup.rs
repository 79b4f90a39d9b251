//! The pod's cgroup on the host, in which VMM and virtiofsd run. v1 (a directory in every hierarchy) and v2 (one).
//!
//! Written to directly, also where the path has systemd's form: the directory is then the one systemd would have
//! made for the scope, so that the kubelet's accounting finds it.
//!
//! The pod's processes are in a child of it that no other pod has. The path comes from outside, and may be another
//! container's too, or a service's: what is killed there has to be ours, and what a child uses counts in its parent.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sha2::{Digest, Sha256};
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
    /// The pod's own, each below `cgroupsPath`.
    dirs: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes a cgroup for `pod` (its directory) at `cgroups_path` (as in the OCI specification), in every hierarchy of
    /// this host.
    ///
    /// # Errors
    /// See [`CgroupError`]; nothing is left then.
    pub fn create(cgroups_path: &str, pod: &Path) -> Result<Self, CgroupError> {
        let mut cgroup = Self { dirs: Vec::new() };
        for dir in dirs_of(cgroups_path, pod)? {
            // Of a pod that was here before, where its processes did not end in time.
            kill_all(&dir);
            if let Err(source) = fs::create_dir_all(&dir) {
                cgroup.remove();
                remove_empty_parent(&dir);
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
    pub fn find(cgroups_path: &str, pod: &Path) -> Result<Self, CgroupError> {
        Ok(Self { dirs: dirs_of(cgroups_path, pod)?.into_iter().filter(|d| d.is_dir()).collect() })
    }

    /// Bounds what the processes in it take: that many bytes of memory, so many CPUs, and of them a tenth of what others
    /// get who want them at the same time.
    ///
    /// # Errors
    /// Where the kernel refuses one of them, or has none of that kind.
    pub fn bound(&self, memory: u64, cpus: u32) -> io::Result<()> {
        const PERIOD_US: u32 = 100_000;
        let mut missing = vec!["cpu", "memory"];
        let quota = cpus * PERIOD_US;
        for dir in &self.dirs {
            let unified = dir.join("cgroup.controllers").exists();
            if unified {
                pass_controllers(dir);
            }
            let bounds = match unified {
                true => [
                    ("cpu.weight", "10".to_owned()),
                    ("cpu.max", format!("{quota} {PERIOD_US}")),
                    ("memory.max", memory.to_string()),
                ],
                false => [
                    ("cpu.shares", "102".to_owned()),
                    ("cpu.cfs_quota_us", quota.to_string()),
                    ("memory.limit_in_bytes", memory.to_string()),
                ],
            };
            for (name, value) in bounds {
                let file = dir.join(name);
                // Of the hierarchies of version 1 each has its own.
                if unified || file.exists() {
                    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", file.display()));
                    fs::write(&file, value).map_err(named)?;
                    // Shares alone are no bound.
                    missing.retain(|controller| !name.starts_with(controller) || name == "cpu.shares");
                }
            }
        }
        // A kernel may be without one, and a host that has both versions may have it where pods are not.
        match missing.is_empty() {
            true => Ok(()),
            false => Err(io::Error::other(format!("the kernel bounds no {} here", missing.join(" and no ")))),
        }
    }

    /// Its directories.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// Kills what is still inside and removes the directories; that at `cgroupsPath` only where nobody else uses it.
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
            remove_empty_parent(&dir);
        }
    }
}

/// The kernel refuses where there are processes or other cgroups inside.
fn remove_empty_parent(dir: &Path) {
    let _ = dir.parent().map(fs::remove_dir);
}

fn kill_all(dir: &Path) {
    let pids = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    for pid in pids.lines().filter_map(|l| l.parse().ok()).filter(|pid| *pid > 1) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Version 2 gives a cgroup only the controllers that each above it passes on. Where that fails, the bounds tell.
fn pass_controllers(dir: &Path) {
    let mut above: Vec<&Path> = dir.ancestors().skip(1).take_while(|d| d.join("cgroup.controllers").exists()).collect();
    above.reverse();
    for dir in above {
        for controller in ["+cpu", "+memory"] {
            let _ = fs::write(dir.join("cgroup.subtree_control"), controller);
        }
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

fn dirs_of(cgroups_path: &str, pod: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let relative = relative(cgroups_path).ok_or_else(|| CgroupError::Path { path: cgroups_path.into() })?;
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = own_name(pod);
    Ok(hierarchies(&mountinfo).into_iter().map(|h| h.join(&relative).join(&own)).collect())
}

/// The same for the shim and for whoever cleans up after it, and for no other pod.
fn own_name(pod: &Path) -> String {
    let digest = Sha256::digest(pod.as_os_str().as_bytes());
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("chsnap-{hex}")
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

    /// As version 1 has it, where each hierarchy has files of its own.
    #[test]
    fn a_bound_that_cannot_be_set_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = |names: &[&str]| {
            names.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
            Cgroup { dirs: vec![dir.path().into()] }
        };
        let said = |cgroup: Cgroup| cgroup.bound(1 << 20, 1).unwrap_err().to_string();
        assert_eq!(said(Cgroup::default()), "the kernel bounds no cpu and no memory here");
        assert_eq!(said(cgroup(&["memory.limit_in_bytes", "cpu.shares"])), "the kernel bounds no cpu here");
        cgroup(&["cpu.cfs_quota_us"]).bound(1 << 20, 1).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("memory.limit_in_bytes")).unwrap(), "1048576");
    }

    fn sleeper(dirs: &[PathBuf]) -> std::process::Child {
        let child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        for dir in dirs {
            fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        child
    }

    #[test]
    fn made_and_removed() {
        let path = format!("/chsnap-test/{}", std::process::id());
        let Ok(mut cgroup) = Cgroup::create(&path, Path::new("/s/default/web")) else {
            chsnap_test_skip::skip("no writable cgroup hierarchy here");
            return;
        };
        let dirs = cgroup.dirs().to_vec();
        assert!(dirs.iter().all(|d| d.is_dir()));
        cgroup.bound(64 << 20, 1).unwrap();
        let read = |names: [&str; 2]| {
            let files = dirs.iter().flat_map(|d| names.map(|name| d.join(name)));
            files.filter_map(|file| fs::read_to_string(file).ok()).next().map(|text| text.trim().to_owned())
        };
        assert_eq!(read(["memory.max", "memory.limit_in_bytes"]).as_deref(), Some("67108864"));
        assert!(matches!(read(["cpu.weight", "cpu.shares"]).as_deref(), Some("10" | "102")));
        let mut child = sleeper(&dirs);
        let killer = thread::spawn(move || child.wait().unwrap());
        cgroup.remove();
        assert!(!killer.join().unwrap().success(), "what was inside is killed");
        assert!(dirs.iter().all(|d| !d.parent().unwrap().exists()));
        for dir in dirs {
            let _ = fs::remove_dir(dir.ancestors().nth(2).unwrap());
        }
    }

    #[test]
    fn what_others_have_at_the_same_path_is_left_alone() {
        let path = format!("/chsnap-test-shared-{}", std::process::id());
        let Ok(mut ours) = Cgroup::create(&path, Path::new("/s/default/ours")) else {
            chsnap_test_skip::skip("no writable cgroup hierarchy here");
            return;
        };
        let mut theirs = Cgroup::create(&path, Path::new("/s/default/theirs")).unwrap();
        let shared: Vec<PathBuf> = ours.dirs().iter().map(|d| d.parent().unwrap().into()).collect();
        let (mut pod, mut stranger) = (sleeper(theirs.dirs()), sleeper(&shared));
        let mut child = sleeper(ours.dirs());
        let killer = thread::spawn(move || child.wait().unwrap());
        ours.remove();
        assert!(!killer.join().unwrap().success());
        // A shim that was killed is cleaned up after by name.
        Cgroup::find(&path, Path::new("/s/default/ours")).unwrap().remove();
        let alive = pod.try_wait().unwrap().is_none() && stranger.try_wait().unwrap().is_none();
        for child in [&mut pod, &mut stranger] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(shared.iter().all(|d| d.is_dir()));
        theirs.remove();
        assert!(alive, "a process of somebody else was killed");
        assert!(shared.iter().all(|d| !d.exists()), "the last one leaves nothing");
    }
}
