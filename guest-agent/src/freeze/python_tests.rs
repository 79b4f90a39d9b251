//! The module for Python, in a real one.

use std::{process::Stdio, time::Duration};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::hooks::{Event, Hooks};

const LONG: Duration = Duration::from_secs(20);

/// What stands in for the guest.
struct Guest {
    dir: TempDir,
    hooks: Hooks,
}

/// A program that says something, a line at a time.
struct Program {
    said: Lines<BufReader<ChildStdout>>,
    /// Kept open, and it goes on.
    _told: ChildStdin,
    _child: Child,
}

impl Program {
    async fn says(&mut self, line: &str) {
        let said = tokio::time::timeout(LONG, self.said.next_line()).await.unwrap().unwrap();
        assert_eq!(said.as_deref(), Some(line));
    }
}

impl Guest {
    /// `None` where there is no Python.
    fn new() -> Option<Self> {
        if std::process::Command::new("python3").arg("--version").output().is_err() {
            chsnap_test_skip::skip("no python3");
            return None;
        }
        let (dir, hooks) = (tempfile::tempdir().unwrap(), Hooks::default());
        hooks.listen(&dir.path().join("s")).unwrap();
        super::write_python(&dir.path().join("python")).unwrap();
        Some(Self { dir, hooks })
    }

    /// As a container's process has it.
    fn python(&self, script: &str) -> Command {
        let mut python = Command::new("python3");
        python.args(["-c", script]).stdin(Stdio::null()).kill_on_drop(true);
        python.env("PYTHONPATH", self.dir.path().join("python")).env("PYTHONDONTWRITEBYTECODE", "1");
        python.env("CHSNAP_SNAPSHOT_SOCKET", self.dir.path().join("s"));
        python
    }

    fn program(&self, script: &str) -> Program {
        let mut python = self.python(script);
        let mut child = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        Program { said, _told: child.stdin.take().unwrap(), _child: child }
    }
}

/// As a server becomes a daemon: its first process ends, and a worker's does.
#[tokio::test]
async fn who_forks_and_ends_has_hung_up() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os, sys, snapshot_restore_py
if os.fork():
    os._exit(0)
snapshot_restore_py.register_before_snapshot(lambda: print("before", flush=True))
worker = os.fork()
if not worker:
    # The parent is asked, too, and not here.
    snapshot_restore_py.register_before_snapshot(os._exit, 1)
    os._exit(0)
os.waitpid(worker, 0)
print("ready", flush=True)
sys.stdin.read()
"#;
    let mut program = guest.program(script);
    program.says("ready").await;
    guest.hooks.run(&Event::BeforeSnapshot, LONG).await.unwrap();
    program.says("before").await;
}
