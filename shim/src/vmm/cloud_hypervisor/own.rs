//! Cloud Hypervisors that have an option of their own for a rung's mask: `--cpus boot=1,pmu=off,sve=off`.
//!
//! Upstream's v53 has none, vendors' builds may. Whether a build has one is asked of its parser, with a second
//! option after it whose value no parser takes: so nothing is ever started, and the complaint is about the first option
//! where that is unknown, else about the second. Such a machine is then described on the command line and not through
//! the JSON API, which ignores what it does not know.

use std::{collections::BTreeSet, ffi::OsString, io, path::Path, time::Duration};

use chsnap_protocol::SHARE_TAG;
use tokio::time::{sleep, timeout};

use super::{api::Api, machine::CID};
use crate::{
    child,
    vmm::{Accelerator, ControlError, Rung, VmSpec, arch::Arch},
};

/// Between two questions whether the machine runs.
const PAUSE: Duration = Duration::from_millis(5);
/// No parser takes this for a size.
const NO_SIZE: &str = "chsnap-asks";

/// The rungs for which the program has options.
///
/// # Errors
/// Where it cannot be run, or does not end in time.
pub async fn rungs(program: &Path, patience: Duration) -> io::Result<BTreeSet<Rung>> {
    let mut known = BTreeSet::new();
    for rung in Rung::LADDER.into_iter().filter(|rung| rung.without_pmu()) {
        let mut command = child::command(program, &[], vec![])?;
        command.arg("--cpus").arg(format!("boot=1{}", rung.properties()));
        command.arg("--memory").arg(format!("size={NO_SIZE}")).args(["--kernel", "/dev/null"]);
        let said = timeout(patience, command.output()).await??;
        if !said.status.success() && String::from_utf8_lossy(&said.stderr).contains(NO_SIZE) {
            known.insert(rung);
        }
    }
    Ok(known)
}

/// The machine, on the command line: what [`super::machine`] says in JSON, and the rung's mask.
pub fn arguments(spec: &VmSpec, rung: Rung, vsock: &Path, landlock: bool) -> Result<Vec<OsString>, ControlError> {
    let mut words = vec![
        ("--cpus", format!("boot={0},max={0}{1}", spec.cpus, rung.properties())),
        ("--memory", format!("size={}M,shared=on", spec.memory_mib)),
        ("--kernel", text(&spec.kernel)?.to_owned()),
        ("--initramfs", text(&spec.initramfs)?.to_owned()),
        ("--cmdline", Arch::HOST.cmdline(Accelerator::Kvm, &spec.cmdline)),
        ("--fs", format!("tag={SHARE_TAG},socket={},num_queues=1,queue_size=256", value(&spec.share_socket)?)),
        ("--vsock", format!("cid={CID},socket={}", value(vsock)?)),
        ("--rng", "src=/dev/urandom".into()),
        ("--serial", "tty".into()),
        ("--console", "off".into()),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.into(), value.into()])
    .collect::<Vec<OsString>>();
    words.push("--pvpanic".into());
    if landlock {
        words.push("--landlock".into());
        if let Some(dir) = &spec.snapshot_dir {
            words.extend(["--landlock-rules".into(), format!("path={},access=rw", value(dir)?).into()]);
        }
    }
    Ok(words)
}

/// Waits until the machine of the command line runs. The API may answer before the machine is there.
pub async fn runs(api: &Api, patience: Duration) -> Result<(), ControlError> {
    let running = async {
        loop {
            match api.get("vm.info").await {
                Ok(info) if info["state"] == "Running" => return Ok(()),
                Ok(_) | Err(ControlError::Refused { .. }) => sleep(PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    };
    let late = |_| ControlError::Late { command: "vm.info".into(), seconds: patience.as_secs_f32() };
    timeout(patience, running).await.map_err(late)?
}

/// A path within an option with commas.
fn value(path: &Path) -> Result<String, ControlError> {
    let text = text(path)?;
    match text.contains('"') {
        true => Err(ControlError::Path { path: path.to_owned() }),
        false => Ok(format!("\"{text}\"")),
    }
}

pub fn text(path: &Path) -> Result<&str, ControlError> {
    path.to_str().ok_or_else(|| ControlError::Path { path: path.to_owned() })
}
