//! The virtio-serial port.
//!
//! While no host is attached, the port reads as at its end and polls as hung up, which lasts: a hang-up is for ever in
//! tokio's eyes, and every level-triggered wait would return at once. So the port is watched by an edge-triggered
//! epoll of its own, and tokio watches that one, which only ever becomes readable. A host that attaches is an edge.
//!
//! One epoll for both directions, whose every edge is told to both. With one for each, requests got lost: whoever polls
//! the port, for whichever direction, takes what has arrived out of the queue (`port_has_data` in Linux's virtio_console.c),
//! and an interrupt that finds the queue empty wakes nobody (`vring_interrupt`). A look whether there is room for output, just
//! between a request's arrival and its interrupt, was then the only one to be told of the request, and did not care.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt as _},
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures::task::AtomicWaker;
use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    unistd::{read, write},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::AbortHandle,
};

use chsnap_protocol::SERIAL_PORT;

use crate::sys;

const PORTS: &str = "/sys/class/virtio-ports";

/// An open port.
#[derive(Debug)]
pub struct SerialPort {
    file: File,
    changes: Changes,
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
        let changes = Changes::of(&file)?;
        Ok(Self { file, changes })
    }

    /// Nothing read means that there is no host.
    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            match read(&self.file, buffer) {
                Err(Errno::EAGAIN) => ready!(self.changes.poll_input(cx))?,
                Err(Errno::EINTR) => {}
                result => return Poll::Ready(Ok(result?)),
            }
        }
    }

    pub fn poll_write(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match write(&self.file, data) {
                Err(Errno::EAGAIN) => ready!(self.changes.poll_output(cx))?,
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
                Ok(0) => std::future::poll_fn(|cx| self.changes.poll_input(cx)).await?,
                Ok(count) => return Ok(first.get(..count).unwrap_or_default().to_vec()),
                // A host that has not said anything.
                Err(Errno::EAGAIN) => return Ok(Vec::new()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Changes of a descriptor's state, each told to whoever reads and to whoever writes.
#[derive(Debug)]
struct Changes {
    told: Arc<Told>,
    watcher: AbortHandle,
}

#[derive(Debug, Default)]
struct Told {
    input: Edge,
    output: Edge,
    /// Nothing more will be.
    broken: OnceLock<Errno>,
}

/// Whether there was a change since one was last taken, and who waits for the next.
#[derive(Debug, Default)]
struct Edge {
    came: AtomicBool,
    waiting: AtomicWaker,
}

impl Edge {
    fn tell(&self) {
        self.came.store(true, Ordering::Release);
        self.waiting.wake();
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        // Before the look, or one that comes right after it would wake nobody.
        self.waiting.register(cx.waker());
        if self.came.swap(false, Ordering::AcqRel) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Changes {
    fn of(file: &File) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(file, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 0))?;
        let watch = sys::watch(epoll.0.try_clone()?, Interest::READABLE)?;
        let told = Arc::new(Told::default());
        let watcher = tokio::spawn(tell(epoll, watch, told.clone())).abort_handle();
        Ok(Self { told, watcher })
    }

    /// Ready when the state has changed since the last time, in whatever way.
    fn poll_input(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.told.input, cx)
    }

    /// As [`Self::poll_input`], for another waiter.
    fn poll_output(&self, cx: &Context<'_>) -> Poll<io::Result<()>> {
        self.poll(&self.told.output, cx)
    }

    fn poll(&self, edge: &Edge, cx: &Context<'_>) -> Poll<io::Result<()>> {
        if let Some(errno) = self.told.broken.get() {
            return Poll::Ready(Err((*errno).into()));
        }
        edge.poll(cx).map(Ok)
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// Tells of every change. `watch` is the same descriptor as `epoll`, for the runtime.
async fn tell(epoll: Epoll, watch: AsyncFd<OwnedFd>, told: Arc<Told>) {
    // The runtime's end is the program's.
    while let Ok(mut ready) = watch.readable().await {
        let mut events = [EpollEvent::empty(); 1];
        match epoll.wait(&mut events, EpollTimeout::ZERO) {
            Err(Errno::EINTR) => continue,
            Err(errno) => drop(told.broken.set(errno)),
            Ok(count) => {
                ready.clear_ready();
                if count == 0 {
                    continue;
                }
            }
        }
        told.input.tell();
        told.output.tell();
        if told.broken.get().is_some() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::Write as _, os::unix::net::UnixStream, time::Duration};

    use futures::poll;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_change_is_told_to_both_directions_whoever_looks_first() {
        timeout(Duration::from_secs(20), both_are_told()).await.expect("a change was told to nobody");
    }

    async fn both_are_told() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let ours = File::from(OwnedFd::from(ours));
        let changes = Changes::of(&ours).expect("epoll");
        let input = || poll_fn(|cx| changes.poll_input(cx));
        let output = || poll_fn(|cx| changes.poll_output(cx));
        // That it can be written to.
        output().await.expect("an edge");
        input().await.expect("the same edge");
        for _ in 0..3 {
            assert!(poll!(input()).is_pending() && poll!(output()).is_pending(), "an edge is told once");
            theirs.write_all(b"x").expect("writing");
            output().await.expect("an edge");
            input().await.expect("the same edge");
        }
        let waiting = tokio::spawn({
            let told = changes.told.clone();
            async move { poll_fn(|cx| told.input.poll(cx)).await }
        });
        tokio::task::yield_now().await;
        theirs.write_all(b"x").expect("writing");
        waiting.await.expect("woken");
    }
}
