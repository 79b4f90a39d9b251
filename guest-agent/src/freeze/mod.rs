//! The room of what an image snapshot needs of the guest: to know when a container's process has initialised, to have
//! it stand still, and to make it another pod's in a machine that was restored.
//!
//! `ready` waits for the sign, `hooks` asks processes to prepare and to recover; how a container is stopped and renamed
//! is the `container` room's.

mod held;
mod hooks;
mod kept;
#[cfg(test)]
mod python_tests;
mod ready;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::sync;
use tokio::time::timeout;
use ttrpc::Code;

use chsnap_protocol::{
    EPOCH_FILE, HOOK_SOCKET, NOTIFY_SOCKET, PUBLIC_DIR, PYTHON_DIR,
    agent::{AdoptRequest, AwaitReadyRequest, FreezeRequest, await_ready_request::Sign as Asked},
};

use crate::{
    container::{Adoption, ContainerError, Containers},
    error::Coded,
    process::StreamIds,
};
pub use held::Removed;
pub use hooks::HookError;
use hooks::{Event, Hooks};
use ready::{Notify, Sign};

/// What processes in Python import, by themselves and at their start.
const PYTHON_FILES: [(&str, &str); 2] = [
    ("snapshot_restore_py.py", include_str!("../../python/snapshot_restore_py.py")),
    ("sitecustomize.py", include_str!("../../python/sitecustomize.py")),
];
/// Everything that is not in use.
const DROP_CACHES: (&str, &str) = ("/proc/sys/vm/drop_caches", "3");

/// Why a container is not saved, or not taken over.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("the request names no sign of readiness that there is")]
    NoSign,
    #[error("the process ended with status {0} before it was ready")]
    Ended(u32),
    #[error("the process ended with status {0} after it was ready, before it could be saved")]
    EndedSince(u32),
    #[error("cannot tell what the container keeps in memory")]
    Kept(#[source] io::Error),
    #[error(
        "the process was not ready within {ms} ms: it waits, having written more to its output than is kept for whoever \
         reads it after a restore"
    )]
    Talkative { ms: u32 },
    #[error("the process was not ready within {ms} ms: {last}")]
    Late { ms: u32, last: String },
    #[error(
        "process {} ({}) has {:?} open, which was removed: a restored machine could not open it again",
        .0.pid, .0.program, .0.path
    )]
    Removed(Removed),
    #[error("cannot let go of what the guest has cached")]
    Caches(#[source] io::Error),
    #[error("the machine has no epoch")]
    Epoch(#[source] io::Error),
    #[error(transparent)]
    Hooks(#[from] HookError),
    #[error(transparent)]
    Container(#[from] ContainerError),
}

impl Coded for FreezeError {
    fn code(&self) -> Code {
        match self {
            Self::NoSign => Code::INVALID_ARGUMENT,
            // Not DEADLINE_EXCEEDED: that would say that the agent did not answer.
            Self::Late { .. }
            | Self::Talkative { .. }
            | Self::Ended(_)
            | Self::EndedSince(_)
            | Self::Hooks(_)
            | Self::Removed(_) => Code::FAILED_PRECONDITION,
            Self::Caches(_) | Self::Epoch(_) | Self::Kept(_) => Code::INTERNAL,
            Self::Container(e) => e.code(),
        }
    }
}

/// The sockets that processes find, and what came over them.
#[derive(Debug, Default)]
pub struct Freezer {
    hooks: Hooks,
    notify: Notify,
    /// Not in a VM, the caches would be the host's.
    in_vm: bool,
}

impl Freezer {
    /// Offers what processes need, in [`PUBLIC_DIR`].
    ///
    /// # Errors
    /// If that cannot be written.
    pub fn open() -> io::Result<Self> {
        let freezer = Self { in_vm: true, ..Self::default() };
        let public = Path::new(PUBLIC_DIR);
        freezer.notify.listen(&public.join(NOTIFY_SOCKET))?;
        freezer.hooks.listen(&public.join(HOOK_SOCKET))?;
        write_python(&public.join(PYTHON_DIR))?;
        Ok(freezer)
    }

    /// Waits for the container's process to be ready.
    ///
    /// # Errors
    /// If it is not in time.
    pub async fn await_ready(&self, containers: &Containers, request: &AwaitReadyRequest) -> Result<(), FreezeError> {
        let sign = sign(request).ok_or(FreezeError::NoSign)?;
        let process = containers.process(&request.container_id, "")?;
        let root = PathBuf::from(format!("/proc/{}/root", process.pid().unwrap_or(0)));
        let ms = request.timeout_ms;
        let mut last = String::new();
        let waiting = timeout(Duration::from_millis(ms.into()), ready::wait(&sign, &self.notify, &root, &mut last));
        let late = tokio::select! {
            // First, since what is left of it may well look ready.
            biased;
            exit = process.wait() => {
                return Err(FreezeError::Ended(exit.map_err(ContainerError::from)?.status));
            }
            seen = waiting => seen.is_err(),
        };
        let StreamIds { stdout, stderr, .. } = process.streams();
        match late {
            false => Ok(()),
            true if [stdout, stderr].iter().any(|id| containers.streams.is_full(*id)) => {
                Err(FreezeError::Talkative { ms })
            }
            true => Err(FreezeError::Late { ms, last }),
        }
    }

    /// Makes the guest fit to be saved, and tells at which places a pod is not to have files of its own: of what is open of the
    /// share, and of what the container keeps in memory.
    ///
    /// # Errors
    /// If a hook fails, something does not stop, or the process has ended.
    pub async fn freeze(&self, containers: &Containers, request: &FreezeRequest) -> Result<Vec<PathBuf>, FreezeError> {
        self.hooks.run(&Event::BeforeSnapshot, Duration::from_millis(request.hooks_ms.into())).await?;
        containers.freeze(&request.container_id).await?;
        // A container without processes stands still, too.
        if let Some(exit) = containers.ended(&request.container_id).await? {
            return Err(FreezeError::EndedSince(exit.status));
        }
        if !self.in_vm {
            return Ok(Vec::new());
        }
        let mut places = held::open().map_err(FreezeError::Removed)?;
        let pid = containers.process(&request.container_id, "")?.pid().unwrap_or(0);
        places.append(&mut kept::kept(pid).map_err(FreezeError::Kept)?);
        let_go()?;
        Ok(places)
    }

    /// Makes what was frozen a container of this machine.
    ///
    /// # Errors
    /// If anything of it cannot be done; then the machine is of no use.
    pub async fn adopt(&self, containers: &Containers, request: &AdoptRequest) -> Result<StreamIds, FreezeError> {
        // Nothing of the share was looked at since it was frozen: the caches are as empty as they were then.
        let (id, hostname) = (&request.container_id, &request.hostname);
        let adoption = Adoption {
            hostname,
            domainname: &request.domainname,
            mounts_json: &request.mounts_json,
            resources_json: &request.resources_json,
            oom_score: request.oom_score_adj,
        };
        let container = containers.adopt(&request.from, id, adoption).await?;
        if !self.hooks.is_empty() {
            let epoch = fs::read_to_string(Path::new(PUBLIC_DIR).join(EPOCH_FILE)).map_err(FreezeError::Epoch)?;
            let env: BTreeMap<_, _> = request.env.iter().filter_map(|variable| variable.split_once('=')).collect();
            let event = Event::AfterRestore { env, epoch: epoch.trim(), hostname };
            containers.thaw(id)?;
            self.hooks.run(&event, Duration::from_millis(request.hooks_ms.into())).await?;
            containers.freeze(id).await?;
        }
        container.park();
        let wanted = request.stdio.get_or_default();
        let mut streams = container.init().streams();
        for (id, is_read) in
            [(&mut streams.stdout, wanted.stdout || wanted.terminal), (&mut streams.stderr, wanted.stderr)]
        {
            if !is_read && *id != 0 {
                tokio::spawn(containers.streams.drain(*id));
                *id = 0;
            }
        }
        Ok(streams)
    }
}

/// Files may be others at the same places when the machine is restored.
fn let_go() -> Result<(), FreezeError> {
    sync();
    fs::write(DROP_CACHES.0, DROP_CACHES.1).map_err(FreezeError::Caches)
}

fn write_python(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    PYTHON_FILES.iter().try_for_each(|(name, text)| fs::write(dir.join(name), text))
}

fn sign(request: &AwaitReadyRequest) -> Option<Sign> {
    let port = |port: u32| u16::try_from(port).ok().filter(|port| *port != 0);
    Some(match request.sign.as_ref()? {
        Asked::Notify(_) => Sign::Notify,
        Asked::Http(probe) => Sign::Http { port: port(probe.port)?, path: probe.path.clone() },
        Asked::Tcp(number) => Sign::Tcp(port(*number)?),
        Asked::File(path) => Sign::File(path.into()),
        _ => return None,
    })
}
