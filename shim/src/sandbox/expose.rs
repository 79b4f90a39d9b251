//! Makes a guest's TCP port reachable from the host, through the agent; works without any network.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use thiserror::Error;
use tokio::{
    io::{AsyncWriteExt, split},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{
    agent::{Agent, AgentError, read_into, write_from},
    config::Expose,
    vmm::Channel,
};

/// Connections at once per exposed port; each holds a chunk or two of memory here and a descriptor in the guest.
const MAX_CONNECTIONS: usize = 512;

/// A port could not be exposed.
#[derive(Debug, Error)]
pub enum ExposeError {
    /// The UNIX socket.
    #[error("cannot listen on {path:?}")]
    Unix {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The TCP address.
    #[error("cannot listen on {address} (annotation io.chsnap.expose)")]
    Tcp {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Listening sockets and their connections; all end when this is dropped.
#[derive(Debug)]
pub struct Exposed {
    tasks: JoinSet<()>,
    sockets: Vec<PathBuf>,
}

impl Exposed {
    /// Opens `<dir>/<port>.sock` and, where it has one, the TCP address of every port of `ports`.
    ///
    /// # Errors
    /// See [`ExposeError`].
    pub async fn open(dir: &Path, ports: &[Expose], agent: &Agent) -> Result<Self, ExposeError> {
        let mut exposed = Self { tasks: JoinSet::new(), sockets: Vec::new() };
        for Expose { guest_port: port, listen: address } in ports.iter().copied() {
            let path = dir.join(format!("{port}.sock"));
            if !exposed.sockets.contains(&path) {
                let unix =
                    UnixListener::bind(&path).map_err(|source| ExposeError::Unix { path: path.clone(), source })?;
                exposed.sockets.push(path);
                let agent = agent.clone();
                exposed.tasks.spawn(serve(port, agent, Listener::Unix(unix)));
            }
            if let Some(address) = address {
                let tcp = TcpListener::bind(address).await.map_err(|source| ExposeError::Tcp { address, source })?;
                let agent = agent.clone();
                exposed.tasks.spawn(serve(port, agent, Listener::Tcp(tcp)));
            }
        }
        Ok(exposed)
    }
}

impl Drop for Exposed {
    fn drop(&mut self) {
        for path in &self.sockets {
            let _ = fs::remove_file(path);
        }
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Channel>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Accepts until the task is aborted; its connections end with it.
async fn serve(port: u16, agent: Agent, listener: Listener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                let agent = agent.clone();
                connections.spawn(async move {
                    if let Err(e) = forward(port, &agent, stream).await {
                        log::debug!("port {port}: {e}");
                    }
                    drop(slot);
                });
            }
            Err(e) => {
                // Out of descriptors, or a client that went away: neither ends the service.
                log::warn!("port {port}: accept failed: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn forward(port: u16, agent: &Agent, stream: Box<dyn Channel>) -> Result<(), AgentError> {
    let number = agent.connect_port(port).await?;
    let (mut from_client, mut to_client) = split(stream);
    let to_guest = write_from(agent, number, &mut from_client);
    let from_guest = async {
        let done = read_into(agent, number, &mut to_client, |_| ()).await;
        let _ = to_client.shutdown().await;
        done
    };
    let (a, b) = tokio::join!(to_guest, from_guest);
    let closed = agent.close(number).await;
    a.and(b).and(closed)
}
