//! What Cloud Hypervisor is asked for: a machine, in its own words.

use std::path::Path;

use chsnap_protocol::SHARE_TAG;
use serde_json::{Value, json};

use super::{api::Api, own::text};
use crate::vmm::{Accelerator, ControlError, VmSpec, arch::Arch};

/// The guest's address on its vsock. Each machine has a vsock of its own, so all have the same.
pub const CID: u32 = 3;

/// Major and minor version of the VMM that answers.
pub async fn version(api: &Api) -> Result<(String, Option<(u64, u64)>), ControlError> {
    let answer = api.get("vmm.ping").await?;
    let version = answer["version"].as_str().unwrap_or_default().to_owned();
    let mut numbers = version.split('.').map(str::parse::<u64>);
    let parsed = match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    Ok((version, parsed))
}

/// Creates the machine and starts its CPUs.
pub async fn boot(api: &Api, spec: &VmSpec, vsock: &Path) -> Result<(), ControlError> {
    let created = api.put("vm.create", Some(&config(spec, vsock, true)?)).await;
    if let Err(ControlError::Refused { answer, .. }) = &created
        && lacks_landlock(answer)
    {
        // The refused machine is there all the same.
        api.put("vm.delete", None).await?;
        api.put("vm.create", Some(&config(spec, vsock, false)?)).await?;
    } else {
        created?;
    }
    api.put("vm.boot", None).await
}

/// Whether the VMM refuses a machine because this kernel cannot confine it; then it is warned of.
pub fn lacks_landlock(said: &str) -> bool {
    let lacking = said.to_lowercase().contains("landlock");
    if lacking {
        log::warn!("this kernel has no Landlock, so the VMM's only walls are seccomp and its cgroup: {said}");
    }
    lacking
}

/// The machine. Unknown fields are ignored silently by the API, so every name here is checked by a test.
fn config(spec: &VmSpec, vsock: &Path, landlock: bool) -> Result<Value, ControlError> {
    let rules = match &spec.snapshot_dir {
        Some(dir) if landlock => json!([{ "path": text(dir)?, "access": "rw" }]),
        _ => json!(null),
    };
    Ok(json!({
        "cpus": { "boot_vcpus": spec.cpus, "max_vcpus": spec.cpus },
        // virtiofsd maps the guest's memory, so it has to be shared.
        "memory": { "size": spec.memory_mib << 20, "shared": true },
        "payload": {
            "kernel": text(&spec.kernel)?,
            "initramfs": text(&spec.initramfs)?,
            "cmdline": Arch::HOST.cmdline(Accelerator::Kvm, &spec.cmdline),
        },
        "fs": [{ "tag": SHARE_TAG, "socket": text(&spec.share_socket)?, "num_queues": 1, "queue_size": 256 }],
        "vsock": { "cid": CID, "socket": text(vsock)? },
        "rng": { "src": "/dev/urandom" },
        // A terminal in name only: Cloud Hypervisor's stdout is a pipe.
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
        "pvpanic": true,
        "landlock_enable": landlock,
        "landlock_rules": rules,
    }))
}
