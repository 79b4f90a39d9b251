//! The machine: the trait every VMM driver fulfils, and the drivers. Nothing outside this room knows which VMM runs.

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};

mod arch;
mod cloud_hypervisor;
mod error;
mod kvm;
mod memory;
mod process;
mod qemu;
mod rung;
#[cfg(test)]
mod scenarios;
mod select;
mod survey;
#[cfg(test)]
mod testing;

pub(crate) use arch::Arch;
pub(crate) use cloud_hypervisor::{own_rungs, remove_leftovers};
pub use error::{BootError, ChannelError, ControlError, SnapshotError};
pub(crate) use memory::Memory;
pub use rung::Rung;
pub use select::{SelectError, Taken, select};
pub use survey::{Kvm, Problem, Program, Survey, survey};

/// Which VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// Cloud Hypervisor, v52 or newer; needs KVM.
    CloudHypervisor,
    /// QEMU 10 or newer; KVM or TCG.
    Qemu,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's KVM.
    Kvm,
    /// QEMU's own translation.
    Tcg,
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "qemu",
        })
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A machine to be started.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Kernel: an ELF vmlinux or an arm64 Image.
    pub kernel: PathBuf,
    /// Initial root file system with `vm_init.sh` and the agent.
    pub initramfs: PathBuf,
    /// Words appended to the driver's own kernel command line.
    pub cmdline: Vec<String>,
    /// virtiofsd's vhost-user socket; it listens already.
    pub share_socket: PathBuf,
    /// Directory for the VMM's sockets; exists, belongs to this VM alone, is removed by the caller.
    pub run_dir: PathBuf,
    /// cgroup directories (one on v2, one per controller on v1) that the VMM process joins before exec.
    pub cgroups: Vec<PathBuf>,
    /// The pod's network namespace, where it was given one. The VMM is in there, or in an empty one of its own: whoever
    /// asks for the network namespace of the task's process, as `ctr run --cni` does, must not find the host's.
    pub network: Option<PathBuf>,
    /// What the guest's CPUs do without.
    pub rung: Rung,
    /// The directory of a snapshot that will be taken, for a VMM that has to know before it confines itself.
    pub snapshot_dir: Option<PathBuf>,
    /// How long the VMM may take for any one thing it is told to do.
    pub deadline: Duration,
}

/// Why a VM is gone.
#[derive(Debug, Clone)]
pub struct VmExit {
    /// How the VMM process ended, e.g. `exit status: 1` or `signal: 9 (SIGKILL)`.
    pub status: String,
    /// True where the guest itself asked for the end (power off, or a panic with `panic=-1`).
    pub by_guest: bool,
    /// The last lines the VMM wrote to stderr.
    pub stderr: String,
    /// The last lines of the guest's console.
    pub console: String,
}

/// Bytes to and from the agent.
pub trait Channel: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Channel for T {}

/// A VMM that can start machines.
#[async_trait]
pub trait Driver: Send + Sync {
    /// Which one.
    fn kind(&self) -> VmmKind;
    /// What it runs the guest on.
    fn accelerator(&self) -> Accelerator;
    /// Its program.
    fn program(&self) -> &Path;
    /// Starts the VMM and the guest's CPUs. When it fails, nothing is left of either.
    async fn boot(&self, spec: &VmSpec) -> Result<Box<dyn Vm>, BootError>;
    /// Starts the VMM with the machine of a snapshot in `from`, which this driver made of a machine with the same
    /// `spec` but for sockets, directories and cgroups. Its CPUs run. When it fails, nothing is left.
    async fn restore(&self, spec: &VmSpec, from: &Path) -> Result<Box<dyn Vm>, BootError>;
}

/// A machine that runs. Dropping it kills the VMM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// The VMM's process.
    fn pid(&self) -> u32;
    /// The byte channel to the agent; waits until there is one. The caller bounds the wait, and watches [`Vm::exited`].
    async fn channel(&self) -> Result<Box<dyn Channel>, ChannelError>;
    /// Becomes `Some` once the VMM has ended and been reaped.
    fn exited(&self) -> watch::Receiver<Option<VmExit>>;
    /// The last lines of the guest's console, bounded, printable.
    fn console(&self) -> String;
    /// What lies in the queues of its devices, where the VMM can tell.
    async fn queues(&self) -> String {
        String::new()
    }
    /// Stops the guest's CPUs and writes the machine into the directory that its [`VmSpec::snapshot_dir`] named. The
    /// machine does not go on from there: it is to be killed.
    async fn snapshot(&self, into: &Path) -> Result<(), SnapshotError>;
    /// Ends the VMM at once and waits for it.
    async fn kill(&self);
}
