//! `ctr task exec`.

use std::{io::Read, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Pty, eventually};

crate::cases! {
    Everywhere: results, in_parallel, missing, killed, in_a_stopped_container, on_a_terminal;
}

fn results(env: &Env) -> Result<()> {
    let started = env.container().flags(["--env", "OWN_WORD=from the container"]).sh("sleep 1000").start()?;
    for code in [0, 1, 42, 255] {
        started.exec(["sh", "-c", &format!("exit {code}")]).output()?.code(code)?;
    }
    let both = started.exec(["sh", "-c", "echo out; echo err >&2"]).output()?.success()?;
    ensure!(both.text() == "out\n" && both.stderr.contains("err") && !both.stderr.contains("out"), "{}", both.whole());
    ensure!(started.sh("echo $OWN_WORD")? == "from the container");
    ensure!(started.sh("uname -n")? == started.sh("cat /proc/sys/kernel/hostname")?);
    // It is in the container's PID namespace, beside the container's own process.
    ensure!(started.sh("tr '\\0' ' ' < /proc/1/cmdline")?.contains("sleep 1000"));
    ensure!(started.exec(["cat"]).stdin("through").text()? == "through");
    // What an exec leaves running is not its exit.
    let left = started.exec(["sh", "-c", "sleep 30 >/dev/null 2>&1 & echo left"]).limit(Duration::from_secs(20));
    ensure!(left.text()? == "left");
    started.remove()
}

fn in_parallel(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    let running: Vec<_> = (0..10)
        .map(|n| started.exec(["sh", "-c", &format!("sleep 0.5; echo number {n}; exit {n}")]).start())
        .collect::<Result<_>>()?;
    for (n, exec) in running.into_iter().enumerate() {
        let output = exec.output()?.code(n as i32)?;
        ensure!(output.text() == format!("number {n}\n"), "{}", output.whole());
    }
    started.remove()
}

fn missing(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    for program in ["/no/such/program", "nosuchprogram"] {
        let output = started.exec([program]).output()?;
        ensure!(output.code != 0 && output.stderr.contains(program), "{}", output.whole());
    }
    let output = started.exec_with(&["--cwd", "/no/such/dir"], ["true"]).output()?;
    ensure!(output.code != 0 && output.stderr.contains("/no/such/dir"), "{}", output.whole());
    // No harm done.
    ensure!(started.sh("echo fine")? == "fine");
    started.remove()
}

fn killed(env: &Env) -> Result<()> {
    // exec: a shell that stays would be one more process, from the moment it has forked.
    let started = env.container().sh("exec sleep 1000").start()?;
    let command = ["sh", "-c", "echo up; exec sleep 500"];
    let mut exec = started.exec_with(&["--exec-id", "victim"], command).start()?;
    exec.child.stdout.take().context("no stdout")?.read_exact(&mut [0; 3])?;
    let ctr = env.ctr();
    let mut list = String::new();
    // Whatever brought the exec into the container's namespaces may still be on its way out, and its output may be here
    // before its start has been answered, until when it has no name.
    let two = eventually(Duration::from_secs(5), || {
        list = ctr.text(["task", "ps", &started.id]).ok()?;
        (list.lines().count() == 3 && list.contains("victim")).then_some(())
    });
    ensure!(two.is_some(), "not the two processes there are, the exec's by its name: {list}");
    // The container's own goes by the task's number, and by no other name.
    let task = ctr.pid(&started.id)?;
    let own = |line: &&str| line.split_whitespace().eq([task.as_deref().unwrap_or_default(), "-"]);
    ensure!(list.lines().filter(own).count() == 1, "{task:?} is not the container's own: {list}");
    ctr.text(["task", "kill", "-s", "SIGKILL", "--exec-id", "victim", &started.id])?;
    exec.output()?.code(137)?;
    ensure!(ctr.status(&started.id)?.as_deref() == Some("RUNNING"), "the container died with its exec");
    started.exec_with(&["--exec-id", "victim"], ["sh", "-c", "kill -TERM $$"]).output()?.code(143)?;
    started.remove()
}

fn in_a_stopped_container(env: &Env) -> Result<()> {
    let started = env.container().sh("exit 0").start()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    let output = started.exec(["true"]).output()?;
    ensure!(output.code != 0, "{}", output.whole());
    if env.is_vm() {
        ensure!(output.stderr.contains("is not running"), "{}", output.whole());
    }
    started.remove()
}

fn on_a_terminal(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    let mut pty = Pty::open(33, 99)?;
    let run = env.ctr().under(Some(&Pty::WRAPPER)).args(["task", "exec", "--tty", "--exec-id", "term"]);
    let run = run.arg("--fifo-dir").arg(env.daemon.run.join("fifo")).arg(&started.id);
    let exec = run.args(["sh", "-c", "echo on $(tty); read line; echo \"<$line>\"; exit 5"]);
    let running = exec.terminal(pty.slave()?).start()?;
    pty.wait("on /dev/pts/")?;
    pty.write(b"typed\n")?;
    pty.wait("<typed>")?;
    running.output()?.code(5)?;
    started.remove()
}
