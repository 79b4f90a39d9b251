//! VMMs and KVM, as the `vmm` room finds them. Its findings say themselves how to mend them.

use super::{Check, Status};
use crate::vmm::{Program, Survey};

/// What is not taken need not be there; only a choice that is left with nothing keeps containers from running.
pub(super) fn checks(survey: &Survey) -> Vec<Check> {
    let kvm = match &survey.kvm.problem {
        None => Check::ok("kvm", "a guest ran on it"),
        Some(problem) => unusable("kvm", problem),
    };
    let taken = match (&survey.taken, &survey.problem) {
        (Some(taken), _) => Check::ok("driver", format!("{} with {}: {}", taken.vmm, taken.accelerator, taken.why)),
        (None, problem) => {
            Check { status: Status::Missing, ..unusable("driver", problem.as_deref().unwrap_or("no VMM can be used")) }
        }
    };
    vec![kvm, program("cloud-hypervisor", &survey.cloud_hypervisor), program("qemu", &survey.qemu), taken]
}

fn program(name: &'static str, program: &Program) -> Check {
    match (&program.problem, &program.path, &program.version) {
        (Some(problem), ..) => unusable(name, problem),
        (None, Some(path), Some(version)) => Check::ok(name, format!("{version} ({})", path.display())),
        (None, ..) => unusable(name, "not found"),
    }
}

fn unusable(name: &'static str, problem: &str) -> Check {
    Check { name, status: Status::Warn, found: problem.to_owned(), mend: None }
}
