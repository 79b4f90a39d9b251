//! How the shim is set up: `/etc/chsnap/config.toml`, the `io.chsnap.*` annotations of one container, and the shape of
//! the machine that follows from both. `deploy/config.toml` documents every key; a test holds the two together.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

mod annotations;
mod error;
mod expose;
mod load;
mod ready;
mod shape;
mod values;
mod vmm;

pub use annotations::{Annotations, Overrides, SnapshotUse};
pub use error::{AnnotationError, ConfigError, Place, ShapeError};
pub use expose::Expose;
pub use load::DEFAULT_PATH;
pub use ready::Ready;
pub use shape::{Host, Shape};
pub use values::{Deadline, Size};
pub use vmm::{AcceleratorChoice, MemoryRestore, VmmChoice, VmmConfig};

/// The smallest memory a guest is given; the kernel and the agent need it before any container does.
pub const MIN_MEMORY: Size = Size::mib(64);

/// The whole configuration. Every key has a default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which VMM runs the guests. `vmm = "qemu"` is short for `[vmm] choice = "qemu"`.
    #[serde(deserialize_with = "vmm::choice_or_table")]
    pub vmm: VmmConfig,
    /// What the guests boot, and how large they are.
    pub guest: GuestConfig,
    /// How root file systems reach the guest.
    pub share: ShareConfig,
    /// How long to wait for what.
    pub deadlines: Deadlines,
    /// Logging.
    pub log: LogConfig,
    /// Where running pods are recorded.
    pub state: StateConfig,
    /// Where snapshots are kept.
    pub snapshot: SnapshotConfig,
}

/// `[guest]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestConfig {
    /// ELF vmlinux, or arm64 Image.
    pub kernel: PathBuf,
    /// Initial root file system with `vm_init.sh` and the agent.
    pub initramfs: PathBuf,
    /// Words appended to the kernel's command line.
    pub cmdline: String,
    /// vCPUs of a container that asks for none.
    pub default_vcpus: u32,
    /// Memory of a container that asks for none.
    pub default_memory: Size,
    /// What the guest itself needs, added to a container's memory limit together with a 64th of the limit.
    pub memory_overhead: Size,
    /// Most vCPUs a container gets; 0 is the number of host CPUs.
    pub max_vcpus: u32,
    /// Most memory a guest gets; 0 is the host's memory.
    pub max_memory: Size,
}

impl GuestConfig {
    /// The extra words for the kernel's command line.
    pub fn cmdline_words(&self) -> Vec<String> {
        self.cmdline.split_whitespace().map(str::to_owned).collect()
    }
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            kernel: PathBuf::from("/usr/lib/chsnap/vmlinux"),
            initramfs: PathBuf::from("/usr/lib/chsnap/initramfs"),
            cmdline: String::new(),
            default_vcpus: 1,
            default_memory: Size::mib(512),
            memory_overhead: Size::mib(96),
            max_vcpus: 0,
            max_memory: Size::ZERO,
        }
    }
}

/// `[share]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShareConfig {
    /// virtiofsd 1.14 or newer; else searched in PATH and in /usr/libexec.
    pub virtiofsd: Option<PathBuf>,
    /// What the guest may cache.
    pub cache: CacheMode,
}

/// How long the guest may believe what it has seen of the share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// As `always` where nobody but the guest writes, else as `revalidate`.
    #[default]
    Auto,
    /// Data is cached while a file is open, names for a second.
    Revalidate,
    /// Nothing is cached; writes of the host are seen at once.
    Never,
    /// Everything is cached; only where nothing but the guest writes to its files.
    Always,
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Revalidate => "revalidate",
            Self::Never => "never",
            Self::Always => "always",
        })
    }
}

/// `[deadlines]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// From the VMM's start until the agent answers.
    pub boot: Deadline,
    /// One call to the agent that is not a wait.
    pub agent_call: Deadline,
    /// From starting a restore until the restored guest is ready for its container.
    pub restore: Deadline,
    /// From the start of a template's process until it is ready to be saved.
    pub ready: Deadline,
    /// The hooks of a process, before it is saved and after it is restored.
    pub hooks: Deadline,
    /// From asking the guest to power off until its VMM is killed.
    pub stop: Deadline,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot: Deadline::secs(60),
            agent_call: Deadline::secs(10),
            restore: Deadline::secs(10),
            ready: Deadline::secs(60),
            hooks: Deadline::secs(10),
            stop: Deadline::secs(10),
        }
    }
}

/// `[log]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// The least severe message that is logged.
    pub level: LogLevel,
}

/// Severity of a log message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What was odd, and survived.
    Warn,
    /// What was done.
    #[default]
    Info,
    /// How it was done.
    Debug,
    /// Every call.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// Whether pods that do not say it themselves start from snapshots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotMode {
    /// Where there is one; and where there is none, one is built beside them.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// `[snapshot]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// Whether they are used and built.
    pub mode: SnapshotMode,
    /// Kept over a reboot, and written by nobody else.
    pub dir: PathBuf,
    /// What all of them may take on the disk.
    pub budget: Size,
    /// How many are built at once on this host, at most; 0 builds none beside pods.
    pub builders: u32,
    /// What a process may write to its root file system before it is saved.
    pub root_limit: Size,
    /// Variables of the environment that differ from pod to pod, beside those of Kubernetes services.
    pub pod_env: Vec<String>,
    /// containerd's client, which knows from which image a container was made.
    pub ctr: PathBuf,
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            mode: SnapshotMode::Auto,
            dir: PathBuf::from("/var/lib/chsnap/snapshots"),
            budget: Size::mib(20 << 10),
            builders: 1,
            root_limit: Size::mib(1 << 10),
            pod_env: vec!["HOSTNAME".into()],
            ctr: PathBuf::from("ctr"),
        }
    }
}

/// `[state]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StateConfig {
    /// One directory a pod, below its namespace; `host.json` keeps what was found out about the host.
    pub dir: PathBuf,
}

impl Default for StateConfig {
    fn default() -> Self {
        Self { dir: PathBuf::from("/run/chsnap") }
    }
}
