//! The protocol between the shim and the agent: one `.proto`, and how a session on the byte channel begins.
//!
//! The channel is whatever the VMM offers: a vsock connection under Cloud Hypervisor, a virtio-serial port under
//! QEMU. Both ends see a plain byte stream, see [`session`].

pub mod session;

/// Generated from `proto/agent.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
mod r#gen {
    include!(concat!(env!("OUT_DIR"), "/gen/mod.rs"));
}

pub use r#gen::{agent, agent_ttrpc};

/// Spoken by this build. Raised when an old agent would misunderstand a new shim.
pub const PROTOCOL_VERSION: u32 = 1;

/// The tag of the virtiofs device.
pub const SHARE_TAG: &str = "chsnap";

/// Where the guest mounts the share. A container's root is `<SHARE_MOUNT>/<container id>/rootfs`.
pub const SHARE_MOUNT: &str = "/run/chsnap/share";

/// What every container of the guest sees, read-only, at [`PUBLIC_MOUNT`].
pub const PUBLIC_DIR: &str = "/run/chsnap/public";

/// Where a container sees [`PUBLIC_DIR`], if it has a `/dev` of the guest's.
pub const PUBLIC_MOUNT: &str = "/dev/chsnap";

/// In both: the UUID that a machine, booted or restored, shares with no other.
pub const EPOCH_FILE: &str = "epoch";

/// In both: a datagram socket for sd_notify(3).
pub const NOTIFY_SOCKET: &str = "notify";

/// In both: where processes register for hooks, see `docs/hooks.md`.
pub const HOOK_SOCKET: &str = "snapshot.sock";

/// In both: modules for Python.
pub const PYTHON_DIR: &str = "python";

/// The container's directory in the share, for the first one of a pod: the same in every pod, since a machine that is
/// restored looks for its files where they were. No container's id begins with a point.
pub const FIRST_HOME: &str = ".first";

/// The kernel's word for a guest whose share is mounted by `Resume` and not in the boot.
pub const SHARE_LATER: &str = "chsnap.share=later";

/// The least that `Resume` takes, bytes.
pub const MIN_ENTROPY: usize = 64;

/// Name of the virtio-serial port that carries the agent channel under QEMU.
pub const SERIAL_PORT: &str = "io.chsnap.agent";

/// vsock port on the host (CID 2) to which the agent connects where the guest has a vsock device.
pub const VSOCK_PORT: u32 = 1024;

/// Largest `data` of a stream message, bytes. Well below ttrpc's limit of 4 MiB a message.
pub const MAX_CHUNK: usize = 1 << 20;
