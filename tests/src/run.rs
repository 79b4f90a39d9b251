//! Runs a program with a bound on its time, and kills no process but that one.

use std::{
    ffi::OsStr,
    fs::File,
    io::{Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

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
        let stderr = child.stderr.take().map(collect);
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
    stderr: Option<JoinHandle<Vec<u8>>>,
    started: Instant,
    limit: Duration,
    what: String,
}

impl Running {
    /// Waits for its end, with everything it prints.
    pub fn output(mut self) -> Result<Output> {
        let stdout = match self.child.stdout.take() {
            Some(stdout) => collect(stdout),
            None => thread::spawn(Vec::new),
        };
        self.finish(stdout)
    }

    fn finish(mut self, stdout: JoinHandle<Vec<u8>>) -> Result<Output> {
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if self.started.elapsed() > self.limit {
                self.child.kill()?;
                self.child.wait()?;
                let said = self.stderr.take().and_then(|t| t.join().ok()).unwrap_or_default();
                let said = String::from_utf8_lossy(&said);
                bail!("{} did not end within {:?}; it said: {said}", self.what, self.limit);
            }
            thread::sleep(Duration::from_millis(10));
        };
        let took = self.started.elapsed();
        let stdout = stdout.join().unwrap_or_default();
        let stderr = self.stderr.take().and_then(|t| t.join().ok()).unwrap_or_default();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
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

fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
