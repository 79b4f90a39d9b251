//! containerd's own client, for one containerd and one namespace.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;

use crate::{Output, Run};

/// How to call it.
#[derive(Debug, Clone)]
pub struct Ctr {
    program: PathBuf,
    address: PathBuf,
    namespace: String,
    mark: (&'static str, PathBuf),
}

impl Ctr {
    pub(crate) fn new(program: PathBuf, address: PathBuf, namespace: &str, run: &Path) -> Self {
        Self { program, address, namespace: namespace.into(), mark: (crate::proc::MARK, run.into()) }
    }

    /// Where it is.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// `ctr` with `args`.
    #[must_use]
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        self.under(None).args(args)
    }

    /// `ctr` through another program that executes it, e.g. `setsid`.
    #[must_use]
    pub fn under(&self, wrapper: Option<&[&str]>) -> Run {
        let run = match wrapper {
            Some([first, rest @ ..]) => Run::new(first).args(rest).arg(&self.program),
            _ => Run::new(&self.program),
        };
        run.env(self.mark.0, &self.mark.1)
            .env("CONTAINERD_ADDRESS", &self.address)
            .env("CONTAINERD_NAMESPACE", &self.namespace)
            .args(["--connect-timeout", "5s"])
    }

    /// Runs `ctr` to its end.
    pub fn output<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Output> {
        self.run(args).output()
    }

    /// Runs `ctr` to its end, which must be a success; answers its output, trimmed.
    pub fn text<S: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        self.run(args).text()
    }

    /// The status of a task as `ctr task ls` shows it, `None` where there is no such task.
    pub fn status(&self, id: &str) -> Result<Option<String>> {
        self.column(id, 2)
    }

    /// Its pid, as shown there.
    pub fn pid(&self, id: &str) -> Result<Option<String>> {
        self.column(id, 1)
    }

    fn column(&self, id: &str, number: usize) -> Result<Option<String>> {
        let list = self.text(["task", "ls"])?;
        let line = list.lines().find(|l| l.split_whitespace().next() == Some(id));
        Ok(line.and_then(|l| l.split_whitespace().nth(number)).map(str::to_owned))
    }

    /// What `ctr task metrics` tells programs.
    pub fn metrics(&self, id: &str) -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&self.text(["task", "metrics", "--format", "json", id])?)?)
    }

    /// Waits until a task has that status.
    pub fn wait_status(&self, id: &str, status: &str) -> Result<()> {
        let mut last = None;
        let found = crate::eventually(Duration::from_secs(20), || {
            last = self.status(id).ok()?;
            (last.as_deref() == Some(status)).then_some(())
        });
        anyhow::ensure!(found.is_some(), "task {id} is {last:?}, not {status}");
        Ok(())
    }
}
