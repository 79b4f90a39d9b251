//! containerd goes and comes back, and the shim is killed.

use std::time::Duration;

use anyhow::{Result, ensure};
use chsnap_tests::{Env, Run, Started, Tools, eventually, kill};
use nix::sys::signal::Signal;

crate::cases! {
    Everywhere: containerd_restarts, ended_while_containerd_was_away;
    Vms: shim_killed, shim_terminated, shim_stands_still, containerd_ends_in_boot;
}

fn containerd_restarts(env: &Env) -> Result<()> {
    let started = env.container().sh("trap 'exit 6' TERM; echo up; while :; do sleep 0.1; done").start()?;
    started.wait_log("up")?;
    env.daemon.terminate()?;
    env.daemon.start()?;
    let ctr = env.ctr();
    ctr.wait_status(&started.id, "RUNNING")?;
    ensure!(started.sh("echo answers")? == "answers");
    started.kill("SIGTERM")?.success()?;
    ctr.wait_status(&started.id, "STOPPED")?;
    let removed = ctr.output(["task", "rm", &started.id])?;
    ensure!(removed.code == 6 || removed.stderr.contains("exit code 6"), "{}", removed.whole());
    ctr.text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}

/// containerd, when it comes back, removes a task without processes by itself, or still tells its exit: its choice.
fn ended_while_containerd_was_away(env: &Env) -> Result<()> {
    let started = env.container().sh("echo up; sleep 2; exit 4").start()?;
    started.wait_log("up")?;
    env.daemon.terminate()?;
    std::thread::sleep(Duration::from_secs(4));
    env.daemon.start()?;
    let ctr = env.ctr();
    let settled = eventually(Duration::from_secs(20), || {
        ctr.status(&started.id).ok().filter(|s| s.as_deref().is_none_or(|s| s == "STOPPED"))
    });
    match settled {
        Some(Some(_)) => {
            let removed = ctr.output(["task", "rm", &started.id])?;
            ensure!(removed.code == 4 || removed.stderr.contains("exit code 4"), "{}", removed.whole());
        }
        Some(None) => {}
        None => anyhow::bail!("the task is {:?}", ctr.status(&started.id)?),
    }
    ctr.text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}

/// Nothing outlives a shim, however it goes.
fn nothing_is_left(env: &Env) -> Result<()> {
    let names = ["containerd-shim", env.vmm_name(), "virtiofsd"];
    let left = || names.iter().flat_map(|n| env.processes(n)).collect::<Vec<_>>();
    let gone = eventually(Duration::from_secs(15), || left().is_empty().then_some(()));
    ensure!(gone.is_some(), "still there: {:?}", left());
    Ok(())
}

/// A shim whose containerd goes away while its guest boots takes the container down by itself, which nobody waits for:
/// containerd 2.1, when it comes back, does it too for one that has not come into being, 1.6 forgets the shim.
fn containerd_ends_in_boot(env: &Env) -> Result<()> {
    // A restore might well be quicker than we are.
    let container = env.container().annotation("io.chsnap.snapshot", "off").sh("sleep 1000");
    let id = container.id.clone();
    let run = container.ctr(&["run"], &["-d"], None)?.start()?;
    let started = Started::adopt(env, &id);
    let there = eventually(Duration::from_secs(20), || env.process(env.vmm_name()).ok());
    ensure!(there.is_some(), "no VMM was started");
    env.daemon.terminate()?;
    let output = run.output()?;
    ensure!(output.code != 0, "{}", output.whole());
    env.daemon.start()?;
    env.ctr().output(["task", "rm", "-f", &id])?;
    nothing_is_left(env)?;
    env.ctr().text(["container", "rm", &id])?;
    started.forget();
    env.container().id(&id).annotation("io.chsnap.snapshot", "off").command(["true"]).output()?.success()?;
    Ok(())
}

fn shim_killed(env: &Env) -> Result<()> {
    let container = env.container().annotation("io.chsnap.expose", "8080").sh("echo up; sleep 1000");
    let started = container.start()?;
    started.wait_log("up")?;
    kill(env.process("containerd-shim-chsnap")?.pid, Signal::SIGKILL)?;
    nothing_is_left(env)?;
    // containerd notices by itself and has the rest cleaned up.
    let pod = started.pod_dir();
    let clean = eventually(Duration::from_secs(10), || (!pod.exists()).then_some(()));
    ensure!(clean.is_some(), "{} is still there", pod.display());
    env.ctr().output(["task", "rm", "-f", &started.id])?;
    ensure!(env.ctr().status(&started.id)?.is_none());
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    // The name can be used again.
    let output = env.container().command(["echo", "again"]).output()?.success()?;
    ensure!(output.text() == "again\n");
    Ok(())
}

fn shim_terminated(env: &Env) -> Result<()> {
    let started = env.container().sh("echo up; sleep 1000").start()?;
    started.wait_log("up")?;
    kill(env.process("containerd-shim-chsnap")?.pid, Signal::SIGTERM)?;
    nothing_is_left(env)?;
    env.ctr().output(["task", "rm", "-f", &started.id])?;
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}

/// A shim that takes connections and does nothing is ended by the `delete` action, which containerd runs for a shim
/// that it has given up.
fn shim_stands_still(env: &Env) -> Result<()> {
    let started = env.container().sh("echo up; sleep 1000").start()?;
    started.wait_log("up")?;
    let bundle =
        env.daemon.run.join("state/io.containerd.runtime.v2.task").join(&env.daemon.namespace).join(&started.id);
    let delete = || {
        let run = Run::new(Tools::get().bin.join("containerd-shim-chsnap-v2"));
        let run = run.args(["-namespace", &env.daemon.namespace, "-id", &started.id, "-bundle"]).arg(&bundle);
        run.args(["-address", &env.daemon.run.join("c.sock").display().to_string(), "delete"]).output()?.success()
    };
    // One that answers is left alone.
    delete()?;
    ensure!(started.sh("echo still here")? == "still here");
    kill(env.process("containerd-shim-chsnap")?.pid, Signal::SIGSTOP)?;
    let pod = started.pod_dir();
    let output = delete()?;
    // containerd sees the shim go, and has the same action run beside ours: only one of the two gets the directory.
    let clean = eventually(Duration::from_secs(10), || (!pod.exists()).then_some(()));
    ensure!(clean.is_some(), "{} is still there: {}", pod.display(), output.whole());
    ensure!(output.stderr.contains("did not answer within 2 s"), "{}", output.whole());
    nothing_is_left(env)?;
    env.ctr().output(["task", "rm", "-f", &started.id])?;
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}
