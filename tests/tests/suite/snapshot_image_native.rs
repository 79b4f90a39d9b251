//! Image snapshots of containers whose root is a copy of the image's.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Started, eventually};

use crate::{
    snapshot::container,
    snapshot_builder::finished,
    snapshot_image::{digest, imaged, is},
};

/// The native snapshotter's containers have no layers: what the template wrote is written into each one's own copy, and taken
/// back when the restore fails.
pub fn copied_root(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let program = String::from(
        "import os, socket, time, snapshot_restore_py as s\n\
         log = open('/log', 'a')\nlog.write('saved '); log.flush()\n\
         open('/warm', 'a').write('warm ')\nos.path.exists('/etc/debian_version') and os.remove('/etc/debian_version')\n\
         def after():\n    if os.environ.get('WHO') == 'bad': raise ValueError('no database')\n    log.write('restored'); log.flush()\n\
         s.register_after_restore(after)\n\
         socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n\
         while True: time.sleep(0.1)",
    );
    let make = |who: &str| {
        let pod = container(env, &settings).python(&program).annotation("io.chsnap.ready", "notify");
        pod.flags(["--snapshotter", "native", "--env", &format!("WHO={who}")])
    };
    let native = |id: &str| -> Result<PathBuf> {
        let mounts = env.ctr().text(["snapshots", "--snapshotter", "native", "mounts", "/", id])?;
        let dir = mounts.split_whitespace().find(|word| word.contains("native") && word.starts_with('/'));
        Ok(dir.with_context(|| mounts.clone())?.into())
    };
    // One that requires a snapshot and does not get it leaves its root as it was.
    let required = make("required").annotation("io.chsnap.snapshot", "require");
    let id = required.id.clone();
    required.ctr(&["container", "create"], &[], None)?.output()?.success()?;
    let required = Started::adopt(env, &id);
    // Containers come and go; what is there before the first one runs is the image's.
    let own = native(&id)?;
    let all = fs::read_dir(own.parent().context("no directory of snapshots")?)?;
    let all = all.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    ensure!(all.contains(&own) && all.len() > 1, "{own:?} of {all:?}");
    let image = || digest(all.iter().filter(|dir| **dir != own).filter_map(|dir| dir.to_str()));
    let before = image()?;
    let start = || {
        // ctr passes on the same file as before, which other calls have written since.
        settings.write(&env.dir)?;
        env.ctr().output(["task", "start", "-d", "--null-io", &id])
    };
    let refused = start()?;
    ensure!(refused.code != 0 && refused.stderr.contains("no snapshot could be used"), "{}", refused.whole());
    let first = make("first").start()?;
    is(env, &first, "direct", "no image snapshot yet")?;
    finished(env)?;
    first.remove()?;
    start()?.success()?;
    is(env, &required, "image", "")?;
    required.kill("SIGKILL")?.success()?;
    env.ctr().wait_status(&id, "STOPPED")?;
    env.ctr().output(["task", "rm", &id])?;
    let again = start()?;
    ensure!(again.stderr.contains("has been written to the container's root file system"), "{}", again.whole());
    required.remove()?;
    let good = make("good").start()?;
    is(env, &good, "image", "").with_context(|| env.daemon.log_tail(30))?;
    ensure!(good.sh("echo mine > /mine; cat /warm; ls /etc/debian_version || true")? == "warm");
    let dir = native(&good.id)?;
    ensure!(fs::read_to_string(dir.join("mine"))? == "mine\n", "what it writes is in its own directory");
    ensure!(fs::read_to_string(dir.join("log"))? == "saved restored", "the file that it had open is in its own root");
    ensure!(fs::read_to_string(dir.join("warm"))? == "warm " && !dir.join("etc/debian_version").exists());
    good.remove()?;
    let bad = make("bad").start()?;
    is(env, &bad, "base", "ValueError: no database")?;
    let warm = eventually(Duration::from_secs(20), || bad.sh("cat /warm").ok().filter(|text| !text.is_empty()));
    ensure!(warm.as_deref() == Some("warm"), "what the template wrote was not taken back: {warm:?}");
    bad.remove()?;
    ensure!(image()? == before, "the image has changed");
    env.chsnap_with(&settings, ["snapshot", "verify", "--all"])?.text().map(drop)
}
