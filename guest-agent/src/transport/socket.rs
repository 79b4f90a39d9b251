//! Sockets to the host.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, socket, sockopt,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use chsnap_protocol::VSOCK_PORT;

use crate::sys;

/// Who is connected to.
#[derive(Debug, Clone)]
pub enum Peer {
    /// The shim, on the agent's port of the host.
    Vsock,
    /// A socket in the file system, where the agent runs outside a VM.
    Unix(PathBuf),
}

/// Whether the VM has a vsock device, and its driver is there.
pub fn has_vsock() -> bool {
    Path::new("/dev/vsock").exists()
        && socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).is_ok()
}

impl Peer {
    /// One attempt.
    ///
    /// # Errors
    /// If nobody listens.
    pub async fn connect(&self) -> io::Result<AsyncFd<OwnedFd>> {
        match self {
            Self::Vsock => {
                let host = VsockAddr::new(libc::VMADDR_CID_HOST, VSOCK_PORT);
                establish(AddressFamily::Vsock, &host).await
            }
            Self::Unix(path) => establish(AddressFamily::Unix, &UnixAddr::new(path)?).await,
        }
    }
}

async fn establish(family: AddressFamily, address: &(dyn SockaddrLike + Sync)) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    match connect(fd.as_raw_fd(), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => {}
        Err(e) => return Err(e.into()),
    }
    let socket = sys::watch(fd, Interest::READABLE | Interest::WRITABLE)?;
    let _ = socket.writable().await?;
    match getsockopt(socket.get_ref(), sockopt::SocketError)? {
        0 => Ok(socket),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
