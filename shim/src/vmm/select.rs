//! Which driver a container gets.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Serialize;
use thiserror::Error;

use super::{
    Accelerator, Driver, Rung, VmmKind,
    arch::Arch,
    cloud_hypervisor::CloudHypervisor,
    qemu::Qemu,
    survey::{Host, Problem, Program},
};
use crate::{
    config::{AcceleratorChoice, VmmChoice, VmmConfig},
    program::Scout,
};

/// No driver can be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SelectError {
    /// The wanted VMM, or all of them.
    #[error("{kind} cannot be used: {problem}")]
    Unusable {
        /// Which.
        kind: VmmKind,
        /// Why not, and what to do.
        problem: Problem,
    },
    /// KVM is wanted, or Cloud Hypervisor, which has nothing else.
    #[error("KVM is needed for {by} but cannot be used: {problem}; or set {instead}")]
    NoKvm {
        /// By what.
        by: &'static str,
        /// Why not, and what to do.
        problem: Problem,
        /// What to configure instead.
        instead: &'static str,
    },
    /// The configuration wants what nobody has.
    #[error("Cloud Hypervisor has no accelerator but KVM: set accelerator = \"auto\", or choice = \"qemu\"")]
    Contradiction,
}

/// What a container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// Which VMM.
    pub vmm: VmmKind,
    /// What it runs the guest on.
    pub accelerator: Accelerator,
    /// Its program.
    pub program: PathBuf,
    /// Why nothing better, or that it is the best.
    pub why: String,
}

/// Chooses the driver.
///
/// # Errors
/// Where none can be used, with what to do about it.
pub async fn select(config: &VmmConfig, scout: &mut Scout) -> Result<Box<dyn Driver>, SelectError> {
    let host = Host::look(config, scout).await;
    let Taken { vmm, accelerator, program, why } = decide(config, &host)?;
    log::debug!("{vmm} on {accelerator}: {why}");
    match vmm {
        VmmKind::Qemu => Ok(Box::new(Qemu { program, accelerator })),
        VmmKind::CloudHypervisor => {
            let own_rungs = if config.rung.on(Arch::HOST) == Rung::Standard {
                BTreeSet::new()
            } else {
                let mute = |error| format!("{program:?} does not tell which CPU options it has: {error}");
                let rungs = scout.own_rungs(&program).await;
                rungs.map_err(|error| SelectError::Unusable { kind: vmm, problem: Problem::mere(mute(error)) })?
            };
            Ok(Box::new(CloudHypervisor { program, own_rungs, memory_restore: config.memory_restore }))
        }
    }
}

/// The rule: Cloud Hypervisor where KVM runs guests, else QEMU with KVM, else QEMU with TCG. A program that the
/// configuration names must be usable; only one that was found by itself is passed over.
pub fn decide(config: &VmmConfig, host: &Host) -> Result<Taken, SelectError> {
    let Host { kvm, cloud_hypervisor, qemu } = host;
    let (choice, wanted) = (config.choice, config.accelerator);
    let no_kvm = |by, instead| SelectError::NoKvm { by, problem: told(&kvm.problem), instead };
    let mut why = match choice {
        VmmChoice::Auto => "nothing better exists",
        _ => "the configuration asks for it",
    }
    .to_owned();

    if choice == VmmChoice::CloudHypervisor {
        if wanted == AcceleratorChoice::Tcg {
            return Err(SelectError::Contradiction);
        }
        let program = usable(cloud_hypervisor)?;
        if !kvm.usable {
            return Err(no_kvm("Cloud Hypervisor", "choice = \"auto\" to fall back to QEMU"));
        }
        return Ok(Taken { vmm: VmmKind::CloudHypervisor, accelerator: Accelerator::Kvm, program, why });
    }
    if choice == VmmChoice::Auto && wanted != AcceleratorChoice::Tcg && kvm.usable {
        match usable(cloud_hypervisor) {
            Ok(program) => {
                return Ok(Taken { vmm: VmmKind::CloudHypervisor, accelerator: Accelerator::Kvm, program, why });
            }
            Err(error) if cloud_hypervisor.configured => return Err(error),
            Err(error) => why = error.to_string(),
        }
    }
    let program = usable(qemu)?;
    if wanted == AcceleratorChoice::Kvm && !kvm.usable {
        return Err(no_kvm("accelerator = \"kvm\"", "accelerator = \"auto\" to fall back to TCG"));
    }
    let accelerator = if kvm.usable && wanted != AcceleratorChoice::Tcg { Accelerator::Kvm } else { Accelerator::Tcg };
    if accelerator == Accelerator::Tcg {
        why = told(&kvm.problem).to_string();
    }
    Ok(Taken { vmm: VmmKind::Qemu, accelerator, program, why })
}

fn usable(program: &Program) -> Result<PathBuf, SelectError> {
    match (&program.path, &program.problem) {
        (Some(path), None) => Ok(path.clone()),
        (_, problem) => Err(SelectError::Unusable { kind: program.kind, problem: told(problem) }),
    }
}

fn told(problem: &Option<Problem>) -> Problem {
    problem.clone().unwrap_or_else(|| Problem::mere("it was not looked for"))
}

/// Apart, what is wrong and what to do.
impl From<SelectError> for Problem {
    fn from(error: SelectError) -> Self {
        match error {
            SelectError::Unusable { kind, problem } => {
                Self { what: format!("{kind} cannot be used: {}", problem.what), mend: problem.mend }
            }
            SelectError::NoKvm { by, problem, instead } => {
                let mend = problem.mend.map_or_else(String::new, |mend| format!("{mend}, or "));
                let what = format!("KVM is needed for {by} but cannot be used: {}", problem.what);
                Self { what, mend: Some(format!("{mend}set {instead}")) }
            }
            SelectError::Contradiction => {
                let what = "Cloud Hypervisor has no accelerator but KVM".to_owned();
                Self { what, mend: Some("set accelerator = \"auto\", or choice = \"qemu\"".to_owned()) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::survey::Kvm;

    fn host(kvm: bool, cloud_hypervisor: bool, qemu: bool) -> Host {
        let program = |kind: VmmKind, there: bool| Program {
            kind,
            path: there.then(|| format!("/bin/{kind}").into()),
            version: None,
            problem: (!there).then(|| Problem::mere(format!("no {kind} here"))),
            configured: false,
        };
        Host {
            kvm: Kvm { usable: kvm, problem: (!kvm).then(|| Problem::mere("KVM is broken")) },
            cloud_hypervisor: program(VmmKind::CloudHypervisor, cloud_hypervisor),
            qemu: program(VmmKind::Qemu, qemu),
        }
    }

    fn config(choice: VmmChoice, accelerator: AcceleratorChoice) -> VmmConfig {
        VmmConfig { choice, accelerator, ..VmmConfig::default() }
    }

    #[test]
    fn auto_takes_the_best_that_works() {
        use {Accelerator as A, VmmKind as V};
        let auto = VmmConfig::default();
        let cases = [
            (host(true, true, true), V::CloudHypervisor, A::Kvm, "nothing better exists"),
            (host(true, false, true), V::Qemu, A::Kvm, "cloud-hypervisor cannot be used: no cloud-hypervisor here"),
            (host(false, true, true), V::Qemu, A::Tcg, "KVM is broken"),
            (host(false, false, true), V::Qemu, A::Tcg, "KVM is broken"),
        ];
        for (host, vmm, accelerator, why) in cases {
            let program = format!("/bin/{vmm}").into();
            assert_eq!(decide(&auto, &host), Ok(Taken { vmm, accelerator, program, why: why.into() }));
        }
        assert!(decide(&auto, &host(false, true, false)).is_err());
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused() {
        use {AcceleratorChoice as A, VmmChoice as C};
        let everything = host(true, true, true);
        let taken = decide(&config(C::Qemu, A::Tcg), &everything).unwrap();
        assert_eq!((taken.vmm, taken.accelerator), (VmmKind::Qemu, Accelerator::Tcg));
        let taken = decide(&config(C::Auto, A::Tcg), &everything).unwrap();
        assert_eq!((taken.vmm, taken.accelerator), (VmmKind::Qemu, Accelerator::Tcg));
        let taken = decide(&config(C::Qemu, A::Auto), &everything).unwrap();
        assert_eq!((taken.vmm, taken.accelerator), (VmmKind::Qemu, Accelerator::Kvm));
        assert_eq!(decide(&config(C::CloudHypervisor, A::Tcg), &everything), Err(SelectError::Contradiction));
        let no_kvm = host(false, true, true);
        for config in [config(C::CloudHypervisor, A::Auto), config(C::Auto, A::Kvm)] {
            let error = decide(&config, &no_kvm).unwrap_err().to_string();
            assert!(error.contains("KVM is broken") && error.contains("fall back"), "{error}");
        }
    }

    #[test]
    fn a_program_named_in_the_configuration_is_not_passed_over() {
        let mut host = host(true, false, true);
        host.cloud_hypervisor.configured = true;
        assert!(matches!(decide(&VmmConfig::default(), &host), Err(SelectError::Unusable { .. })));
    }
}
