//! Divides a container's OCI specification between host and guest.
//!
//! The host mounts the root and what is bound into it; the guest does the rest. What neither can do is refused here,
//! before anything has been started.

use std::{
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use chsnap_protocol::{NOTIFY_SOCKET, PUBLIC_MOUNT, PYTHON_DIR, SHARE_MOUNT};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use thiserror::Error;

use super::features;
use crate::{
    config::Ready,
    share::{self, Bind, Mountpoint},
};

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
    /// A file of the host's whose file system is stuck.
    #[error("the mount source {path:?} did not answer within {seconds} s ([deadlines] boot): its file system is stuck")]
    Unanswered {
        /// Which.
        path: PathBuf,
        /// The deadline.
        seconds: f32,
    },
    /// A part that must be there.
    #[error("the OCI specification has no {0}")]
    Missing(&'static str),
    /// It is not said what to run.
    #[error(
        "there is nothing to run (process.args): name a command after the container's id, or give its image one \
         (chsnap image import --cmd)"
    )]
    NoProgram,
    /// It cannot be written for the guest.
    #[error("the OCI specification cannot be passed on")]
    Json(#[from] serde_json::Error),
}

/// A specification that can be honoured.
#[derive(Debug)]
pub struct Plan {
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
    /// The container's root, as the guest sees it.
    pub root: PathBuf,
    /// Bound into the root on the host.
    pub binds: Vec<Bind>,
    /// Bound beside the root on the host, and from there by the guest: their places lie below a mount of the guest's, or
    /// they have options that only the guest can see to.
    pub staged: Vec<Bind>,
    /// Where the guest mounts something.
    pub mountpoints: Vec<Mountpoint>,
    /// For the agent.
    pub for_guest: Vec<Mount>,
}

/// Annotations that name the pod a container belongs to, as CRI implementations set them.
const POD_ANNOTATIONS: [&str; 2] = ["io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];

/// The pod that a specification says its container belongs to.
pub(crate) fn pod_of(spec: &Spec) -> Option<&str> {
    let annotations = spec.annotations().as_ref()?;
    POD_ANNOTATIONS.iter().find_map(|name| annotations.get(*name)).map(String::as_str)
}

/// The network namespace that a specification gives its container.
pub(crate) fn network(spec: &Spec) -> Option<&Path> {
    let mut all = spec.linux().as_ref()?.namespaces().iter().flatten();
    all.find(|one| one.typ() == LinuxNamespaceType::Network)?.path().as_deref()
}

/// File systems that the guest mounts itself.
const GUEST_TYPES: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

/// shm_overview(7)
const SHARED_MEMORY: &str = "/dev/shm";

/// The longest that a kernel takes, and a DNS label may be.
const MAX_HOSTNAME: usize = 63;

impl Plan {
    /// Whether something of the host's is bound into the root, or beside it.
    #[must_use]
    pub fn has_host_files(&self) -> bool {
        self.mounts.iter().any(|mount| matches!(mount, Wanted::Bind(_)))
    }

    /// Where something of the host's is to be bound, as it is written.
    pub fn bound(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().filter_map(|mount| match mount {
            Wanted::Bind(bind) => Some(bind.destination.as_path()),
            Wanted::Guest(_) => None,
        })
    }

    /// Whether it is said to be a pod's, where there may be others.
    #[must_use]
    pub fn in_a_pod(&self) -> bool {
        pod_of(&self.spec).is_some()
    }

    /// Judges `spec` of `container`.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn of(container: &str, mut spec: Spec) -> Result<Self, PlanError> {
        features::check(&spec)?;
        let readonly = spec.root().as_ref().ok_or(PlanError::Missing("root"))?.readonly().unwrap_or(false);
        let process = spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(PlanError::NoProgram);
        }
        let terminal = process.terminal().unwrap_or(false);
        let ignored = features::ignored(&spec);
        let mounts = spec.mounts().clone().unwrap_or_default().into_iter().map(wanted).collect::<Result<_, _>>()?;
        if spec.hostname().as_ref().is_none_or(String::is_empty) {
            // runc would leave the host's name there, which is not the guest's.
            spec.set_hostname(Some(container.chars().take(MAX_HOSTNAME).collect()));
        }
        if let Some(root) = spec.root_mut() {
            // The host closes it.
            root.set_readonly(Some(false));
        }
        Ok(Self { readonly, terminal, ignored, spec, mounts })
    }

    /// What a process that can be saved finds in its environment, in every way of starting it.
    #[must_use]
    pub fn with_ready(mut self, ready: Option<&Ready>) -> Self {
        let (Some(ready), Some(process)) = (ready, self.spec.process_mut()) else { return self };
        let mut env = process.env().clone().unwrap_or_default();
        let python = format!("{PUBLIC_MOUNT}/{PYTHON_DIR}");
        match env.iter_mut().find(|variable| variable.starts_with("PYTHONPATH=")) {
            Some(path) if path.contains(&python) => {}
            // Before the image's own: what is customised there is done as well, from ours.
            Some(path) => *path = path.replacen('=', &format!("={python}:"), 1),
            None => env.push(format!("PYTHONPATH={python}")),
        }
        if *ready == Ready::Notify {
            env.retain(|variable| !variable.starts_with("NOTIFY_SOCKET="));
            env.push(format!("NOTIFY_SOCKET={PUBLIC_MOUNT}/{NOTIFY_SOCKET}"));
        }
        process.set_env(Some(env));
        self
    }

    /// Divides the mounts of a container whose directory in the share is `home`. `resolve` tells where a place leads in the container's root, and is told where the guest
    /// will have mounted something by then: `/var/run/x` may well be below a tmpfs on `/run`.
    ///
    /// # Errors
    /// Those of `resolve`.
    pub fn divide<E>(
        &self,
        home: &str,
        mut resolve: impl FnMut(&Path, &[PathBuf]) -> Result<PathBuf, E>,
    ) -> Result<Division, E> {
        let home = Path::new(SHARE_MOUNT).join(home);
        let mut division = Division { root: home.join("rootfs"), ..Division::default() };
        let mut hidden: Vec<PathBuf> = Vec::new();
        for wanted in &self.mounts {
            let written = match wanted {
                Wanted::Bind(bind) => &bind.destination,
                Wanted::Guest(m) => m.destination(),
            };
            let destination = resolve(written, &hidden)?;
            let below = hidden.iter().any(|place| destination.starts_with(place));
            // Below a mount of the guest's, the guest makes the place itself.
            let mut guest_mounts_there = |is_dir| {
                if !below {
                    hidden.push(destination.clone());
                    division.mountpoints.push(Mountpoint { path: destination.clone(), is_dir });
                }
            };
            match wanted {
                Wanted::Bind(bind) if below || !share::for_guest(&bind.options).is_empty() => {
                    guest_mounts_there(bind.source.is_dir());
                    let place = PathBuf::from(format!("binds/{}", division.staged.len()));
                    let source = home.join(&place);
                    division.staged.push(Bind { destination: place, ..bind.clone() });
                    division.for_guest.push(bind_in_guest(destination, source, &bind.options));
                }
                Wanted::Bind(bind) => division.binds.push(Bind { destination, ..bind.clone() }),
                Wanted::Guest(m) => {
                    guest_mounts_there(true);
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
        if let Some(root) = spec.root_mut() {
            root.set_path(division.root.clone());
        }
        Ok(serde_json::to_vec(&spec)?)
    }

    /// The specification, as it is but for what the host has mounted.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The container's limits, as JSON; empty where it has none.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn resources_json(&self) -> Result<Vec<u8>, PlanError> {
        let resources = self.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        Ok(resources.map(serde_json::to_vec).transpose()?.unwrap_or_default())
    }

    /// Those of the mounts that the guest makes where nothing of the host's is bound: there is shared memory in any case, which
    /// Kubernetes binds of the pod's.
    pub fn guest_mounts(&self) -> impl Iterator<Item = Mount> {
        self.mounts.iter().filter_map(|wanted| match wanted {
            Wanted::Guest(mount) => Some(mount.clone()),
            Wanted::Bind(bind) if bind.destination == Path::new(SHARED_MEMORY) => Some(shared_memory()),
            Wanted::Bind(_) => None,
        })
    }
}

impl Division {
    /// Where in the container something of the host's is bound, whoever does that.
    pub fn bound(&self) -> impl Iterator<Item = &Path> {
        let by_guest = self.guest_binds().map(Mount::destination);
        self.binds.iter().map(|bind| &bind.destination).chain(by_guest).map(PathBuf::as_path)
    }

    fn guest_binds(&self) -> impl Iterator<Item = &Mount> {
        self.for_guest.iter().filter(|mount| is_bind(mount))
    }

    /// The binds that the guest has to make, as JSON.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn staged_json(&self) -> Result<Vec<u8>, PlanError> {
        Ok(serde_json::to_vec(&self.guest_binds().collect::<Vec<_>>())?)
    }
}

/// As containerd's client and Kubernetes make it.
fn shared_memory() -> Mount {
    let options = ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"];
    let mut mount = Mount::default();
    mount.set_destination(SHARED_MEMORY.into()).set_typ(Some("tmpfs".into())).set_source(Some("shm".into()));
    mount.set_options(Some(options.map(str::to_owned).into()));
    mount
}

/// By its type, or by an option whatever the type is.
pub(super) fn is_bind(m: &Mount) -> bool {
    m.typ().as_deref() == Some("bind") || m.options().iter().flatten().any(|o| o == "bind" || o == "rbind")
}

fn wanted(m: Mount) -> Result<Wanted, PlanError> {
    let options = m.options().clone().unwrap_or_default();
    let fstype = m.typ().as_deref().unwrap_or_default();
    if is_bind(&m) {
        let source = m.source().clone().ok_or(PlanError::Missing("source of a bind mount"))?;
        if let Some(word) = share::unknown_of_bind(&options) {
            return Err(PlanError::Unsupported {
                what: format!("the mount option {word:?} of {:?}", m.destination()),
                hint: "use ro, rro, nosuid, nodev, noexec and those of times; nothing of the guest's is seen by the host",
            });
        }
        if let Some(kind) = of_the_host(&source) {
            return Err(PlanError::Unsupported {
                what: format!("a bind of the {kind} {source:?} of the host on {:?}", m.destination()),
                hint: "its other end is the host's kernel, which the guest does not share; use files, directories or a port",
            });
        }
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

/// What a file is that would lead to nowhere in the guest. Devices of the kind of /dev/null (mem, major number 1) are the same
/// everywhere.
fn of_the_host(path: &Path) -> Option<&'static str> {
    let meta = std::fs::metadata(path).ok()?;
    let kind = meta.file_type();
    [
        (kind.is_socket(), "socket"),
        (kind.is_fifo(), "fifo"),
        (kind.is_block_device(), "block device"),
        (kind.is_char_device() && libc::major(meta.rdev()) != 1, "device"),
    ]
    .into_iter()
    .find_map(|(is, name)| is.then_some(name))
}

fn bind_in_guest(destination: PathBuf, source: PathBuf, options: &[String]) -> Mount {
    let read_only = share::is_read_only(options).then_some("ro");
    let kept = read_only.into_iter().chain(share::for_guest(options)).map(String::from);
    let mut m = Mount::default();
    m.set_destination(destination);
    m.set_typ(Some("bind".into()));
    m.set_source(Some(source));
    m.set_options(Some([String::from("rbind")].into_iter().chain(kept).collect()));
    m
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
