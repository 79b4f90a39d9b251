//! Machine and virtiofsd as one thing: either's end is the end of both, and the better explanation is told.

use std::{sync::Arc, time::Duration};

use chsnap_protocol::agent::InfoResponse;
use tokio::{sync::watch, task::AbortHandle, time::timeout};

use super::StartError;
use crate::{
    agent::Agent,
    config::Config,
    share::{Ended, Virtiofsd},
    vmm::{Driver, Vm, VmExit, VmSpec},
};

/// Starts the machine. A virtiofsd that ended is the better explanation for a VMM that failed.
pub(super) async fn boot(
    driver: &dyn Driver,
    spec: &VmSpec,
    virtiofsd: &mut Virtiofsd,
) -> Result<Box<dyn Vm>, StartError> {
    match driver.boot(spec).await {
        Ok(vm) => Ok(vm),
        Err(e) => match timeout(Duration::from_millis(100), virtiofsd.ended()).await {
            Ok(ended) if !ended.clean => Err(StartError::VirtiofsdEnded(ended.how)),
            _ => Err(e.into()),
        },
    }
}

/// Waits for the agent, for as long as machine and virtiofsd live and the deadline allows.
pub(super) async fn meet_agent(
    vm: &dyn Vm,
    virtiofsd: &mut Virtiofsd,
    config: &Config,
) -> Result<(Agent, InfoResponse), StartError> {
    let deadline = config.deadlines.boot.duration();
    let (mut exited, mut exited_too) = (vm.exited(), vm.exited());
    let met = async {
        let channel = vm.channel().await?;
        Ok(Agent::open(channel, config.deadlines.agent_call.duration()).await?)
    };
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
        met = timeout(deadline, met) => match met {
            Ok(Ok(met)) => Ok(met),
            Ok(Err(e)) => {
                // The channel breaks a moment before the VMM is reaped.
                match timeout(Duration::from_millis(500), settled(&mut exited_too)).await.ok().flatten() {
                    Some(exit) => Err(StartError::Died { how: describe(&exit) }),
                    None => Err(e),
                }
            }
            Err(_) => Err(StartError::NoAgent { seconds: deadline.as_secs_f32(), console: vm.console() }),
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

/// In the guest's words, why it stopped.
const TELLING: [&str; 2] = ["Kernel panic", "chsnap-init: fatal: "];

/// Why a machine is gone, with the lines that explain it.
fn describe(exit: &VmExit) -> String {
    let mut text = if exit.by_guest {
        format!("the guest stopped ({})", exit.status)
    } else {
        format!("the VMM ended ({})", exit.status)
    };
    for (what, tail) in [("VMM", &exit.stderr), ("guest console", &exit.console)] {
        let lines: Vec<&str> = tail.lines().filter(|l| !l.trim().is_empty()).collect();
        // What follows a panic is the way to it through the kernel, which tells a person nothing.
        let telling: Vec<&str> = lines.iter().copied().filter(|l| TELLING.iter().any(|t| l.contains(t))).collect();
        let last = if telling.is_empty() { &lines } else { &telling };
        let last = &last[last.len().saturating_sub(8)..];
        if !last.is_empty() {
            text.push_str(&format!("; {what}: {}", last.join(" | ")));
        }
    }
    text
}
