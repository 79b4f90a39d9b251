//! The room of the agent channel: a virtio-serial port, or a connection to the host over vsock. Above this room there
//! are only sessions.

mod channel;
mod serial;
mod session;
mod socket;

use std::{
    io,
    time::{Duration, Instant},
};

use futures::{Stream, stream};

use chsnap_protocol::{SERIAL_PORT, session as greeting};

use channel::Channel;
pub use session::Session;
pub use socket::Peer;

/// How long the VMM's devices may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);
const SHORTEST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no agent channel.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error(
        "the VM has neither a virtio-serial port {SERIAL_PORT} nor vsock: no way to the host \
         (waited {} s)",
        DEVICE_DEADLINE.as_secs()
    )]
    None,
    #[error("the virtio-serial port {SERIAL_PORT}")]
    Port(#[source] io::Error),
}

/// A pause that grows.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(SHORTEST_PAUSE)
    }

    async fn pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_PAUSE);
    }
}

/// Where sessions come from.
#[derive(Debug)]
pub enum Source {
    /// The port stays open while hosts come and go.
    Port(Port),
    /// Every session has a connection of its own.
    Socket(Socket),
}

/// The port, while no session has it.
#[derive(Debug)]
pub struct Port(Option<Channel>);

/// Connections to the other end.
#[derive(Debug)]
pub struct Socket {
    peer: Peer,
    /// How long to wait before the next one.
    backoff: Backoff,
    /// A connection on which the next greeting has come already.
    greeted: Option<Channel>,
}

impl Source {
    /// The virtio-serial port if there is one, else vsock. Devices may appear a little late.
    ///
    /// # Errors
    /// If there is neither.
    pub async fn find() -> Result<Self, TransportError> {
        let begin = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            if let Some(port) = serial::find().map_err(TransportError::Port)? {
                let channel = Channel::new(channel::Raw::Port(port));
                return Ok(Self::Port(Port(Some(channel))));
            }
            if socket::has_vsock() {
                return Ok(Self::peer(Peer::Vsock));
            }
            if begin.elapsed() > DEVICE_DEADLINE {
                return Err(TransportError::None);
            }
            backoff.pause().await;
        }
    }

    /// A socket to connect to, again and again.
    pub fn peer(peer: Peer) -> Self {
        Self::Socket(Socket { peer, backoff: Backoff::new(), greeted: None })
    }

    /// A channel with a host on its other end.
    async fn channel(&mut self) -> Result<Channel, TransportError> {
        match self {
            Self::Port(port) => {
                let mut channel = port.0.take().ok_or(TransportError::None)?;
                channel.wait_for_host().await.map_err(TransportError::Port)?;
                Ok(channel)
            }
            Self::Socket(socket) => loop {
                if let Some(channel) = socket.greeted.take() {
                    return Ok(channel);
                }
                match socket.peer.connect().await {
                    Ok(fd) => return Ok(Channel::new(channel::Raw::Socket(fd))),
                    // Nobody listens yet, or not any more.
                    Err(_) => socket.backoff.pause().await,
                }
            },
        }
    }

    /// A session has ended, or never began.
    async fn done(&mut self, channel: Channel, began: bool) {
        match self {
            Self::Port(port) => port.0 = Some(channel),
            Self::Socket(socket) if began => {
                socket.backoff = Backoff::new();
                socket.greeted = Some(channel).filter(Channel::has_more);
            }
            Self::Socket(socket) => socket.backoff.pause().await,
        }
    }

    /// One session after the other. `ended` is called after each; `fatal` when there can be none any more.
    pub fn sessions(
        self,
        ended: impl Fn() + Send + 'static,
        fatal: impl Fn(TransportError) + Send + 'static,
    ) -> impl Stream<Item = io::Result<Session>> + Send + 'static {
        stream::unfold((self, None, ended, fatal), |(mut source, running, ended, fatal)| async move {
            if let Some(running) = running {
                if let Ok(channel) = running.await {
                    source.done(channel, true).await;
                }
                ended();
            }
            loop {
                let mut channel = match source.channel().await {
                    Ok(channel) => channel,
                    Err(error) => {
                        fatal(error);
                        return None;
                    }
                };
                if greeting::accept(&mut channel).await.is_err() {
                    source.done(channel, false).await;
                    continue;
                }
                let (session, end) = Session::new(channel);
                return Some((Ok(session), (source, Some(end), ended, fatal)));
            }
        })
    }
}
