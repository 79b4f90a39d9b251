//! A client of Cloud Hypervisor's REST API: HTTP/1.1 on one UNIX socket, one request at a time.
//!
//! A general HTTP client would be most of the shim's dependencies, for one server that sends a status, a length and
//! a body. Everything in an answer is bounded: the VMM is what a hostile guest breaks into first.

use std::time::Duration;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::Mutex,
    time::timeout,
};

use crate::vmm::ControlError;

/// Of an answer's lines before its body, together.
const MAX_HEAD: u64 = 16 << 10;
/// Of an answer's body; the longest is a running machine's description, about 2 KiB.
const MAX_BODY: usize = 1 << 20;

/// The conversation. After a failure of the socket it is over.
#[derive(Debug)]
pub struct Api {
    stream: Mutex<Option<BufReader<UnixStream>>>,
    patience: Duration,
}

/// An answer.
struct Answer {
    status: u16,
    body: Vec<u8>,
}

enum Failure {
    Io(std::io::Error),
    Closed,
    Garbled(String),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

impl Api {
    /// On a connected socket; `patience` is for one request.
    pub fn new(stream: UnixStream, patience: Duration) -> Self {
        Self { stream: Mutex::new(Some(BufReader::new(stream))), patience }
    }

    /// Asks for something.
    pub async fn get(&self, endpoint: &str) -> Result<Value, ControlError> {
        let body = self.request("GET", endpoint, None).await?;
        serde_json::from_slice(&body)
            .map_err(|error| ControlError::Garbled { command: endpoint.into(), what: error.to_string() })
    }

    /// Makes something so.
    pub async fn put(&self, endpoint: &str, body: Option<&Value>) -> Result<(), ControlError> {
        self.request("PUT", endpoint, body).await.map(drop)
    }

    async fn request(&self, method: &str, endpoint: &str, body: Option<&Value>) -> Result<Vec<u8>, ControlError> {
        let command = || endpoint.to_owned();
        let mut guard = self.stream.lock().await;
        // Taken out, so that a request given up half-way leaves no stream on which the next reads its answer.
        let mut stream = guard.take().ok_or_else(|| ControlError::Closed { command: command() })?;
        let answer = timeout(self.patience, exchange(&mut stream, method, endpoint, body)).await;
        let late = |_| ControlError::Late { command: command(), seconds: self.patience.as_secs_f32() };
        let answer = answer.map_err(late)?;
        let Answer { status, body } = answer.map_err(|failure| match failure {
            Failure::Io(source) => ControlError::Io { command: command(), source },
            Failure::Closed => ControlError::Closed { command: command() },
            Failure::Garbled(what) => ControlError::Garbled { command: command(), what },
        })?;
        *guard = Some(stream);
        match status {
            200..=299 => Ok(body),
            _ => Err(ControlError::Refused { command: command(), answer: format!("{status}: {}", reasons(&body)) }),
        }
    }
}

async fn exchange(
    stream: &mut BufReader<UnixStream>,
    method: &str,
    endpoint: &str,
    body: Option<&Value>,
) -> Result<Answer, Failure> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut request = format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    if !body.is_empty() {
        request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    }
    request += "\r\n";
    request += &body;
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;

    let mut head = stream.take(MAX_HEAD);
    let status = line(&mut head).await?;
    let status = status.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    let status = status.ok_or_else(|| Failure::Garbled("no HTTP status line".into()))?;
    let mut length = 0;
    loop {
        let header = line(&mut head).await?;
        if header.is_empty() {
            break;
        }
        let (name, value) = header.split_once(':').ok_or_else(|| Failure::Garbled(format!("header {header:?}")))?;
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(|_| Failure::Garbled(format!("header {header:?}")))?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(Failure::Garbled("a body in pieces".into()));
        }
    }
    if length > MAX_BODY {
        return Err(Failure::Garbled(format!("a body of {length} bytes")));
    }
    let mut body = vec![0; length];
    match stream.read_exact(&mut body).await {
        Ok(_) => Ok(Answer { status, body }),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Err(Failure::Closed),
        Err(error) => Err(error.into()),
    }
}

/// One line without its end.
async fn line(head: &mut tokio::io::Take<&mut BufReader<UnixStream>>) -> Result<String, Failure> {
    let mut line = Vec::new();
    head.read_until(b'\n', &mut line).await?;
    match line.strip_suffix(b"\r\n") {
        Some(line) => String::from_utf8(line.to_vec()).map_err(|_| Failure::Garbled("a header that is no text".into())),
        None if head.limit() == 0 => Err(Failure::Garbled("endless headers".into())),
        None if line.is_empty() => Err(Failure::Closed),
        None => Err(Failure::Garbled("half a header".into())),
    }
}

/// A refusal is a list of texts, each the cause of the one before.
fn reasons(body: &[u8]) -> String {
    match serde_json::from_slice::<Vec<String>>(body) {
        Ok(texts) => texts.join(": "),
        Err(_) => String::from_utf8_lossy(body).chars().filter(|char| !char.is_control()).take(500).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends these bytes, whatever is asked.
    async fn answered(bytes: &'static [u8]) -> Result<Value, ControlError> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = tokio::spawn(async move {
            let mut request = [0; 1024];
            let count = theirs.read(&mut request).await.unwrap();
            assert!(request[..count].starts_with(b"GET /api/v1/vmm.ping HTTP/1.1\r\n"));
            theirs.write_all(bytes).await.unwrap();
        });
        let answer = Api::new(ours, Duration::from_secs(30)).get("vmm.ping").await;
        server.await.unwrap();
        answer
    }

    #[tokio::test]
    async fn answers_that_are_none_are_errors() {
        let good = answered(b"HTTP/1.1 200 \r\nContent-Length: 8\r\n\r\n{\"a\": 1}").await.unwrap();
        assert_eq!(good["a"], 1);
        for (bytes, expected) in [
            (&b""[..], "closed"),
            (b"HTTP/1.1 200 \r\nContent-Length: 8\r\n\r\n{\"a\"", "closed"),
            (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP status line"),
            (b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", "a body of 99999999999 bytes"),
            (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n", "Content-Length: -1"),
            (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n", "pieces"),
            (b"HTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n{", "EOF while parsing"),
            (b"HTTP/1.1 500 \r\nContent-Length: 13\r\n\r\n[\"so\",\"what\"]", "500: so: what"),
            (b"HTTP/1.1 500 \r\nContent-Length: 4\r\n\r\n\x1b[2J", "500: [2J"),
        ] {
            let error = answered(bytes).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn endless_headers_are_given_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = tokio::spawn(async move {
            let _ = theirs.write_all(b"HTTP/1.1 200 \r\n").await;
            while theirs.write_all(b"X: y\r\n").await.is_ok() {}
        });
        let error = Api::new(ours, Duration::from_secs(30)).get("vmm.ping").await.unwrap_err();
        assert!(error.to_string().contains("endless headers"), "{error}");
        server.await.unwrap();
    }
}
