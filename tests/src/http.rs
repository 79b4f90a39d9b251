//! Enough of HTTP/1.1 for one request a connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::patience;

/// A connection to an exposed port.
pub trait Stream: Read + Write + Send {
    /// Ends the writing direction.
    fn end_writing(&self) -> std::io::Result<()>;
}

impl Stream for TcpStream {
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

impl Stream for UnixStream {
    fn end_writing(&self) -> std::io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

fn limit() -> Option<Duration> {
    Some(Duration::from_secs(20) * patience())
}

/// Connects to a UNIX socket.
pub fn unix(path: &Path) -> Result<Box<dyn Stream>> {
    let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(limit())?;
    Ok(Box::new(stream))
}

/// Connects to a TCP address.
pub fn tcp(address: SocketAddr) -> Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(address).with_context(|| address.to_string())?;
    stream.set_read_timeout(limit())?;
    Ok(Box::new(stream))
}

/// One request; answers status and body.
pub fn request(stream: &mut dyn Stream, method: &str, path: &str, body: &[u8]) -> Result<(u16, Vec<u8>)> {
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").context("no end of the answer's head")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).with_context(|| head.clone().into_owned())?;
    Ok((status, answer[end + 4..].to_vec()))
}
