//! Who is connected to the task API, and so: whether anybody still waits for an answer.
//!
//! A Create takes as long as a guest boots, and a containerd that ends meanwhile asks for the container when it is back,
//! is told that there is none, and forgets the shim (1.6) or takes it down (2.1). A container that came into being after
//! that would be nobody's. ttrpc does not tell a handler that its connection is gone, and with `AcceptHook` only that it
//! came; hence the streams are watched here, for their end of file.

use std::{
    collections::BTreeSet,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use futures::stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
};
use ttrpc::r#async::transport::Listener;

/// The connections that are open.
#[derive(Debug, Clone, Default)]
pub(super) struct Callers(Arc<Mutex<Open>>);

#[derive(Debug, Default)]
struct Open {
    latest: u64,
    numbers: BTreeSet<u64>,
}

/// Those that were connected at a moment.
#[derive(Debug)]
pub(super) struct Present(BTreeSet<u64>);

impl Callers {
    /// A listener whose connections are counted.
    pub(super) fn listener(&self, socket: UnixListener) -> Listener {
        let callers = self.clone();
        Listener::new(stream::unfold((socket, callers), async |(socket, callers)| {
            let accepted = socket.accept().await.map(|(stream, _)| callers.watch(stream));
            Some((accepted, (socket, callers)))
        }))
    }

    fn watch(&self, stream: UnixStream) -> Caller {
        let mut open = self.open();
        open.latest += 1;
        let number = open.latest;
        open.numbers.insert(number);
        drop(open);
        Caller { stream, number, callers: self.clone() }
    }

    /// Those who are connected now.
    pub(super) fn present(&self) -> Present {
        Present(self.open().numbers.clone())
    }

    /// Whether all of `present` have gone since; false where there was nobody.
    pub(super) fn all_gone(&self, present: &Present) -> bool {
        !present.0.is_empty() && present.0.is_disjoint(&self.open().numbers)
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection. Its end is what it reads: ttrpc keeps the writing half for as long as a handler runs.
struct Caller {
    stream: UnixStream,
    number: u64,
    callers: Callers,
}

impl Caller {
    fn gone(&self) {
        self.callers.open().numbers.remove(&self.number);
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.gone();
    }
}

impl AsyncRead for Caller {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        if read.is_err() || (buf.filled().len() == before && buf.remaining() > 0) {
            self.gone();
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Caller {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn a_caller_is_gone_when_it_hangs_up_although_its_connection_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let callers = Callers::default();
        let mut listener = callers.listener(UnixListener::bind(&path).unwrap());
        assert!(!callers.all_gone(&callers.present()), "nobody was there");

        let (first, second) = (UnixStream::connect(&path).await.unwrap(), UnixStream::connect(&path).await.unwrap());
        let mut held = listener.next().await.unwrap().unwrap();
        let other = listener.next().await.unwrap().unwrap();
        let present = callers.present();
        drop(first);
        assert_eq!(held.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(!callers.all_gone(&present), "the second is still there");
        drop((second, other));
        assert!(callers.all_gone(&present));
        // Who comes later did not ask.
        let _third = UnixStream::connect(&path).await.unwrap();
        let _later = listener.next().await.unwrap().unwrap();
        assert!(callers.all_gone(&present));
        assert!(!callers.all_gone(&callers.present()));
    }
}
