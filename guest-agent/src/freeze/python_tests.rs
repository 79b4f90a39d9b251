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

    /// Has the processes saved, and restored with `env`.
    async fn cloned(&self, env: &[(&str, &str)]) {
        self.hooks.run(&Event::BeforeSnapshot, LONG).await.unwrap();
        let env = env.iter().copied().collect();
        self.hooks.run(&Event::AfterRestore { env, epoch: "e", hostname: "h" }, LONG).await.unwrap();
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

#[tokio::test]
async fn a_program_that_knows_nothing_of_it_is_put_right() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os, random, ssl, sys, time
random.seed(1)
print("ready", flush=True)
while "POD" not in os.environ:
    time.sleep(0.01)
# Right after that, in the other thread.
time.sleep(0.1)
print(os.environ["POD"], random.random() == random.Random(1).random(), flush=True)
sys.stdin.read()
"#;
    let mut program = guest.program(script);
    program.says("ready").await;
    assert!(!guest.hooks.is_empty());
    guest.cloned(&[("POD", "web-1")]).await;
    program.says("web-1 False").await;
}

#[tokio::test]
async fn what_the_image_does_at_the_start_of_python_is_done() {
    let Some(guest) = Guest::new() else { return };
    let image = guest.dir.path().join("image");
    std::fs::create_dir(&image).unwrap();
    let ours = guest.dir.path().join("python");
    let both = std::env::join_paths([&ours, &image]).unwrap();
    let look = "import sys; s = sys.modules.get('sitecustomize'); print(getattr(s, 'who', None)); \
                print(getattr(s, '__file__', None), file=sys.stderr); print('snapshot_restore_py' in sys.modules)";
    for (text, who) in [
        ("who = 'image'", "image"),
        ("import snapshot_restore_py\nwho = __spec__.name", "sitecustomize"),
        // Python goes on after these, and says so; the last is that of a module that is not there.
        ("raise RuntimeError('of the image')", "None"),
        ("import nothing_like_it", "None"),
        ("raise ImportError(name='sitecustomize')", "None"),
    ] {
        std::fs::write(image.join("sitecustomize.py"), text).unwrap();
        let with = guest.python(look).env("PYTHONPATH", &both).output().await.unwrap();
        // Without this one's.
        std::fs::rename(ours.join("sitecustomize.py"), ours.join("away")).unwrap();
        let without = guest.python(look).env("PYTHONPATH", &both).output().await.unwrap();
        std::fs::rename(ours.join("away"), ours.join("sitecustomize.py")).unwrap();
        assert_eq!(String::from_utf8_lossy(&with.stderr), String::from_utf8_lossy(&without.stderr), "{text}");
        assert_eq!(String::from_utf8_lossy(&with.stdout), format!("{who}\nTrue\n"), "{text}");
    }
    // And one in which nothing answers is as it was.
    let alone = guest.python(look).env("CHSNAP_SNAPSHOT_SOCKET", "/nothing").env("PYTHONPATH", &ours).output();
    let alone = alone.await.unwrap();
    assert!(alone.stdout.ends_with(b"False\n"), "{alone:?}");
}
