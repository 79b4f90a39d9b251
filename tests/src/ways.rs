//! The suite in another way: with `CHSNAP_TEST_WAY=base` every ordinary pod has to be restored from a base snapshot, which
//! is built before the first case. Without the variable, pods boot.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{Env, eventually};

/// Pods by their containerd: other cases may run at the same time on others.
static EXPECTED: Mutex<BTreeSet<(PathBuf, String)>> = Mutex::new(BTreeSet::new());
static BUILT: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// Whether ordinary pods are to be restored.
#[must_use]
pub fn base_wanted() -> bool {
    match std::env::var("CHSNAP_TEST_WAY").as_deref() {
        Ok("base") => true,
        Ok("direct") | Err(_) => false,
        Ok(other) => panic!("CHSNAP_TEST_WAY={other}: direct and base are known"),
    }
}

/// This pod has to be restored.
pub(crate) fn expect(env: &Env, id: &str) {
    EXPECTED.lock().unwrap_or_else(PoisonError::into_inner).insert((env.daemon.root.clone(), id.to_owned()));
}

/// Builds the base snapshot of ordinary pods, once for each containerd and VMM.
pub fn build_base(env: &Env) -> Result<()> {
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if base_wanted() && env.is_vm() && built.insert(env.daemon.root.join(env.vmm.to_string())) {
        let limit = Duration::from_secs(180);
        env.chsnap(["snapshot", "build", "--base"])?.limit(limit).text().context("the base snapshot is not built")?;
    }
    Ok(())
}

/// How far the log is.
#[must_use]
pub fn mark(env: &Env) -> usize {
    fs::read(env.daemon.log()).map_or(0, |log| log.len())
}

/// Compares how the pods were started since `mark` with how they had to be.
pub fn check(env: &Env, mark: usize) -> Result<()> {
    let mut all = EXPECTED.lock().unwrap_or_else(PoisonError::into_inner);
    let (ours, theirs) =
        std::mem::take(&mut *all).into_iter().partition::<BTreeSet<_>, _>(|(root, _)| *root == env.daemon.root);
    *all = theirs;
    drop(all);
    let expected: Vec<String> = ours.into_iter().map(|(_, id)| id).collect();
    let mut others = Vec::new();
    // What the shim says comes to containerd's log a little later.
    eventually(Duration::from_millis(300), || {
        let log = fs::read(env.daemon.log()).unwrap_or_default();
        let log = String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned();
        let started =
            log.lines().filter(|line| expected.iter().any(|id| line.contains(&format!("VM of {id} started in "))));
        others = started.filter(|line| !line.contains(", way base ")).map(str::to_owned).collect();
        (!others.is_empty()).then_some(())
    });
    if others.is_empty() {
        return Ok(());
    }
    bail!("not restored from the base snapshot:\n  {}", others.join("\n  "))
}
