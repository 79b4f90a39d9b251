//! Cloud Hypervisor: the main driver, where KVM runs guests.
//!
//! The API's socket is made and connected to before the VMM runs, and its name removed at once: there is nothing to
//! poll for, and nobody else to connect. The agent's is the other way round: the guest connects to port 1024 of
//! the host, which Cloud Hypervisor turns into a connection to `<vsock socket>_1024`, where this driver listens.

mod api;
mod events;
mod machine;
mod mask;
mod own;
mod snapshot;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use chsnap_protocol::VSOCK_PORT;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
};

use self::api::Api;
pub use self::{own::rungs as own_rungs, snapshot::remove_leftovers};
use super::{
    Accelerator, BootError, Channel, ChannelError, ControlError, Driver, Rung, SnapshotError, Vm, VmExit, VmSpec,
    VmmKind,
    arch::Arch,
    process::{Launch, Leash, Process},
};
use crate::{child, config::MemoryRestore};

/// The name of its program.
pub const PROGRAM: &str = "cloud-hypervisor";
/// The first with everything that a restore needs.
pub const OLDEST: (u64, u64) = (52, 0);

/// The vsock's name in the pod's directory; with the port's number it is the longest there, see `sandbox/dir.rs`.
const VSOCK: &str = "vsock";

/// Starts machines with Cloud Hypervisor.
#[derive(Debug, Clone)]
pub struct CloudHypervisor {
    /// Its program.
    pub program: PathBuf,
    /// The rungs whose masks it has options for; those of others are put upon it from outside.
    pub own_rungs: BTreeSet<Rung>,
    /// When it reads a snapshot's memory.
    pub memory_restore: MemoryRestore,
}

#[derive(Debug)]
struct CloudHypervisorVm {
    process: Process,
    agent: UnixListener,
    agent_path: PathBuf,
    api: Api,
}

#[async_trait]
impl Driver for CloudHypervisor {
    fn kind(&self) -> VmmKind {
        VmmKind::CloudHypervisor
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Kvm
    }

    fn program(&self) -> &Path {
        &self.program
    }

    async fn boot(&self, spec: &VmSpec) -> Result<Box<dyn Vm>, BootError> {
        match self.launch(spec, true, None).await {
            Err(BootError::Died { said, .. }) if machine::lacks_landlock(&said) => self.launch(spec, false, None).await,
            outcome => outcome,
        }
    }

    async fn restore(&self, spec: &VmSpec, from: &Path) -> Result<Box<dyn Vm>, BootError> {
        let links = snapshot::Links::make(spec, &spec.run_dir.join(VSOCK), from)?;
        self.launch(spec, true, Some(links.dir())).await
    }
}

/// What the VMM is told once it answers.
#[derive(Debug, Clone, Copy)]
enum Order<'a> {
    /// The machine, and to boot it.
    Boot,
    /// Nothing: the machine is on its command line.
    Wait,
    /// To restore this snapshot.
    Restore(&'a Path),
}

enum StartError {
    Old(String),
    Control(ControlError),
}

impl From<ControlError> for StartError {
    fn from(error: ControlError) -> Self {
        Self::Control(error)
    }
}

impl CloudHypervisor {
    /// `landlock` counts where the machine is on the command line; the API is asked again within the same process.
    async fn launch(&self, spec: &VmSpec, landlock: bool, from: Option<&Path>) -> Result<Box<dyn Vm>, BootError> {
        let vsock = spec.run_dir.join(VSOCK);
        let agent_path = spec.run_dir.join(format!("{VSOCK}_{VSOCK_PORT}"));
        let agent = socket("agent", || {
            let listener = bind_again(&agent_path)?;
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        })?;
        // The VMM binds that one itself, and a killed one leaves it.
        socket("vsock", || make_way(&vsock))?;
        let (api, api_fd) = socket("API", || api_socket(&spec.run_dir.join("api.sock"), spec.deadline))?;
        let (events, events_fd) = socket("event", || {
            let (ours, theirs) = StdStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
        })?;
        let fd = |fd| OsString::from(format!("fd={}", child::fd_number(fd)));
        let mut args = vec!["--api-socket".into(), fd(&api_fd), "--event-monitor".into(), fd(&events_fd)];
        let rung = spec.rung.on(Arch::HOST);
        let own = self.own_rungs.contains(&rung);
        let described = own && from.is_none();
        if described {
            let machine = own::arguments(spec, rung, &vsock, landlock);
            args.extend(machine.map_err(|source| BootError::Control { program: self.program.clone(), source })?);
        }
        // A restored machine's mask by an option is in its configuration; that by the filter has to be put on again.
        let filter = if own { None } else { mask::filter(rung).map_err(BootError::Mask)? };
        let launch = Launch {
            program: &self.program,
            args,
            fds: vec![api_fd, events_fd],
            cgroups: &spec.cgroups,
            network: spec.network.as_deref(),
            filter,
        };
        let leash = Leash::new();
        let listener = tokio::spawn(events::listen(events, leash.clone()));
        // It ends by itself, and well, only after the guest powered off; it may not get to telling that.
        let by_guest = |ended_well| async move { listener.await.unwrap_or(false) || ended_well };
        let process = Process::start(launch, leash, by_guest)?;
        let order = match from {
            Some(from) => Order::Restore(from),
            None if described => Order::Wait,
            None => Order::Boot,
        };
        match self.start(&api, spec, &vsock, order).await {
            Ok(()) => Ok(Box::new(CloudHypervisorVm { process, agent, agent_path, api })),
            Err(StartError::Old(found)) => {
                process.kill().await;
                let needed = format!("{}.{}", OLDEST.0, OLDEST.1);
                Err(BootError::Version { program: self.program.clone(), found, needed })
            }
            Err(StartError::Control(error)) => Err(process.gave_up(&self.program, error, advice).await),
        }
    }

    async fn start(&self, api: &Api, spec: &VmSpec, vsock: &Path, order: Order<'_>) -> Result<(), StartError> {
        let (version, numbers) = machine::version(api).await?;
        if numbers < Some(OLDEST) {
            return Err(StartError::Old(version));
        }
        match order {
            Order::Boot => machine::boot(api, spec, vsock).await?,
            Order::Wait => own::runs(api, spec.deadline).await?,
            Order::Restore(from) => snapshot::load(api, from, self.memory_restore).await?,
        }
        Ok(())
    }
}

#[async_trait]
impl Vm for CloudHypervisorVm {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    async fn channel(&self) -> Result<Box<dyn Channel>, ChannelError> {
        let accepted = self.agent.accept().await;
        let (stream, _) = accepted.map_err(|source| ChannelError::Connect { path: self.agent_path.clone(), source })?;
        Ok(Box::new(stream))
    }

    fn exited(&self) -> watch::Receiver<Option<VmExit>> {
        self.process.exited()
    }

    fn console(&self) -> String {
        self.process.console()
    }

    async fn snapshot(&self, into: &Path) -> Result<(), SnapshotError> {
        match snapshot::save(&self.api, into).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.process.not_saved(error).await),
        }
    }

    async fn kill(&self) {
        self.process.kill().await;
    }
}

fn socket<T>(what: &'static str, make: impl FnOnce() -> io::Result<T>) -> Result<T, BootError> {
    make().map_err(|source| BootError::Socket { what, source })
}

/// Listens there, in the place of a machine that did not start.
fn bind_again(path: &Path) -> io::Result<StdListener> {
    make_way(path).and_then(|()| StdListener::bind(path))
}

/// For a socket in the place of one of a machine that is gone.
fn make_way(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A connection that waits for the VMM to accept it, and the socket on which the VMM does so.
fn api_socket(path: &Path, patience: Duration) -> io::Result<(Api, OwnedFd)> {
    let listener = StdListener::bind(path)?;
    let connected = StdStream::connect(path);
    fs::remove_file(path)?;
    let stream = connected?;
    stream.set_nonblocking(true)?;
    Ok((Api::new(UnixStream::from_std(stream)?, patience), listener.into()))
}

/// What to do about the usual reasons for which Cloud Hypervisor gives up by itself.
fn advice(said: &str) -> &'static str {
    const KNOWN: [(&str, &str); 2] = [
        ("/dev/kvm", "; load the kvm module and give access to /dev/kvm, or set vmm = \"qemu\""),
        ("memory allocation", "; the host cannot give that much memory: lower the VM's memory"),
    ];
    KNOWN.iter().find(|(text, _)| said.contains(text)).map_or("", |(_, advice)| advice)
}
