//! Has an unmodified Cloud Hypervisor make a machine without PMU or SVE.
//!
//! On arm64 it gives its guests both whenever KVM says that it offers them, and has no option against that. So KVM is
//! made to say no: a seccomp filter, installed before exec and inherited by every thread, answers the question itself.
//!
//! | `ioctl` request | argument | answer | why |
//! |---|---|---|---|
//! | `KVM_CHECK_EXTENSION` | `KVM_CAP_ARM_PMU_V3` | 0 | not supported, so that no PMU is created |
//! | `KVM_CHECK_EXTENSION` | `KVM_CAP_ARM_SVE` | 0 | not supported, so that vCPUs are created without SVE |
//! | `KVM_ARM_VCPU_FINALIZE` | any | 0 | done: without SVE there is nothing to finalise, and KVM would refuse |
//!
//! Every other call goes through, to the filters that the VMM installs itself: of several filters' answers the kernel
//! takes the strictest, and an answer without a call is stricter than a call. Not through the JSON API: it ignores
//! fields it does not know, so a mask that it does not know would seem to work.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::vmm::Rung;

/// `_IO(KVMIO, 0x03)`, <linux/kvm.h>.
const KVM_CHECK_EXTENSION: u64 = 0xae03;
/// `_IOW(KVMIO, 0xc2, int)`; its argument is a pointer, which a filter cannot follow.
const KVM_ARM_VCPU_FINALIZE: u64 = 0x4004_aec2;
const KVM_CAP_ARM_PMU_V3: u64 = 126;
const KVM_CAP_ARM_SVE: u64 = 170;

/// The filter for a rung; none where nothing is masked.
pub fn filter(rung: Rung) -> Result<Option<BpfProgram>, BackendError> {
    let mut rules = Vec::new();
    if rung.without_pmu() {
        rules.push(unsupported(KVM_CAP_ARM_PMU_V3)?);
    }
    if rung.without_sve() {
        rules.push(unsupported(KVM_CAP_ARM_SVE)?);
        rules.push(SeccompRule::new(vec![request(KVM_ARM_VCPU_FINALIZE)?])?);
    }
    if rules.is_empty() {
        return Ok(None);
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let rules = BTreeMap::from([(libc::SYS_ioctl, rules)]);
    // An "error" of number 0 is a call that is not made and returns 0.
    SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(0), arch)?.try_into().map(Some)
}

/// `ioctl(_, KVM_CHECK_EXTENSION, capability)`
fn unsupported(capability: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![request(KVM_CHECK_EXTENSION)?, SeccompCondition::new(2, Dword, Eq, capability)?])
}

/// The kernel takes 32 bits of an ioctl's request.
fn request(number: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(1, Dword, Eq, number)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::child;

    /// What a program under the filter gets for these requests and arguments, on a device that knows none of them.
    async fn answers(rung: Rung, requests: &[(u64, u64)]) -> Vec<String> {
        const SCRIPT: &str = "\
import fcntl, os, sys
fd = os.open('/dev/null', os.O_RDONLY)
for pair in sys.argv[1:]:
    request, argument = map(int, pair.split(':'))
    try:
        print(fcntl.ioctl(fd, request, argument))
    except OSError as error:
        print(os.strerror(error.errno))
";
        let mut command = child::filtered(Path::new("python3"), &[], vec![], filter(rung).unwrap()).unwrap();
        command.arg("-c").arg(SCRIPT).args(requests.iter().map(|(request, argument)| format!("{request}:{argument}")));
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn only_the_named_requests_with_the_named_values_are_answered() {
        const THROUGH: &str = "Inappropriate ioctl for device";
        let requests = [
            (KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3),
            (KVM_CHECK_EXTENSION, KVM_CAP_ARM_SVE),
            (KVM_ARM_VCPU_FINALIZE, 4),
            // Near misses.
            (KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3 + 1),
            (KVM_CHECK_EXTENSION + 1, KVM_CAP_ARM_PMU_V3),
            (KVM_ARM_VCPU_FINALIZE - 1, 4),
            (0x5401, KVM_CAP_ARM_SVE),
        ];
        for (rung, masked) in [(Rung::Standard, 0), (Rung::NoPmu, 1), (Rung::Aggressive, 3)] {
            let answers = answers(rung, &requests).await;
            for (number, answer) in answers.iter().enumerate() {
                let expected = if number < masked { "0" } else { THROUGH };
                assert_eq!(answer, expected, "{rung}, request {:?}", requests[number]);
            }
            assert_eq!(answers.len(), requests.len());
        }
    }
}
