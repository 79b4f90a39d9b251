//! What a case is.

use std::process::Command;

use anyhow::Result;
use chsnap_tests::{Env, Tools, Vmm, ways::Way};

/// Where a case makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// With runc as well: it is what chsnap has to behave like.
    Everywhere,
    /// With runc as well, and one containerd, which plays no part in it.
    Likewise,
    /// With every VMM and every containerd.
    Vms,
    /// With every VMM, and one containerd, which plays no part in it.
    Once,
}

/// A case.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// Where it runs.
    pub scope: Scope,
    /// What it does.
    pub body: Body,
}

/// What a case does.
#[derive(Debug, Clone, Copy)]
pub enum Body {
    /// Something that works.
    Works(fn(&Env) -> Result<()>),
    /// Something that fails with the message of the case's row in `docs/errors.md`.
    Fails(fn(&Env) -> Result<String>),
}

impl Case {
    /// Does it.
    pub fn run(&self, env: &Env) -> Result<()> {
        match self.body {
            Body::Works(run) => run(env),
            Body::Fails(provoke) => crate::errors::check(self.name, &provoke(env)?),
        }
    }
}

/// Makes a topic's list: functions with the scope they run in.
#[macro_export]
macro_rules! cases {
    ($($scope:ident: $($name:ident),* $(,)?;)*) => {
        /// The cases of this topic.
        pub const CASES: &[$crate::cases::Case] = &[$($(
            $crate::cases::Case {
                name: stringify!($name),
                scope: $crate::cases::Scope::$scope,
                body: $crate::cases::Body::Works($name),
            },
        )*)*];
    };
}

/// Makes the list of errors, with the scope they are provoked in.
#[macro_export]
macro_rules! errors {
    ($($scope:ident: $($name:ident),* $(,)?;)*) => {
        /// One case for each row of the table.
        pub const CASES: &[$crate::cases::Case] = &[$($(
            $crate::cases::Case {
                name: stringify!($name),
                scope: $crate::cases::Scope::$scope,
                body: $crate::cases::Body::Fails($name),
            },
        )*)*];
    };
}

/// In which ways the pods of a case about containers can start.
pub fn ways(case: &Case) -> impl Iterator<Item = Way> {
    let (booted, unsaved) = (BOOTED.contains(&case.name), UNSAVED.contains(&case.name));
    Way::ALL.into_iter().filter(move |way| match way {
        Way::Direct => true,
        Way::Base => !booted,
        Way::Image => !booted && !unsaved,
    })
}

/// Topics about what a container does.
const CONTAINERS: [&str; 10] =
    ["lifecycle", "stdio", "exec", "signals", "events", "metrics", "restart", "pod", "share", "expose"];
/// Their guests are of a size of their own, of which no snapshot is built, or settings have them booted, or there is none.
const BOOTED: [&str; 6] = [
    "missing_program",
    "shape",
    "out_of_memory",
    "child_out_of_memory",
    "containerd_ends_in_boot",
    "sandbox_without_vm",
];
/// Their containers are not what the launcher's snapshot is of: another directory, root, program or pod. `as_asked` and
/// `built_like` have such ones with snapshots of their own.
const UNSAVED: [&str; 6] =
    ["foreground", "native_snapshotter", "read_only_root", "two_containers", "longest_id", "guest_crashes"];
/// Of the errors, those of a container that runs: they are the same however it was started.
const RUNNING: [&str; 9] = [
    "vmm_killed",
    "virtiofsd_killed",
    "shim_killed",
    "guest_crashes",
    "agent_silent",
    "exec_missing",
    "exec_stopped",
    "exec_twice",
    "kill_finished",
];

/// Whether it is about what a container does, in whatever way that was started.
pub fn is_of_containers(topic: &str, case: &Case) -> bool {
    CONTAINERS.contains(&topic) || (topic == "errors" && RUNNING.contains(&case.name))
}

/// Why one case cannot be provoked here.
pub fn unprovokable(name: &str, vmm: Vmm) -> Option<&'static str> {
    match name {
        "agent_of_another_release" if vmm != Vmm::Qemu => {
            Some("nothing stands between shim and agent there, and it is the same agent with the same answer")
        }
        "ladder_restore_no_pmu" | "ladder_restore_aggressive" | "ladder_save_no_pmu" | "ladder_save_aggressive"
            if cfg!(not(target_arch = "aarch64")) =>
        {
            Some("a guest of this architecture has neither PMU nor SVE to do without, so there is but one rung")
        }
        "kvm_wanted" | "cloud_hypervisor_wanted" if kvm_may_work() => {
            Some("this machine has KVM, and it is about the want of it")
        }
        _ => None,
    }
}

/// Not chsnap's own judgement: a driver that wrongly gives up must not hide its tests.
fn kvm_may_work() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtual_x86 = ["vmx", "svm"].iter().any(|f| flags.split_whitespace().any(|w| w == *f));
    std::path::Path::new("/dev/kvm").exists() && (!cfg!(target_arch = "x86_64") || virtual_x86)
}

/// Why Cloud Hypervisor cannot run here.
pub fn no_cloud_hypervisor() -> Option<String> {
    let Some(program) = &Tools::get().cloud_hypervisor else {
        return Some("no cloud-hypervisor in PATH, nor named by CHSNAP_CLOUD_HYPERVISOR".into());
    };
    let version = Command::new(program).arg("--version").output();
    if !version.is_ok_and(|v| v.status.success()) {
        return Some(format!("{} cannot be run", program.display()));
    }
    (!kvm_may_work()).then(|| "KVM does not run guests on this machine".into())
}
