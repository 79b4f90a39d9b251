//! What a case may not leave behind.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use sha2::{Digest, Sha256};

use crate::{Containerd, containerd::locked, eventually, pod::IDS, proc};

const SHIM_SOCKETS: &str = "/run/containerd/s";
/// The cgroup of those that build snapshots.
const BUILDERS: &str = "chsnap-builders";
/// More than any case has at the same time for one containerd.
const MAX_BUILDERS: usize = 8;
/// A look at containerd that failed begins so.
const UNKNOWN: &str = "unknown what containerd has: ";
const NETWORK_NAMESPACES: [&str; 2] = ["/run/netns", "/var/run/netns"];

/// What was there before a case.
#[derive(Debug)]
pub struct Baseline {
    before: BTreeSet<String>,
}

impl Baseline {
    /// Looks around.
    #[must_use]
    pub fn take(containerd: &Containerd) -> Self {
        // Nothing but cases and what is built for them changes what containerd has, so the last look holds still, and
        // what came after it is the next case's to explain.
        let known = locked(&containerd.had).take();
        let mut before = known.unwrap_or_else(|| in_containerd(containerd));
        before.extend(on_host(containerd));
        Self { before }
    }

    /// What is there now that was not there before, once everything had time to go.
    #[must_use]
    pub fn leftovers(&self, containerd: &Containerd) -> Vec<String> {
        // What could not be looked at may be there, even if it was so before.
        let is_new = |what: &String| what.starts_with(UNKNOWN) || !self.before.contains(what);
        let mut left: BTreeSet<String> = BTreeSet::new();
        let gone = eventually(Duration::from_secs(5), || {
            left = on_host(containerd).into_iter().filter(is_new).collect();
            // Asking containerd starts five programs: not before there is nothing else to wait for.
            if !left.is_empty() {
                return None;
            }
            let has = in_containerd(containerd);
            left = has.iter().filter(|what| is_new(what)).cloned().collect();
            left.is_empty().then_some(has)
        });
        if gone.is_none() {
            left.extend(in_containerd(containerd).into_iter().filter(is_new));
        }
        *locked(&containerd.had) = gone;
        left.into_iter().collect()
    }
}

fn on_host(containerd: &Containerd) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let me = containerd.pid();
    for process in proc::marked(&containerd.run).into_iter().filter(|p| Some(p.pid) != me) {
        all.insert(format!("process {}: {}", process.pid, process.args));
    }
    for mount in mounts_below(&containerd.run).into_iter().chain(mounts_below(&containerd.root)) {
        all.insert(format!("mount {}", mount.display()));
    }
    all.extend(foreign_mounts(&containerd.pods()));
    let bundles = format!("io.containerd.runtime.v2.task/{}", containerd.namespace);
    let dirs = ["s", "fifo", "tmp", &format!("state/{bundles}")].map(|d| containerd.run.join(d));
    for dir in dirs.iter().chain([&containerd.root.join("root").join(&bundles)]) {
        all.extend(
            children(dir).into_iter().filter(|p| !is_memory(containerd, p)).map(|p| format!("file {}", p.display())),
        );
    }
    all.extend(sockets(containerd));
    for dir in cgroup_dirs(&containerd.namespace) {
        all.extend(children(&dir).into_iter().filter(|p| p.is_dir()).map(|p| format!("cgroup {}", p.display())));
    }
    all.extend(builders_cgroups(&containerd.pods()).into_iter().map(|p| format!("cgroup {}", p.display())));
    for dir in NETWORK_NAMESPACES {
        all.extend(children(Path::new(dir)).into_iter().map(|p| format!("network namespace {}", p.display())));
    }
    all
}

fn in_containerd(containerd: &Containerd) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let listed = |args: &[&str], told: &dyn Fn(&str) -> Option<String>| match containerd.list(args) {
        Ok(lines) => lines.iter().filter_map(|line| told(line)).collect(),
        Err(e) => vec![format!("{UNKNOWN}{e:#}")],
    };
    for (what, args) in
        [("task", ["task", "ls", "-q"]), ("container", ["container", "ls", "-q"]), ("lease", ["leases", "ls", "-q"])]
    {
        all.extend(listed(&args, &|id| Some(format!("{what} {id} in containerd"))));
    }
    for snapshotter in ["overlayfs", "native"] {
        all.extend(listed(&["snapshot", "--snapshotter", snapshotter, "ls"], &|line| {
            let line = line.trim_end();
            (line.ends_with("Active") || line.ends_with("View")).then(|| format!("{snapshotter} snapshot {line}"))
        }));
    }
    all
}

/// What chsnap has found out about the host, which outlives every pod.
fn is_memory(containerd: &Containerd, path: &Path) -> bool {
    path == containerd.pods().join("host.json")
}

/// Mount points below `dir` that this process sees, deepest first.
pub(crate) fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = places(&info).filter(|p| p.starts_with(dir) && p != dir).collect();
    found.reverse();
    found
}

fn places(mountinfo: &str) -> impl Iterator<Item = PathBuf> + '_ {
    mountinfo.lines().filter_map(|l| l.split(' ').nth(4).map(PathBuf::from))
}

/// Mounts below `dir` in the mount namespace of any process: a namespace that outlives its shim keeps them.
fn foreign_mounts(dir: &Path) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for pid in proc::pids() {
        let Ok(ns) = fs::metadata(format!("/proc/{pid}/ns/mnt")) else { continue };
        if seen.insert(ns.ino()) {
            let info = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            let ours = places(&info).filter(|p| p.starts_with(dir));
            found.extend(ours.map(|p| format!("mount {} in the mount namespace of process {pid}", p.display())));
        }
    }
    found
}

/// Sockets of our containers' shims. Those of others come and go beside us.
fn sockets(containerd: &Containerd) -> Vec<String> {
    let ids = locked(&IDS);
    let paths = ids.iter().map(|id| shim_socket(containerd, id));
    paths.filter(|p| p.exists()).map(|p| format!("socket {}", p.display())).collect()
}

/// Where containerd and the shim of that name meet.
pub(crate) fn shim_socket(containerd: &Containerd, id: &str) -> PathBuf {
    let hashed = containerd.run.join("c.sock").join(&containerd.namespace).join(id);
    let digest = Sha256::digest(hashed.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SHIM_SOCKETS).join(name)
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

/// The directory of that name in every hierarchy; containers' cgroups are in it.
fn cgroup_dirs(namespace: &str) -> Vec<PathBuf> {
    let info = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroups = info.lines().filter(|l| l.contains(" - cgroup"));
    cgroups.filter_map(|l| l.split(' ').nth(4)).map(|p| Path::new(p).join(namespace)).filter(|p| p.is_dir()).collect()
}

/// The cgroups of what builds snapshots for the pods in `pods`; others' are beside them.
pub(crate) fn builders_cgroups(pods: &Path) -> Vec<PathBuf> {
    let names = (0..MAX_BUILDERS).map(|n| {
        let dir = pods.join(".builders").join(n.to_string());
        let digest = Sha256::digest(dir.as_os_str().as_encoded_bytes());
        digest.iter().take(8).fold("chsnap-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
    });
    let names: Vec<String> = names.collect();
    let dirs = cgroup_dirs(BUILDERS);
    dirs.iter().flat_map(|dir| names.iter().map(|name| dir.join(name))).filter(|dir| dir.is_dir()).collect()
}

/// Those of containers in that namespace, and of what builds snapshots for the pods in `pods`.
pub(crate) fn remove_cgroups(namespace: &str, pods: &Path) {
    for dir in cgroup_dirs(namespace) {
        for child in children(&dir).into_iter().filter(|p| p.is_dir()) {
            // The processes of a pod have one of their own below the pod's.
            for own in children(&child).into_iter().filter(|p| p.is_dir()) {
                let _ = fs::remove_dir(own);
            }
            let _ = fs::remove_dir(child);
        }
        let _ = fs::remove_dir(dir);
    }
    for dir in builders_cgroups(pods) {
        let _ = fs::remove_dir(dir);
    }
}

pub(crate) fn unmount(dirs: &[PathBuf]) {
    for place in dirs.iter().flat_map(|d| mounts_below(d)) {
        let _ = Command::new("umount").arg("-l").arg(place).status();
    }
}
