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

    use chsnap_test_skip::skip;

    use super::*;
    use crate::{
        child,
        vmm::{kvm, testing::is_said_to_have},
    };

    /// One that knows none of these requests.
    const NULL: &str = "/dev/null";
    /// The files of `/dev/kvm`: the device, and a vCPU of a machine that is made for that.
    const DEVICE: usize = 0;
    const VCPU: usize = 2;

    /// What a program under the filter gets for these requests and arguments, on these files of `device`.
    /// `own` is a filter that the program installs itself, as Cloud Hypervisor does.
    async fn answers(rung: Rung, own: &BpfProgram, device: &str, requests: &[(usize, u64, u64)]) -> Vec<String> {
        const SCRIPT: &str = "\
import ctypes, fcntl, os, sys
own = bytes.fromhex(sys.argv[1])
if own:
    class Program(ctypes.Structure):
        _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    # PR_SET_NO_NEW_PRIVS; PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(Program(len(own) // 8, own))):
        sys.exit(os.strerror(ctypes.get_errno()))
files = [os.open(sys.argv[2], os.O_RDWR)]
if sys.argv[2] == '/dev/kvm':
    # KVM_CREATE_VM, KVM_CREATE_VCPU
    files.append(fcntl.ioctl(files[0], 0xae01, 0))
    files.append(fcntl.ioctl(files[1], 0xae41, 0))
for triple in sys.argv[3:]:
    file, request, argument = map(int, triple.split(':'))
    try:
        print(fcntl.ioctl(files[file], request, argument))
    except OSError as error:
        print(os.strerror(error.errno))
";
        let mut command =
            child::confined(Path::new("python3"), &[], vec![], crate::sys::Network::Same, filter(rung).unwrap())
                .unwrap();
        let own = own.iter().flat_map(|step| {
            let [code, k] = [u64::from(step.code), u64::from(step.k)];
            (code | u64::from(step.jt) << 16 | u64::from(step.jf) << 24 | k << 32).to_ne_bytes()
        });
        command.arg("-c").arg(SCRIPT).arg(own.map(|byte| format!("{byte:02x}")).collect::<String>());
        command.arg(device);
        command.args(requests.iter().map(|(file, request, argument)| format!("{file}:{request}:{argument}")));
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }

    /// Of two filters the kernel takes the stricter answer, whichever was there first.
    #[tokio::test]
    async fn a_filter_of_the_program_s_own_neither_lifts_the_mask_nor_loses_to_it() {
        const TCSETS: u64 = 0x5402;
        let rules =
            BTreeMap::from([(libc::SYS_ioctl, vec![SeccompRule::new(vec![request(TCSETS).unwrap()]).unwrap()])]);
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
        let own = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap().try_into().unwrap();
        let requests = [(DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3), (DEVICE, TCSETS, 0), (DEVICE, 0x5401, 0)];
        let through = "Inappropriate ioctl for device";
        let masked = ["0", "Operation not permitted", through];
        assert_eq!(answers(Rung::NoPmu, &own, NULL, &requests).await, masked);
        assert_eq!(answers(Rung::NoPmu, &vec![], NULL, &requests).await, ["0", through, through]);
        assert_eq!(answers(Rung::Standard, &own, NULL, &requests).await, [through, masked[1], through]);
    }

    #[tokio::test]
    async fn only_the_named_requests_with_the_named_values_are_answered() {
        const THROUGH: &str = "Inappropriate ioctl for device";
        let requests = [
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3),
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_SVE),
            (DEVICE, KVM_ARM_VCPU_FINALIZE, 4),
            // Near misses.
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3 + 1),
            (DEVICE, KVM_CHECK_EXTENSION + 1, KVM_CAP_ARM_PMU_V3),
            (DEVICE, KVM_ARM_VCPU_FINALIZE - 1, 4),
            (DEVICE, 0x5401, KVM_CAP_ARM_SVE),
        ];
        for (rung, masked) in [(Rung::Standard, 0), (Rung::NoPmu, 1), (Rung::Aggressive, 3)] {
            let answers = answers(rung, &vec![], NULL, &requests).await;
            for (number, answer) in answers.iter().enumerate() {
                let expected = if number < masked { "0" } else { THROUGH };
                assert_eq!(answer, expected, "{rung}, request {:?}", requests[number]);
            }
            assert_eq!(answers.len(), requests.len());
        }
    }

    /// The host's own KVM: on arm64 with performance counters and SVE the mask makes the difference.
    #[tokio::test]
    async fn kvm_is_asked_whatever_is_not_masked() {
        const KVM_CAP_USER_MEMORY: u64 = 3;
        if let Err(error) = kvm::open() {
            skip(error.to_string());
            return;
        }
        let requests = [
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_PMU_V3),
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_ARM_SVE),
            (DEVICE, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY),
            (VCPU, KVM_ARM_VCPU_FINALIZE, 0),
        ];
        let of = async |rung| answers(rung, &vec![], kvm::DEVICE, &requests).await;
        let offered = of(Rung::Standard).await;
        let [pmu, sve, memory, finalized] = &offered[..] else { panic!("{offered:?}") };
        assert!(memory == "1" && finalized.parse::<u32>().is_err(), "{offered:?}");
        for (name, answer) in [("pmu", pmu), ("sve", sve)] {
            assert!(answer == "1" || !is_said_to_have(name), "the host's KVM has no {name}");
        }
        assert_eq!(of(Rung::NoPmu).await, ["0", sve, "1", finalized]);
        assert_eq!(of(Rung::Aggressive).await, ["0", "0", "1", "0"]);
    }
}
