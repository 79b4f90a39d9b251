//! The module for Python, in a real one.

use std::{process::Stdio, time::Duration};

use nix::time::{ClockId, clock_gettime};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::hooks::{Event, Hooks};

const LONG: Duration = Duration::from_secs(60);

/// What stands in for the guest.
struct Guest {
    dir: TempDir,
    hooks: Hooks,
}

/// A program that says something, a line at a time.
struct Program {
    said: Lines<BufReader<ChildStdout>>,
    /// Kept open, and it goes on.
    told: ChildStdin,
    _child: Child,
}

impl Program {
    async fn is_asked(&mut self) {
        self.told.write_all(b"\n").await.unwrap();
    }

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
        Program { said, told: child.stdin.take().unwrap(), _child: child }
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
import os, sys, time, snapshot_restore_py
first = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == first:
    time.sleep(0.01)
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

/// Threads that want their turn all the time, and one that held it back for longer than any of them waits in peace.
#[tokio::test]
async fn no_thread_sees_another_pods_variables_or_seeds_after_a_restore() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os, random, ssl, sys, threading, time
seen, latest, go_on = set(), {}, True
random.seed(1)
old = random.getstate()[1]
def busy():
    while go_on:
        now = time.monotonic()
        # Variables, seeds and variables: none of them may be new without the others.
        before, state, after = os.environ.get("POD"), random.getstate()[1] != old, os.environ.get("POD")
        if not state:
            latest[threading.get_ident()] = now
        if state != bool(before) and state != bool(after):
            seen.add("half")
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
print("busy", flush=True)
answered = float(sys.stdin.readline())
go_on = False
for thread in threads:
    thread.join()
print("too early" if max(latest.values()) > answered else "restored", *seen, flush=True)
"#;
    let mut program = guest.program(script);
    program.says("busy").await;
    guest.hooks.run(&Event::BeforeSnapshot, LONG).await.unwrap();
    let answered = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    // Longer than a thread waits while the other one has its turn.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let env = [("POD", "web-1")].into();
    guest.hooks.run(&Event::AfterRestore { env, epoch: "e", hostname: "h" }, LONG).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let line = format!("{}.{:09}\n", answered.tv_sec(), answered.tv_nsec());
    program.told.write_all(line.as_bytes()).await.unwrap();
    program.says("restored").await;
}

/// Which is no hanging up, where there are no hooks.
#[tokio::test]
async fn a_program_that_is_replaced_at_once_has_answered() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os
print("ready", flush=True)
while "POD" not in os.environ:
    pass
os.execvp("echo", ["echo", "replaced"])
"#;
    let mut program = guest.program(script);
    program.says("ready").await;
    guest.hooks.run(&Event::BeforeSnapshot, LONG).await.unwrap();
    // By then it has asked for its turn.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let env = [("POD", "web-1")].into();
    guest.hooks.run(&Event::AfterRestore { env, epoch: "e", hostname: "h" }, LONG).await.unwrap();
    program.says("replaced").await;
}

#[tokio::test]
async fn hooks_run_in_their_order_with_what_they_were_registered_with() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os, sys
from snapshot_restore_py import register_before_snapshot, register_after_restore
ran = []
def hook(name, *, by=None):
    ran.append(name if by is None else name + by)
assert register_before_snapshot(hook, "b1") is hook and register_after_restore(hook, "a1", by="!") is hook
@register_before_snapshot
def b2():
    ran.append("b2")
    # Once, as a module does that is imported only here.
    if not ran.count("b3"):
        register_before_snapshot(hook, "b3")
@register_after_restore
def a2():
    ran.append("a2-" + os.environ["POD"])
    register_after_restore(hook, "a4")
register_after_restore(hook, by="?", name="a3")
assert callable(b2) and callable(a2)
print("ready", flush=True)
while sys.stdin.readline():
    said = ran[:]
    # Before the guest may go on.
    ran.clear()
    print(*said, flush=True)
"#;
    let mut program = guest.program(script);
    program.says("ready").await;
    guest.cloned(&[("POD", "web-1")]).await;
    program.is_asked().await;
    program.says("b2 b3 b1 a1! a2-web-1 a3? a4").await;
    // Once more, in the order in which all of them were registered.
    guest.cloned(&[("POD", "web-2")]).await;
    program.is_asked().await;
    program.says("b3 b2 b1 a1! a2-web-2 a3? a4 a4").await;
}

/// The event has no room in what is read of it at once; and text that is no ASCII.
#[tokio::test]
async fn a_large_environment_is_the_pods_too() {
    let Some(guest) = Guest::new() else { return };
    let script = r#"
import os, random, sys
random.seed(1)
print("ready", flush=True)
while sys.stdin.readline():
    name = os.environ.get("WHO")
    print(name == "wèb", os.getenv("WHO") == name == os.environb[b"WHO"].decode("utf-8"), len(os.environ.get("LONG", "")),
          os.popen("printf %s $WHO").read() == name, random.random() == random.Random(1).random(), flush=True)
"#;
    let mut program = guest.program(script);
    program.says("ready").await;
    for length in [3, 100_000] {
        guest.cloned(&[("WHO", "wèb"), ("LONG", &"x".repeat(length))]).await;
        program.is_asked().await;
        program.says(&format!("True True {length} True False")).await;
    }
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
