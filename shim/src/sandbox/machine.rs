//! Machine and virtiofsd as one thing: either's end is the end of both, and the better explanation is told.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use chsnap_protocol::{SHARE_LATER, agent::InfoResponse};
use tokio::{
    sync::watch,
    task::{AbortHandle, yield_now},
    time::{timeout, timeout_at},
};

use super::StartError;
use crate::{
    agent::{Agent, AgentError, Fresh},
    config::{Config, Deadline, Deadlines, Shape},
    share::{Ended, Virtiofsd},
    snapshot::Kind,
    task::chain,
    vmm::{Driver, Rung, Vm, VmExit, VmSpec},
};

/// virtiofsd's, in the pod's directory. No socket's name may be longer than `dir.rs` says.
const SHARE_SOCKET: &str = "fs.sock";

/// How a machine comes into being.
#[derive(Clone, Copy)]
pub(crate) enum Origin<'a> {
    /// Its kernel boots.
    Boot,
    /// From the snapshot of that kind in this directory.
    Snapshot(Kind, &'a Path),
}

/// How long a guest may take to get ready, and where that is configured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub until: Instant,
    pub whole: Duration,
    pub key: &'static str,
}

impl Patience {
    /// That of a boot, from now on.
    pub fn boot(deadlines: &Deadlines) -> Self {
        Self::of(deadlines.boot, "boot")
    }

    /// That of a restore, from now on.
    pub fn restore(deadlines: &Deadlines) -> Self {
        Self::of(deadlines.restore, "restore")
    }

    fn of(deadline: Deadline, key: &'static str) -> Self {
        let whole = deadline.duration();
        Self { until: Instant::now() + whole, whole, key }
    }
}

/// The machine of this configuration and shape, with virtiofsd's socket and its own in `dir`.
pub(crate) fn spec(config: &Config, shape: Shape, dir: &Path, cgroups: &[PathBuf]) -> VmSpec {
    VmSpec {
        cpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        kernel: config.guest.kernel.clone(),
        initramfs: config.guest.initramfs.clone(),
        cmdline: config.guest.cmdline_words(),
        share_socket: dir.join(SHARE_SOCKET),
        run_dir: dir.into(),
        cgroups: cgroups.to_vec(),
        network: None,
        rung: config.vmm.rung,
        snapshot_dir: None,
        deadline: config.deadlines.boot.duration(),
    }
}

/// The same as a template on `rung` is, or what is restored from one: the two may differ in paths alone.
pub(crate) fn templates_spec(spec: VmSpec, kind: Kind, rung: Rung) -> VmSpec {
    let mut spec = VmSpec { rung, ..spec };
    if kind == Kind::Base {
        spec.cmdline.push(SHARE_LATER.into());
    }
    spec
}

/// Starts the machine. A virtiofsd that ended is the better explanation for a VMM that failed.
pub(crate) async fn start(
    driver: &dyn Driver,
    spec: &VmSpec,
    origin: Origin<'_>,
    virtiofsd: &mut Virtiofsd,
) -> Result<Box<dyn Vm>, StartError> {
    let mut starting = Box::pin(async {
        match origin {
            Origin::Boot => driver.boot(spec).await,
            Origin::Snapshot(_, from) => driver.restore(spec, from).await,
        }
    });
    let started = tokio::select! {
        biased;
        started = &mut starting => started,
        ended = virtiofsd.ended() => match ended.clean {
            // The VMM's end is behind it, and is told in a moment.
            true => starting.await,
            // Cloud Hypervisor tries for a minute to connect to it, and must not get through to the next one.
            false => {
                drop(starting);
                // Whoever reaps the VMM kills it now, before there is another virtiofsd.
                yield_now().await;
                return Err(StartError::VirtiofsdEnded(ended.how));
            }
        },
    };
    match started {
        Ok(vm) => Ok(vm),
        Err(e) => match timeout(Duration::from_millis(100), virtiofsd.ended()).await {
            Ok(ended) if !ended.clean => Err(StartError::VirtiofsdEnded(ended.how)),
            _ => Err(e.into()),
        },
    }
}

/// Waits for the agent, for as long as machine and virtiofsd live and `patience` lasts. A restored machine is made one
/// of its own, and is none before.
pub(crate) async fn meet_agent(
    vm: &dyn Vm,
    virtiofsd: &mut Virtiofsd,
    patience: Patience,
    agent_call: Duration,
    origin: Origin<'_>,
) -> Result<(Agent, InfoResponse), StartError> {
    let met = async {
        let channel = vm.channel().await?;
        let (agent, info) = Agent::open(channel, agent_call).await?;
        match origin {
            Origin::Snapshot(kind, _) => {
                let fresh = Fresh::new().map_err(StartError::Fresh)?;
                // An image's process has the share mounted.
                agent.resume(fresh, kind == Kind::Base).await.map_err(StartError::Resume)?;
            }
            // The clock that it booted with is good to a second. There is nothing else to start, so a late one is told alone.
            Origin::Boot => match agent.set_clock().await {
                Err(late @ AgentError::Clock { .. }) => log::warn!("after a boot: {}", chain(&late)),
                set => set?,
            },
        }
        Ok((agent, info))
    };
    let in_time = async {
        timeout_at(patience.until.into(), met).await.unwrap_or_else(|_| {
            let (seconds, key) = (patience.whole.as_secs_f32(), patience.key);
            let console = last_words(&vm.console()).unwrap_or_default();
            Err(StartError::NoAgent { seconds, key, console })
        })
    };
    while_alive(vm, virtiofsd, in_time).await
}

/// Does `work`, for as long as machine and virtiofsd live: whichever ends first explains why it was not done.
pub(crate) async fn while_alive<T>(
    vm: &dyn Vm,
    virtiofsd: &mut Virtiofsd,
    work: impl Future<Output = Result<T, StartError>>,
) -> Result<T, StartError> {
    let (mut exited, mut exited_too) = (vm.exited(), vm.exited());
    tokio::select! {
        // In this order: a dead machine explains a broken channel, not the other way round.
        biased;
        exit = settled(&mut exited) => {
            match timeout(Duration::from_millis(50), virtiofsd.ended()).await {
                Ok(ended) if !ended.clean => Err(StartError::VirtiofsdEnded(ended.how)),
                _ => Err(StartError::Died { how: exit.as_ref().map(describe).unwrap_or_default() }),
            }
        }
        ended = virtiofsd.ended() => match machine_behind(&ended, &mut exited_too).await {
            Some(exit) => Err(StartError::Died { how: describe(&exit) }),
            None => Err(StartError::VirtiofsdEnded(ended.how)),
        },
        done = work => match done {
            Err(e) if e.is_of_channel() => Err(ended(vm).await.map_or(e, |how| StartError::Died { how })),
            done => done,
        },
    }
}

/// Keeps virtiofsd, and says why the pod is no more, whichever of the two ends first.
pub(super) fn watch_over(mut virtiofsd: Virtiofsd, vm: Arc<dyn Vm>) -> (AbortHandle, watch::Receiver<Option<String>>) {
    let (tell, gone) = watch::channel(None);
    let (mut exited, mut exited_too) = (vm.exited(), vm.exited());
    let task = tokio::spawn(async move {
        let why = tokio::select! {
            exit = settled(&mut exited) => exit.as_ref().map(describe).unwrap_or_default(),
            ended = virtiofsd.ended() => match machine_behind(&ended, &mut exited_too).await {
                Some(exit) => describe(&exit),
                None => {
                    // A guest without its files is of no use, and would run on for as long as nobody deletes the task.
                    vm.kill().await;
                    format!("virtiofsd ended: {}", ended.how)
                }
            },
        };
        virtiofsd.kill().await;
        tell.send_replace(Some(why));
    });
    (task.abort_handle(), gone)
}

/// The machine's end, where that was what ended virtiofsd: it is told a moment later.
async fn machine_behind(ended: &Ended, exited: &mut watch::Receiver<Option<VmExit>>) -> Option<VmExit> {
    if !ended.clean {
        return None;
    }
    timeout(Duration::from_secs(2), settled(exited)).await.ok().flatten()
}

/// Waits for what is told once; `None` where nobody is left to tell it.
pub(crate) async fn settled<T: Clone>(told: &mut watch::Receiver<Option<T>>) -> Option<T> {
    told.wait_for(Option::is_some).await.ok().and_then(|value| value.clone())
}

/// Why a machine is gone whose channel is broken, which happens a moment before the VMM is reaped; `None` where it is not.
pub(crate) async fn ended(vm: &dyn Vm) -> Option<String> {
    let exit = timeout(Duration::from_millis(500), settled(&mut vm.exited())).await;
    exit.ok().flatten().as_ref().map(describe)
}

/// In the guest's words, why it stopped.
const TELLING: [&str; 2] = ["Kernel panic", "chsnap-init: fatal: "];

/// Why a machine is gone, with the lines that explain it.
fn describe(exit: &VmExit) -> String {
    let mut text = if exit.by_guest {
        format!("the guest stopped ({})", exit.status)
    } else {
        format!("the VMM ended ({})", exit.status)
    };
    // Where the guest says why, what its VMM had to warn of is beside the point.
    let explained = exit.by_guest && exit.console.lines().any(is_telling);
    let vmm = if explained { "" } else { exit.stderr.as_str() };
    for (what, tail) in [("VMM", vmm), ("guest console", exit.console.as_str())] {
        if let Some(words) = last_words(tail) {
            text.push_str(&format!("; {what}: {words}"));
        }
    }
    text
}

fn is_telling(line: &str) -> bool {
    TELLING.iter().any(|telling| line.contains(telling))
}

/// Its last lines, or those that explain an end where there are such.
pub(super) fn last_words(tail: &str) -> Option<String> {
    let lines: Vec<&str> = tail.lines().filter(|l| !l.trim().is_empty()).collect();
    // What follows a panic is the way to it through the kernel, which tells a person nothing.
    let telling: Vec<&str> = lines.iter().copied().filter(|line| is_telling(line)).collect();
    let last = if telling.is_empty() { &lines } else { &telling };
    let last = &last[last.len().saturating_sub(8)..];
    (!last.is_empty()).then(|| last.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_explained_by_who_knows_why() {
        let exit = |by_guest, stderr: &str, console: &str| VmExit {
            status: "exit status: 0".into(),
            by_guest,
            stderr: stderr.into(),
            console: console.into(),
        };
        let warns = "WARN: no SMT isolation\n";
        for (exit, text) in [
            (
                exit(true, warns, "up\nKernel panic - not syncing\nCall trace\n"),
                "the guest stopped (exit status: 0); guest console: Kernel panic - not syncing",
            ),
            (
                exit(true, warns, "up\n"),
                "the guest stopped (exit status: 0); VMM: WARN: no SMT isolation; guest console: up",
            ),
            (exit(false, "no memory\n", ""), "the VMM ended (exit status: 0); VMM: no memory"),
        ] {
            assert_eq!(describe(&exit), text);
        }
    }
}
