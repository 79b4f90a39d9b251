//! Runs a program with a bound on its time, and kills no process but that one.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::proc;

/// How long what a program has started may hold its streams after its end.
const STREAM_LIMIT: Duration = Duration::from_secs(10);

/// How many times longer than elsewhere everything may take: `CHSNAP_TEST_PATIENCE`, for emulated machines.
#[must_use]
pub fn patience() -> u32 {
    static PATIENCE: OnceLock<u32> = OnceLock::new();
    *PATIENCE.get_or_init(|| {
        let value = std::env::var("CHSNAP_TEST_PATIENCE").ok();
        value.and_then(|v| v.parse().ok()).filter(|n| *n > 0).unwrap_or(1)
    })
}

/// Calls `done` until it answers with something, at most for `limit`.
pub fn eventually<T>(limit: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let (start, limit) = (Instant::now(), limit * patience());
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if start.elapsed() >= limit {
            return None;
        }
        thread::sleep(Duration::from_millis(30));
    }
}

/// A program to be run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    terminal: Option<File>,
    limit: Duration,
}

/// What came of it.
#[derive(Debug)]
pub struct Output {
    /// Exit status; 128 + signal for one that was killed.
    pub code: i32,
    /// Bytes.
    pub stdout: Vec<u8>,
    /// Text.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
    what: String,
}

impl Run {
    /// `program` with a limit of a minute.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self { command: Command::new(program), stdin: None, terminal: None, limit: Duration::from_secs(60) }
    }

    /// Appends an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Appends arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// What it reads; without it, an empty input.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// A terminal for its input and output.
    #[must_use]
    pub fn terminal(mut self, terminal: File) -> Self {
        self.terminal = Some(terminal);
        self
    }

    /// How long it may take.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts it; its output waits to be taken.
    pub fn start(mut self) -> Result<Running> {
        let what = format!("{:?}", self.command);
        let stdin = if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() };
        self.command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(terminal) = &self.terminal {
            self.command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal.try_clone()?);
        }
        let mut child = self.command.spawn().with_context(|| what.clone())?;
        if let (Some(bytes), Some(mut pipe)) = (self.stdin, child.stdin.take()) {
            // Whether the program reads everything is the program's affair.
            thread::spawn(move || pipe.write_all(&bytes));
        }
        let stderr = child.stderr.take().map(Stream::collect);
        Ok(Running { child, stderr, started: Instant::now(), limit: self.limit * patience(), what })
    }

    /// Runs it to its end.
    pub fn output(self) -> Result<Output> {
        self.start()?.output()
    }

    /// Runs it to its end, which must be a success; answers what it printed, trimmed.
    pub fn text(self) -> Result<String> {
        let output = self.output()?.success()?;
        Ok(output.text().trim().to_owned())
    }
}

/// A program that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    /// The process; its stdout is there to be taken.
    pub child: Child,
    stderr: Option<Stream>,
    started: Instant,
    limit: Duration,
    what: String,
}

impl Running {
    /// Waits for its end, with everything it prints.
    pub fn output(mut self) -> Result<Output> {
        let stdout = self.child.stdout.take().map(Stream::collect);
        let (status, in_time) = loop {
            if let Some(status) = self.child.try_wait()? {
                break (status, true);
            }
            if self.started.elapsed() > self.limit {
                self.child.kill()?;
                break (self.child.wait()?, false);
            }
            thread::sleep(Duration::from_millis(10));
        };
        let took = self.started.elapsed();
        let all = |stream: Option<Stream>, name| stream.map_or(Ok(Vec::new()), |s| s.all(&self.what, name));
        if !in_time {
            let said = all(self.stderr.take(), "stderr").unwrap_or_else(|e| format!("{e:#}").into_bytes());
            bail!("{} did not end within {:?}; it said: {}", self.what, self.limit, String::from_utf8_lossy(&said));
        }
        let stdout = all(stdout, "stdout")?;
        let stderr = String::from_utf8_lossy(&all(self.stderr.take(), "stderr")?).into_owned();
        Ok(Output { code: code(status), stdout, stderr, took, what: std::mem::take(&mut self.what) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Output {
    /// What it printed, as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// An error unless the exit status is `code`.
    pub fn code(self, code: i32) -> Result<Self> {
        ensure!(self.code == code, "exit status {} instead of {code}: {}", self.code, self.whole());
        Ok(self)
    }

    /// An error unless it ended well.
    pub fn success(self) -> Result<Self> {
        self.code(0)
    }

    /// Everything, for a person.
    #[must_use]
    pub fn whole(&self) -> String {
        let mut out = self.text();
        if out.len() > 2000 {
            out = format!("({} bytes)", out.len());
        }
        format!("{}\n  stdout: {}\n  stderr: {}", self.what, out.trim_end(), self.stderr.trim_end())
    }
}

/// What a program prints, read beside everything else.
#[derive(Debug)]
struct Stream {
    /// The pipe, as `/proc` names it.
    pipe: PathBuf,
    bytes: mpsc::Receiver<Vec<u8>>,
}

impl Stream {
    fn collect(mut from: impl Read + AsRawFd + Send + 'static) -> Self {
        let pipe = fs::read_link(format!("/proc/self/fd/{}", from.as_raw_fd())).unwrap_or_default();
        let (done, bytes) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = from.read_to_end(&mut bytes);
            let _ = done.send(bytes);
        });
        Self { pipe, bytes }
    }

    /// Everything up to its end, which may come later than the program's: whatever it started can hold it, too.
    fn all(self, what: &str, name: &str) -> Result<Vec<u8>> {
        let limit = STREAM_LIMIT * patience();
        self.bytes.recv_timeout(limit).ok().with_context(|| {
            let holders = proc::holders(&self.pipe).join("; ");
            format!("{what} ended, but its {name} was still open {limit:?} later, in: {holders}")
        })
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
