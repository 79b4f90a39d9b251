//! What a snapshot is of that holds no machine, for those who only look at the store.

use std::collections::BTreeMap;

use chsnap::{
    snapshot::{Inputs, Kind, Process, VmmBuild},
    vmm::{Accelerator, Rung, VmmKind},
};

/// With another number, of another machine.
pub fn inputs(vcpus: u32) -> Inputs {
    Inputs {
        kind: Kind::Image,
        process: Some(Process {
            chain_id: "sha256:1".into(),
            args: vec!["python3".into(), "app.py".into()],
            cwd: "/".into(),
            user: "0:0".into(),
            env: BTreeMap::new(),
            ready: "notify".into(),
            streams: String::new(),
            rest: String::new(),
        }),
        vcpus,
        memory_mib: 512,
        kernel: "k".into(),
        initramfs: "i".into(),
        cmdline: vec![],
        vmm: VmmBuild {
            kind: VmmKind::CloudHypervisor,
            accelerator: Accelerator::Kvm,
            version: "53.0".into(),
            program: "p".into(),
        },
        virtiofsd: ("1.14.0".into(), "v".into()),
        cache: "auto".into(),
        rung: Rung::NoPmu,
        host_kernel: "6.12 #1".into(),
        cpu: "Neoverse-N1".into(),
        chsnap: "0.1.0".into(),
    }
}
