//! Divides a container's OCI specification between host and guest.
//!
//! The host mounts the root and what is bound into it; the guest does the rest. What neither can do is refused here,
//! before anything has been started.

use std::path::{Path, PathBuf};

use chsnap_protocol::SHARE_MOUNT;
use oci_spec::runtime::{LinuxNamespaceType, MountBuilder, Spec};
use thiserror::Error;

use crate::share::Bind;

/// A specification that cannot be honoured, or makes no sense.
#[derive(Debug, Error)]
pub enum PlanError {
    /// Something a microVM cannot give.
    #[error("{what} cannot be given to a container in a microVM: {hint}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do.
        hint: &'static str,
    },
    /// A part that must be there.
    #[error("the OCI specification has no {0}")]
    Missing(&'static str),
    /// It cannot be written for the guest.
    #[error("the OCI specification cannot be passed on")]
    Json(#[from] serde_json::Error),
    /// A mount that the builder refuses.
    #[error("mount on {destination:?} cannot be passed on: {reason}")]
    Mount {
        /// Where.
        destination: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What host and guest do for one container.
#[derive(Debug)]
pub struct Plan {
    /// Bound into the root on the host.
    pub binds: Vec<Bind>,
    /// Bound beside the root on the host, and from there by the guest: their places lie below a mount of the guest's.
    pub staged: Vec<Bind>,
    /// Where the guest mounts something.
    pub mountpoints: Vec<PathBuf>,
    /// The root is closed for writing.
    pub readonly: bool,
    /// For the agent.
    pub spec_json: Vec<u8>,
    /// The container's terminal.
    pub terminal: bool,
    /// Asked for, but left out: the VM does its work.
    pub ignored: Vec<&'static str>,
}

/// File systems that the guest mounts itself.
const GUEST_TYPES: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

impl Plan {
    /// Divides `spec` of `container`.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn of(container: &str, mut spec: Spec) -> Result<Self, PlanError> {
        check_features(&spec)?;
        let readonly = spec.root().as_ref().ok_or(PlanError::Missing("root"))?.readonly().unwrap_or(false);
        let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(PlanError::Missing("process.args"));
        }
        let terminal = process.terminal().unwrap_or(false);
        let mut plan = Self {
            binds: Vec::new(),
            staged: Vec::new(),
            mountpoints: Vec::new(),
            readonly,
            spec_json: Vec::new(),
            terminal,
            ignored: ignored(&spec),
        };
        plan.divide_mounts(container, &mut spec)?;
        if spec.hostname().as_ref().is_none_or(String::is_empty) {
            // runc would leave the host's name there, which is not the guest's.
            spec.set_hostname(Some(container.into()));
        }
        if let Some(root) = spec.root_mut() {
            root.set_path(guest_dir(container).join("rootfs"));
            // The host closes it.
            root.set_readonly(Some(false));
        }
        plan.spec_json = serde_json::to_vec(&spec)?;
        Ok(plan)
    }

    fn divide_mounts(&mut self, container: &str, spec: &mut Spec) -> Result<(), PlanError> {
        let mut for_guest = Vec::new();
        for m in spec.mounts().clone().unwrap_or_default() {
            let options = m.options().clone().unwrap_or_default();
            let fstype = m.typ().clone().unwrap_or_default();
            let destination = m.destination().clone();
            let is_bind = fstype == "bind" || options.iter().any(|o| o == "bind" || o == "rbind");
            if is_bind {
                let source = m.source().clone().ok_or(PlanError::Missing("source of a bind mount"))?;
                if self.mountpoints.iter().any(|p| destination.starts_with(p)) {
                    let place = PathBuf::from(format!("binds/{}", self.staged.len()));
                    let guest_source = guest_dir(container).join(&place);
                    self.staged.push(Bind { source, destination: place, options: options.clone() });
                    for_guest.push(bind_in_guest(&destination, guest_source, &options)?);
                } else {
                    self.binds.push(Bind { source, destination, options });
                }
            } else if GUEST_TYPES.contains(&fstype.as_str()) {
                // Below a mount of the guest's, the guest makes the place itself.
                if !self.mountpoints.iter().any(|p| destination.starts_with(p)) {
                    self.mountpoints.push(destination);
                }
                for_guest.push(m);
            } else {
                return Err(PlanError::Unsupported {
                    what: format!("a mount of type {fstype:?} on {destination:?}"),
                    hint: "use bind, tmpfs, proc, sysfs, devpts, mqueue or cgroup",
                });
            }
        }
        spec.set_mounts(Some(for_guest));
        Ok(())
    }
}

/// A container's directory of the share, as the guest sees it.
fn guest_dir(container: &str) -> PathBuf {
    Path::new(SHARE_MOUNT).join(container)
}

fn bind_in_guest(
    destination: &Path,
    source: PathBuf,
    options: &[String],
) -> Result<oci_spec::runtime::Mount, PlanError> {
    let kept: Vec<String> =
        options.iter().filter(|o| matches!(o.as_str(), "ro" | "nosuid" | "nodev" | "noexec")).cloned().collect();
    MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options([vec!["rbind".into()], kept].concat())
        .build()
        .map_err(|e| PlanError::Mount { destination: destination.into(), reason: e.to_string() })
}

fn check_features(spec: &Spec) -> Result<(), PlanError> {
    let unsupported = |what: String, hint| Err(PlanError::Unsupported { what, hint });
    if let Some(hooks) = spec.hooks()
        && serde_json::to_value(hooks)?.as_object().is_some_and(|o| o.values().any(|v| !v.is_null()))
    {
        return unsupported("OCI hooks".into(), "remove them from the specification");
    }
    let linux = spec.linux().as_ref().ok_or(PlanError::Missing("linux section"))?;
    if let Some(device) = linux.devices().iter().flatten().next() {
        return unsupported(format!("the host's device {:?}", device.path()), "run without --device and --privileged");
    }
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let find = |typ| namespaces.iter().find(|n| n.typ() == typ);
    for (typ, name, hint) in [
        (LinuxNamespaceType::Network, "the host's network namespace", "run without --net-host (hostNetwork)"),
        (LinuxNamespaceType::Pid, "the host's PID namespace", "run without hostPID"),
        (LinuxNamespaceType::Ipc, "the host's IPC namespace", "run without hostIPC"),
        (LinuxNamespaceType::Mount, "the host's mount namespace", "give the container a mount namespace"),
    ] {
        if find(typ).is_none() {
            return unsupported(name.into(), hint);
        }
    }
    if find(LinuxNamespaceType::User).is_some() {
        return unsupported("a user namespace".into(), "the VM isolates already; run without --uidmap");
    }
    if find(LinuxNamespaceType::Pid).is_some_and(|n| n.path().is_some()) {
        return unsupported("another container's PID namespace".into(), "run without shareProcessNamespace");
    }
    Ok(())
}

/// Confinement against the host's kernel, which the container never sees.
fn ignored(spec: &Spec) -> Vec<&'static str> {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    [
        (linux.is_some_and(|l| l.seccomp().is_some()), "linux.seccomp"),
        (process.is_some_and(|p| p.apparmor_profile().is_some()), "process.apparmorProfile"),
        (process.is_some_and(|p| p.selinux_label().as_ref().is_some_and(|l| !l.is_empty())), "process.selinuxLabel"),
    ]
    .into_iter()
    .filter_map(|(there, name)| there.then_some(name))
    .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(change: impl FnOnce(&mut serde_json::Value)) -> Spec {
        let mut value = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs", "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
                {"destination": "/run/lock", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/run/secrets", "type": "bind", "source": "/host/s", "options": ["rbind", "ro"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/host/hosts", "options": ["rbind"]}
            ],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "mount"}]}
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn mounts_are_divided() {
        let plan = Plan::of("web", spec(|_| ())).unwrap();
        assert!(plan.readonly);
        assert_eq!(plan.binds.len(), 1);
        assert_eq!(plan.binds[0].destination, Path::new("/etc/hosts"));
        assert_eq!(plan.staged.len(), 1, "what the guest's tmpfs would hide is bound by the guest");
        assert_eq!(plan.mountpoints, [Path::new("/proc"), Path::new("/run")]);
        let guest: Spec = serde_json::from_slice(&plan.spec_json).unwrap();
        assert_eq!(guest.hostname().as_deref(), Some("web"));
        let mounts = guest.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[3].source().as_ref().unwrap(), Path::new("/run/chsnap/share/web/binds/0"));
        assert_eq!(guest.root().as_ref().unwrap().path(), Path::new("/run/chsnap/share/web/rootfs"));
    }

    #[test]
    fn what_cannot_be_given_is_named() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 7] = [
            (|v| v["hooks"] = json!({"poststart": [{"path": "/bin/x"}]}), "OCI hooks"),
            (|v| v["linux"]["devices"] = json!([{"path": "/dev/kvm", "type": "c"}]), "/dev/kvm"),
            (|v| v["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "ipc"}]), "network namespace"),
            (|v| v["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"})), "user namespace"),
            (|v| v["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"), "PID namespace"),
            (|v| v["mounts"][0]["type"] = json!("nfs"), "\"nfs\""),
            (|v| v["process"]["args"] = json!([]), "process.args"),
        ];
        for (change, expected) in cases {
            let error = Plan::of("web", spec(change)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn host_confinement_is_reported_as_ignored() {
        let plan = Plan::of("web", spec(|v| v["process"]["apparmorProfile"] = json!("x"))).unwrap();
        assert_eq!(plan.ignored, ["process.apparmorProfile"]);
    }
}
