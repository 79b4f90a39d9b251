//! `io.chsnap.expose`: the guest's ports on the host.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Started, eventually, http};
use serde_json::Value;

crate::cases! {
    Vms: both_ways;
    Once: many_at_once, half_close, nobody_listens, large_bodies;
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The demo application, answering on the socket that is returned.
fn serving<'a>(env: &'a Env, expose: &str) -> Result<(Started<'a>, std::path::PathBuf)> {
    let started = env.container().annotation("io.chsnap.expose", expose).start()?;
    started.wait_log("listening on port 8080")?;
    let socket = started.pod_dir().join("8080.sock");
    Ok((started, socket))
}

fn get(socket: &Path, path: &str) -> Result<(u16, Vec<u8>)> {
    http::request(&mut *http::unix(socket)?, "GET", path, b"")
}

fn both_ways(env: &Env) -> Result<()> {
    let address = free_port()?;
    let (started, socket) = serving(env, &format!("8080,{address}:8080"))?;
    let (status, body) = get(&socket, "/")?;
    let answer: Value = serde_json::from_slice(&body).with_context(|| String::from_utf8_lossy(&body).into_owned())?;
    ensure!(status == 200 && answer["pid"] == 1, "{status} {answer}");
    ensure!(answer["kernel"] == started.sh("uname -r")?.as_str(), "{answer}");
    let (status, body) = http::request(&mut *http::tcp(address)?, "POST", "/echo", b"over TCP")?;
    ensure!(status == 200 && body == b"over TCP", "{status}");
    ensure!(get(&socket, "/no/such")?.0 == 404);
    started.remove()?;
    ensure!(!socket.exists(), "the socket is still there");
    ensure!(http::tcp(address).is_err(), "somebody still listens on {address}");
    Ok(())
}

fn many_at_once(env: &Env) -> Result<()> {
    let (started, socket) = serving(env, "8080")?;
    // All connections are open before the first request is sent.
    let mut streams = (0..100).map(|_| http::unix(&socket)).collect::<Result<Vec<_>>>()?;
    let answers: Vec<Result<(u16, Vec<u8>)>> = thread::scope(|scope| {
        let each = |(n, stream): (usize, &mut Box<dyn http::Stream>)| {
            let body = format!("request {n}");
            http::request(&mut **stream, "POST", "/echo", body.as_bytes())
        };
        let threads: Vec<_> = streams.iter_mut().enumerate().map(|s| scope.spawn(move || each(s))).collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|_| anyhow::bail!("panicked"))).collect()
    });
    for (n, answer) in answers.into_iter().enumerate() {
        let (status, body) = answer.with_context(|| format!("request {n}"))?;
        ensure!(status == 200 && body == format!("request {n}").as_bytes(), "request {n}: {status} {body:?}");
    }
    started.remove()
}

/// Reads to the end of its input before it answers, and keeps reading from one that does not end.
const COUNTER: &str = "
import socket
s = socket.create_server(('127.0.0.1', 8080))
print('up', flush=True)
while True:
    c, _ = s.accept()
    n = 0
    while True:
        d = c.recv(65536)
        if not d:
            break
        n += len(d)
    c.sendall(b'got %d' % n)
    c.close()
";

fn half_close(env: &Env) -> Result<()> {
    let started = env.container().annotation("io.chsnap.expose", "8080").python(COUNTER).start()?;
    started.wait_log("up")?;
    let socket = started.pod_dir().join("8080.sock");
    for size in [0, 1, 100_000] {
        let mut stream = http::unix(&socket)?;
        stream.write_all(&vec![7; size])?;
        stream.end_writing()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer == format!("got {size}"), "{size}: {answer:?}");
    }
    // A client that goes in the middle frees the server for the next one.
    let mut rude = http::unix(&socket)?;
    rude.write_all(b"abc")?;
    drop(rude);
    let mut stream = http::unix(&socket)?;
    stream.write_all(b"next")?;
    stream.end_writing()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer == "got 4", "{answer:?}");
    started.remove()
}

fn nobody_listens(env: &Env) -> Result<()> {
    let started = env.container().annotation("io.chsnap.expose", "8080").sh("sleep 1000").start()?;
    let socket = started.pod_dir().join("8080.sock");
    // Accepted here, refused there: the connection ends without a byte.
    let mut stream = http::unix(&socket)?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    ensure!(answer.is_empty(), "{answer:?}");
    // Once somebody does, it works.
    let server = started.exec_with(&["--exec-id", "server"], ["python3", "/app/app.py"]).start()?;
    let served = eventually(Duration::from_secs(20), || get(&socket, "/healthz").ok().filter(|(s, _)| *s == 200));
    ensure!(served.is_some(), "no answer from a server that came later");
    env.ctr().text(["task", "kill", "--exec-id", "server", &started.id])?;
    server.output()?.success()?;
    started.remove()
}

fn large_bodies(env: &Env) -> Result<()> {
    let (started, socket) = serving(env, "8080")?;
    let body: Vec<u8> = (0..3_000_000_u32).flat_map(|n| n.to_le_bytes()[..1].to_vec()).collect();
    let (status, back) = http::request(&mut *http::unix(&socket)?, "POST", "/echo", &body)?;
    ensure!(status == 200 && back == body, "{status}, {} of {} bytes", back.len(), body.len());
    let (status, _) = http::request(&mut *http::unix(&socket)?, "PUT", "/write?path=/stored", &body)?;
    ensure!(status == 200);
    ensure!(std::fs::read(started.upper("overlayfs")?.join("stored"))? == body, "other bytes are on the host");
    started.remove()
}
