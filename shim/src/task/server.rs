//! The shim's process: containerd's `start` and `delete` actions, and the server between the two.
//!
//! containerd-shim speaks the task API's version 3 only, which containerd knows since 2.0. The messages of version 2
//! are the same, so the service is registered under both names, and a containerd that does not offer version 3 in
//! its environment is answered in version 2's way: the bare address.

use std::{
    collections::HashMap,
    env, io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim::{
    Config as ShimConfig, DeleteResponse, Error, ExitSignal, Flags, Shim, StartOpts, asynchronous as shim,
    publisher::RemotePublisher,
};
use containerd_shim_protos::{
    protobuf::well_known_types::any::Any, shim_async::create_task, ttrpc::r#async::Server,
    types::introspection::RuntimeInfo,
};
use thiserror::Error as ThisError;
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
};

use super::{
    Api, Events, Exit, Service,
    clean_up::{clean_up, told_pid},
    info::runtime_info,
};
use crate::{sandbox, sys};

/// The runtime's name at containerd.
pub const RUNTIME: &str = "io.containerd.chsnap.v2";

/// containerd creates the container a moment after it has started the shim.
const UNUSED: Duration = Duration::from_secs(60);

const V2: &str = "containerd.task.v2.Task";
const V3: &str = "containerd.task.v3.Task";

/// The server could not be started.
#[derive(Debug, ThisError)]
pub enum ServeError {
    /// containerd's event socket is not named.
    #[error("TTRPC_ADDRESS is not set; this program is started by containerd")]
    NoAddress,
    /// The mount namespace.
    #[error("cannot enter a mount namespace of its own")]
    Mounts(#[source] nix::Error),
    /// The socket.
    #[error("cannot listen on {address:?}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The ttrpc server.
    #[error("cannot serve the task API")]
    Ttrpc(#[from] ttrpc::Error),
    /// Signals or streams.
    #[error("cannot set the process up")]
    Process(#[from] io::Error),
    /// The log fifo.
    #[error("cannot open the log")]
    Log(#[from] Error),
}

/// The two actions that containerd runs the program for.
pub struct Actions {
    namespace: String,
    id: String,
    bundle: PathBuf,
}

#[async_trait]
impl Shim for Actions {
    type T = Api;

    async fn new(_: &str, flags: &Flags, config: &mut ShimConfig) -> Self {
        config.no_reaper = true;
        config.no_sub_reaper = true;
        let bundle = if flags.bundle.is_empty() { ".".into() } else { flags.bundle.clone().into() };
        Self { namespace: flags.namespace.clone(), id: flags.id.clone(), bundle }
    }

    async fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        start(opts).await
    }

    /// Runs when containerd has lost the shim, see `clean_up.rs`.
    async fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        clean_up(&self.bundle, &self.id).await;
        let exit = Exit::now(137);
        let mut answer = DeleteResponse::new();
        answer.pid = told_pid(&self.bundle);
        answer.exit_status = exit.status;
        answer.exited_at = Some(exit.at).into();
        Ok(answer)
    }

    async fn wait(&mut self) {}

    fn runtime_info(_: &str, _: Option<&Any>) -> Result<RuntimeInfo, Error> {
        Ok(runtime_info())
    }

    /// Never called: [`serve`] runs the server.
    async fn create_task_service(&self, publisher: RemotePublisher) -> Api {
        let events = Events::new(&self.namespace, &publisher.address);
        Api(Arc::new(Service::new(&self.namespace, &self.id, Arc::new(events), Arc::default(), false)))
    }
}

/// Starts the server process, or finds that of the pod, and answers its address.
///
/// # Errors
/// Where the server cannot be started; its own words went to stderr, which containerd shows.
pub async fn start(opts: StartOpts) -> Result<String, Error> {
    let pod = pod_of(&opts.id);
    let address = opts.socket_address(&pod);
    let socket = address.strip_prefix("unix://").unwrap_or(&address);
    let is_first = pod == opts.id;
    if is_first {
        shim::spawn(opts, &pod, Vec::new()).await?;
    }
    if let Err(err) = StdStream::connect(socket) {
        return Err(match is_first {
            // spawn() answers when the server listens or has ended; in the second case the reason is on our stderr.
            true => Error::Other("the shim's server did not start".into()),
            false => Error::Other(format!(
                "the pod {pod:?} has no shim that runs (any more), to which the container could be added: {err}"
            )),
        });
    }
    // containerd before 1.7 finds the shim again by this file in the bundle; later ones keep a file of their own.
    std::fs::write("address", &address)
        .map_err(|err| Error::IoError { context: "cannot write the bundle's address file".into(), err })?;
    Ok(address)
}

/// The pod of the container whose bundle is the current directory: itself, unless CRI says otherwise.
fn pod_of(id: &str) -> String {
    let spec = oci_spec::runtime::Spec::load("config.json").ok();
    spec.as_ref().and_then(sandbox::pod_of).unwrap_or(id).into()
}

/// True where containerd offers version 3 of the task API.
#[must_use]
pub fn offers_v3() -> bool {
    env::var("MAX_SHIM_VERSION").is_ok_and(|v| v.parse().is_ok_and(|v: u32| v >= 3))
}

/// Serves the task API until containerd says Shutdown.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(flags: &Flags) -> Result<(), ServeError> {
    sys::bound_malloc();
    let containerd = env::var("TTRPC_ADDRESS").ok().filter(|a| !a.is_empty()).ok_or(ServeError::NoAddress)?;
    containerd_shim::logger::init(flags.debug, "info", &flags.namespace, &flags.id)?;
    let exit = Arc::new(ExitSignal::default());
    let events = Arc::new(Events::new(&flags.namespace, &containerd));
    let service = Service::new(&flags.namespace, &flags.id, events, Arc::clone(&exit), flags.debug);
    let service = Arc::new(service.of(&flags.address));
    let listener = service.callers.listener(listen(&flags.socket)?);
    let mut server = Server::new().add_listener(listener).register_service(both_names(&service));
    server.start().await?;
    // `start` waits for the end of our stdout, and then tells containerd the address.
    nix::unistd::dup2_stdout(io::stderr().as_fd()).map_err(io::Error::from)?;
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = exit.wait() => {}
        _ = term.recv() => log::info!("SIGTERM: stopping the pod"),
        _ = int.recv() => log::info!("SIGINT: stopping the pod"),
        () = unused(&service) => log::warn!("nobody has created a container for {UNUSED:?}: this shim is not needed"),
    }
    service.stop().await;
    let _ = server.shutdown().await;
    if let Some(path) = flags.socket.strip_prefix("unix://") {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Until there is nothing that this process is for, and has not been for a while: containerd may change its mind between
/// `start` and Create, and then forgets the shim.
async fn unused(service: &Service) {
    let mut since = 0;
    while since < 2 {
        tokio::time::sleep(UNUSED / 2).await;
        since = if service.is_unused() { since + 1 } else { 0 };
    }
}

fn listen(address: &str) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Listen { address: address.into(), source };
    let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    let bound = StdListener::bind(&path).or_else(|e| {
        // A shim of the same name that was killed; a living one answers.
        if e.kind() == io::ErrorKind::AddrInUse && StdStream::connect(&path).is_err() {
            std::fs::remove_file(&path)?;
            return StdListener::bind(&path);
        }
        Err(e)
    });
    let bound = bound.map_err(failed)?;
    bound.set_nonblocking(true).map_err(failed)?;
    UnixListener::from_std(bound).map_err(failed)
}

fn both_names(service: &Arc<Service>) -> HashMap<String, ttrpc::r#async::Service> {
    let mut services = HashMap::new();
    for name in [V2, V3] {
        let task: Arc<dyn containerd_shim_protos::shim_async::Task + Send + Sync> = Arc::new(Api(Arc::clone(service)));
        services.extend(create_task(task).into_values().map(|s| (name.to_string(), s)));
    }
    services
}
