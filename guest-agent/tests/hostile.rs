//! What comes over the channel in the wrong form: the agent must neither die nor grow.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use chsnap_protocol::session;
use common::{Agent, refusal};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use ttrpc::{
    Code,
    proto::{Codec as _, MessageHeader, Request, Response},
};

const METHODS: [&str; 19] = [
    "Info",
    "CreateContainer",
    "DeleteContainer",
    "CreateExec",
    "StartProcess",
    "WaitProcess",
    "SignalProcess",
    "DeleteProcess",
    "ListPids",
    "ResizeTerminal",
    "Stats",
    "ReadStream",
    "WriteStream",
    "CloseStreamWrite",
    "CloseStream",
    "ConnectPort",
    "NoSuchMethod",
    "",
    "\0",
];

/// A generator of numbers that look random, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }

    fn bytes(&mut self, limit: usize) -> Vec<u8> {
        (0..self.below(limit)).map(|_| self.below(256) as u8).collect()
    }
}

fn message(method: &str, stream: u32, payload: Vec<u8>) -> Vec<u8> {
    let mut request = Request::new();
    request.service = "chsnap.agent.v1.Agent".into();
    request.method = method.into();
    request.payload = payload;
    let body = request.encode().unwrap();
    let mut bytes: Vec<u8> = MessageHeader::new_request(stream, body.len() as u32).into();
    bytes.extend(body);
    bytes
}

#[tokio::test]
async fn noise_ends_a_session_and_nothing_else() {
    need_root!();
    let mut agent = Agent::silent();
    let mut numbers = Numbers(1);
    for round in 0..100 {
        let mut channel = agent.connection().await;
        if round % 3 != 0 {
            session::open(&mut channel, 1).await.unwrap();
        }
        let noise = numbers.bytes(20_000);
        // The agent may hang up in the middle of it.
        let _ = channel.write_all(&noise).await;
    }
    agent.client = agent.session().await;
    agent.info().await;
    assert!(agent.resident() < 16 << 10, "{} kB resident", agent.resident());
}

#[tokio::test]
async fn every_request_is_answered_however_broken() {
    need_root!();
    let mut agent = Agent::silent();
    let mut numbers = Numbers(2);
    let mut channel = agent.connection().await;
    session::open(&mut channel, 1).await.unwrap();
    for round in 0..2000u32 {
        let method = METHODS[numbers.below(METHODS.len())];
        let payload = match round % 4 {
            // A string field with a container's name, then noise.
            0 => [vec![10, 1, b'a'], numbers.bytes(40)].concat(),
            // Small numbers.
            1 => vec![8, numbers.below(128) as u8, 16, numbers.below(128) as u8],
            _ => numbers.bytes(60),
        };
        let stream = round * 2 + 1;
        channel.write_all(&message(method, stream, payload)).await.unwrap();
        let mut header = [0; 10];
        timeout(Duration::from_secs(10), channel.read_exact(&mut header)).await.unwrap().unwrap();
        let header = MessageHeader::from(header);
        assert_eq!(header.stream_id, stream, "{method}");
        let mut body = vec![0; header.length as usize];
        channel.read_exact(&mut body).await.unwrap();
        Response::decode(&body).unwrap();
    }
    drop(channel);
    agent.client = agent.session().await;
    assert_eq!(refusal(agent.delete("a").await).0, Code::NOT_FOUND);
    assert!(agent.resident() < 16 << 10, "{} kB resident", agent.resident());
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused() {
    need_root!();
    let mut agent = Agent::silent();
    let mut channel = agent.connection().await;
    session::open(&mut channel, 1).await.unwrap();
    let length = (4 << 20) + 1;
    channel.write_all(&Vec::from(MessageHeader::new_request(1, length))).await.unwrap();
    for _ in 0..length >> 12 {
        channel.write_all(&[0; 4096]).await.unwrap();
    }
    channel.write_all(&[0]).await.unwrap();
    let mut header = [0; 10];
    timeout(Duration::from_secs(10), channel.read_exact(&mut header)).await.unwrap().unwrap();
    let header = MessageHeader::from(header);
    let mut body = vec![0; header.length as usize];
    channel.read_exact(&mut body).await.unwrap();
    assert_eq!(Response::decode(&body).unwrap().status().code(), Code::INVALID_ARGUMENT);
    assert!(agent.resident() < 8 << 10, "{} kB resident", agent.resident());
    drop(channel);
    agent.client = agent.session().await;
    agent.info().await;
}

/// As on a virtio-serial port, where one host goes away in the middle of a message and the next one greets.
#[tokio::test]
async fn a_new_host_is_heard_inside_an_old_message() {
    need_root!();
    let mut agent = Agent::silent();
    let mut channel = agent.connection().await;
    session::open(&mut channel, 1).await.unwrap();
    for number in 2..10 {
        let unfinished = message("WriteStream", 1, vec![7; 10_000]);
        let cut = 1 + (number as usize * 1237) % (unfinished.len() - 1);
        channel.write_all(&unfinished[..cut]).await.unwrap();
        timeout(Duration::from_secs(5), session::open(&mut channel, number)).await.unwrap().unwrap();
    }
    agent.client = chsnap_protocol::agent_ttrpc::AgentClient::new(ttrpc::r#async::Client::new(
        ttrpc::r#async::transport::Socket::new(channel),
    ));
    agent.info().await;
}

#[tokio::test]
async fn a_container_cannot_fill_the_agent() {
    need_root!();
    let agent = Agent::start().await;
    // Endless output that nobody reads, and many orphans.
    let script = "yes & i=0; while [ $i -lt 300 ]; do (true &); i=$((i+1)); done; echo up >&2; wait";
    let streams = agent.run("c", &agent.shell(script)).await;
    agent.read_until(streams.stderr_stream, "up").await;
    assert!(agent.resident() < 8 << 10, "{} kB resident", agent.resident());
    agent.delete("c").await.unwrap();
}
