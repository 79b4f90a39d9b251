//! What a specification may ask for that a microVM cannot give.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxNamespaceType, LinuxNetwork, LinuxPersonalityDomain, LinuxResources, Mount, Spec,
};

use super::PlanError;

const REMOVE: &str = "remove it from the specification";

/// Refuses what a container in a microVM cannot have.
pub(super) fn check(spec: &Spec) -> Result<(), PlanError> {
    let unsupported = |what: String, hint| Err(PlanError::Unsupported { what, hint });
    if let Some(hooks) = spec.hooks()
        && serde_json::to_value(hooks)?.as_object().is_some_and(|o| o.values().any(|v| !v.is_null()))
    {
        return unsupported("OCI hooks".into(), "remove them from the specification");
    }
    if let Some(process) = spec.process() {
        for (there, what) in [
            (process.scheduler().is_some(), "a scheduling policy (process.scheduler)"),
            (process.io_priority().is_some(), "an I/O priority (process.ioPriority)"),
            (process.exec_cpu_affinity().is_some(), "a choice of CPUs for execs (process.execCPUAffinity)"),
        ] {
            if there {
                return unsupported(what.into(), REMOVE);
            }
        }
    }
    let linux = spec.linux().as_ref().ok_or(PlanError::Missing("linux section"))?;
    if let Some(device) = linux.devices().iter().flatten().next() {
        return unsupported(format!("the host's device {:?}", device.path()), "run without --device and --privileged");
    }
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let find = |typ| namespaces.iter().find(|n| n.typ() == typ);
    for (typ, name, hint) in [
        (LinuxNamespaceType::Network, "the host's network namespace", "run without --net-host (hostNetwork)"),
        (LinuxNamespaceType::Pid, "the host's PID namespace", "run without hostPID"),
        (LinuxNamespaceType::Ipc, "the host's IPC namespace", "run without hostIPC"),
        (
            LinuxNamespaceType::Uts,
            "the host's UTS namespace",
            "give the container a UTS namespace (run without --uts host)",
        ),
        (LinuxNamespaceType::Mount, "the host's mount namespace", "give the container a mount namespace"),
    ] {
        if find(typ).is_none() {
            return unsupported(name.into(), hint);
        }
    }
    if find(LinuxNamespaceType::User).is_some() {
        return unsupported("a user namespace".into(), "the VM isolates already; run without --uidmap");
    }
    if find(LinuxNamespaceType::Pid).is_some_and(|n| n.path().is_some()) {
        return unsupported("another container's PID namespace".into(), "run without shareProcessNamespace");
    }
    // Those of IPC, names and network are the sandbox's with CRI. The machine has one of each for all containers that
    // are given one.
    if find(LinuxNamespaceType::Mount).is_some_and(|n| n.path().is_some()) {
        return unsupported("another mount namespace".into(), "give the container one of its own, without a path");
    }
    for (there, what) in [
        (linux.time_offsets().as_ref().is_some_and(|all| !all.is_empty()), "another clock (linux.timeOffsets)"),
        (linux.memory_policy().is_some(), "a choice of the host's memory nodes (linux.memoryPolicy)"),
        (
            linux.net_devices().as_ref().is_some_and(|all| !all.is_empty()),
            "the host's network devices (linux.netDevices)",
        ),
    ] {
        if there {
            return unsupported(what.into(), REMOVE);
        }
    }
    if linux.intel_rdt().is_some() {
        return unsupported("Intel RDT (linux.intelRdt)".into(), "run without an RDT class");
    }
    if linux.personality().as_ref().is_some_and(|p| p.domain() != LinuxPersonalityDomain::PerLinux) {
        return unsupported("an execution domain (linux.personality)".into(), REMOVE);
    }
    if linux.rootfs_propagation().as_ref().is_some_and(|how| how.ends_with("shared")) {
        return unsupported(
            "mounts of its own on the host (linux.rootfsPropagation)".into(),
            "run without Bidirectional mounts",
        );
    }
    let mapped = |mount: &&Mount| mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    if let Some(mount) = spec.mounts().iter().flatten().find(mapped) {
        return unsupported(format!("another owner's mount (uidMappings) on {:?}", mount.destination()), REMOVE);
    }
    linux.resources().as_ref().map_or(Ok(()), check_resources)
}

/// What the guest's cgroups limit is in the agent's `cgroup.rs`. Limits on huge pages and on swap are kept as they are:
/// the guest has neither.
fn check_resources(resources: &LinuxResources) -> Result<(), PlanError> {
    let given = |list: Option<&String>| list.is_some_and(|list| !list.is_empty());
    let cpu = resources.cpu().as_ref();
    let found = [
        (given(cpu.and_then(|c| c.cpus().as_ref())), "a choice of the host's CPUs (linux.resources.cpu.cpus)"),
        (given(cpu.and_then(|c| c.mems().as_ref())), "a choice of the host's memory nodes (linux.resources.cpu.mems)"),
        (
            cpu.and_then(LinuxCpu::realtime_runtime).is_some_and(|time| time != 0),
            "real-time CPU (linux.resources.cpu.realtimeRuntime)",
        ),
        (
            resources.memory().as_ref().is_some_and(|memory| memory.disable_oom_killer() == Some(true)),
            "memory that is never short (linux.resources.memory.disableOOMKiller)",
        ),
        (
            resources.block_io().as_ref().is_some_and(|io| *io != LinuxBlockIo::default()),
            "limits on the host's disks (linux.resources.blockIO)",
        ),
        (
            resources.network().as_ref().is_some_and(|net| *net != LinuxNetwork::default()),
            "a class of the host's network (linux.resources.network)",
        ),
        (resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "RDMA (linux.resources.rdma)"),
    ];
    match found.into_iter().find(|(there, _)| *there) {
        Some((_, what)) => Err(PlanError::Unsupported { what: what.into(), hint: REMOVE }),
        None => Ok(()),
    }
}

/// Confinement against the host's kernel, which the container never sees.
pub(super) fn ignored(spec: &Spec) -> Vec<&'static str> {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    [
        (linux.is_some_and(|l| l.seccomp().is_some()), "linux.seccomp"),
        (process.is_some_and(|p| p.apparmor_profile().is_some()), "process.apparmorProfile"),
        (process.is_some_and(|p| p.selinux_label().as_ref().is_some_and(|l| !l.is_empty())), "process.selinuxLabel"),
    ]
    .into_iter()
    .filter_map(|(there, name)| there.then_some(name))
    .collect()
}
