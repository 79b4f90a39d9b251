//! What this host puts into a key: the files a guest is made from, the programs that make it, the processor it runs on.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use nix::sys::utsname::uname;
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::{Footing, Inputs, Kind, Process, VmmBuild, digest::hex};
use crate::{
    config::{Config, Shape},
    program::{Scout, version_in},
    share::VirtiofsdProgram,
    vmm::{Accelerator, Arch, Driver, Rung},
};

/// It cannot be told what a snapshot would have to match.
#[derive(Debug, Error)]
pub enum InputsError {
    /// A file of the guest, or a program.
    #[error("cannot read {path:?}, on which the snapshot's key depends")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM.
    #[error("{program:?} does not tell its version ({said})")]
    Version {
        /// What was asked.
        program: PathBuf,
        /// What was wrong.
        said: String,
    },
    /// The host's kernel.
    #[error("the host's kernel does not tell its version")]
    Kernel(#[source] nix::Error),
}

/// A machine, as far as it is known before it is started.
#[derive(Clone, Copy)]
pub struct Machine<'a> {
    /// Settings of the host.
    pub config: &'a Config,
    /// vCPUs and memory.
    pub shape: Shape,
    /// Who starts it.
    pub driver: &'a dyn Driver,
    /// Who serves its files.
    pub virtiofsd: &'a VirtiofsdProgram,
}

impl Machine<'_> {
    /// Everything that a base snapshot for it has to match. Large files are read once, see [`Scout::digest`].
    ///
    /// # Errors
    /// See [`InputsError`].
    pub async fn base(&self, rung: Rung, scout: &mut Scout) -> Result<Inputs, InputsError> {
        self.base_on(&Here::read()?, rung, scout).await
    }

    async fn base_on(&self, here: &Here, rung: Rung, scout: &mut Scout) -> Result<Inputs, InputsError> {
        let guest = &self.config.guest;
        let Footing { host_kernel, cpu, vmm, .. } = self.footing_on(here, scout).await?;
        Ok(Inputs {
            kind: Kind::Base,
            process: None,
            vcpus: self.shape.vcpus,
            memory_mib: self.shape.memory_mib,
            kernel: digest(&guest.kernel, scout)?,
            initramfs: digest(&guest.initramfs, scout)?,
            cmdline: guest.cmdline_words(),
            vmm,
            virtiofsd: (self.virtiofsd.version.clone(), digest(&self.virtiofsd.path, scout)?),
            cache: self.config.share.cache.to_string(),
            rung,
            host_kernel,
            cpu,
            chsnap: here.chsnap.into(),
        })
    }

    /// Everything that a snapshot of `process` for it has to match.
    ///
    /// # Errors
    /// See [`InputsError`].
    pub async fn image(&self, rung: Rung, process: Process, scout: &mut Scout) -> Result<Inputs, InputsError> {
        self.image_on(&Here::read()?, rung, process, scout).await
    }

    async fn image_on(
        &self,
        here: &Here,
        rung: Rung,
        process: Process,
        scout: &mut Scout,
    ) -> Result<Inputs, InputsError> {
        Ok(Inputs { kind: Kind::Image, process: Some(process), ..self.base_on(here, rung, scout).await? })
    }

    /// What decides on which rung snapshots of it work.
    ///
    /// # Errors
    /// See [`InputsError`].
    pub async fn footing(&self, scout: &mut Scout) -> Result<Footing, InputsError> {
        self.footing_on(&Here::read()?, scout).await
    }

    async fn footing_on(&self, here: &Here, scout: &mut Scout) -> Result<Footing, InputsError> {
        let driver = self.driver;
        let path = driver.program();
        let version = scout.version(path, version_in).await;
        let version = version.map_err(|said| InputsError::Version { program: path.into(), said })?;
        let vmm =
            VmmBuild { kind: driver.kind(), accelerator: driver.accelerator(), version, program: digest(path, scout)? };
        let (host_kernel, cpu) = (here.kernel(), here.cpu(vmm.accelerator));
        Ok(Footing { host_kernel, cpu, vmm, from: self.config.vmm.rung.here() })
    }
}

fn digest(path: &Path, scout: &mut Scout) -> Result<String, InputsError> {
    scout.digest(path).map_err(|source| InputsError::File { path: path.into(), source })
}

/// What a host and this program say of themselves.
struct Here {
    /// `uname -r`.
    release: String,
    /// `uname -v`: the same release is built more than once.
    version: String,
    /// `/proc/cpuinfo`.
    cpuinfo: String,
    /// Version and sources.
    chsnap: &'static str,
}

impl Here {
    fn read() -> Result<Self, InputsError> {
        let uname = uname().map_err(InputsError::Kernel)?;
        let path = Path::new("/proc/cpuinfo");
        let cpuinfo = fs::read_to_string(path).map_err(|source| InputsError::File { path: path.into(), source })?;
        let [release, version] = [uname.release(), uname.version()].map(|text| text.to_string_lossy().into_owned());
        Ok(Self { release, version, cpuinfo, chsnap: concat!(env!("CARGO_PKG_VERSION"), "+", env!("CHSNAP_SOURCES")) })
    }

    fn kernel(&self) -> String {
        format!("{} {}", self.release, self.version)
    }

    fn cpu(&self, accelerator: Accelerator) -> String {
        // Whole MHz: at each of its boots, a host measures a few kHz more or less.
        let clock = Arch::HOST.clock_khz(accelerator, &self.cpuinfo).map(|khz| format!("; {} MHz", (khz + 500) / 1000));
        cpu_in(&self.cpuinfo) + &clock.unwrap_or_default()
    }
}

/// Lines of `/proc/cpuinfo` that tell a model from another, on x86_64 and arm64. Not the microcode's revision, nor what
/// changes while it runs.
const MODEL: [&str; 10] = [
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "CPU revision",
];
/// And those with a list of features, too long to be told in full.
const FEATURES: [&str; 2] = ["flags", "Features"];

/// Of all CPUs: a host may have several kinds of them.
fn cpu_in(cpuinfo: &str) -> String {
    let mut kinds = BTreeSet::new();
    for block in cpuinfo.split("\n\n") {
        let lines = block.lines().filter_map(|line| line.split_once(':'));
        let lines: Vec<_> = lines.map(|(name, value)| (name.trim(), value.trim())).collect();
        let model = lines.iter().filter(|(name, _)| MODEL.contains(name)).map(|(_, value)| *value);
        let mut words: Vec<String> = model.map(str::to_owned).collect();
        for (_, list) in lines.iter().filter(|(name, _)| FEATURES.contains(name)) {
            let sorted: BTreeSet<&str> = list.split_whitespace().collect();
            let text = sorted.into_iter().collect::<Vec<_>>().join(" ");
            words.push(format!("features {}", &hex(&Sha256::digest(text))[..12]));
        }
        if !words.is_empty() {
            kinds.insert(words.join(", "));
        }
    }
    kinds.into_iter().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        config::CacheMode,
        program::Freshness,
        snapshot::{Key, key::tests::inputs},
        vmm::{Accelerator, BootError, Vm, VmSpec, VmmKind},
    };

    /// Nothing but a program.
    struct Stand(PathBuf, VmmKind, Accelerator);

    #[async_trait]
    impl Driver for Stand {
        fn kind(&self) -> VmmKind {
            self.1
        }
        fn accelerator(&self) -> Accelerator {
            self.2
        }
        fn program(&self) -> &Path {
            &self.0
        }
        async fn boot(&self, _: &VmSpec) -> Result<Box<dyn Vm>, BootError> {
            unreachable!()
        }
        async fn restore(&self, _: &VmSpec, _: &Path) -> Result<Box<dyn Vm>, BootError> {
            unreachable!()
        }
    }

    /// A host with all that a key depends on, and may be changed.
    struct Host {
        dir: TempDir,
        config: Config,
        shape: Shape,
        rung: Rung,
        vmm: Stand,
        virtiofsd: VirtiofsdProgram,
        process: Process,
        here: Here,
    }

    impl Host {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let at = |name: &str| dir.path().join(name);
            let mut config = Config::default();
            config.state.dir = at("state");
            (config.guest.kernel, config.guest.initramfs) = (at("kernel"), at("initramfs"));
            let vmm = Stand(at("vmm"), VmmKind::Qemu, Accelerator::Tcg);
            let virtiofsd = VirtiofsdProgram { path: at("virtiofsd"), version: "1.14.0".into() };
            let shape = Shape { vcpus: 1, memory_mib: 256 };
            let process = inputs().process.unwrap();
            let here = Here::read().unwrap();
            let host = Self { dir, config, shape, rung: Rung::Standard, vmm, virtiofsd, process, here };
            for name in ["kernel", "initramfs", "vmm", "virtiofsd"] {
                host.program(name, "10.0.2");
            }
            host
        }

        fn program(&self, name: &str, version: &str) {
            let path = self.dir.path().join(name);
            // Another file, as an upgrade makes it: the one before may be running.
            let _ = fs::remove_file(&path);
            fs::write(&path, format!("#!/bin/sh\necho {name} {version}\n")).unwrap();
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }

        fn append(&self, name: &str) {
            let path = self.dir.path().join(name);
            let content = [&fs::read(&path).unwrap()[..], b"# more\n"].concat();
            fs::write(path, content).unwrap();
        }

        /// Of a base snapshot and of one of an image.
        async fn keys(&self) -> [Key; 2] {
            let Self { config, shape, vmm, virtiofsd, rung, here, .. } = self;
            let machine = Machine { config, shape: *shape, driver: vmm, virtiofsd };
            // What was found before is believed, as by pods.
            let mut scout = Scout::new(config, Freshness::Remembered);
            let base = machine.base_on(here, *rung, &mut scout).await.unwrap();
            [base.key(), machine.image_on(here, *rung, self.process.clone(), &mut scout).await.unwrap().key()]
        }
    }

    #[tokio::test]
    async fn whatever_of_a_host_changes_changes_the_keys() {
        type Change = fn(&mut Host);
        let changes: [(&str, Change); 21] = [
            ("kernel", |host| host.append("kernel")),
            ("initramfs", |host| host.append("initramfs")),
            ("cmdline", |host| host.config.guest.cmdline = "quiet".into()),
            ("cache", |host| host.config.share.cache = CacheMode::Never),
            ("virtiofsd", |host| host.append("virtiofsd")),
            ("virtiofsd's version", |host| host.virtiofsd.version = "1.15.0".into()),
            ("VMM", |host| host.append("vmm")),
            ("VMM's version", |host| host.program("vmm", "10.0.3")),
            ("kind of VMM", |host| host.vmm.1 = VmmKind::CloudHypervisor),
            ("accelerator", |host| host.vmm.2 = Accelerator::Kvm),
            ("vcpus", |host| host.shape.vcpus = 2),
            ("memory", |host| host.shape.memory_mib = 257),
            ("rung", |host| host.rung = Rung::NoPmu),
            ("host's kernel", |host| host.here.release.push_str("-rc1")),
            ("host's kernel, built again", |host| host.here.version.push_str(" again")),
            ("CPU model", |host| host.here.cpuinfo.insert_str(0, "model name : Another\nCPU part : 0xfff\n")),
            ("CPU features", |host| host.here.cpuinfo.insert_str(0, "flags : another\n")),
            ("chsnap's sources", |host| host.here.chsnap = "0.1.0+other"),
            ("another kernel", |host| {
                fs::rename(host.dir.path().join("initramfs"), host.dir.path().join("kernel")).unwrap();
                host.program("initramfs", "10.0.2");
            }),
            ("kernel and initramfs", |host| {
                let guest = &mut host.config.guest;
                std::mem::swap(&mut guest.kernel, &mut guest.initramfs);
            }),
            ("both programs", |host| {
                host.append("vmm");
                host.append("virtiofsd");
            }),
        ];
        let plain = Host::new();
        let keys = plain.keys().await;
        assert_eq!(plain.keys().await, keys, "the same twice");
        assert_eq!(Host::new().keys().await, keys, "contents count, and not where they are");
        let mut seen: BTreeSet<Key> = keys.clone().into();
        assert_eq!(seen.len(), 2);
        for (what, change) in changes {
            let mut host = Host::new();
            assert_eq!(host.keys().await, keys, "{what}");
            change(&mut host);
            for key in host.keys().await {
                assert!(seen.insert(key), "{what}");
            }
        }
        // And of the image alone.
        let mut host = Host::new();
        host.process.chain_id = "sha256:2".into();
        let [base, image] = host.keys().await;
        assert!(base == keys[0] && seen.insert(image));
    }

    #[test]
    fn a_cpu_is_told_by_its_model_and_features_and_nothing_that_changes() {
        let x86 = |mhz: &str, flags: &str| {
            let block = format!(
                "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\
                 stepping\t: 1\nmicrocode\t: 0xa0011d1\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n"
            );
            cpu_in(&format!("{block}\n{}", block.replace("processor\t: 0", "processor\t: 1")))
        };
        let one = x86("2000", "fpu vme sse");
        assert!(one.starts_with("AuthenticAMD, 25, 1, AMD EPYC, 1, features "), "{one}");
        assert_eq!(one, x86("3000", "sse fpu vme"));
        assert_ne!(one, x86("2000", "fpu vme"));
        let arm = |part: &str| format!("BogoMIPS : 50\nFeatures : fp sve\nCPU implementer : 0x41\nCPU part : {part}\n");
        let both = cpu_in(&format!("{}\n{}", arm("0xd05"), arm("0xd0b")));
        assert_eq!(both, cpu_in(&format!("{}\n{}", arm("0xd0b"), arm("0xd05"))));
        assert!(both.contains("0xd05") && both.contains("0xd0b"), "{both}");
    }

    #[tokio::test]
    async fn what_a_key_has_of_this_host_is_what_that_says() {
        let said = |path: &str| fs::read_to_string(path).unwrap().trim_end().to_owned();
        let Host { config, shape, vmm, virtiofsd, dir: _dir, .. } = &Host::new();
        let machine = Machine { config, shape: *shape, driver: vmm, virtiofsd };
        let mut scout = Scout::new(config, Freshness::Remembered);
        let inputs = machine.base(Rung::Standard, &mut scout).await.unwrap();
        let kernel = ["osrelease", "version"].map(|name| said(&format!("/proc/sys/kernel/{name}"))).join(" ");
        assert_eq!(inputs.host_kernel, kernel);
        assert!(inputs.cpu.starts_with(&cpu_in(&said("/proc/cpuinfo"))) && !inputs.cpu.is_empty(), "{}", inputs.cpu);
        assert!(inputs.chsnap.ends_with(env!("CHSNAP_SOURCES")) && !env!("CHSNAP_SOURCES").is_empty());
        let footing = machine.footing(&mut scout).await.unwrap();
        assert_eq!((&footing.host_kernel, &footing.cpu), (&inputs.host_kernel, &inputs.cpu));
    }
}
