//! `ctr task kill`.

use std::time::Duration;

use anyhow::{Result, ensure};
use chsnap_tests::{Env, eventually};

crate::cases! {
    Everywhere: handled;
    Likewise: by_number, all_processes, default_is_term;
}

/// Says which signals it gets; TERM ends it with 3.
const TRAPS: &str = "trap 'echo got HUP' HUP; trap 'echo got USR1' USR1; trap 'echo got TERM; exit 3' TERM; echo up; \
                     while :; do sleep 0.1; done";

fn handled(env: &Env) -> Result<()> {
    let started = env.container().sh(TRAPS).start()?;
    started.wait_log("up")?;
    started.kill("SIGHUP")?.success()?;
    started.wait_log("got HUP")?;
    started.kill("SIGUSR1")?.success()?;
    started.wait_log("got USR1")?;
    started.kill("SIGTERM")?.success()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    started.wait_log("got TERM")?;
    let removed = env.ctr().output(["task", "rm", &started.id])?;
    ensure!(removed.code == 3 || removed.stderr.contains("exit code 3"), "{}", removed.whole());
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}

fn by_number(env: &Env) -> Result<()> {
    let started = env.container().sh(TRAPS).start()?;
    started.wait_log("up")?;
    started.kill("10")?.success()?;
    started.wait_log("got USR1")?;
    // A signal that is ignored by default does no harm.
    started.kill("SIGWINCH")?.success()?;
    ensure!(env.ctr().status(&started.id)?.as_deref() == Some("RUNNING"));
    started.remove()
}

/// How many processes `sleep 100x` there are.
const SLEEPERS: &str = "
import glob
def args(path):
    try:
        return open(path, 'rb').read().split(b'\\0')
    except OSError:
        return []
print(sum(a[0] == b'sleep' and a[1].startswith(b'100') for a in map(args, glob.glob('/proc/[0-9]*/cmdline'))))
";

fn all_processes(env: &Env) -> Result<()> {
    let script = "sleep 1001 & sleep 1002 & trap 'echo one got it' TERM; echo up; while :; do sleep 0.2; done";
    let started = env.container().sh(script).start()?;
    started.wait_log("up")?;
    // What was forked before that may take its time to become `sleep`.
    let both = eventually(Duration::from_secs(10), || (started.python(SLEEPERS).ok()? == "2").then_some(()));
    ensure!(both.is_some(), "{}", started.python(SLEEPERS)?);
    env.ctr().text(["task", "kill", "--all", "-s", "SIGTERM", &started.id])?;
    started.wait_log("one got it")?;
    let gone = eventually(Duration::from_secs(20), || (started.python(SLEEPERS).ok()? == "0").then_some(()));
    ensure!(gone.is_some(), "the other processes did not get it");
    started.remove()
}

fn default_is_term(env: &Env) -> Result<()> {
    // The demo application ends well on SIGTERM.
    let started = env.container().start()?;
    started.wait_log("listening on port 8080")?;
    env.ctr().text(["task", "kill", &started.id])?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    env.ctr().output(["task", "rm", &started.id])?.success()?;
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    Ok(())
}
