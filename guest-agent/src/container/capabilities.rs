//! Names of capabilities.

use std::fs;

use super::{plan::PlanError, spec::Capabilities};
use crate::sys::CapabilitySets;

/// In the order of their numbers.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What this kernel knows; a host with a newer one may name more.
fn known_to_kernel() -> u64 {
    let last = fs::read_to_string("/proc/sys/kernel/cap_last_cap").ok().and_then(|text| text.trim().parse().ok());
    u64::MAX >> (63 - last.unwrap_or(NAMES.len() as u32 - 1).min(63))
}

fn mask(names: &[String], known: u64) -> Result<u64, PlanError> {
    let bit = |name: &String| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES.iter().position(|known| known.eq_ignore_ascii_case(short));
        number.map(|n| 1 << n).ok_or_else(|| PlanError::Capability(name.clone()))
    };
    names.iter().try_fold(0, |mask, name| Ok(mask | bit(name)?)).map(|mask| mask & known)
}

/// The sets as masks.
///
/// # Errors
/// For an unknown name.
pub fn sets(names: &Capabilities) -> Result<CapabilitySets, PlanError> {
    let known = known_to_kernel();
    Ok(CapabilitySets {
        bounding: mask(&names.bounding, known)?,
        effective: mask(&names.effective, known)?,
        inheritable: mask(&names.inheritable, known)?,
        permitted: mask(&names.permitted, known)?,
        ambient: mask(&names.ambient, known)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_bits() {
        let all = u64::MAX;
        assert_eq!(mask(&["CAP_CHOWN".into(), "CAP_CHECKPOINT_RESTORE".into()], all).unwrap(), 1 | 1 << 40);
        assert_eq!(mask(&["CAP_BPF".into()], 0xff).unwrap(), 0);
        let error = mask(&["CAP_FLY".into()], all).unwrap_err().to_string();
        assert!(error.contains("CAP_FLY"), "{error}");
    }
}
