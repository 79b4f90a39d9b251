//! What a case runs in, and what runs its containers.

use std::{
    ffi::OsStr,
    fmt, fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Result, ensure};

use crate::{Container, Containerd, Ctr, Process, Run, Settings, Tools, patience, proc, ways, ways::Way};

/// What runs the containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// chsnap with QEMU.
    Qemu,
    /// chsnap with Cloud Hypervisor.
    CloudHypervisor,
    /// No VMM at all: the reference that chsnap is compared with.
    Runc,
}

impl fmt::Display for Vmm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Runc => "runc",
        })
    }
}

/// What a case runs in.
#[derive(Debug)]
pub struct Env {
    /// The containerd.
    pub daemon: Arc<Containerd>,
    /// What runs the containers.
    pub vmm: Vmm,
    /// How ordinary ones start.
    pub way: Way,
    /// The case's own directory on the host, removed after it.
    pub dir: PathBuf,
}

static NUMBER: AtomicU32 = AtomicU32::new(1);

/// One that no other case's directory, container or process has.
pub(crate) fn number() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// Those of ordinary pods, for all containerds: in the directory of the first, which is there for as long as any.
fn snapshots() -> PathBuf {
    Tools::get().target.join(format!("tests/{}-1/snapshots", std::process::id()))
}

impl Env {
    /// A case's surroundings.
    pub fn new(daemon: Arc<Containerd>, vmm: Vmm, way: Way) -> Result<Self> {
        let dir = daemon.root.join(format!("case-{}", number()));
        fs::create_dir_all(&dir)?;
        let way = if vmm == Vmm::Runc { Way::Direct } else { way };
        Ok(Self { daemon, vmm, way, dir })
    }

    /// containerd's client.
    #[must_use]
    pub fn ctr(&self) -> &Ctr {
        &self.daemon.ctr
    }

    /// Whether the containers have a kernel of their own.
    #[must_use]
    pub fn is_vm(&self) -> bool {
        self.vmm != Vmm::Runc
    }

    /// The configuration with which a container of this case starts.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let tools = Tools::get();
        let accelerator = std::env::var("CHSNAP_TEST_ACCELERATOR").unwrap_or_else(|_| "auto".into());
        let settings = Settings::default()
            .set("vmm", "choice", format!("\"{}\"", self.vmm))
            .set("vmm", "accelerator", format!("\"{accelerator}\""))
            .set("deadlines", "boot", (60 * patience()).to_string())
            .set("deadlines", "agent_call", (10 * patience()).to_string())
            .set("deadlines", "restore", (10 * patience()).to_string())
            // Whoever wants templates built beside its pods says so; the others are not to wait for the CPU.
            .set("snapshot", "mode", if self.way == Way::Direct { "\"off\"" } else { "\"auto\"" })
            .set("snapshot", "builders", "0")
            .set("snapshot", "pod_env", ways::POD_ENV)
            .path("snapshot", "ctr", self.ctr().program())
            .path("snapshot", "dir", snapshots())
            .path("vmm", "qemu", &tools.qemu)
            .path("guest", "kernel", &tools.kernel)
            .path("guest", "initramfs", &tools.initramfs)
            .path("share", "virtiofsd", &tools.virtiofsd)
            .path("state", "dir", self.daemon.pods());
        let settings = match &tools.cloud_hypervisor {
            Some(path) => settings.path("vmm", "cloud_hypervisor", path),
            None => settings,
        };
        match std::env::var("CHSNAP_TEST_MEMORY_RESTORE") {
            Ok(how) => settings.set("vmm", "memory_restore", format!("\"{how}\"")),
            Err(_) => settings,
        }
    }

    /// A container that is not there yet.
    #[must_use]
    pub fn container(&self) -> Container<'_> {
        Container::new(self, format!("c{}", number()))
    }

    /// `chsnap` with this case's configuration.
    pub fn chsnap<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Run> {
        self.chsnap_with(&self.settings(), args)
    }

    /// `chsnap` with another configuration.
    pub fn chsnap_with<S: AsRef<OsStr>>(&self, settings: &Settings, args: impl IntoIterator<Item = S>) -> Result<Run> {
        let config = settings.write(&self.dir)?;
        let run = Run::new(Tools::get().bin.join("chsnap")).args(args).arg("--config").arg(config);
        Ok(run.env("PATH", proc::path(&self.daemon.run)).env(proc::MARK, &self.daemon.run))
    }

    /// The processes of this containerd's containers whose program's name contains `name`.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<Process> {
        proc::marked(&self.daemon.run).into_iter().filter(|p| p.is(name)).collect()
    }

    /// The only process of that name.
    pub fn process(&self, name: &str) -> Result<Process> {
        let mut found = self.processes(name);
        // virtiofsd runs as two: a parent that waits, and the one in the namespaces.
        ensure!(!found.is_empty(), "no process {name}");
        Ok(found.remove(0))
    }

    /// The name of this VMM's process.
    #[must_use]
    pub fn vmm_name(&self) -> &'static str {
        match self.vmm {
            Vmm::Qemu => "qemu-system",
            Vmm::CloudHypervisor => "cloud-hypervisor",
            Vmm::Runc => "runc",
        }
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
