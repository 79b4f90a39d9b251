//! Bytes: stdio, terminals and forwarded connections, on the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Agent, Spec, refusal};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::{sleep, timeout},
};
use ttrpc::Code;

#[tokio::test]
async fn stdin_is_echoed_until_it_is_closed() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &Spec::new(&agent.root(), &["cat"])).await;
    for line in ["one\n", "two\n"] {
        agent.write(streams.stdin_stream, line.as_bytes()).await.unwrap();
        assert_eq!(agent.read_until(streams.stdout_stream, line).await, line);
    }
    agent.close_write(streams.stdin_stream).await.unwrap();
    agent.close_write(streams.stdin_stream).await.unwrap();
    assert_eq!(agent.text(streams.stdout_stream).await, "");
    assert_eq!(agent.wait("c", "").await, 0);
    assert_eq!(refusal(agent.write(streams.stdin_stream, b"x").await).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn stdin_that_nobody_reads_stops_the_writer() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("sleep 1; wc -c")).await;
    let chunk = vec![b'x'; 1 << 20];
    // More than a pipe holds, so it is only taken once the program reads.
    let early = timeout(Duration::from_millis(300), agent.write(streams.stdin_stream, &chunk)).await;
    assert!(early.is_err(), "taken before anybody read");
    // The write goes on in the agent, though nobody waits for its answer here.
    agent.write(streams.stdin_stream, &chunk).await.unwrap();
    agent.close_write(streams.stdin_stream).await.unwrap();
    assert_eq!(agent.text(streams.stdout_stream).await.trim(), (2 << 20).to_string());
}

#[tokio::test]
async fn a_dead_reader_is_reported() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("exec true")).await;
    assert_eq!(agent.wait("c", "").await, 0);
    let (code, text) = refusal(agent.write(streams.stdin_stream, &vec![0; 1 << 20]).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("reader"), "{text}");
}

#[tokio::test]
async fn a_slow_reader_loses_nothing_and_stops_the_writer() {
    need_root!();
    let agent = Agent::start().await;
    let script = "dd if=/dev/zero bs=1M count=10 2>/dev/null | tr '\\0' x; echo done >&2";
    let streams = agent.run("c", &agent.shell(script)).await;
    let mut total = 0;
    for _ in 0..20 {
        let answer = agent.read(streams.stdout_stream, 1000).await.unwrap();
        assert!((1..=1000).contains(&answer.data.len()));
        total += answer.data.len();
        sleep(Duration::from_millis(10)).await;
    }
    // With 10 MB under way, the writer cannot have finished.
    let early = timeout(Duration::from_millis(100), agent.read(streams.stderr_stream, 10)).await;
    assert!(early.is_err(), "the writer was not stopped");
    let rest = agent.read_all(streams.stdout_stream).await;
    assert!(rest.iter().all(|b| *b == b'x'));
    assert_eq!(total + rest.len(), 10 << 20);
    eprintln!("{} kB resident after 10 MB of output", agent.resident());
    assert!(agent.resident() < 16 << 10, "{} kB resident", agent.resident());
}

#[tokio::test]
async fn the_last_bytes_outlive_the_process() {
    need_root!();
    let agent = Agent::start().await;
    for round in 0..20 {
        let id = format!("c{round}");
        let streams = agent.run(&id, &agent.shell("seq 1 5000; echo -n last >&2")).await;
        assert_eq!(agent.wait(&id, "").await, 0);
        let out = agent.text(streams.stdout_stream).await;
        assert!(out.ends_with("4999\n5000\n"), "{:?}", &out[out.len().saturating_sub(20)..]);
        assert_eq!(agent.text(streams.stderr_stream).await, "last");
        agent.delete(&id).await.unwrap();
        assert_eq!(refusal(agent.read(streams.stdout_stream, 1).await).0, Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn a_descendant_keeps_stdout_open() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("sleep 100")).await;
    let exec = agent.exec("c", "e", &agent.shell("(sleep 1; echo late) & echo early")).await.unwrap();
    agent.start_process("c", "e").await.unwrap();
    assert_eq!(agent.wait("c", "e").await, 0);
    assert_eq!(agent.text(exec.stdout_stream).await, "early\nlate\n");
    assert_eq!(streams.stdout_stream + 3, exec.stdout_stream);
}

#[tokio::test]
async fn a_waiting_reader_is_ended_by_close() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("sleep 100")).await;
    let (answer, ()) = tokio::join!(agent.read(streams.stdout_stream, 1), async {
        sleep(Duration::from_millis(100)).await;
        agent.close(streams.stdout_stream).await;
    });
    assert_eq!(refusal(answer).0, Code::CANCELLED);
}

#[tokio::test]
async fn bad_sizes_and_numbers_are_refused() {
    need_root!();
    let agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("sleep 100")).await;
    assert_eq!(refusal(agent.read(4711, 1).await).0, Code::NOT_FOUND);
    assert_eq!(refusal(agent.read(0, 1).await).0, Code::NOT_FOUND);
    assert_eq!(refusal(agent.read(streams.stdout_stream, 0).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(refusal(agent.read(streams.stdin_stream, 1).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(agent.write(streams.stdout_stream, b"x").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(agent.write(streams.stdin_stream, &vec![0; (1 << 20) + 1]).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(refusal(agent.connect(0).await).0, Code::INVALID_ARGUMENT);
    assert_eq!(refusal(agent.connect(70000).await).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_terminal_is_one() {
    need_root!();
    let agent = Agent::start().await;
    let script = "tty; stty size; test -c /dev/console && echo console; read x; echo got $x; stty size; cat";
    let spec =
        agent.shell(script).terminal().set("/process/consoleSize", serde_json::json!({ "height": 33, "width": 111 }));
    let streams = agent.run("c", &spec).await;
    assert_eq!(streams.stderr_stream, 0);
    let seen = agent.read_until(streams.stdout_stream, "console\r\n").await;
    assert_eq!(seen, "/dev/pts/0\r\n33 111\r\nconsole\r\n");
    let request = chsnap_protocol::agent::ResizeTerminalRequest {
        process: Some(common::process("c", "")).into(),
        width: 80,
        height: 24,
        ..Default::default()
    };
    agent.client.resize_terminal(common::soon(), &request).await.unwrap();
    agent.write(streams.stdin_stream, b"word\n").await.unwrap();
    let seen = agent.read_until(streams.stdout_stream, "24 80\r\n").await;
    assert!(seen.contains("got word\r\n"), "{seen:?}");
    // In the midst of a line, cat still sees both the line and the end.
    agent.write(streams.stdin_stream, b"no newline").await.unwrap();
    agent.close_write(streams.stdin_stream).await.unwrap();
    let rest = agent.text(streams.stdout_stream).await;
    assert_eq!(rest, "no newlineno newline");
    assert_eq!(agent.wait("c", "").await, 0);
}

#[tokio::test]
async fn the_interrupt_character_interrupts() {
    need_root!();
    let agent = Agent::start().await;
    agent.run("c", &agent.shell("sleep 100")).await;
    let spec = agent.shell("echo up; exec sleep 100").terminal();
    let streams = agent.exec("c", "e", &spec).await.unwrap();
    agent.start_process("c", "e").await.unwrap();
    agent.read_until(streams.stdout_stream, "up").await;
    agent.write(streams.stdin_stream, b"\x03").await.unwrap();
    assert_eq!(agent.wait("c", "e").await, 130);
}

#[tokio::test]
async fn a_terminal_without_devpts_says_so() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent.shell("true").terminal().set("/mounts", serde_json::json!([]));
    let (_, text) = refusal(agent.create("c", &spec).await);
    assert!(text.contains("devpts"), "{text}");
    // Nothing is left of it.
    agent.create("c", &agent.shell("true")).await.unwrap();
}

#[tokio::test]
async fn a_hundred_connections_with_half_closes() {
    need_root!();
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let server = tokio::spawn(async move {
        for _ in 0..100 {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                // The answer begins only after the client's half-close.
                let mut question = Vec::new();
                socket.read_to_end(&mut question).await.unwrap();
                question.reverse();
                socket.write_all(&question).await.unwrap();
            });
        }
    });
    let all = (0..100).map(|number| {
        let agent = &agent;
        async move {
            let stream = agent.connect(port).await.unwrap();
            let mut question = vec![number; 50_000];
            question[0] = 255;
            agent.write(stream, &question).await.unwrap();
            agent.close_write(stream).await.unwrap();
            let answer = agent.read_all(stream).await;
            question.reverse();
            assert!(answer == question, "connection {number}: {} bytes", answer.len());
            agent.close(stream).await;
        }
    });
    futures::future::join_all(all).await;
    server.await.unwrap();
    eprintln!("{} kB resident after 100 connections at once", agent.resident());
    assert!(agent.resident() < 32 << 10, "{} kB resident", agent.resident());
}

#[tokio::test]
async fn the_other_side_closes_first() {
    need_root!();
    let agent = Agent::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    let stream = agent.connect(port).await.unwrap();
    let (mut socket, _) = listener.accept().await.unwrap();
    socket.write_all(b"greetings").await.unwrap();
    socket.shutdown().await.unwrap();
    assert_eq!(agent.text(stream).await, "greetings");
    // The way there is still open.
    agent.write(stream, b"thanks").await.unwrap();
    agent.close_write(stream).await.unwrap();
    let mut thanks = String::new();
    socket.read_to_string(&mut thanks).await.unwrap();
    assert_eq!(thanks, "thanks");
}

#[tokio::test]
async fn a_refused_connection_says_so() {
    need_root!();
    let agent = Agent::start().await;
    // Bound, then released: nobody listens there.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let (code, text) = refusal(agent.connect(port.into()).await);
    assert_eq!(code, Code::UNAVAILABLE);
    assert!(text.contains(&port.to_string()) && text.contains("listens"), "{text}");
}

#[tokio::test]
async fn ipv6_is_tried_too() {
    need_root!();
    let agent = Agent::start().await;
    let Ok(listener) = TcpListener::bind("[::1]:0").await else {
        chsnap_test_skip::skip("no IPv6 loopback");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    agent.connect(port.into()).await.unwrap();
}
