//! The container's mounts and devices, as steps of its first process.
//!
//! They are carried out after the root has been entered, so a link in a hostile image leads to a place in the image.

use nix::sys::stat::{SFlag, makedev};

use chsnap_protocol::{PUBLIC_DIR, PUBLIC_MOUNT, SHARE_MOUNT};

use super::{
    plan::{PlanError, cstring},
    spec::{Linux, Mount},
};
use crate::sys::{MOUNT_ATTRIBUTES, Op};

/// Sets or clears a mount flag.
const FLAGS: &[(&str, libc::c_ulong, bool)] = &[
    ("defaults", 0, true),
    ("ro", libc::MS_RDONLY, true),
    ("rw", libc::MS_RDONLY, false),
    ("nosuid", libc::MS_NOSUID, true),
    ("suid", libc::MS_NOSUID, false),
    ("nodev", libc::MS_NODEV, true),
    ("dev", libc::MS_NODEV, false),
    ("noexec", libc::MS_NOEXEC, true),
    ("exec", libc::MS_NOEXEC, false),
    ("sync", libc::MS_SYNCHRONOUS, true),
    ("async", libc::MS_SYNCHRONOUS, false),
    ("dirsync", libc::MS_DIRSYNC, true),
    ("mand", libc::MS_MANDLOCK, true),
    ("nomand", libc::MS_MANDLOCK, false),
    ("noatime", libc::MS_NOATIME, true),
    ("atime", libc::MS_NOATIME, false),
    ("nodiratime", libc::MS_NODIRATIME, true),
    ("diratime", libc::MS_NODIRATIME, false),
    ("relatime", libc::MS_RELATIME, true),
    ("norelatime", libc::MS_RELATIME, false),
    ("strictatime", libc::MS_STRICTATIME, true),
    ("nostrictatime", libc::MS_STRICTATIME, false),
];

/// Nobody else sees the container's mounts, so there is nothing to propagate to or from.
const PROPAGATION: &[&str] =
    &["private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable"];

/// The devices every container has: name, major, minor.
///
/// The others that `linux.resources.devices` denies are not denied here. A container with CAP_MKNOD may make a node of any
/// number in its `/dev`, as runc's own list lets it, and what it could open so is the guest's: no device of the host is in
/// the VM, its disks are directories of the share, which have no nodes, and the port of the agent channel can be opened only
/// once, which the agent has done. The host trusts the guest's kernel no more than a container in it.
const DEVICES: &[(&str, u64, u64)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// The steps taken before and after the root is entered.
#[derive(Debug, Default)]
pub struct MountSteps {
    pub outside: Vec<Op>,
    pub inside: Vec<Op>,
    /// Read-only only when everything in it is in place.
    pub last: Vec<Op>,
}

/// The directories from the root down to `path`, made where they are missing.
pub fn directories(path: &str) -> Result<Vec<Op>, PlanError> {
    let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
    let prefixes = ends.map(|end| path.get(..end).unwrap_or_default()).filter(|p| !p.is_empty() && *p != "/");
    prefixes.map(|prefix| Ok(Op::Dir(cstring("mount destination", prefix)?))).collect()
}

/// Translates `mounts` of the specification.
///
/// # Errors
/// For what the guest does not mount, by name.
pub fn steps(mounts: &[Mount], linux: &Linux, terminal: bool, slots: &mut usize) -> Result<MountSteps, PlanError> {
    let mut steps = MountSteps::default();
    let mut has_dev = false;
    for mount in mounts {
        let target = mount.destination.as_str();
        if !target.starts_with('/') {
            return Err(PlanError::MountDestination(target.to_owned()));
        }
        if is_bind(mount) {
            bind(mount, &mut steps, slots)?;
            continue;
        }
        let (kind, source) = match mount.kind.as_str() {
            "cgroup" | "cgroup2" => ("cgroup2", "cgroup"),
            kind @ ("proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue") => (kind, mount.source.as_str()),
            other => return Err(PlanError::MountType { target: target.to_owned(), kind: other.to_owned() }),
        };
        let (mut flags, data) = options(mount);
        // The options of v1 and of the whole hierarchy mean nothing in a container's own view of v2.
        let data = if kind == "cgroup2" { String::new() } else { data };
        if target.trim_end_matches('/') == "/dev" {
            has_dev = true;
            if flags & libc::MS_RDONLY != 0 {
                flags &= !libc::MS_RDONLY;
                steps.last.push(Op::ReadOnly(c"/dev".into()));
            }
        }
        steps.inside.extend(directories(target)?);
        steps.inside.push(Op::Mount {
            source: cstring("mount source", if source.is_empty() { kind } else { source })?,
            target: cstring("mount destination", target)?,
            kind: cstring("mount type", kind)?,
            flags,
            data: cstring("mount options", &data)?,
        });
        if has_dev && target.trim_end_matches('/') == "/dev" {
            devices(&mut steps.inside)?;
            public(&mut steps, slots)?;
            if terminal {
                steps.inside.push(Op::File(c"/dev/console".into()));
            }
        }
    }
    check_devices(linux)?;
    Ok(steps)
}

fn check_devices(linux: &Linux) -> Result<(), PlanError> {
    let known = |path: &str| {
        let name = path.strip_prefix("/dev/").unwrap_or_default();
        DEVICES.iter().any(|(known, ..)| *known == name) || matches!(name, "console" | "ptmx")
    };
    match linux.devices.iter().find(|device| !known(&device.path)) {
        Some(device) => Err(PlanError::Device(device.path.clone())),
        None => Ok(()),
    }
}

fn devices(steps: &mut Vec<Op>) -> Result<(), PlanError> {
    for (name, major, minor) in DEVICES {
        steps.push(Op::Node {
            path: cstring("device", &format!("/dev/{name}"))?,
            mode: SFlag::S_IFCHR.bits() | 0o666,
            device: makedev(*major, *minor),
        });
    }
    for (target, path) in LINKS {
        steps.push(Op::Symlink { target: cstring("link", target)?, path: cstring("link", path)? });
    }
    Ok(())
}

/// A directory, not a file, for what is in it is replaced. In `/dev`, since that is no part of the image.
fn public(steps: &mut MountSteps, slots: &mut usize) -> Result<(), PlanError> {
    // An agent outside a VM has none.
    if !std::path::Path::new(PUBLIC_DIR).is_dir() {
        return Ok(());
    }
    let (slot, target) = (*slots, cstring("mount destination", PUBLIC_MOUNT)?);
    *slots += 1;
    steps.outside.push(Op::TakeTree { path: cstring("mount source", PUBLIC_DIR)?, slot });
    steps.inside.push(Op::Dir(target.clone()));
    steps.inside.push(Op::Attach { slot, target, attributes: attributes(libc::MS_RDONLY) });
    Ok(())
}

fn is_bind(mount: &Mount) -> bool {
    mount.kind == "bind" || mount.options.iter().any(|o| o == "bind" || o == "rbind")
}

/// What the host could not put in the root itself, since a mount of the guest would hide it: a path in the share.
fn bind(mount: &Mount, steps: &mut MountSteps, slots: &mut usize) -> Result<(), PlanError> {
    let inside = mount.source.strip_prefix(SHARE_MOUNT).is_some_and(|rest| rest.starts_with('/'));
    if !inside || mount.source.split('/').any(|part| part == "..") {
        return Err(PlanError::Bind { from: mount.source.clone(), target: mount.destination.clone() });
    }
    let is_dir = std::fs::metadata(&mount.source)
        .map_err(|e| PlanError::BindSource { path: mount.source.clone(), source: e })?
        .is_dir();
    let slot = *slots;
    *slots += 1;
    let target = cstring("mount destination", &mount.destination)?;
    let (parent, _) = mount.destination.trim_end_matches('/').rsplit_once('/').unwrap_or_default();
    steps.outside.push(Op::TakeTree { path: cstring("mount source", &mount.source)?, slot });
    steps.inside.extend(directories(if is_dir { &mount.destination } else { parent })?);
    if !is_dir {
        steps.inside.push(Op::File(target.clone()));
    }
    steps.inside.push(Op::Attach { slot, target, attributes: attributes(options(mount).0) });
    Ok(())
}

/// Of a bind, whose file system has flags of its own.
fn attributes(flags: libc::c_ulong) -> u64 {
    MOUNT_ATTRIBUTES.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, attribute)| attribute).sum()
}

/// Flags, and what the file system itself is to make of the rest.
fn options(mount: &Mount) -> (libc::c_ulong, String) {
    let mut flags = 0;
    let mut data = Vec::new();
    for option in &mount.options {
        if let Some((_, flag, set)) = FLAGS.iter().find(|(name, ..)| name == option) {
            if *set {
                flags |= flag;
            } else {
                flags &= !flag;
            }
        } else if !PROPAGATION.contains(&option.as_str()) && option != "bind" && option != "rbind" {
            data.push(option.as_str());
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(json: &str) -> Mount {
        serde_json::from_str(json).unwrap()
    }

    fn translate(json: &str) -> Result<MountSteps, PlanError> {
        steps(&[mount(json)], &Linux::default(), false, &mut 1)
    }

    #[test]
    fn options_become_flags_and_data() {
        let mount = mount(
            r#"{"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k", "ro", "rw", "rprivate"]}"#,
        );
        assert_eq!(options(&mount), (libc::MS_NOSUID | libc::MS_STRICTATIME, "mode=755,size=65536k".into()));
    }

    #[test]
    fn an_unknown_type_is_named() {
        let error = translate(r#"{"destination": "/x", "type": "nfs", "source": "h:/y"}"#).unwrap_err().to_string();
        assert!(error.contains("nfs") && error.contains("/x"), "{error}");
    }

    #[test]
    fn a_bind_mount_of_the_host_is_refused() {
        for source in ["/etc", "/run/chsnap/share/../../../etc", "/run/chsnap/shared/x"] {
            let json = format!(r#"{{"destination": "/x", "type": "bind", "source": "{source}"}}"#);
            let error = translate(&json).unwrap_err().to_string();
            assert!(error.contains(source), "{error}");
        }
    }

    #[test]
    fn every_directory_on_the_way_is_made() {
        let made = directories("/sys/fs/cgroup").unwrap();
        assert_eq!(made.len(), 3);
        assert!(format!("{:?}", made[0]).contains("\"/sys\""));
        assert!(directories("/").unwrap().is_empty());
    }

    #[test]
    fn a_foreign_device_is_named() {
        let linux: Linux =
            serde_json::from_str(r#"{"devices": [{"path": "/dev/null"}, {"path": "/dev/fuse"}]}"#).unwrap();
        let error = steps(&[], &linux, false, &mut 1).unwrap_err().to_string();
        assert!(error.contains("/dev/fuse"), "{error}");
    }
}
