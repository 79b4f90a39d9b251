//! VMMs and KVM, as the `vmm` room finds them.

use super::{Check, Status};
use crate::vmm::{Problem, Program, Survey};

/// Where a KVM that opens runs no guests, there is nothing to be set on this host.
const ELSEWHERE: &str = "take a host whose KVM runs guests: hardware, or a VM with nested virtualisation; until then QEMU \
    emulates, which is slower";

/// What is not taken need not be there; only a choice that is left with nothing keeps containers from running.
pub(super) fn checks(survey: &Survey) -> Vec<Check> {
    let kvm = match &survey.kvm.problem {
        None => Check::ok("kvm", "a guest ran on it"),
        Some(problem) => Check::warn("kvm", &problem.what, problem.mend.as_deref().unwrap_or(ELSEWHERE)),
    };
    let taken = match &survey.taken {
        Ok(taken) => Check::ok("driver", format!("{} with {}: {}", taken.vmm, taken.accelerator, taken.why)),
        Err(problem) => Check { status: Status::Missing, ..unusable("driver", problem) },
    };
    vec![kvm, program("cloud-hypervisor", &survey.cloud_hypervisor), program("qemu", &survey.qemu), taken]
}

fn program(name: &'static str, program: &Program) -> Check {
    match (&program.problem, &program.path, &program.version) {
        (Some(problem), ..) => unusable(name, problem),
        (None, Some(path), Some(version)) => Check::ok(name, format!("{version} ({})", path.display())),
        (None, ..) => Check::warn(name, "not found", "install it"),
    }
}

fn unusable(name: &'static str, problem: &Problem) -> Check {
    Check { name, status: Status::Warn, found: problem.what.clone(), mend: problem.mend.clone() }
}
