//! A session against every way in which hosts come and go.

use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::UnixStream,
    time::timeout,
};

use super::*;
use crate::{sys, transport::channel::Raw};

fn pair() -> (UnixStream, Channel) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (host, guest): (OwnedFd, OwnedFd) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let host = UnixStream::from_std(std::os::unix::net::UnixStream::from(host)).unwrap();
    (host, Channel::new(Raw::Socket(sys::watch(guest, Interest::READABLE | Interest::WRITABLE).unwrap())))
}

fn frame(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, 1, 1, 0]);
    bytes.extend(body);
    bytes
}

fn hello(number: u64) -> Vec<u8> {
    [GREETING.as_slice(), &number.to_le_bytes()].concat()
}

/// What the session gives before its end, and what is left on the channel.
async fn split(mut session: Session, end: oneshot::Receiver<Channel>) -> (Vec<u8>, Vec<u8>) {
    let mut before = Vec::new();
    session.read_to_end(&mut before).await.unwrap();
    drop(session);
    let mut channel = end.await.unwrap();
    let mut after = vec![0; HELLO];
    let _ = timeout(Duration::from_secs(1), channel.read_exact(&mut after)).await;
    (before, after)
}

/// A generator of numbers that look random, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

#[tokio::test]
async fn messages_pass_unchanged_however_they_are_cut() {
    let mut numbers = Numbers(7);
    for _ in 0..50 {
        let (mut host, channel) = pair();
        let (mut session, _end) = Session::new(channel);
        let mut sent = Vec::new();
        for _ in 0..20 {
            let mut body: Vec<u8> = (0..numbers.below(9000)).map(|_| numbers.below(256) as u8).collect();
            if numbers.below(3) == 0 {
                // Somebody's data, followed by more.
                body.extend(hello(1));
                body.extend(b"more");
            }
            sent.extend(frame(&body));
        }
        let expected = sent.clone();
        let cuts: Vec<_> = (0..40).map(|_| numbers.below(5000) + 1).collect();
        let writer = tokio::spawn(async move {
            let mut rest = sent.as_slice();
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at(rest.len().min(*cut));
                host.write_all(now).await.unwrap();
                tokio::task::yield_now().await;
                rest = later;
                if rest.is_empty() {
                    return;
                }
            }
        });
        let mut seen = Vec::new();
        session.read_to_end(&mut seen).await.unwrap();
        writer.await.unwrap();
        assert!(seen == expected);
    }
}

#[tokio::test]
async fn a_greeting_between_messages_ends_the_session_at_once() {
    let (mut host, channel) = pair();
    let (session, end) = Session::new(channel);
    host.write_all(&[frame(b"abc"), hello(5)].concat()).await.unwrap();
    let (before, after) = timeout(SILENCE / 2, split(session, end)).await.unwrap();
    assert_eq!((before, after), (frame(b"abc"), hello(5)));
}

#[tokio::test]
async fn a_greeting_inside_a_message_ends_the_session_when_nothing_follows() {
    // Cut inside the body, and inside the header.
    for cut in [HEADER + 100, 3] {
        let (mut host, channel) = pair();
        let (session, end) = Session::new(channel);
        let mut sent = frame(&[7; 5000]);
        sent.truncate(cut);
        host.write_all(&sent).await.unwrap();
        tokio::task::yield_now().await;
        host.write_all(&hello(9)).await.unwrap();
        let (_, after) = timeout(Duration::from_secs(5), split(session, end)).await.unwrap();
        assert_eq!(after, hello(9), "cut at {cut}");
    }
}

#[tokio::test]
async fn data_that_looks_like_a_greeting_is_data() {
    let (mut host, channel) = pair();
    let (mut session, _end) = Session::new(channel);
    let body = [hello(1), vec![1; 100]].concat();
    let (first, second) = (frame(&body)[..HEADER + HELLO].to_vec(), vec![1; 100]);
    host.write_all(&first).await.unwrap();
    tokio::time::sleep(SILENCE / 4).await;
    host.write_all(&second).await.unwrap();
    // At a message's end, silence means nothing.
    host.write_all(&frame(&hello(2))).await.unwrap();
    tokio::time::sleep(SILENCE * 2).await;
    host.write_all(&frame(b"end")).await.unwrap();
    drop(host);
    let mut seen = Vec::new();
    session.read_to_end(&mut seen).await.unwrap();
    assert_eq!(seen, [frame(&body), frame(&hello(2)), frame(b"end")].concat());
}
