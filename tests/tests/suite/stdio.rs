//! Bytes in and out.

use std::{io::Read, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Pty, Run, rss_kib};

crate::cases! {
    Everywhere: streams, last_bytes, big_output_slow_reader, terminal, log_file, reader_goes;
}

/// 5 MB through and back, and stderr beside it.
fn streams(env: &Env) -> Result<()> {
    let mut noise = vec![0; 5_000_000];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut noise)?;
    let output = env.container().sh("cat; echo done >&2; exit 4").run()?.stdin(noise.clone()).output()?.code(4)?;
    ensure!(output.stdout == noise, "{} of {} bytes came back, or others", output.stdout.len(), noise.len());
    ensure!(output.stderr.contains("done"), "{}", output.whole());
    // A little input, which ends long before a machine has booted.
    let output = env.container().command(["cat"]).run()?.stdin("hi\n").output()?.success()?;
    ensure!(output.text() == "hi\n", "{}", output.whole());
    Ok(())
}

/// Nothing of what is written right before the end is lost.
fn last_bytes(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    for n in 0..20 {
        let output = started.exec(["echo", &format!("line {n}")]).output()?.success()?;
        ensure!(output.text() == format!("line {n}\n"), "exec {n}: {}", output.whole());
    }
    let output = started.exec(["head", "-c", "3000000", "/dev/zero"]).output()?.success()?;
    ensure!(output.stdout.len() == 3_000_000, "{} bytes", output.stdout.len());
    started.remove()
}

/// 20 MB to a reader that sleeps first: the writer waits, and the shim does not hoard.
fn big_output_slow_reader(env: &Env) -> Result<()> {
    let program = "
import sys
block = bytes(range(256)) * 256
for _ in range(320):
    sys.stdout.buffer.write(block)
sys.stdout.buffer.flush()
sys.stderr.write('all written')
";
    let mut running = env.container().python(program).run()?.limit(Duration::from_secs(120)).start()?;
    let mut stdout = running.child.stdout.take().context("no stdout")?;
    let mut all = vec![0; 1];
    stdout.read_exact(&mut all)?;
    sleep(Duration::from_secs(3));
    if env.is_vm() {
        let shim = env.process("containerd-shim-chsnap")?;
        let rss = rss_kib(shim.pid)?;
        ensure!(rss < 20 << 10, "the shim holds {rss} KiB while nobody reads");
    }
    ensure!(running.child.try_wait()?.is_none(), "it ended though nobody read");
    stdout.read_to_end(&mut all)?;
    let output = running.output()?.success()?;
    ensure!(output.stderr.contains("all written"), "{}", output.whole());
    ensure!(all.len() == 320 << 16, "{} bytes", all.len());
    ensure!(all.chunks(256).all(|c| c.iter().enumerate().all(|(i, b)| i == usize::from(*b))), "bytes were mixed up");
    Ok(())
}

fn terminal(env: &Env) -> Result<()> {
    let mut pty = Pty::open(24, 80)?;
    let script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo is a terminal; stty size; \
                  trap 'echo size $(stty size)' WINCH; trap 'echo interrupted; exit 9' INT; echo ready; \
                  while :; do sleep 0.1; done";
    let container = env.container().sh(script);
    let run = container.ctr(&["run"], &["--rm", "--tty"], Some(&Pty::WRAPPER))?;
    let running = run.terminal(pty.slave()?).start()?;
    pty.wait("ready")?;
    pty.wait("is a terminal")?;
    let sized = chsnap_tests::eventually(Duration::from_secs(10), || {
        pty.resize(40, 120).ok()?;
        sleep(Duration::from_millis(300));
        pty.seen().contains("size 40 120").then_some(())
    });
    ensure!(sized.is_some(), "the new size never arrived: {:?}", pty.seen());
    pty.write(b"\x03")?;
    pty.wait("interrupted")?;
    running.output()?.code(9)?;
    ensure!(pty.seen().contains("\r\n"), "no terminal's line ends: {:?}", pty.seen());
    Ok(())
}

/// `--log-uri file://`: both streams end up in the file.
fn log_file(env: &Env) -> Result<()> {
    let started = env.container().sh("echo to stdout; echo to stderr >&2; seq 1 20000; exit 0").start()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    started.wait_log("\n20000\n")?;
    let log = started.log();
    ensure!(log.contains("to stdout\n") && log.contains("to stderr\n"), "{}", &log[..200]);
    started.remove()
}

/// A client that goes away does not end the container.
fn reader_goes(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    let mut running =
        started.exec_with(&["--exec-id", "chatty"], ["sh", "-c", "while echo chat; do :; done"]).start()?;
    let mut stdout = running.child.stdout.take().context("no stdout")?;
    stdout.read_exact(&mut [0; 5])?;
    // By then, the client has its answer to Start.
    sleep(Duration::from_millis(500));
    // Killed before its output is closed: of that, it would tell the process with a signal.
    drop(running);
    drop(stdout);
    ensure!(started.sh("echo well")? == "well");
    let kill = ["task", "kill", "-s", "SIGKILL", "--exec-id", "chatty", &started.id];
    env.ctr().text(kill)?;
    let gone = chsnap_tests::eventually(Duration::from_secs(10), || {
        env.ctr()
            .output(["task", "rm", "--exec-id", "chatty", &started.id])
            .ok()
            .filter(|o| !o.stderr.contains("running"))
    });
    ensure!(gone.is_some(), "the exec of the client that went cannot be removed");
    started.remove()?;
    // What the client would have removed, had it not been killed.
    Run::new("find").arg(env.daemon.run.join("fifo")).args(["-mindepth", "1", "-delete"]).output()?.success()?;
    Ok(())
}
