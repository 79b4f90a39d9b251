//! The bytes of the agent channel, buffered, so that what one session leaves is there for the next.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

use super::serial::SerialPort;

/// Small reads come out of the buffer; larger ones go past it.
const BUFFER: usize = 4096;

/// What is underneath.
#[derive(Debug)]
pub enum Raw {
    Port(SerialPort),
    Socket(AsyncFd<OwnedFd>),
}

impl Raw {
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Port(port) => port.poll_read(cx, buffer),
            Self::Socket(socket) => loop {
                let mut ready = ready!(socket.poll_read_ready(cx))?;
                match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
                    Ok(count) => return Poll::Ready(Ok(count)),
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(Errno::EINTR) => {}
                    Err(e) => return Poll::Ready(Err(e.into())),
                }
            },
        }
    }

    fn poll_write(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Port(port) => port.poll_write(cx, data),
            Self::Socket(socket) => loop {
                let mut ready = ready!(socket.poll_write_ready(cx))?;
                match send(socket.as_raw_fd(), data, MsgFlags::MSG_NOSIGNAL) {
                    Ok(count) => return Poll::Ready(Ok(count)),
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(Errno::EINTR) => {}
                    Err(e) => return Poll::Ready(Err(e.into())),
                }
            },
        }
    }
}

/// A buffered channel.
#[derive(Debug)]
pub struct Channel {
    raw: Raw,
    buffer: Vec<u8>,
    /// How much of the buffer has been taken.
    taken: usize,
}

impl Channel {
    pub fn new(raw: Raw) -> Self {
        Self { raw, buffer: Vec::new(), taken: 0 }
    }

    /// Puts bytes back, to be read next.
    pub fn put_back(&mut self, bytes: &[u8]) {
        let mut buffer = bytes.to_vec();
        buffer.extend_from_slice(self.buffer.get(self.taken..).unwrap_or_default());
        self.buffer = buffer;
        self.taken = 0;
    }

    /// Whether bytes have been read that nobody has taken.
    pub fn has_more(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// Waits until there is a host on the other end.
    ///
    /// # Errors
    /// If the device has gone.
    pub async fn wait_for_host(&mut self) -> io::Result<()> {
        if self.has_more() {
            return Ok(());
        }
        match &self.raw {
            Raw::Port(port) => {
                self.buffer = port.wait_for_host().await?;
                self.taken = 0;
                Ok(())
            }
            Raw::Socket(_) => Ok(()),
        }
    }

    /// Reads into `target`; nothing means the end.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<usize>> {
        if self.taken == self.buffer.len() {
            if target.len() >= BUFFER {
                return self.raw.poll_read(cx, target);
            }
            self.buffer.resize(BUFFER, 0);
            self.taken = BUFFER;
            let count = match self.raw.poll_read(cx, &mut self.buffer) {
                Poll::Ready(Ok(count)) => count,
                other => return other,
            };
            self.buffer.truncate(count);
            self.taken = 0;
        }
        let there = self.buffer.get(self.taken..).unwrap_or_default();
        let count = there.len().min(target.len());
        for (to, from) in target.iter_mut().zip(there) {
            *to = *from;
        }
        self.taken += count;
        Poll::Ready(Ok(count))
    }
}

impl AsyncRead for Channel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let count = ready!(self.get_mut().poll_fill(cx, buf.initialize_unfilled()))?;
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Channel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().raw.poll_write(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
