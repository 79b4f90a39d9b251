//! When a process has initialised, by its own account.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::OFlag;
use tokio::{
    net::UnixDatagram,
    sync::watch,
    time::{sleep, timeout},
};

use crate::{container::open_inside, stream};

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(20);
/// A server that accepts a connection before it can answer is asked anew after this.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Bytes of a message of `sd_notify`; longer ones are cut.
const MAX_MESSAGE: usize = 4096;
/// Bytes of an HTTP status line.
const MAX_STATUS: usize = 256;

/// How that is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sign {
    Notify,
    Http { port: u16, path: String },
    Tcp(u16),
    File(PathBuf),
}

/// Messages of `sd_notify`(3). They are read whether or not anybody waits for them: a sender must not be held up.
#[derive(Debug)]
pub struct Notify(watch::Sender<bool>);

impl Default for Notify {
    fn default() -> Self {
        Self(watch::Sender::new(false))
    }
}

impl Notify {
    /// Listens at `path`, for as long as the agent runs.
    ///
    /// # Errors
    /// If there can be no socket.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        let socket = UnixDatagram::bind(path)?;
        // Whoever a container's process runs as.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        let seen = self.0.clone();
        tokio::spawn(async move {
            let mut message = [0; MAX_MESSAGE];
            loop {
                match socket.recv(&mut message).await {
                    Ok(length) if is_ready(message.get(..length).unwrap_or_default()) => drop(seen.send_replace(true)),
                    Ok(_) => {}
                    Err(_) => sleep(PAUSE).await,
                }
            }
        });
        Ok(())
    }

    async fn wait(&self) {
        // The sender is this one's.
        let _ = self.0.subscribe().wait_for(|seen| *seen).await;
    }
}

fn is_ready(message: &[u8]) -> bool {
    message.split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
}

/// Waits for the sign, for ever. `root` is the container's, and `last` is what was seen of it last.
pub async fn wait(sign: &Sign, notify: &Notify, root: &Path, last: &mut String) {
    if *sign == Sign::Notify {
        "no READY=1 came".clone_into(last);
        return notify.wait().await;
    }
    while let Err(why) = look(sign, root, last).await {
        *last = why;
        sleep(PAUSE).await;
    }
}

async fn look(sign: &Sign, root: &Path, last: &mut String) -> Result<(), String> {
    match sign {
        Sign::Notify => Ok(()),
        Sign::Tcp(port) => stream::probe(*port).await.map(drop).map_err(|e| crate::error::chain(&e)),
        Sign::Http { port, path } => {
            let connection = stream::probe(*port).await.map_err(|e| crate::error::chain(&e))?;
            // The wait for it may be what the deadline ends.
            *last = format!("port {port} accepted a connection and did not answer GET {path}");
            let silent = last.clone();
            timeout(ANSWER_LIMIT, http(connection, *port, path)).await.unwrap_or(Err(silent))
        }
        Sign::File(path) => {
            let inside = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
            open_inside(root, &inside, OFlag::O_PATH).map(drop).map_err(|e| format!("{}: {}", path.display(), e.desc()))
        }
    }
}

async fn http(connection: stream::Probe, port: u16, path: &str) -> Result<(), String> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: chsnap\r\nConnection: close\r\n\r\n");
    let failed = |e: io::Error| format!("port {port}: {e}");
    connection.send(request.as_bytes()).await.map_err(failed)?;
    let mut line = Vec::new();
    while !line.contains(&b'\n') && line.len() < MAX_STATUS {
        let more = connection.receive(MAX_STATUS).await.map_err(failed)?;
        if more.is_empty() {
            break;
        }
        line.extend(more);
    }
    let text = String::from_utf8_lossy(&line);
    let first = text.lines().next().unwrap_or_default();
    match status(first) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("port {port} answered GET {path} with status {status}")),
        None => Err(format!("port {port} answered GET {path} with {first:?}, which is no HTTP")),
    }
}

fn status(line: &str) -> Option<u16> {
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        time::timeout,
    };

    use super::*;

    #[test]
    fn a_message_says_ready_in_a_line_of_its_own() {
        for (message, ready) in [
            ("READY=1", true),
            ("STATUS=up\nREADY=1\nMAINPID=1", true),
            ("READY=0", false),
            ("NOTREADY=1", false),
            ("", false),
        ] {
            assert_eq!(is_ready(message.as_bytes()), ready, "{message:?}");
        }
    }

    #[tokio::test]
    async fn notify_file_and_port_are_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (notify, mut last) = (Notify::default(), String::new());
        let path = dir.path().join("notify");
        notify.listen(&path).unwrap();
        let soon = |sign: Sign| {
            let (root, notify) = (dir.path().to_owned(), &notify);
            async move {
                let mut last = String::new();
                let seen = timeout(Duration::from_millis(100), wait(&sign, notify, &root, &mut last)).await;
                seen.map_err(|_| last)
            }
        };
        assert_eq!(soon(Sign::Notify).await, Err("no READY=1 came".into()));
        let sender = UnixDatagram::unbound().unwrap();
        sender.send_to(b"STATUS=loading", &path).await.unwrap();
        assert!(soon(Sign::Notify).await.is_err());
        sender.send_to(b"READY=1\n", &path).await.unwrap();
        wait(&Sign::Notify, &notify, dir.path(), &mut last).await;

        let file = Sign::File("/run/ready".into());
        assert_eq!(soon(file.clone()).await, Err("/run/ready: No such file or directory".into()));
        fs::create_dir(dir.path().join("run")).unwrap();
        fs::write(dir.path().join("run/ready"), "").unwrap();
        assert_eq!(soon(file).await, Ok(()));

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(soon(Sign::Tcp(port)).await, Ok(()));
        drop(listener);
        let text = soon(Sign::Tcp(port)).await.unwrap_err();
        assert!(text.contains("nothing listens"), "{text}");
    }

    #[tokio::test]
    async fn a_server_that_does_not_answer_is_told_of() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sign, mut last) = (Sign::Http { port, path: "/".into() }, String::new());
        let notify = Notify::default();
        let waiting = wait(&sign, &notify, Path::new("/"), &mut last);
        timeout(Duration::from_millis(200), waiting).await.unwrap_err();
        assert_eq!(last, format!("port {port} accepted a connection and did not answer GET /"));
    }

    #[tokio::test]
    async fn an_http_server_is_ready_when_it_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            for answer in ["HTTP/1.1 503 Service Unavailable\r\n\r\n", "SSH-2.0\r\n", "HTTP/1.0 204 No Content\r\n\r\n"]
            {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                let length = stream.read(&mut request).await.unwrap();
                assert!(request[..length].starts_with(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"));
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let sign = Sign::Http { port, path: "/healthz".into() };
        let (root, mut last) = (Path::new("/"), String::new());
        let text = look(&sign, root, &mut last).await.unwrap_err();
        assert!(text.ends_with("answered GET /healthz with status 503"), "{text}");
        let text = look(&sign, root, &mut last).await.unwrap_err();
        assert!(text.ends_with("\"SSH-2.0\", which is no HTTP"), "{text}");
        look(&sign, root, &mut last).await.unwrap();
        server.await.unwrap();
    }
}
