//! The room of streams: bytes between the shim and a process's stdio or a TCP connection in the guest.
//!
//! A stream is pulled: nothing is read from its descriptor before the shim asks, so the kernel's own buffers are all
//! there is, and a reader that waits can be dropped at any time without losing a byte.

mod error;
mod full;
mod tcp;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        socket::{Shutdown, shutdown},
        termios::{LocalFlags, SpecialCharacterIndices, tcgetattr},
    },
    unistd::{read, write},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

use chsnap_protocol::MAX_CHUNK;

use crate::sys;

pub use error::StreamError;
pub use tcp::{ConnectError, Probe, probe};

/// Far above what one pod needs; bounds what the agent holds.
const MAX_STREAMS: usize = 8192;

/// What a descriptor is, where that makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Pipe,
    Terminal,
    Tcp,
}

/// A descriptor that can be waited for.
#[derive(Debug)]
pub struct Channel {
    fd: AsyncFd<OwnedFd>,
    kind: Kind,
}

impl Channel {
    /// Takes over the descriptor and makes it non-blocking.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub fn new(fd: OwnedFd, kind: Kind) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // A pipe's end goes one way only, and epoll would report errors of the other one.
        let interest = match (kind, flags & OFlag::O_ACCMODE) {
            (Kind::Pipe, OFlag::O_WRONLY) => Interest::WRITABLE,
            (Kind::Pipe, _) => Interest::READABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        Ok(Self { fd: sys::watch(fd, interest)?, kind })
    }

    /// Changes a terminal's size.
    ///
    /// # Errors
    /// If this is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        sys::set_window_size(self.fd.as_fd(), columns, rows)
    }

    /// At least one byte, or none at the end. Bytes leave the kernel only when this is about to return.
    async fn read(&self, max: usize) -> io::Result<Vec<u8>> {
        loop {
            let mut ready = self.fd.readable().await?;
            let available = sys::bytes_available(self.fd.as_fd()).unwrap_or(0);
            let mut buffer = vec![0; available.clamp(1, max)];
            match ready.try_io(|fd| Ok(read(fd.get_ref(), &mut buffer)?)) {
                Ok(Ok(count)) => {
                    buffer.truncate(count);
                    return Ok(buffer);
                }
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                // What a terminal says when nobody has its other side open.
                Ok(Err(e)) if self.kind == Kind::Terminal && e.raw_os_error() == Some(libc::EIO) => {
                    return Ok(Vec::new());
                }
                Ok(Err(e)) => return Err(e),
                Err(_would_block) => {}
            }
        }
    }

    async fn write(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let mut ready = self.fd.writable().await?;
            match ready.try_io(|fd| Ok(write(fd.get_ref(), data)?)) {
                Ok(Ok(count)) => data = data.get(count..).unwrap_or_default(),
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(e)) => return Err(e),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }
}

/// The way towards the guest.
#[derive(Debug)]
struct Writer {
    channel: Arc<Channel>,
    /// The last byte written was not the end of a line; a terminal needs one end-of-file more then.
    in_line: bool,
}

impl Writer {
    /// Half-close. For a pipe, dropping the descriptor is all.
    async fn close(self) -> io::Result<()> {
        match self.channel.kind {
            Kind::Pipe => Ok(()),
            Kind::Tcp => match shutdown(self.channel.fd.as_raw_fd(), Shutdown::Write) {
                // The other side has gone already.
                Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
                Err(e) => Err(e.into()),
            },
            // A terminal cannot be half-closed. Its end of file is a character, and a reader sees it as such only
            // while it reads lines; a program that has switched that off gets nothing.
            Kind::Terminal => {
                let modes = tcgetattr(self.channel.fd.get_ref())?;
                if !modes.local_flags.contains(LocalFlags::ICANON) {
                    return Ok(());
                }
                let end = modes.control_chars[SpecialCharacterIndices::VEOF as usize];
                let ends = [end; 2];
                // In the midst of a line, the first one only hands the line over.
                self.channel.write(&ends[..if self.in_line { 2 } else { 1 }]).await
            }
        }
    }
}

/// One stream of the protocol.
#[derive(Debug)]
struct Stream {
    reader: Option<Arc<Channel>>,
    /// Empty after the half-close, and where the stream never went that way.
    writer: tokio::sync::Mutex<Option<Writer>>,
    writable: bool,
    /// Ends whoever waits in it.
    closed: watch::Sender<bool>,
    /// Ends with the session, since nobody could name it afterwards.
    session_bound: bool,
}

/// All streams by number. Numbers are never used again.
#[derive(Debug, Default)]
pub struct Streams {
    open: Mutex<HashMap<u64, Arc<Stream>>>,
    last: AtomicU64,
}

impl Streams {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Stream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, id: u64) -> Result<Arc<Stream>, StreamError> {
        self.open().get(&id).cloned().ok_or(StreamError::NotFound(id))
    }

    fn add(
        &self,
        reader: Option<Arc<Channel>>,
        writer: Option<Arc<Channel>>,
        session_bound: bool,
    ) -> Result<u64, StreamError> {
        let mut open = self.open();
        if open.len() >= MAX_STREAMS {
            return Err(StreamError::TooMany);
        }
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let writable = writer.is_some();
        let writer = tokio::sync::Mutex::new(writer.map(|channel| Writer { channel, in_line: false }));
        let closed = watch::Sender::new(false);
        open.insert(id, Arc::new(Stream { reader, writer, writable, closed, session_bound }));
        Ok(id)
    }

    /// A stream the shim reads.
    ///
    /// # Errors
    /// If there are too many.
    pub fn add_reader(&self, channel: Arc<Channel>) -> Result<u64, StreamError> {
        self.add(Some(channel), None, false)
    }

    /// A stream the shim writes.
    ///
    /// # Errors
    /// If there are too many.
    pub fn add_writer(&self, channel: Arc<Channel>) -> Result<u64, StreamError> {
        self.add(None, Some(channel), false)
    }

    /// Reads at least one byte; nothing means the end.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub async fn read(&self, id: u64, max: usize) -> Result<Vec<u8>, StreamError> {
        if max == 0 {
            return Err(StreamError::BadSize(max));
        }
        let stream = self.get(id)?;
        let channel = stream.reader.as_ref().ok_or(StreamError::NotReadable(id))?;
        let mut closed = stream.closed.subscribe();
        tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => Err(StreamError::Closed(id)),
            data = channel.read(max.min(MAX_CHUNK)) => data.map_err(|e| StreamError::Io(id, e)),
        }
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub async fn write(&self, id: u64, data: &[u8]) -> Result<(), StreamError> {
        let Some(last) = data.last().filter(|_| data.len() <= MAX_CHUNK) else {
            return Err(StreamError::BadSize(data.len()));
        };
        let stream = self.get(id)?;
        let mut closed = stream.closed.subscribe();
        let all = async {
            let mut writer = stream.writer.lock().await;
            let writer = writer.as_mut().ok_or(StreamError::NotWritable(id))?;
            writer.in_line = *last != b'\n';
            writer.channel.write(data).await.map_err(|e| match e.raw_os_error() {
                Some(libc::EPIPE | libc::EIO) => StreamError::ReaderGone(id),
                _ => StreamError::Io(id, e),
            })
        };
        tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => Err(StreamError::Closed(id)),
            result = all => result,
        }
    }

    /// Lets the guest see end of file after what was written. Doing it twice is no error.
    ///
    /// # Errors
    /// See [`StreamError`].
    pub async fn close_write(&self, id: u64) -> Result<(), StreamError> {
        let stream = self.get(id)?;
        let mut closed = stream.closed.subscribe();
        let close = async {
            match stream.writer.lock().await.take() {
                Some(writer) => writer.close().await.map_err(|e| StreamError::Io(id, e)),
                None if !stream.writable => Err(StreamError::NotWritable(id)),
                None => Ok(()),
            }
        };
        tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => Err(StreamError::Closed(id)),
            result = close => result,
        }
    }

    /// Forgets the stream and ends whoever waits in it. Unknown numbers are no error: the end may come from both
    /// sides.
    pub fn close(&self, id: u64) {
        let stream = self.open().remove(&id);
        if let Some(stream) = stream {
            stream.closed.send_replace(true);
        }
    }

    /// Reads to the end for nobody, so that whoever writes need not wait.
    pub fn drain(&self, id: u64) -> impl Future<Output = ()> + Send + use<> {
        let channel = self.get(id).ok().and_then(|stream| stream.reader.clone());
        async move {
            let Some(channel) = channel else { return };
            while channel.read(64 << 10).await.is_ok_and(|data| !data.is_empty()) {}
        }
    }

    /// Whether whoever writes to the stream has to wait for a reader.
    pub fn is_full(&self, id: u64) -> bool {
        self.get(id).is_ok_and(|stream| stream.reader.as_ref().is_some_and(|channel| channel.is_full()))
    }

    /// Forgets what belongs to a session that has ended.
    pub fn end_session(&self) {
        let ended: Vec<_> = self.open().extract_if(|_, stream| stream.session_bound).collect();
        for (_, stream) in ended {
            stream.closed.send_replace(true);
        }
    }

    /// Connects to a port on the guest's loopback.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, port: u16) -> Result<u64, ConnectError> {
        let channel = Arc::new(tcp::connect(port).await?);
        self.add(Some(channel.clone()), Some(channel), true).map_err(ConnectError::Stream)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use nix::unistd::pipe;

    use super::*;

    #[tokio::test]
    async fn a_reader_that_is_dropped_takes_nothing() {
        let streams = Streams::default();
        let (ours, theirs) = pipe().unwrap();
        let id = streams.add_reader(Arc::new(Channel::new(ours, Kind::Pipe).unwrap())).unwrap();
        let mut sent = Vec::new();
        let mut seen = Vec::new();
        for round in 0..200u32 {
            // Given up before, between and after the bytes arrive.
            for give_up in 0..3 {
                if give_up == 1 {
                    write(&theirs, &round.to_le_bytes()).unwrap();
                    sent.extend(round.to_le_bytes());
                }
                if let Some(data) = streams.read(id, 3).now_or_never() {
                    seen.extend(data.unwrap());
                }
                tokio::task::yield_now().await;
            }
        }
        drop(theirs);
        loop {
            let data = streams.read(id, 1000).await.unwrap();
            if data.is_empty() {
                break;
            }
            seen.extend(data);
        }
        assert_eq!(seen, sent);
    }

    #[tokio::test]
    async fn there_is_a_bound_on_streams() {
        let streams = Streams::default();
        let (_ours, theirs) = pipe().unwrap();
        let channel = Arc::new(Channel::new(theirs, Kind::Pipe).unwrap());
        for _ in 0..MAX_STREAMS {
            streams.add_writer(channel.clone()).unwrap();
        }
        assert!(matches!(streams.add_writer(channel.clone()), Err(StreamError::TooMany)));
        streams.close(1);
        assert_eq!(streams.add_writer(channel).unwrap(), MAX_STREAMS as u64 + 1);
    }
}
