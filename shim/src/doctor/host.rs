//! The host itself.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::{
        statfs::{CGROUP2_SUPER_MAGIC, statfs},
        utsname::uname,
    },
    unistd::{AccessFlags, Uid, access},
};

use super::Check;
use crate::config::{Config, Host, Overrides, Shape};

/// The shim needs it for mounts and cgroups; containerd, which starts it, mostly is.
pub(super) fn root() -> Check {
    let name = "root";
    match Uid::effective() {
        uid if uid.is_root() => Check::ok(name, "running as root"),
        uid => Check::warn(
            name,
            format!("running as user {uid}"),
            "containerd must run as root; run this as root too, to see what containerd sees",
        ),
    }
}

pub(super) fn kernel() -> Check {
    let name = "host kernel";
    let Ok(uname) = uname() else { return Check::missing(name, "the kernel does not tell its name", "") };
    let found = format!("{} {}", uname.release().to_string_lossy(), uname.machine().to_string_lossy());
    match uname.machine().to_str() {
        Some("x86_64" | "aarch64") => Check::ok(name, found),
        _ => Check::missing(name, found, "chsnap runs on x86_64 and aarch64"),
    }
}

/// Whether a container that asks for nothing gets its guest.
pub(super) fn size(config: &Config) -> Check {
    let name = "host size";
    let (host, shape) = match Host::read().and_then(|host| {
        let shape = Shape::on(host, config, &Overrides::default(), None)?;
        Ok((host, shape))
    }) {
        Ok(both) => both,
        Err(error) => {
            return Check::missing(name, crate::task::chain(&error), "lower the value in the configuration's [guest]");
        }
    };
    let available = available_mib();
    let free = available.map(|mib| format!(", {mib}MiB available")).unwrap_or_default();
    let found = format!(
        "{} CPUs, {}MiB memory{free}; a default guest has {} and {}MiB",
        host.cpus,
        host.memory.as_mib(),
        shape.vcpus,
        shape.memory_mib
    );
    match available {
        Some(available) if available < shape.memory_mib => {
            Check::warn(name, found, "free memory, or lower guest.default_memory: the guest may be killed")
        }
        _ => Check::ok(name, found),
    }
}

fn available_mib() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

pub(super) fn cgroups() -> Check {
    let (name, path) = ("cgroups", Path::new("/sys/fs/cgroup"));
    if statfs(path).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC) {
        return Check::ok(name, "version 2");
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let hierarchies = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup")).count();
    match hierarchies {
        0 => Check::warn(
            name,
            "none are mounted",
            "mount cgroup2 on /sys/fs/cgroup: VMs run without limits and statistics",
        ),
        n => Check::ok(name, format!("version 1, {n} hierarchies")),
    }
}

/// Most use containerd's overlayfs snapshotter.
pub(super) fn overlay() -> Check {
    let name = "overlayfs";
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        return Check::ok(name, "known to the kernel");
    }
    let release = uname().map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default();
    let modules = Path::new("/lib/modules").join(release).join("modules.dep");
    if fs::read_to_string(modules).is_ok_and(|text| text.contains("/overlay.ko")) {
        return Check::ok(name, "a module, loaded on first use");
    }
    Check::warn(name, "unknown to the kernel", "use another snapshotter of containerd's, such as native")
}

/// Nothing needs it yet but a guest's network.
pub(super) fn tun() -> Check {
    let (name, path) = ("/dev/net/tun", Path::new("/dev/net/tun"));
    match access(path, AccessFlags::R_OK | AccessFlags::W_OK) {
        Ok(()) => Check::ok(name, "usable"),
        Err(error) => Check::warn(
            name,
            error.desc(),
            "load the module tun; only guests with a network of their own need it, exposed ports do not",
        ),
    }
}

/// Whether the directory can be made.
pub(super) fn state(dir: &Path) -> Check {
    let name = "state directory";
    let there: PathBuf = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_owned();
    let mend = "name a directory that root can write to in [state] dir";
    if !there.is_dir() {
        return Check::missing(name, format!("{} is no directory", there.display()), mend);
    }
    match access(&there, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Check::ok(name, dir.display().to_string()),
        // Containers run as root, who may.
        Err(Errno::EACCES) if !Uid::effective().is_root() => {
            Check::warn(name, dir.display().to_string(), "run this as root, who alone can tell whether it is usable")
        }
        Err(error) => Check::missing(name, format!("{}: {}", there.display(), error.desc()), mend),
    }
}
