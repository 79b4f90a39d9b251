//! What this host has: which VMMs, of which version, and whether KVM works.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;
use tokio::time::timeout;

use super::{
    VmmKind, cloud_hypervisor, kvm,
    memory::Memory,
    qemu,
    select::{self, Taken},
};
use crate::{
    child,
    config::{AcceleratorChoice, VmmChoice, VmmConfig},
};

/// Where findings are kept.
pub const MEMORY: &str = "/run/chsnap/host.json";
/// For a program to tell its version. QEMU loads a hundred libraries first, which took 26 s on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VMM's program.
#[derive(Debug, Clone, Serialize)]
pub struct Program {
    /// Which VMM it is.
    pub kind: VmmKind,
    /// Where, if anywhere.
    pub path: Option<PathBuf>,
    /// What it says its version is.
    pub version: Option<String>,
    /// Why it cannot be used, and how to mend that.
    pub problem: Option<String>,
    /// The configuration names it, so that its absence is a mistake and not a choice.
    pub configured: bool,
}

/// KVM.
#[derive(Debug, Clone, Serialize)]
pub struct Kvm {
    /// A guest ran on it.
    pub usable: bool,
    /// Why not, and how to mend that.
    pub problem: Option<String>,
}

/// What there is, what would be taken, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Survey {
    /// Which VMM is wanted.
    pub choice: VmmChoice,
    /// Which accelerator is wanted.
    pub accelerator: AcceleratorChoice,
    /// KVM.
    pub kvm: Kvm,
    /// Cloud Hypervisor.
    pub cloud_hypervisor: Program,
    /// QEMU.
    pub qemu: Program,
    /// What a container would get.
    pub taken: Option<Taken>,
    /// Why a container would get nothing.
    pub problem: Option<String>,
}

/// Looks at everything afresh, and remembers it.
pub async fn survey(config: &VmmConfig) -> Survey {
    let host = Host::look(config, &mut Memory::load(MEMORY.into()), Freshness::Now).await;
    let (taken, problem) = match select::decide(config, &host) {
        Ok(taken) => (Some(taken), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let Host { kvm, cloud_hypervisor, qemu } = host;
    let VmmConfig { choice, accelerator, .. } = *config;
    Survey { choice, accelerator, kvm, cloud_hypervisor, qemu, taken, problem }
}

/// Whether to believe what was found before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Look.
    Now,
    /// Believe.
    Remembered,
}

/// Everything that a decision depends on.
#[derive(Debug, Clone)]
pub struct Host {
    pub kvm: Kvm,
    pub cloud_hypervisor: Program,
    pub qemu: Program,
}

impl Host {
    /// Looks at what `config` may need; at all there is where it is to be told to a person.
    pub async fn look(config: &VmmConfig, memory: &mut Memory, freshness: Freshness) -> Self {
        let all = freshness == Freshness::Now;
        let kvm = if all || config.accelerator != AcceleratorChoice::Tcg {
            let outcome = kvm_works(memory, freshness).await;
            Kvm { usable: outcome.is_ok(), problem: outcome.err().map(|error| error.to_string()) }
        } else {
            Kvm { usable: false, problem: Some("the configuration asks for accelerator = \"tcg\"".into()) }
        };
        let cloud_hypervisor =
            if all || (kvm.usable && config.choice != VmmChoice::Qemu) || config.choice == VmmChoice::CloudHypervisor {
                find(&CLOUD_HYPERVISOR, config.cloud_hypervisor.as_deref(), memory, freshness).await
            } else {
                CLOUD_HYPERVISOR.unknown(config.cloud_hypervisor.is_some())
            };
        let qemu = if all || config.choice != VmmChoice::CloudHypervisor {
            find(&QEMU, config.qemu.as_deref(), memory, freshness).await
        } else {
            QEMU.unknown(config.qemu.is_some())
        };
        Self { kvm, cloud_hypervisor, qemu }
    }
}

async fn kvm_works(memory: &mut Memory, freshness: Freshness) -> Result<(), kvm::KvmError> {
    // Opened even where the answer is known: access may have been taken away since.
    let device = kvm::open()?;
    if freshness == Freshness::Remembered
        && let Some(known) = memory.kvm()
    {
        return known;
    }
    let outcome = kvm::try_out(device).await;
    memory.learn_kvm(&outcome);
    outcome
}

/// How a VMM's program is found.
struct Wanted {
    kind: VmmKind,
    name: &'static str,
    variable: &'static str,
    /// The configuration's key.
    key: &'static str,
    /// Major and minor version.
    oldest: (u64, u64),
    install: &'static str,
}

const CLOUD_HYPERVISOR: Wanted = Wanted {
    kind: VmmKind::CloudHypervisor,
    name: cloud_hypervisor::PROGRAM,
    variable: "CHSNAP_CLOUD_HYPERVISOR",
    key: "vmm.cloud_hypervisor",
    oldest: cloud_hypervisor::OLDEST,
    install: "install a release of Cloud Hypervisor",
};

const QEMU: Wanted = Wanted {
    kind: VmmKind::Qemu,
    name: qemu::PROGRAM,
    variable: "CHSNAP_QEMU",
    key: "vmm.qemu",
    oldest: (qemu::OLDEST.major, qemu::OLDEST.minor),
    install: "install QEMU's system emulator (on Debian 12 from bookworm-backports)",
};

impl Wanted {
    fn unknown(&self, configured: bool) -> Program {
        Program { kind: self.kind, path: None, version: None, problem: Some("not looked for".into()), configured }
    }
}

async fn find(wanted: &Wanted, configured: Option<&Path>, memory: &mut Memory, freshness: Freshness) -> Program {
    let Wanted { kind, name, variable, key, install, oldest } = *wanted;
    let named =
        configured.map(|path| (path.to_owned(), key)).or_else(|| Some((env::var_os(variable)?.into(), variable)));
    let mut program = Program { kind, path: None, version: None, problem: None, configured: named.is_some() };
    let path = match named {
        Some((path, _)) if is_executable(&path) => path,
        Some((path, by)) => {
            program.problem = Some(format!("{by} names {path:?}, which is not a program: correct it, or {install}"));
            return program;
        }
        None => match in_path(name) {
            Some(path) => path,
            None => {
                program.problem = Some(format!("there is no {name} in PATH: {install}, or set {key}"));
                return program;
            }
        },
    };
    let remembered = (freshness == Freshness::Remembered).then(|| memory.version(&path)).flatten();
    let version = match remembered {
        Some(version) => Ok(version),
        None => ask_version(&path).await.inspect(|version| memory.learn_version(&path, version)),
    };
    match version {
        Ok(version) => {
            let (major, minor) = oldest;
            if numbers(&version) < Some(oldest) {
                let what = format!("{path:?} is version {version}, but {major}.{minor} or newer is needed: {install}");
                program.problem = Some(what);
            }
            program.version = Some(version);
        }
        Err(what) => program.problem = Some(format!("{path:?} does not tell its version ({what}): {install}")),
    }
    program.path = Some(path);
    program
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|path| is_executable(path))
}

/// The version in the first line of `<program> --version`, such as `10.0.2`.
async fn ask_version(program: &Path) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let ask = async {
        let child = child::command(program, &[], vec![]).map_err(text)?.arg("--version").spawn().map_err(text)?;
        let said = child.wait_with_output().await.map_err(text)?;
        let first = |stream: &[u8]| String::from_utf8_lossy(stream).lines().next().unwrap_or_default().to_owned();
        let version = version_in(&first(&said.stdout));
        version.ok_or_else(|| format!("{}; {:?} {:?}", said.status, first(&said.stdout), first(&said.stderr)))
    };
    timeout(PATIENCE, ask).await.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())))
}

/// The first word that looks like a version, without a `v` before it.
fn version_in(line: &str) -> Option<String> {
    let words = line.split_whitespace().map(|word| word.strip_prefix('v').unwrap_or(word));
    words.filter(|word| numbers(word).is_some()).map(str::to_owned).next()
}

/// Major and minor of `10.0.2` or `53.0-dirty`.
fn numbers(version: &str) -> Option<(u64, u64)> {
    let (major, rest) = version.split_once('.')?;
    let minor = rest.split(|char: char| !char.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that answers `--version` with `says`.
    fn program(dir: &Path, name: &str, says: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn found(path: &Path, memory: &mut Memory) -> Program {
        find(&CLOUD_HYPERVISOR, Some(path), memory, Freshness::Remembered).await
    }

    #[test]
    fn versions_as_the_vmms_tell_them() {
        assert_eq!(version_in("cloud-hypervisor v53.0-dirty").as_deref(), Some("53.0-dirty"));
        assert_eq!(version_in("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)").as_deref(), Some("10.0.2"));
        assert_eq!(version_in("no version here"), None);
        assert_eq!((numbers("53.0-dirty"), numbers("10.0.2")), (Some((53, 0)), Some((10, 0))));
        assert!(numbers("9.2.0") < Some((10, 0)) && numbers("51.2") < Some(CLOUD_HYPERVISOR.oldest));
    }

    #[tokio::test]
    async fn a_program_is_judged_by_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::load(dir.path().join("host.json"));
        let good = found(&program(dir.path(), "good", "echo cloud-hypervisor v52.0"), &mut memory).await;
        assert_eq!((good.version.as_deref(), good.problem), (Some("52.0"), None));
        let old = found(&program(dir.path(), "old", "echo cloud-hypervisor v51.1.0"), &mut memory).await;
        assert!(old.problem.unwrap().contains("version 51.1.0, but 52.0 or newer"));
        let mute = found(&program(dir.path(), "mute", "echo no libssl >&2; exit 127"), &mut memory).await;
        let problem = mute.problem.unwrap();
        assert!(problem.contains("exit status: 127") && problem.contains("no libssl"), "{problem}");
        let none = found(&dir.path().join("none"), &mut memory).await;
        assert!(none.problem.unwrap().starts_with("vmm.cloud_hypervisor names"));
    }

    #[tokio::test]
    async fn a_version_is_asked_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::load(dir.path().join("host.json"));
        let says = format!("echo asked >>{}/asked; echo v53.0", dir.path().display());
        let path = program(dir.path(), "ch", &says);
        for _ in 0..3 {
            assert_eq!(found(&path, &mut memory).await.version.as_deref(), Some("53.0"));
        }
        assert_eq!(fs::read_to_string(dir.path().join("asked")).unwrap(), "asked\n");
        find(&CLOUD_HYPERVISOR, Some(&path), &mut memory, Freshness::Now).await;
        assert_eq!(fs::read_to_string(dir.path().join("asked")).unwrap(), "asked\nasked\n");
    }
}
