//! What this host has: which VMMs, of which version, and whether KVM works.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use super::{
    VmmKind, cloud_hypervisor, kvm, qemu,
    select::{self, Taken},
};
use crate::{
    config::{AcceleratorChoice, VmmChoice, VmmConfig},
    program::{Freshness, Scout, in_path, is_executable, numbers, version_in},
};

/// Why something cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// What to do, where anything can be done on this host.
    pub mend: Option<String>,
}

impl Problem {
    fn new(what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what: what.into(), mend: Some(mend.into()) }
    }

    /// One that nothing is to be done about.
    pub(super) fn mere(what: impl Into<String>) -> Self {
        Self { what: what.into(), mend: None }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.mend.as_ref().map_or(Ok(()), |mend| write!(f, ": {mend}"))
    }
}

/// A VMM's program.
#[derive(Debug, Clone)]
pub struct Program {
    /// Which VMM it is.
    pub kind: VmmKind,
    /// Where, if anywhere.
    pub path: Option<PathBuf>,
    /// What it says its version is.
    pub version: Option<String>,
    /// Why it cannot be used.
    pub problem: Option<Problem>,
    /// The configuration names it, so that its absence is a mistake and not a choice.
    pub configured: bool,
}

/// KVM.
#[derive(Debug, Clone)]
pub struct Kvm {
    /// A guest ran on it.
    pub usable: bool,
    /// Why not.
    pub problem: Option<Problem>,
}

/// What there is, what would be taken, and why.
#[derive(Debug, Clone)]
pub struct Survey {
    /// KVM.
    pub kvm: Kvm,
    /// Cloud Hypervisor.
    pub cloud_hypervisor: Program,
    /// QEMU.
    pub qemu: Program,
    /// What a container would get, or why nothing.
    pub taken: Result<Taken, Problem>,
}

/// Looks at everything; afresh, where the scout does.
pub async fn survey(config: &VmmConfig, scout: &mut Scout) -> Survey {
    let host = Host::look(config, scout).await;
    let taken = select::decide(config, &host).map_err(Problem::from);
    let Host { kvm, cloud_hypervisor, qemu } = host;
    Survey { kvm, cloud_hypervisor, qemu, taken }
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
    pub async fn look(config: &VmmConfig, scout: &mut Scout) -> Self {
        let all = scout.freshness == Freshness::Now;
        let kvm = if all || config.accelerator != AcceleratorChoice::Tcg {
            let outcome = kvm_works(scout).await;
            Kvm { usable: outcome.is_ok(), problem: outcome.err().map(Problem::from) }
        } else {
            Kvm { usable: false, problem: Some(Problem::mere("the configuration asks for accelerator = \"tcg\"")) }
        };
        let cloud_hypervisor =
            if all || (kvm.usable && config.choice != VmmChoice::Qemu) || config.choice == VmmChoice::CloudHypervisor {
                find(&CLOUD_HYPERVISOR, config.cloud_hypervisor.as_deref(), scout).await
            } else {
                CLOUD_HYPERVISOR.unknown(config.cloud_hypervisor.is_some())
            };
        let qemu = if all || config.choice != VmmChoice::CloudHypervisor {
            find(&QEMU, config.qemu.as_deref(), scout).await
        } else {
            QEMU.unknown(config.qemu.is_some())
        };
        Self { kvm, cloud_hypervisor, qemu }
    }
}

impl From<kvm::KvmError> for Problem {
    fn from(error: kvm::KvmError) -> Self {
        let mend = error.mend().map(str::to_owned);
        Self { what: error.to_string(), mend }
    }
}

async fn kvm_works(scout: &mut Scout) -> Result<(), kvm::KvmError> {
    // Opened even where the answer is known: access may have been taken away since.
    let device = kvm::open()?;
    if scout.freshness == Freshness::Remembered
        && let Some(known) = scout.memory.kvm()
    {
        return known;
    }
    let outcome = kvm::try_out(device).await;
    scout.memory.learn_kvm(&outcome);
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
        Program {
            kind: self.kind,
            path: None,
            version: None,
            problem: Some(Problem::mere("not looked for")),
            configured,
        }
    }
}

async fn find(wanted: &Wanted, configured: Option<&Path>, scout: &mut Scout) -> Program {
    let Wanted { kind, name, variable, key, install, oldest } = *wanted;
    let named =
        configured.map(|path| (path.to_owned(), key)).or_else(|| Some((env::var_os(variable)?.into(), variable)));
    let mut program = Program { kind, path: None, version: None, problem: None, configured: named.is_some() };
    let path = match named {
        Some((path, _)) if is_executable(&path) => path,
        Some((path, by)) => {
            let what = format!("{by} names {path:?}, which is not a program");
            program.problem = Some(Problem::new(what, format!("correct it, or {install}")));
            return program;
        }
        None => match in_path(name) {
            Some(path) => path,
            None => {
                let what = format!("there is no {name} in PATH");
                program.problem = Some(Problem::new(what, format!("{install}, or set {key}")));
                return program;
            }
        },
    };
    match scout.version(&path, version_in).await {
        Ok(version) => {
            let (major, minor) = oldest;
            if numbers(&version) < Some(oldest) {
                let what = format!("{path:?} is version {version}, but {major}.{minor} or newer is needed");
                program.problem = Some(Problem::new(what, install));
            }
            program.version = Some(version);
        }
        Err(what) => {
            let what = format!("{path:?} does not tell its version ({what})");
            program.problem = Some(Problem::new(what, install));
        }
    }
    program.path = Some(path);
    program
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::program::testing::{program, scout};

    #[tokio::test]
    async fn a_program_is_judged_by_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let mut scout = scout(dir.path(), Freshness::Remembered, Duration::from_secs(60));
        let mut found = async |path: &Path| find(&CLOUD_HYPERVISOR, Some(path), &mut scout).await;
        let good = found(&program(dir.path(), "good", "echo cloud-hypervisor v52.0")).await;
        assert_eq!((good.version.as_deref(), good.problem), (Some("52.0"), None));
        let old = found(&program(dir.path(), "old", "echo cloud-hypervisor v51.1.0")).await;
        assert!(old.problem.unwrap().what.contains("version 51.1.0, but 52.0 or newer"));
        let mute = found(&program(dir.path(), "mute", "echo no libssl >&2; exit 127")).await;
        let problem = mute.problem.unwrap().to_string();
        assert!(problem.contains("exit status: 127") && problem.contains("no libssl"), "{problem}");
        let none = found(&dir.path().join("none")).await;
        let problem = none.problem.unwrap();
        assert!(problem.what.starts_with("vmm.cloud_hypervisor names"), "{problem}");
        assert_eq!(problem.mend.unwrap(), "correct it, or install a release of Cloud Hypervisor");
    }
}
