//! QEMU: the portable driver. It runs everywhere, on KVM where that works and by translation where not.
//!
//! Nothing of it has a name in the file system: the agent channel and QMP are socket pairs made before the fork,
//! the console is a pipe. So nothing has to be polled for, and nothing is left when it dies.

mod args;
mod migration;
mod qmp;
mod queues;
#[cfg(test)]
mod tests;

use std::{
    fs,
    io::{self, Read},
    os::{fd::OwnedFd, unix::net::UnixStream as StdStream},
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use tokio::{net::UnixStream, sync::watch};

use self::{
    args::{Fds, Host},
    qmp::{Qmp, Version},
};
use super::{
    Accelerator, BootError, Channel, ChannelError, Driver, Rung, SnapshotError, Vm, VmExit, VmSpec, VmmKind,
    arch::Arch,
    kvm,
    process::{Launch, Leash, Process},
};
use crate::child;

/// Older ones refuse to snapshot a virtiofs device, and their emulation corrupts a nested AMD guest.
pub const OLDEST: Version = Version { major: 10, minor: 0, micro: 0 };
/// The name of its program.
pub const PROGRAM: &str = args::program(Arch::HOST);

/// Starts machines with QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// Its program.
    pub program: PathBuf,
    /// On what the guest runs.
    pub accelerator: Accelerator,
}

#[derive(Debug)]
struct QemuVm {
    process: Process,
    /// The host's end of the agent channel. It stays open, so the port looks connected for as long as the VM lives.
    agent: StdStream,
    qmp: Qmp,
}

#[async_trait]
impl Driver for Qemu {
    fn kind(&self) -> VmmKind {
        VmmKind::Qemu
    }

    fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    fn program(&self) -> &Path {
        &self.program
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Box<dyn Vm>, BootError> {
        self.start(spec, None).await
    }

    async fn restore(&self, spec: &VmSpec, from: &Path) -> Result<Box<dyn Vm>, BootError> {
        self.start(spec, Some(from)).await
    }
}

impl Qemu {
    async fn start(&self, spec: &VmSpec, from: Option<&Path>) -> Result<Box<dyn Vm>, BootError> {
        let (agent, agent_fd) = socket_pair("agent")?;
        let (control, control_fd) = socket_pair("QMP")?;
        let control = UnixStream::from_std(control).map_err(|source| BootError::Socket { what: "QMP", source })?;
        let fds = Fds { agent: child::fd_number(&agent_fd), qmp: child::fd_number(&control_fd) };
        let cpuinfo = match self.accelerator {
            Accelerator::Tcg => cpuinfo().unwrap_or_default(),
            Accelerator::Kvm => String::new(),
        };
        let host = Host { pmu_known: spec.rung != Rung::Standard && kvm::has_pmu(), cpuinfo };
        let launch = Launch {
            program: &self.program,
            args: args::args(spec, Arch::HOST, self.accelerator, &host, fds, from.is_some()),
            fds: vec![agent_fd, control_fd],
            cgroups: &spec.cgroups,
            network: spec.network.as_deref(),
            filter: None,
        };
        let (qmp, listener) = Qmp::start(control, spec.deadline);
        let by_guest = |_| async { listener.await.unwrap_or(false) };
        let process = Process::start(launch, Leash::new(), by_guest)?;
        let version = match qmp.negotiate().await {
            Ok(version) => version,
            Err(error) => return Err(process.gave_up(&self.program, error, advice).await),
        };
        if version < OLDEST {
            process.kill().await;
            let (found, needed) = (version.to_string(), OLDEST.to_string());
            return Err(BootError::Version { program: self.program.clone(), found, needed });
        }
        if let Some(from) = from
            && let Err(error) = migration::load(&qmp, from).await
        {
            return Err(process.gave_up(&self.program, error, advice).await);
        }
        Ok(Box::new(QemuVm { process, agent, qmp }))
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn channel(&self) -> Result<Box<dyn Channel>, ChannelError> {
        let stream = self.agent.try_clone().and_then(UnixStream::from_std);
        Ok(Box::new(stream.map_err(ChannelError::Duplicate)?))
    }

    fn exited(&self) -> watch::Receiver<Option<VmExit>> {
        self.process.exited()
    }

    fn console(&self) -> String {
        self.process.console()
    }

    async fn queues(&self) -> String {
        queues::describe(&self.qmp).await
    }

    async fn snapshot(&self, into: &Path) -> Result<(), SnapshotError> {
        match migration::save(&self.qmp, into).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.process.not_saved(error).await),
        }
    }

    async fn kill(&self) {
        self.process.kill().await;
    }
}

/// What the host says of its first CPU, without having it ask all the others, which takes long where there are many.
fn cpuinfo() -> io::Result<String> {
    let mut first = Vec::new();
    fs::File::open("/proc/cpuinfo")?.take(4096).read_to_end(&mut first)?;
    Ok(String::from_utf8_lossy(&first).into_owned())
}

/// This side's end, not blocking, and the one that QEMU inherits.
fn socket_pair(what: &'static str) -> Result<(StdStream, OwnedFd), BootError> {
    let pair = || -> io::Result<_> {
        let (ours, theirs) = StdStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((ours, theirs.into()))
    };
    pair().map_err(|source| BootError::Socket { what, source })
}

/// What to do about the usual reasons. QEMU's own text says what is wrong, seldom what to do.
fn advice(said: &str) -> &'static str {
    const KNOWN: [(&str, &str); 7] = [
        ("KVM kernel module", "; load the kvm module and give access to /dev/kvm, or set accelerator = \"tcg\""),
        ("failed to initialize kvm", "; KVM does not work on this host: set accelerator = \"tcg\""),
        ("Cannot allocate memory", "; the host cannot give that much memory: lower the VM's memory"),
        ("cannot set up guest memory", "; the host cannot give that much memory: lower the VM's memory"),
        // What arm64's KVM has it say.
        ("but memory exceeds it by", "; no such machine has that much memory: lower the VM's memory"),
        ("SMP CPUs", "; lower the number of vCPUs"),
        ("could not load kernel", "; the kernel must be an ELF vmlinux or an arm64 Image"),
    ];
    KNOWN.iter().find(|(text, _)| said.contains(text)).map_or("", |(_, advice)| advice)
}
