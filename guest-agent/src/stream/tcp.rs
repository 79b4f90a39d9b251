//! Connections to the guest's loopback.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage,
        connect as connect_socket, getpeername, getsockname, getsockopt, setsockopt, socket, sockopt,
    },
};
use ttrpc::Code;

use super::{Channel, Kind, StreamError};
use crate::error::{Coded, code_of};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("nothing listens on port {0} of the guest's loopback")]
    Refused(u16),
    #[error("port {0} did not accept the connection within 5 s")]
    Timeout(u16),
    #[error("cannot connect to port {0}")]
    Io(u16, #[source] io::Error),
    #[error("cannot open a stream")]
    Stream(#[source] StreamError),
}

impl Coded for ConnectError {
    fn code(&self) -> Code {
        match self {
            // Not DEADLINE_EXCEEDED: that would say that the agent did not answer.
            Self::Refused(_) | Self::Timeout(_) => Code::UNAVAILABLE,
            Self::Io(_, e) => code_of(e),
            Self::Stream(e) => e.code(),
        }
    }
}

/// A connection of the agent's own.
#[derive(Debug)]
pub struct Probe(Channel);

/// Connects to a port on the guest's loopback, for nobody but the agent.
///
/// # Errors
/// See [`ConnectError`].
pub async fn probe(port: u16) -> Result<Probe, ConnectError> {
    connect(port).await.map(Probe)
}

impl Probe {
    /// Sends all of it.
    ///
    /// # Errors
    /// If the other side hangs up.
    pub async fn send(&self, data: &[u8]) -> io::Result<()> {
        self.0.write(data).await
    }

    /// At least one byte, or none at the end.
    ///
    /// # Errors
    /// If the connection breaks.
    pub async fn receive(&self, max: usize) -> io::Result<Vec<u8>> {
        self.0.read(max).await
    }
}

/// IPv4 first, then IPv6.
pub(super) async fn connect(port: u16) -> Result<Channel, ConnectError> {
    let [a, b, c, d] = Ipv4Addr::LOCALHOST.octets();
    let v4 = SockaddrIn::new(a, b, c, d, port);
    let v6 = SockaddrIn6::from(std::net::SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0));
    let attempt = async {
        match establish(AddressFamily::Inet, &v4).await {
            Err(first) if first.kind() == io::ErrorKind::ConnectionRefused => {
                // A guest without IPv6 refuses in its own way; then the first refusal is the answer.
                match establish(AddressFamily::Inet6, &v6).await {
                    Err(e) if matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => Err(first),
                    other => other,
                }
            }
            other => other,
        }
    };
    match tokio::time::timeout(TIMEOUT, attempt).await {
        Err(_elapsed) => Err(ConnectError::Timeout(port)),
        Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => Err(ConnectError::Refused(port)),
        Ok(result) => result.map_err(|e| ConnectError::Io(port, e)),
    }
}

async fn establish(family: AddressFamily, address: &(dyn SockaddrLike + Sync)) -> io::Result<Channel> {
    let fd: OwnedFd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&fd, sockopt::TcpNoDelay, &true)?;
    match connect_socket(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let channel = Channel::new(fd, Kind::Tcp)?;
    let _ = channel.fd.writable().await?;
    match getsockopt(channel.fd.get_ref(), sockopt::SocketError)? {
        0 if is_own_peer(channel.fd.get_ref())? => Err(io::ErrorKind::ConnectionRefused.into()),
        0 => Ok(channel),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Where nobody listens on a port from which the kernel takes those of clients, it may take that very one, and connects
/// the socket to itself. Nothing of that stays: who listens there next needs the port.
fn is_own_peer(fd: &OwnedFd) -> io::Result<bool> {
    let own: SockaddrStorage = getsockname(fd.as_raw_fd())?;
    let is_own = match getpeername::<SockaddrStorage>(fd.as_raw_fd()) {
        Ok(peer) => peer == own,
        // It has hung up.
        Err(Errno::ENOTCONN) => false,
        Err(e) => return Err(e.into()),
    };
    if is_own {
        setsockopt(fd, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
    }
    Ok(is_own)
}

#[cfg(test)]
mod tests {
    use std::{fs, net::TcpListener, process::Command};

    use nix::sched::{CloneFlags, unshare};
    use tokio::runtime::Builder;

    use super::*;

    /// A network with one port for clients.
    fn in_network_of(port: u16, test: impl FnOnce() + Send + 'static) {
        if !nix::unistd::geteuid().is_root() {
            chsnap_test_skip::skip_without_setup("not root: a network namespace is needed");
            return;
        }
        let network = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            fs::write("/proc/sys/net/ipv4/ip_local_port_range", format!("{port} {port}")).unwrap();
            test();
        };
        std::thread::spawn(network).join().unwrap();
    }

    #[test]
    fn nobody_listens_where_the_agent_meets_itself() {
        const PORT: u16 = 40_000;
        in_network_of(PORT, || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            for _ in 0..3 {
                let result = runtime.block_on(probe(PORT));
                assert!(matches!(result, Err(ConnectError::Refused(PORT))), "{result:?}");
            }
            // Without SO_REUSEADDR, as whoever knows nothing of it.
            let server = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
            nix::sys::socket::bind(server.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, PORT)).unwrap();
            drop(server);
            let other = TcpListener::bind(("127.0.0.1", 8080)).unwrap();
            runtime.block_on(probe(8080)).unwrap();
            drop(other);
        });
    }
}
