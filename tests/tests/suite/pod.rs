//! Pods beside each other, and several containers in one pod.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use chsnap_tests::{Env, eventually};

crate::cases! {
    Once: shared_cgroup, two_containers;
}

/// The path of a cgroup is whatever the specification says: two containers may have the same one.
fn shared_cgroup(env: &Env) -> Result<()> {
    let path = format!("/{}/shared", env.daemon.namespace);
    let start = || env.container().flags(["--cgroup", &path]).sh("echo up; sleep 1000").start();
    let (first, second) = (start()?, start()?);
    second.wait_log("up")?;
    first.remove()?;
    let alive = eventually(Duration::from_secs(2), || (env.processes(env.vmm_name()).len() != 1).then_some(()));
    ensure!(alive.is_none(), "{:?}", env.processes(env.vmm_name()));
    ensure!(second.sh("echo still here")? == "still here");
    second.remove()
}

/// A pod's second container comes into a machine that runs: what is closed for writing has to be closed there too.
fn two_containers(env: &Env) -> Result<()> {
    let first = env.container().sh("echo up; sleep 1000").start()?;
    first.wait_log("up")?;
    let volume = env.dir.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("word"), "secret\n")?;
    let mount = format!("type=bind,src={},dst=/mnt/volume,options=rbind:ro", volume.display());
    let second = env
        .container()
        .annotation("io.kubernetes.cri.sandbox-id", &first.id)
        .annotation("io.kubernetes.cri.container-type", "container")
        .flags(["--read-only", "--mount", &mount])
        .sh("echo up; sleep 1000")
        .start()?;
    second.wait_log("up")?;
    ensure!(env.processes(env.vmm_name()).len() == 1, "{:?}", env.processes(env.vmm_name()));
    ensure!(second.sh("cat /mnt/volume/word")? == "secret");
    for place in ["/mnt/volume/word", "/mnt/volume/new", "/etc/new"] {
        let said = second.exec(["sh", "-c", &format!("echo x > {place}")]).output()?;
        ensure!(said.code != 0 && said.stderr.contains("Read-only file system"), "{place}: {}", said.whole());
    }
    ensure!(fs::read_to_string(volume.join("word"))? == "secret\n" && !volume.join("new").exists());
    // Each has its own processes and root, and its own end.
    ensure!(first.sh("test -e /mnt/volume; echo $?")? == "1");
    second.exec(["sh", "-c", "exit 4"]).output()?.code(4)?;
    second.remove()?;
    ensure!(first.sh("echo still here")? == "still here");
    first.remove()
}
