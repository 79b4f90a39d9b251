//! Pods beside each other, and several containers in one pod.

use std::time::Duration;

use anyhow::{Result, ensure};
use chsnap_tests::{Env, eventually};

crate::cases! {
    Once: shared_cgroup;
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
