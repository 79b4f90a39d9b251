//! QEMU's command line.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

use chsnap_protocol::{SERIAL_PORT, SHARE_TAG};

use crate::vmm::{Accelerator, Rung, VmSpec, arch::Arch};

/// QEMU's program for a guest.
pub const fn program(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "qemu-system-x86_64",
        Arch::Aarch64 => "qemu-system-aarch64",
    }
}

/// The board, without what no guest of ours looks for: probing it costs time, emulating it costs trust.
fn machine(arch: Arch, accelerator: Accelerator) -> &'static str {
    match (arch, accelerator) {
        (Arch::X86_64, _) => "q35,smm=off,usb=off,vmport=off,hpet=off,i8042=off,sata=off",
        (Arch::Aarch64, Accelerator::Kvm) => "virt,gic-version=host",
        (Arch::Aarch64, Accelerator::Tcg) => "virt,gic-version=3",
    }
}

/// The processor, without what the rung masks. On KVM `pmu_known` says whether KVM has performance counters: where it
/// has none, QEMU does not know their option either.
fn cpu(arch: Arch, accelerator: Accelerator, rung: Rung, pmu_known: bool) -> String {
    let mut model = match (arch, accelerator) {
        // Five-level page tables make every emulated TLB miss dearer, for memory no pod has. ERMS and FSRM have kernel
        // and C library copy and clear with string instructions, which are emulated byte by byte.
        (Arch::X86_64, Accelerator::Tcg) => "max,la57=off,erms=off,fsrm=off",
        // The architected pointer authentication algorithm costs half of the guest's speed when emulated.
        (Arch::Aarch64, Accelerator::Tcg) => "max,pauth-impdef=on",
        (_, Accelerator::Kvm) => "host",
    }
    .to_owned();
    let rung = rung.on(arch);
    if rung.without_pmu() && (accelerator == Accelerator::Tcg || pmu_known) {
        model += ",pmu=off";
    }
    if rung.without_sve() {
        model += match accelerator {
            Accelerator::Tcg => ",sve=off,sme=off",
            // KVM has no SME to be turned off.
            Accelerator::Kvm => ",sve=off",
        };
    }
    model
}

/// What is to be known of the host.
#[derive(Debug, Clone)]
pub struct Host {
    /// Whether KVM has performance counters.
    pub pmu_known: bool,
    /// What its `/proc/cpuinfo` says, for a guest that is emulated.
    pub cpuinfo: String,
}

/// Numbers of the descriptors that QEMU inherits.
#[derive(Debug, Clone, Copy)]
pub struct Fds {
    /// Connected socket: the agent channel.
    pub agent: i32,
    /// Connected socket: QMP.
    pub qmp: i32,
}

/// All arguments for `spec`; with `incoming`, the machine waits for its state.
pub fn args(
    spec: &VmSpec,
    arch: Arch,
    accelerator: Accelerator,
    host: &Host,
    fds: Fds,
    incoming: bool,
) -> Vec<OsString> {
    let mut args = Args::default();
    args.flag("-nodefaults").flag("-no-user-config").flag("-no-reboot").option("-display", ["none"]);
    args.option("-sandbox", ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    args.option("-name", ["chsnap-".into(), escaped(spec.run_dir.file_name().unwrap_or_default())]);

    args.option("-machine", [machine(arch, accelerator), ",memory-backend=memory,dump-guest-core=off"]);
    args.option(
        "-accel",
        [match (accelerator, spec.cpus) {
            (Accelerator::Kvm, _) => "kvm",
            (Accelerator::Tcg, 1) => "tcg,thread=multi",
            // QEMU does not bear that one emulated CPU changes the map of memory, as setting up a device does, while
            // another one uses a device: of 260 starts with two CPUs one ended over an assertion (iotlb_to_section).
            (Accelerator::Tcg, _) => "tcg,thread=single",
        }],
    );
    args.option("-cpu", [cpu(arch, accelerator, spec.rung, host.pmu_known)]);
    args.option("-smp", [spec.cpus.to_string()]);
    args.option("-m", [format!("{}M", spec.memory_mib)]);
    // virtiofsd maps the guest's memory, so it has to be shared.
    args.option("-object", [format!("memory-backend-memfd,id=memory,size={}M,share=on", spec.memory_mib)]);

    args.option("-kernel", [&spec.kernel]).option("-initrd", [&spec.initramfs]);
    let words = arch.clock_word(accelerator, &host.cpuinfo).into_iter().chain(spec.cmdline.iter().cloned());
    args.option("-append", [arch.cmdline(accelerator, &words.collect::<Vec<_>>())]);

    args.option("-chardev", ["stdio,id=console,signal=off"]).option("-serial", ["chardev:console"]);
    args.option("-chardev", [format!("socket,id=qmp,fd={}", fds.qmp)]);
    args.option("-mon", ["chardev=qmp,mode=control"]);
    let virtio = match accelerator {
        Accelerator::Kvm => "",
        // Whether the other side wants to hear of a request is asked after a barrier. The kernel's on x86 is a locked
        // instruction, and for a single thread of emulation QEMU makes that a plain one: the question overtakes the
        // request, and virtiofsd sleeps over it for ever (one start of some hundred). Without this, nobody is asked.
        Accelerator::Tcg => ",event_idx=off",
    };
    args.option("-device", ["virtio-serial-pci,id=serial,max_ports=2", virtio]);
    args.option("-chardev", [format!("socket,id=agent,fd={}", fds.agent)]);
    args.option("-device", [format!("virtserialport,bus=serial.0,nr=1,chardev=agent,name={SERIAL_PORT}")]);
    args.option("-object", ["rng-builtin,id=rng"]).option("-device", ["virtio-rng-pci,rng=rng", virtio]);
    args.option("-chardev", ["socket,id=share,path=".into(), escaped(spec.share_socket.as_os_str())]);
    args.option("-device", ["vhost-user-fs-pci,chardev=share,queue-size=256,tag=", SHARE_TAG, virtio]);
    if incoming {
        args.option("-incoming", ["defer"]);
    }
    args.0
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn option<const N: usize>(&mut self, name: &str, parts: [impl AsRef<OsStr>; N]) -> &mut Self {
        let mut value = OsString::new();
        parts.iter().for_each(|part| value.push(part));
        self.0.extend([name.into(), value]);
        self
    }
}

/// A comma separates QEMU's options; one within a value is written twice.
fn escaped(value: &OsStr) -> OsString {
    let bytes = value.as_bytes().iter();
    OsString::from_vec(bytes.flat_map(|byte| std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 })).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            cpus: 3,
            memory_mib: 640,
            kernel: "/guest/vmlinux".into(),
            initramfs: "/guest/initramfs".into(),
            cmdline: vec!["chsnap.log=debug".into()],
            share_socket: "/run/a,b/share.sock".into(),
            run_dir: "/run/chsnap/k8s.io/pod,1".into(),
            cgroups: vec![],
            network: None,
            rung: Rung::Standard,
            snapshot_dir: None,
            deadline: std::time::Duration::from_secs(30),
        }
    }

    fn line(arch: Arch, accelerator: Accelerator) -> Vec<String> {
        let host = Host { pmu_known: true, cpuinfo: "bogomips : 4000.00\n".into() };
        let args = args(&spec(), arch, accelerator, &host, Fds { agent: 7, qmp: 9 }, false);
        args.into_iter().map(|arg| arg.into_string().unwrap()).collect()
    }

    fn values<'a>(line: &'a [String], name: &str) -> Vec<&'a str> {
        line.windows(2).filter(|pair| pair[0] == name).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn x86_64_with_tcg() {
        let line = line(Arch::X86_64, Accelerator::Tcg);
        assert!(values(&line, "-machine")[0].starts_with("q35,"));
        assert_eq!(values(&line, "-accel"), ["tcg,thread=single"], "more than one CPU");
        assert_eq!(values(&line, "-smp"), ["3"]);
        assert_eq!(values(&line, "-m"), ["640M"]);
        assert_eq!(values(&line, "-kernel"), ["/guest/vmlinux"]);
        assert_eq!(values(&line, "-initrd"), ["/guest/initramfs"]);
        let cmdline = values(&line, "-append")[0];
        assert!(cmdline.starts_with("console=ttyS0 ") && cmdline.ends_with(" chsnap.log=debug"), "{cmdline}");
        assert!(cmdline.contains(" tsc_early_khz=2000000 "), "{cmdline}");
        assert!(cmdline.contains(" panic=-1 ") && !cmdline.contains("  "), "{cmdline}");
        assert!(values(&line, "-chardev").contains(&"socket,id=agent,fd=7"));
        assert!(values(&line, "-chardev").contains(&"socket,id=qmp,fd=9"));
        assert!(values(&line, "-object").contains(&"memory-backend-memfd,id=memory,size=640M,share=on"));
        assert!(line.iter().any(|arg| arg == "-no-reboot"));
        let virtio =
            values(&line, "-device").into_iter().filter(|device| device.starts_with("v") && device.contains("-pci"));
        assert!(
            virtio.clone().count() == 3 && virtio.clone().all(|device| device.ends_with(",event_idx=off")),
            "{line:?}"
        );
    }

    #[test]
    fn aarch64_differs_where_it_must() {
        let tcg = line(Arch::Aarch64, Accelerator::Tcg);
        assert!(values(&tcg, "-machine")[0].starts_with("virt,gic-version=3,"));
        assert!(values(&tcg, "-append")[0].starts_with("console=ttyAMA0 "));
        let kvm = line(Arch::Aarch64, Accelerator::Kvm);
        assert_eq!((values(&kvm, "-accel")[0], values(&kvm, "-cpu")[0]), ("kvm", "host"));
    }

    #[test]
    fn a_rung_masks_where_it_means_something() {
        use Accelerator::{Kvm, Tcg};
        let arm = |accelerator, rung, pmu_known| cpu(Arch::Aarch64, accelerator, rung, pmu_known);
        assert_eq!(arm(Kvm, Rung::NoPmu, true), "host,pmu=off");
        assert_eq!(arm(Kvm, Rung::Aggressive, true), "host,pmu=off,sve=off");
        assert_eq!(arm(Kvm, Rung::Aggressive, false), "host,sve=off");
        assert_eq!(arm(Tcg, Rung::NoPmu, false), "max,pauth-impdef=on,pmu=off");
        assert_eq!(arm(Tcg, Rung::Aggressive, false), "max,pauth-impdef=on,pmu=off,sve=off,sme=off");
        assert_eq!(cpu(Arch::X86_64, Kvm, Rung::Aggressive, true), "host");
    }

    #[test]
    fn a_comma_in_a_path_does_not_become_an_option() {
        let line = line(Arch::X86_64, Accelerator::Tcg);
        assert!(values(&line, "-chardev").contains(&"socket,id=share,path=/run/a,,b/share.sock"));
        assert_eq!(values(&line, "-name"), ["chsnap-pod,,1"]);
    }
}
