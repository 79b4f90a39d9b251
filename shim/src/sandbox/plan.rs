//! Divides a container's OCI specification between host and guest.
//!
//! The host mounts the root and what is bound into it; the guest does the rest. What neither can do is refused here,
//! before anything has been started.

use std::path::{Path, PathBuf};

use chsnap_protocol::SHARE_MOUNT;
use oci_spec::runtime::{Mount, Spec};
use thiserror::Error;

use super::features;
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
}

/// A specification that can be honoured.
#[derive(Debug)]
pub struct Plan {
    container: String,
    /// The root is closed for writing.
    pub readonly: bool,
    /// The container's terminal.
    pub terminal: bool,
    /// Asked for, but left out: the VM does its work.
    pub ignored: Vec<&'static str>,
    /// For the agent, but for the mounts.
    spec: Spec,
    /// In the specification's order.
    mounts: Vec<Wanted>,
}

#[derive(Debug)]
enum Wanted {
    /// Of something on the host.
    Bind(Bind),
    /// Of something that the guest makes.
    Guest(Mount),
}

/// What host and guest do for one container.
#[derive(Debug, Default)]
pub struct Division {
    /// Bound into the root on the host.
    pub binds: Vec<Bind>,
    /// Bound beside the root on the host, and from there by the guest: their places lie below a mount of the guest's.
    pub staged: Vec<Bind>,
    /// Where the guest mounts something.
    pub mountpoints: Vec<PathBuf>,
    /// For the agent.
    pub for_guest: Vec<Mount>,
}

/// File systems that the guest mounts itself.
const GUEST_TYPES: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// The longest that a kernel takes, and a DNS label may be.
const MAX_HOSTNAME: usize = 63;

impl Plan {
    /// Judges `spec` of `container`.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn of(container: &str, mut spec: Spec) -> Result<Self, PlanError> {
        features::check(&spec)?;
        let readonly = spec.root().as_ref().ok_or(PlanError::Missing("root"))?.readonly().unwrap_or(false);
        let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(PlanError::Missing("process.args"));
        }
        let terminal = process.terminal().unwrap_or(false);
        let ignored = features::ignored(&spec);
        let mounts = spec.mounts().clone().unwrap_or_default().into_iter().map(wanted).collect::<Result<_, _>>()?;
        if spec.hostname().as_ref().is_none_or(String::is_empty) {
            // runc would leave the host's name there, which is not the guest's.
            spec.set_hostname(Some(container.chars().take(MAX_HOSTNAME).collect()));
        }
        if let Some(root) = spec.root_mut() {
            root.set_path(guest_dir(container).join("rootfs"));
            // The host closes it.
            root.set_readonly(Some(false));
        }
        Ok(Self { container: container.into(), readonly, terminal, ignored, spec, mounts })
    }

    /// Divides the mounts. `resolve` tells where a place leads in the container's root, and is told where the guest
    /// will have mounted something by then: `/var/run/x` may well be below a tmpfs on `/run`.
    ///
    /// # Errors
    /// Those of `resolve`.
    pub fn divide<E>(&self, mut resolve: impl FnMut(&Path, &[PathBuf]) -> Result<PathBuf, E>) -> Result<Division, E> {
        let mut division = Division::default();
        for wanted in &self.mounts {
            let written = match wanted {
                Wanted::Bind(bind) => &bind.destination,
                Wanted::Guest(m) => m.destination(),
            };
            let destination = resolve(written, &division.mountpoints)?;
            let below = division.mountpoints.iter().any(|p| destination.starts_with(p));
            match wanted {
                Wanted::Bind(bind) if below => {
                    let place = PathBuf::from(format!("binds/{}", division.staged.len()));
                    let source = guest_dir(&self.container).join(&place);
                    division.staged.push(Bind { destination: place, ..bind.clone() });
                    division.for_guest.push(bind_in_guest(destination, source, &bind.options));
                }
                Wanted::Bind(bind) => division.binds.push(Bind { destination, ..bind.clone() }),
                Wanted::Guest(m) => {
                    // Below a mount of the guest's, the guest makes the place itself.
                    if !below {
                        division.mountpoints.push(destination.clone());
                    }
                    let mut m = m.clone();
                    m.set_destination(destination);
                    division.for_guest.push(m);
                }
            }
        }
        Ok(division)
    }

    /// The specification for the agent.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn spec_json(&self, division: &Division) -> Result<Vec<u8>, PlanError> {
        let mut spec = self.spec.clone();
        spec.set_mounts(Some(division.for_guest.clone()));
        Ok(serde_json::to_vec(&spec)?)
    }
}

fn wanted(m: Mount) -> Result<Wanted, PlanError> {
    let options = m.options().clone().unwrap_or_default();
    let fstype = m.typ().as_deref().unwrap_or_default();
    if fstype == "bind" || options.iter().any(|o| o == "bind" || o == "rbind") {
        let source = m.source().clone().ok_or(PlanError::Missing("source of a bind mount"))?;
        return Ok(Wanted::Bind(Bind { source, destination: m.destination().clone(), options }));
    }
    if GUEST_TYPES.contains(&fstype) {
        return Ok(Wanted::Guest(m));
    }
    Err(PlanError::Unsupported {
        what: format!("a mount of type {fstype:?} on {:?}", m.destination()),
        hint: "use bind, tmpfs, proc, sysfs, devpts, mqueue or cgroup",
    })
}

/// A container's directory of the share, as the guest sees it.
fn guest_dir(container: &str) -> PathBuf {
    Path::new(SHARE_MOUNT).join(container)
}

fn bind_in_guest(destination: PathBuf, source: PathBuf, options: &[String]) -> Mount {
    let kept = options.iter().filter(|o| matches!(o.as_str(), "ro" | "nosuid" | "nodev" | "noexec")).cloned();
    let mut m = Mount::default();
    m.set_destination(destination);
    m.set_typ(Some("bind".into()));
    m.set_source(Some(source));
    m.set_options(Some([String::from("rbind")].into_iter().chain(kept).collect()));
    m
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

    fn divide(plan: &Plan) -> Division {
        plan.divide(|place, _| Ok::<_, ()>(place.into())).unwrap()
    }

    #[test]
    fn mounts_are_divided() {
        let whole = Plan::of("web", spec(|_| ())).unwrap();
        assert!(whole.readonly);
        let plan = divide(&whole);
        assert_eq!(plan.binds.len(), 1);
        assert_eq!(plan.binds[0].destination, Path::new("/etc/hosts"));
        assert_eq!(plan.staged.len(), 1, "what the guest's tmpfs would hide is bound by the guest");
        assert_eq!(plan.mountpoints, [Path::new("/proc"), Path::new("/run")]);
        let guest: Spec = serde_json::from_slice(&whole.spec_json(&plan).unwrap()).unwrap();
        assert_eq!(guest.hostname().as_deref(), Some("web"));
        let mounts = guest.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 4);
        assert_eq!(mounts[3].source().as_ref().unwrap(), Path::new("/run/chsnap/share/web/binds/0"));
        assert_eq!(guest.root().as_ref().unwrap().path(), Path::new("/run/chsnap/share/web/rootfs"));
    }

    #[test]
    fn a_place_is_judged_by_where_it_leads() {
        let mounts = json!([
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/var/run/secrets", "type": "bind", "source": "/host/s", "options": ["rbind", "ro"]},
            {"destination": "/var/run/lock", "type": "tmpfs", "source": "tmpfs"},
        ]);
        let whole = Plan::of("web", spec(|v| v["mounts"] = mounts)).unwrap();
        let plan = whole.divide(|place, hidden| {
            assert!(place == Path::new("/run") || hidden == [PathBuf::from("/run")]);
            Ok::<_, ()>(place.strip_prefix("/var").map_or(place.into(), |rest| Path::new("/").join(rest)))
        });
        let plan = plan.unwrap();
        assert_eq!((plan.binds.len(), plan.staged.len()), (0, 1), "the tmpfs would hide it");
        assert_eq!(plan.mountpoints, [Path::new("/run")]);
        let places: Vec<_> = plan.for_guest.iter().map(|m| m.destination().to_str().unwrap()).collect();
        assert_eq!(places, ["/run", "/run/secrets", "/run/lock"]);
        assert_eq!(plan.for_guest[1].options().as_deref().unwrap(), ["rbind", "ro"]);
    }

    #[test]
    fn a_long_id_becomes_a_name_that_a_kernel_takes() {
        let id = "x".repeat(76);
        let plan = Plan::of(&id, spec(|_| ())).unwrap();
        assert_eq!(plan.spec.hostname().as_deref().unwrap().len(), 63);
    }

    #[test]
    fn what_cannot_be_given_is_named() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 16] = [
            (|v| v["hooks"] = json!({"poststart": [{"path": "/bin/x"}]}), "OCI hooks"),
            (|v| v["linux"]["devices"] = json!([{"path": "/dev/kvm", "type": "c"}]), "/dev/kvm"),
            (|v| v["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "ipc"}]), "network namespace"),
            (|v| v["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"})), "user namespace"),
            (|v| v["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"), "PID namespace"),
            (|v| v["linux"]["namespaces"][3]["path"] = json!("/proc/1/ns/mnt"), "another mount namespace"),
            (|v| v["linux"]["intelRdt"] = json!({"closID": "gold"}), "linux.intelRdt"),
            (|v| v["linux"]["personality"] = json!({"domain": "LINUX32"}), "linux.personality"),
            (|v| v["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1}), "process.scheduler"),
            (
                |v| v["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 1}),
                "process.ioPriority",
            ),
            (|v| v["linux"]["resources"] = json!({"cpu": {"cpus": "0-1"}}), "cpu.cpus"),
            (|v| v["linux"]["resources"] = json!({"cpu": {"realtimeRuntime": 950_000}}), "cpu.realtimeRuntime"),
            (|v| v["linux"]["resources"] = json!({"blockIO": {"weight": 10}}), "resources.blockIO"),
            (|v| v["linux"]["resources"] = json!({"network": {"classID": 7}}), "resources.network"),
            (|v| v["mounts"][0]["type"] = json!("nfs"), "\"nfs\""),
            (|v| v["process"]["args"] = json!([]), "process.args"),
        ];
        for (change, expected) in cases {
            let error = Plan::of("web", spec(change)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_no_reason_to_refuse() {
        let nothing = json!({
            "cpu": {"shares": 2, "cpus": "", "mems": "", "realtimeRuntime": 0},
            "blockIO": {},
            "network": {},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
        });
        Plan::of("web", spec(|v| v["linux"]["resources"] = nothing)).unwrap();
    }

    #[test]
    fn a_sandbox_s_namespaces_are_no_reason_to_refuse() {
        let sandbox = |v: &mut serde_json::Value| {
            v["linux"]["namespaces"][1]["path"] = json!("/run/netns/cni-1");
            v["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/ipc");
            v["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "uts", "path": "/proc/1/ns/uts"}));
            v["linux"]["personality"] = json!({"domain": "LINUX"});
        };
        Plan::of("web", spec(sandbox)).unwrap();
    }

    #[test]
    fn host_confinement_is_reported_as_ignored() {
        let plan = Plan::of("web", spec(|v| v["process"]["apparmorProfile"] = json!("x"))).unwrap();
        assert_eq!(plan.ignored, ["process.apparmorProfile"]);
    }
}
