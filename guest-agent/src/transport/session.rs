//! One session on the channel, as ttrpc sees it.
//!
//! On a virtio-serial port a host can go and another one come without the agent ever reading an end: the state of the
//! port is all there is, and after a restore not even that has changed. What is sure to come is the next host's
//! greeting. Between two messages it cannot be anything else, since as a header it would announce more than ttrpc
//! allows. Inside a message (the last host went away while it sent one) the same bytes may be somebody's data; but a
//! host that greets sends nothing more until it is answered, so a greeting that is followed by silence is one.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::{Sleep, sleep},
};

use chsnap_protocol::session::GREETING;

use super::channel::Channel;

/// Of a ttrpc message: length, stream, type, flags.
const HEADER: usize = 10;
/// Greeting and number.
const HELLO: usize = 16;
/// How long a host that is in the midst of a message may pause, right after bytes that look like a greeting.
const SILENCE: Duration = Duration::from_millis(100);

/// Where in a message the reader is.
#[derive(Debug)]
enum Frame {
    Header {
        bytes: [u8; HEADER],
        have: usize,
    },
    /// The header is complete, and passed on.
    Deliver {
        bytes: [u8; HEADER],
        given: usize,
    },
    Body {
        left: usize,
    },
}

const START: Frame = Frame::Header { bytes: [0; HEADER], have: 0 };

/// Gives the channel back when it is dropped.
#[derive(Debug)]
pub struct Session {
    channel: Option<Channel>,
    back: Option<oneshot::Sender<Channel>>,
    frame: Frame,
    /// The bytes read last.
    last: [u8; HELLO],
    silence: Option<Pin<Box<Sleep>>>,
    over: bool,
}

impl Session {
    /// The session, and where the channel comes back.
    pub fn new(channel: Channel) -> (Self, oneshot::Receiver<Channel>) {
        let (back, end) = oneshot::channel();
        let session = Self {
            channel: Some(channel),
            back: Some(back),
            frame: START,
            last: [0xff; HELLO],
            silence: None,
            over: false,
        };
        (session, end)
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.silence = None;
        let fresh = bytes.get(bytes.len().saturating_sub(HELLO)..).unwrap_or_default();
        self.last.rotate_left(fresh.len());
        for (to, from) in self.last.iter_mut().rev().zip(fresh.iter().rev()) {
            *to = *from;
        }
    }

    /// Ends the session; what has been read of the next one goes back.
    fn end(&mut self, next: &[u8]) -> Poll<io::Result<()>> {
        self.over = true;
        if let Some(channel) = &mut self.channel {
            channel.put_back(next);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads at most `max` bytes of the channel; `None` at its end.
    fn poll_channel(&mut self, cx: &mut Context<'_>, target: &mut [u8]) -> Poll<io::Result<Option<usize>>> {
        let Some(channel) = &mut self.channel else { return Poll::Ready(Ok(None)) };
        match channel.poll_fill(cx, target) {
            Poll::Ready(Ok(0)) => Poll::Ready(Ok(None)),
            Poll::Ready(Ok(count)) => {
                self.remember(target.get(..count).unwrap_or_default());
                Poll::Ready(Ok(Some(count)))
            }
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// In the midst of a message, nothing more comes. Ready when that is since a greeting, for long enough.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.last.starts_with(&GREETING) {
            return Poll::Pending;
        }
        self.silence.get_or_insert_with(|| Box::pin(sleep(SILENCE))).as_mut().poll(cx)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let (Some(channel), Some(back)) = (self.channel.take(), self.back.take()) {
            // Without a receiver the agent is on its way out.
            let _ = back.send(channel);
        }
    }
}

impl AsyncRead for Session {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.over || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match &mut this.frame {
                Frame::Header { bytes, have } => {
                    let (mut bytes, have) = (*bytes, *have);
                    let rest = bytes.get_mut(have..).unwrap_or_default();
                    let count = match this.poll_channel(cx, rest) {
                        Poll::Ready(result) => result?,
                        Poll::Pending => {
                            if have > 0 {
                                ready!(this.poll_silence(cx));
                                let hello = this.last;
                                return this.end(&hello);
                            }
                            return Poll::Pending;
                        }
                    };
                    let Some(count) = count else { return this.end(&[]) };
                    let have = have + count;
                    if have >= GREETING.len() && bytes.starts_with(&GREETING) {
                        return this.end(bytes.get(..have).unwrap_or_default());
                    }
                    this.frame = match have {
                        HEADER => Frame::Deliver { bytes, given: 0 },
                        _ => Frame::Header { bytes, have },
                    };
                }
                Frame::Deliver { bytes, given } => {
                    let rest = bytes.get(*given..).unwrap_or_default();
                    let part = rest.get(..rest.len().min(buf.remaining())).unwrap_or_default();
                    buf.put_slice(part);
                    *given += part.len();
                    if *given == HEADER {
                        let [a, b, c, d, ..] = *bytes;
                        this.frame = match u32::from_be_bytes([a, b, c, d]) as usize {
                            0 => START,
                            left => Frame::Body { left },
                        };
                    }
                    return Poll::Ready(Ok(()));
                }
                Frame::Body { left } => {
                    let left = *left;
                    let room = buf.remaining().min(left);
                    let target = buf.initialize_unfilled_to(room);
                    let count = match this.poll_channel(cx, target) {
                        Poll::Ready(result) => result?,
                        Poll::Pending => {
                            ready!(this.poll_silence(cx));
                            let hello = this.last;
                            return this.end(&hello);
                        }
                    };
                    let Some(count) = count else { return this.end(&[]) };
                    buf.advance(count);
                    this.frame = match left - count {
                        0 => START,
                        left => Frame::Body { left },
                    };
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Session {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match &mut this.channel {
            Some(channel) if !this.over => Pin::new(channel).poll_write(cx, data),
            _ => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
