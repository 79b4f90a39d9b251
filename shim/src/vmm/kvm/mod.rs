//! Does KVM really run guests? Known by running one, of a few dozen instructions, in about a millisecond.
//!
//! On some hosts `/dev/kvm` opens and virtual machines and CPUs can be created, and still no kernel starts: nested,
//! paravirtual KVMs emulate a stranger's instructions one by one, and give up at the first exception in long mode.

#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
mod guest;
mod sys;

use std::{
    io::ErrorKind,
    os::unix::thread::JoinHandleExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kvm_ioctls::{Cap, Kvm, VcpuExit};
use nix::{
    libc::{EAGAIN, EINTR},
    sys::{pthread::pthread_kill, signal::Signal},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::timeout,
};

use self::sys::Memory;

/// The device.
pub const DEVICE: &str = "/dev/kvm";
/// Raised when the micro guest changes, so that older findings are not believed.
pub const REVISION: u32 = 1;

/// A thousand times what the guest takes.
const DEADLINE: Duration = Duration::from_secs(2);
/// Between attempts to interrupt a CPU that does not come back.
const NUDGE: Duration = Duration::from_millis(20);
/// Ends a CPU's run. Ignored by default, and by everything in this process; it only has to interrupt.
const INTERRUPT: Signal = Signal::SIGURG;

/// Why KVM cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmError {
    /// No device.
    #[error("there is no /dev/kvm")]
    Missing,
    /// No access.
    #[error("/dev/kvm cannot be opened ({0})")]
    Denied(String),
    /// It opens, but a guest cannot be made.
    #[error("/dev/kvm opens but makes no guest ({0})")]
    Unmade(String),
    /// It makes a guest that does not run.
    #[error("/dev/kvm opens but runs no guest: {0}")]
    Broken(String),
}

impl KvmError {
    /// What to do, where that is in the host's hands.
    pub fn mend(&self) -> Option<&'static str> {
        match self {
            Self::Missing => {
                Some("load the module kvm_intel or kvm_amd, or enable (nested) virtualisation for this host")
            }
            Self::Denied(_) => Some("give the shim's user access to it"),
            Self::Unmade(_) | Self::Broken(_) => None,
        }
    }

    /// True where the finding took more than a look at the device, and will be the same until the host changes.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Unmade(_) | Self::Broken(_))
    }
}

/// Whether KVM gives arm64 guests performance counters. False where there is no KVM.
pub fn has_pmu() -> bool {
    open().is_ok_and(|kvm| kvm.check_extension(Cap::ArmPmuV3))
}

/// Opens the device.
pub fn open() -> Result<Kvm, KvmError> {
    match Kvm::new() {
        Ok(kvm) => Ok(kvm),
        Err(_) if !Path::new(DEVICE).exists() => Err(KvmError::Missing),
        Err(error) => {
            let error = std::io::Error::from(error);
            Err(if error.kind() == ErrorKind::NotFound {
                KvmError::Missing
            } else {
                KvmError::Denied(error.to_string())
            })
        }
    }
}

/// Runs the micro guest.
pub async fn try_out(kvm: Kvm) -> Result<(), KvmError> {
    let unmade = |error: std::io::Error| KvmError::Unmade(error.to_string());
    // Its handler is what makes the signal interrupt; that it came is of no interest.
    let _handler = signal(SignalKind::from_raw(INTERRUPT as i32)).map_err(unmade)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, mut outcome) = oneshot::channel();
    let runner = {
        let stop = stop.clone();
        thread::Builder::new()
            .name("kvm-probe".into())
            .spawn(move || {
                let _ = sender.send(run(&kvm, &stop));
            })
            .map_err(unmade)?
    };
    let hung = || KvmError::Broken("the CPU cannot even be interrupted".into());
    if let Ok(outcome) = timeout(DEADLINE, &mut outcome).await {
        return outcome.unwrap_or_else(|_| Err(hung()));
    }
    stop.store(true, Ordering::Relaxed);
    let nudged = timeout(DEADLINE, async {
        loop {
            // The signal may come while the thread is not in the guest, so once is not enough. The thread is not
            // joined yet, so it is still this one that gets it.
            let _ = pthread_kill(runner.as_pthread_t(), INTERRUPT);
            if let Ok(outcome) = timeout(NUDGE, &mut outcome).await {
                return outcome.unwrap_or_else(|_| Err(hung()));
            }
        }
    });
    nudged.await.unwrap_or_else(|_| Err(hung()))
}

/// Makes the guest and runs it to its end, or until it is interrupted and `stop` is set.
fn run(kvm: &Kvm, stop: &AtomicBool) -> Result<(), KvmError> {
    let unmade = |error: kvm_ioctls::Error| KvmError::Unmade(error.to_string());
    // Declared first, so dropped last.
    let mut memory = Memory::new();
    let vm = kvm.create_vm().map_err(unmade)?;
    let mut cpu = guest::prepare(kvm, &vm, &mut memory).map_err(unmade)?;
    let mut step = guest::STEPS[0];
    let broken = |step: &str, what: &str| Err(KvmError::Broken(format!("a trial guest came as far as {step}, {what}")));
    loop {
        match cpu.run() {
            Ok(exit) => match guest::announcement(&exit) {
                Some(guest::DONE) => return Ok(()),
                Some(guest::WRONG) => return broken(step, "which had a wrong result"),
                Some(number) => step = guest::STEPS.get(usize::from(number)).copied().unwrap_or(step),
                None => return broken(step, &format!("where KVM gave up: {}", reason(&exit))),
            },
            Err(error) if [EINTR, EAGAIN].contains(&error.errno()) => {
                if stop.load(Ordering::Relaxed) {
                    return broken(step, "and no further in two seconds");
                }
            }
            Err(error) => return broken(step, &format!("where KVM failed: {error}")),
        }
    }
}

fn reason(exit: &VcpuExit<'_>) -> String {
    match exit {
        VcpuExit::InternalError => "internal error (it cannot emulate this)".into(),
        VcpuExit::Shutdown => "the CPU shut down (triple fault)".into(),
        other => format!("{other:?}").chars().take(80).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever this host's KVM is worth, the answer comes at once and is the same again.
    #[tokio::test]
    async fn an_answer_comes_soon_and_is_repeatable() {
        let mut answers = Vec::new();
        for _ in 0..3 {
            let start = std::time::Instant::now();
            let answer = match open() {
                Ok(kvm) => try_out(kvm).await,
                Err(error) => Err(error),
            };
            eprintln!("KVM after {:?}: {answer:?}", start.elapsed());
            answers.push(answer);
        }
        assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    }
}
