//! A process's streams: containerd's fifos (or log files) on one side, the agent's streams on the other.
//!
//! Fifo semantics are those of containerd's runc shim: output fifos are held open for reading too, so that a client
//! may go and another come without the process getting SIGPIPE; the stdin fifo is held open for writing until
//! CloseIO, so that a client that goes does not end the input.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::{ffi::OsStringExt, fs::FileTypeExt},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chsnap_protocol::agent::{CreateProcessResponse, Stdio};
use thiserror::Error;
use tokio::{
    fs::{File, OpenOptions},
    io::AsyncWrite,
    net::unix::pipe,
    sync::Mutex,
    task::{AbortHandle, JoinHandle},
    time::{sleep, timeout},
};

use crate::agent::{Agent, read_into, write_from};

/// Where a process's streams go. Empty: nowhere.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// A fifo.
    pub stdin: String,
    /// A fifo or a `file://` URI.
    pub stdout: String,
    /// A fifo or a `file://` URI.
    pub stderr: String,
    /// One terminal instead of three pipes.
    pub terminal: bool,
}

/// A stream's local end cannot be opened.
#[derive(Debug, Error)]
pub enum StdioError {
    /// Not there, or not a fifo.
    #[error("cannot open {path:?} for the process's {stream}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// Where.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A log URI that this shim does not know.
    #[error("{uri:?} cannot take the process's {stream}: give a fifo or a file:// URI")]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// What it said.
        uri: String,
    },
}

impl Paths {
    /// What the agent is told to make.
    #[must_use]
    pub fn wanted(&self) -> Stdio {
        Stdio {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty() && !self.terminal,
            terminal: self.terminal,
            ..Default::default()
        }
    }
}

type Sink = Box<dyn AsyncWrite + Send + Unpin>;

/// The local ends. The outputs are open; stdin is opened when the process starts, see [`Relays::start`].
pub struct Local {
    stdin: Option<String>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

impl Local {
    /// Opens what `paths` names.
    ///
    /// # Errors
    /// See [`StdioError`].
    pub async fn open(paths: &Paths) -> Result<Self, StdioError> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => {
                let failed = |source| StdioError::Open { stream: "stdin", path: path.into(), source };
                let kind = fs::metadata(path).map_err(failed)?.file_type();
                if !kind.is_fifo() {
                    return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a fifo")));
                }
                Some(path.to_owned())
            }
        };
        let stderr = if paths.terminal { "" } else { &paths.stderr };
        Ok(Self { stdin, stdout: sink("stdout", &paths.stdout).await?, stderr: sink("stderr", stderr).await? })
    }
}

async fn sink(stream: &'static str, path: &str) -> Result<Option<Sink>, StdioError> {
    let failed = |source| StdioError::Open { stream, path: path.into(), source };
    if path.is_empty() {
        return Ok(None);
    }
    if let Some(file) = path.strip_prefix("file://") {
        let file = unescaped(file);
        // As containerd's runc shim does it.
        if let Some(dir) = file.parent() {
            tokio::fs::create_dir_all(dir).await.map_err(failed)?;
        }
        let file: File = OpenOptions::new().append(true).create(true).open(file).await.map_err(failed)?;
        return Ok(Some(Box::new(file)));
    }
    if path.contains("://") {
        return Err(StdioError::Scheme { stream, uri: path.into() });
    }
    let fifo = pipe::OpenOptions::new().read_write(true).open_sender(path).map_err(failed)?;
    Ok(Some(Box::new(fifo)))
}

/// A URI's path: `%20` stands for a blank, RFC 3986, section 2.1.
fn unescaped(path: &str) -> PathBuf {
    let bytes = path.as_bytes();
    let (mut plain, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let escaped = || u8::from_str_radix(path.get(at + 1..at + 3)?, 16).ok();
        let (byte, length) = match escaped().filter(|_| *byte == b'%') {
            Some(escaped) => (escaped, 3),
            None => (*byte, 1),
        };
        plain.push(byte);
        at += length;
    }
    OsString::from_vec(plain).into()
}

/// The longest that a deleted process's output is waited for, however it moves.
const LONGEST: Duration = Duration::from_secs(120);

/// The running copies of one process.
#[derive(Debug, Default)]
pub struct Relays {
    outputs: Mutex<Vec<JoinHandle<()>>>,
    aborts: std::sync::Mutex<Vec<AbortHandle>>,
    /// Bytes of output that have reached their local end.
    moved: Arc<AtomicU64>,
    /// Keeps the stdin fifo open for writing.
    keep_stdin: std::sync::Mutex<Stdin>,
    broken: Arc<std::sync::Mutex<Broken>>,
}

/// Local ends whose streams broke with the machine: whoever reads them is still to be told of that, and would go at their
/// end.
#[derive(Default)]
struct Broken {
    sinks: Vec<Sink>,
    /// From then on, none is kept: their reader waits for the end.
    told: bool,
}

impl std::fmt::Debug for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Broken")
    }
}

/// Whether CloseIO has been called; it may come before the process starts.
#[derive(Debug)]
enum Stdin {
    Closable(Option<pipe::Sender>),
    Closed,
}

impl Default for Stdin {
    fn default() -> Self {
        Self::Closable(None)
    }
}

impl Relays {
    /// Starts copying between `local` and `streams`.
    ///
    /// stdin is opened only now: a client whose input ends before its Create was answered has nowhere to send
    /// CloseIO to, and clients wait with their input for the fifo's reader.
    ///
    /// # Errors
    /// Where the stdin fifo cannot be opened.
    pub async fn start(&self, agent: &Agent, local: Local, streams: &CreateProcessResponse) -> Result<(), StdioError> {
        let outputs = [(local.stdout, streams.stdout_stream), (local.stderr, streams.stderr_stream)];
        for (sink, stream) in outputs {
            let Some(mut sink) = sink.filter(|_| stream != 0) else { continue };
            let (agent, moved, broken) = (agent.clone(), Arc::clone(&self.moved), Arc::clone(&self.broken));
            let copy = tokio::spawn(async move {
                let count = |bytes| {
                    moved.fetch_add(bytes, Ordering::Relaxed);
                };
                if let Err(e) = read_into(&agent, stream, &mut sink, count).await {
                    log::debug!("output stream {stream}: {e}");
                    if e.is_unknown()
                        && let Ok(mut broken) = broken.lock()
                        && !broken.told
                    {
                        broken.sinks.push(sink);
                    }
                }
            });
            self.remember(copy.abort_handle());
            self.outputs.lock().await.push(copy);
        }
        if let Some(path) = local.stdin.filter(|_| streams.stdin_stream != 0) {
            let failed = |source| StdioError::Open { stream: "stdin", path: path.clone(), source };
            let mut fifo = pipe::OpenOptions::new().open_receiver(&path).map_err(failed)?;
            let keep = pipe::OpenOptions::new().open_sender(&path).map_err(failed)?;
            if let Ok(mut slot) = self.keep_stdin.lock()
                && let Stdin::Closable(None) = *slot
            {
                *slot = Stdin::Closable(Some(keep));
            }
            let (agent, stream) = (agent.clone(), streams.stdin_stream);
            let copy = tokio::spawn(async move {
                if let Err(e) = write_from(&agent, stream, &mut fifo).await {
                    log::debug!("input stream {stream}: {e}");
                }
            });
            self.remember(copy.abort_handle());
        }
        Ok(())
    }

    fn remember(&self, handle: AbortHandle) {
        if let Ok(mut aborts) = self.aborts.lock() {
            aborts.push(handle);
        }
    }

    /// The process sees the end of its input once the client has closed its end too and all was read.
    pub fn close_stdin(&self) {
        if let Ok(mut keep) = self.keep_stdin.lock() {
            *keep = Stdin::Closed;
        }
    }

    /// There is nothing more to be told to readers of streams that broke.
    pub fn let_go(&self) {
        if let Ok(mut broken) = self.broken.lock() {
            *broken = Broken { sinks: Vec::new(), told: true };
        }
    }

    /// Waits until the output has reached its readers, or nothing of it has moved for the time of `still`; then ends
    /// every copy. A process that stays behind in the guest and writes on is not waited for for ever.
    pub async fn finish(&self, still: Duration) {
        let outputs = std::mem::take(&mut *self.outputs.lock().await);
        let all = async {
            for copy in outputs {
                let _ = copy.await;
            }
        };
        let stuck = async {
            let mut seen = self.moved.load(Ordering::Relaxed);
            loop {
                sleep(still).await;
                let now = self.moved.load(Ordering::Relaxed);
                if now == seen {
                    return;
                }
                seen = now;
            }
        };
        tokio::select! {
            () = all => {}
            () = stuck => {}
            () = sleep(LONGEST) => {}
        }
        self.close_stdin();
        self.let_go();
        if let Ok(mut aborts) = self.aborts.lock() {
            aborts.drain(..).for_each(|copy| copy.abort());
        }
    }
}

/// Tells the person at the other end of the process's streams what happened to its machine.
pub async fn report(paths: &Paths, text: &str) {
    let path = if paths.terminal || paths.stderr.is_empty() { &paths.stdout } else { &paths.stderr };
    let Ok(Some(mut sink)) = sink("stderr", path).await else { return };
    let line = format!("chsnap: {text}{}", if paths.terminal { "\r\n" } else { "\n" });
    // Nobody may be reading.
    let write = tokio::io::AsyncWriteExt::write_all(&mut sink, line.as_bytes());
    let _ = timeout(Duration::from_millis(200), write).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_file_is_made_with_its_directory_and_named_as_a_uri() {
        assert_eq!(unescaped("/a%20b/100%"), PathBuf::from("/a b/100%"));
        assert_eq!(unescaped("/%zz%2"), PathBuf::from("/%zz%2"));
        let dir = tempfile::tempdir().unwrap();
        let uri = format!("file://{}/new/my%20log", dir.path().display());
        assert!(sink("stdout", &uri).await.unwrap().is_some());
        assert!(dir.path().join("new/my log").exists());
    }
}
