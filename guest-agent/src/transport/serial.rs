//! The virtio-serial port.
//!
//! While no host is attached, the port reads as at its end and polls as hung up, which lasts: a hang-up is for ever in
//! tokio's eyes, and every level-triggered wait would return at once. So the port is watched by an edge-triggered
//! epoll of its own, and tokio watches that one, which only ever becomes readable. A host that attaches is an edge.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::PathBuf,
    task::{Context, Poll, ready},
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::{read, write},
};
use tokio::io::{Interest, unix::AsyncFd};

use chsnap_protocol::SERIAL_PORT;

use crate::sys;

const PORTS: &str = "/sys/class/virtio-ports";

/// An open port.
#[derive(Debug)]
pub struct SerialPort {
    file: File,
    input: Edges,
    output: Edges,
}

/// Finds the port by its name and opens it. `None` if there is no such port (yet).
///
/// # Errors
/// If it cannot be opened.
pub fn find() -> io::Result<Option<SerialPort>> {
    let ports = match fs::read_dir(PORTS) {
        Ok(ports) => ports,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    for port in ports.flatten() {
        // The name arrives from the VMM after the port.
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim_end() == SERIAL_PORT {
            let path = PathBuf::from("/dev").join(port.file_name());
            let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            return SerialPort::new(file).map(Some);
        }
    }
    Ok(None)
}

impl SerialPort {
    fn new(file: File) -> io::Result<Self> {
        let input = Edges::new(&file, EpollFlags::EPOLLIN)?;
        let output = Edges::new(&file, EpollFlags::EPOLLOUT)?;
        Ok(Self { file, input, output })
    }

    /// Nothing read means that there is no host.
    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            match read(&self.file, buffer) {
                Err(Errno::EAGAIN) => ready!(self.input.poll_edge(cx))?,
                Err(Errno::EINTR) => {}
                result => return Poll::Ready(Ok(result?)),
            }
        }
    }

    pub fn poll_write(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match write(&self.file, data) {
                Err(Errno::EAGAIN) => ready!(self.output.poll_edge(cx))?,
                Err(Errno::EINTR) => {}
                result => return Poll::Ready(Ok(result?)),
            }
        }
    }

    /// Waits for a host, and gives what it has sent already.
    pub async fn wait_for_host(&self) -> io::Result<Vec<u8>> {
        loop {
            let mut first = [0; 64];
            match read(&self.file, &mut first) {
                Ok(0) => std::future::poll_fn(|cx| self.input.poll_edge(cx)).await?,
                Ok(count) => return Ok(first.get(..count).unwrap_or_default().to_vec()),
                // A host that has not said anything.
                Err(Errno::EAGAIN) => return Ok(Vec::new()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Changes of a descriptor's state.
#[derive(Debug)]
struct Edges {
    epoll: Epoll,
    /// The same one, for the runtime.
    watch: AsyncFd<OwnedFd>,
}

impl Edges {
    fn new(file: &File, what: EpollFlags) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(file, EpollEvent::new(what | EpollFlags::EPOLLET, 0))?;
        let watch = sys::watch(epoll.0.try_clone()?, Interest::READABLE)?;
        Ok(Self { epoll, watch })
    }

    /// Ready when the state has changed since the last time.
    fn poll_edge(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.watch.poll_read_ready(cx))?;
            let mut events = [EpollEvent::empty(); 1];
            let count = match self.epoll.wait(&mut events, EpollTimeout::ZERO) {
                Err(Errno::EINTR) => continue,
                count => count?,
            };
            ready.clear_ready();
            if count > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}
