//! The agent: pid 1 of the guest. Starts the container's processes, relays their bytes and reports their ends to the
//! shim, over the agent channel.
//!
//! Rooms: `transport` (channel and sessions), `service` (the protocol), `resume` (what a restored machine has to forget),
//! `freeze` (what is saved of a container's process), `container` (specification to namespaces), `process` (start and end), `stream` (bytes), `sys` (system calls).

mod clock;
mod container;
mod error;
mod freeze;
mod process;
mod resume;
mod service;
mod stream;
mod sys;
mod transport;

use std::{error::Error, io, path::PathBuf, process::ExitCode, sync::Arc};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ttrpc::r#async::{Server, transport::Listener};

use chsnap_protocol::{PUBLIC_DIR, agent_ttrpc::create_agent};

use container::Containers;
use freeze::Freezer;
use service::Service;
use transport::{Peer, Source, TransportError};

/// A stream is one descriptor or two, and there may be thousands.
const OPEN_FILES: u64 = 32768;
/// For processes whose specification has no limit, soft and hard: what runc passes on of containerd's own, and as much as
/// a kernel allows by itself. Its own default is 1024.
const THEIR_OPEN_FILES: u64 = 1 << 20;

/// Why the agent cannot work.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("unknown argument {0:?}; known are --unix PATH and --cgroup-root PATH")]
    Argument(String),
    #[error("this is no guest: the agent is the first process of one, and anywhere else wants --unix PATH")]
    NotInit,
    #[error("cannot start")]
    Start(#[source] io::Error),
    #[error("cannot serve")]
    Serve(#[source] ttrpc::Error),
    #[error("no agent channel")]
    Channel(#[source] TransportError),
    #[error("cannot begin an epoch")]
    Epoch(#[source] resume::ResumeError),
    #[error("cannot offer containers what they find in {PUBLIC_DIR}")]
    Public(#[source] io::Error),
    #[error("cannot reap processes")]
    Reap(#[source] io::Error),
}

/// Both only for an agent outside a VM.
#[derive(Debug)]
struct Arguments {
    /// The shim's end of the channel, instead of the VM's devices.
    unix: Option<PathBuf>,
    cgroup_root: PathBuf,
}

fn arguments() -> Result<Arguments, AgentError> {
    let mut found = Arguments { unix: None, cgroup_root: PathBuf::from("/sys/fs/cgroup") };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        match (name.as_str(), given.next()) {
            ("--unix", Some(path)) => found.unix = Some(path.into()),
            ("--cgroup-root", Some(path)) => found.cgroup_root = path.into(),
            _ => return Err(AgentError::Argument(name)),
        }
    }
    Ok(found)
}

/// The last words: the host shows the end of the console when the VM dies.
fn fatal(error: &dyn Error) {
    eprintln!("chsnap-agent: fatal: {}", error::chain(error));
}

fn main() -> ExitCode {
    sys::bound_malloc();
    std::panic::set_hook(Box::new(|panic| eprintln!("chsnap-agent: fatal: {panic}")));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            fatal(&error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), AgentError> {
    let arguments = arguments()?;
    // It would write into the host's /run and /dev, and set its clock.
    if arguments.unix.is_none() && std::process::id() != 1 {
        return Err(AgentError::NotInit);
    }
    let start = |e: nix::Error| AgentError::Start(e.into());
    // Where it may not be raised, outside a VM, there are fewer streams, and fewer files for all.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, THEIR_OPEN_FILES);
    let (_, open_files) = getrlimit(Resource::RLIMIT_NOFILE).map_err(start)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AgentError::Start)?;
    runtime.block_on(serve(arguments, open_files.min(THEIR_OPEN_FILES)))
}

async fn serve(arguments: Arguments, open_files: u64) -> Result<(), AgentError> {
    let init_start_ns = clock::init_start_ns();
    // Outside a VM, the directory would be the host's.
    let freezer = match arguments.unix {
        None => {
            resume::begin_epoch().map_err(AgentError::Epoch)?;
            Freezer::open().map_err(AgentError::Public)?
        }
        Some(_) => Freezer::default(),
    };
    let containers = Containers::new(arguments.cgroup_root, open_files).map_err(AgentError::Start)?;
    let containers = Arc::new(containers);
    let source = match arguments.unix {
        Some(path) => Source::peer(Peer::Unix(path)),
        None => Source::find().await.map_err(AgentError::Channel)?,
    };
    let service = Service {
        containers: containers.clone(),
        freezer: Arc::new(freezer),
        init_start_ns,
        ready_ns: clock::boot_ns(),
    };
    let (lost, mut loss) = tokio::sync::mpsc::unbounded_channel();
    let streams = containers.clone();
    let sessions = source.sessions(
        move || streams.streams.end_session(),
        move |error| {
            let _ = lost.send(error);
        },
    );
    let mut server =
        Server::new().register_service(create_agent(Arc::new(service))).add_listener(Listener::new(sessions));
    server.start().await.map_err(AgentError::Serve)?;
    tokio::select! {
        result = containers.reaper.run() => result.map_err(AgentError::Reap),
        Some(error) = loss.recv() => Err(AgentError::Channel(error)),
    }
}
