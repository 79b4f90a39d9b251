//! What was found out about this host before, so that no container pays for finding it out again.
//!
//! A finding is believed only while what it is about looks the same: the boot and the device for KVM, the file for
//! a version. Losing the file costs some milliseconds; nothing fails for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{Rung, kvm};
use crate::files::{self, Identity};

/// A larger file is not ours.
const MAX_BYTES: u64 = 64 << 10;
/// Kept of programs that come and go.
const MAX_PROGRAMS: usize = 16;

/// Findings, and where they are kept.
#[derive(Debug)]
pub struct Memory {
    /// None where nothing is kept.
    path: Option<PathBuf>,
    findings: Findings,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
struct Findings {
    kvm: Option<KvmFinding>,
    versions: BTreeMap<PathBuf, VersionFinding>,
    #[serde(default)]
    rungs: BTreeMap<PathBuf, RungsFinding>,
    #[serde(default)]
    digests: BTreeMap<PathBuf, DigestFinding>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct KvmFinding {
    boot: String,
    device: Identity,
    probe: u32,
    /// Why not, where it does not work.
    broken: Option<kvm::KvmError>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct VersionFinding {
    file: Identity,
    version: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct RungsFinding {
    file: Identity,
    rungs: BTreeSet<Rung>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct DigestFinding {
    file: Identity,
    digest: String,
}

impl Memory {
    /// What is remembered in `path`; nothing where that cannot be read.
    pub fn load(path: PathBuf) -> Self {
        let read = || -> Option<Findings> {
            let meta = fs::symlink_metadata(&path).ok()?;
            let ours = meta.is_file() && meta.uid() == nix::unistd::geteuid().as_raw() && meta.len() <= MAX_BYTES;
            serde_json::from_slice(&ours.then(|| fs::read(&path).ok())??).ok()
        };
        let findings = read().unwrap_or_default();
        Self { path: Some(path), findings }
    }

    /// For this once.
    pub fn fleeting() -> Self {
        Self { path: None, findings: Findings::default() }
    }

    /// Whether KVM works, if that is known.
    pub fn kvm(&self) -> Option<Result<(), kvm::KvmError>> {
        let known = self.findings.kvm.as_ref()?;
        let same = known.boot == boot_id()?
            && known.probe == kvm::REVISION
            && known.device == Identity::of(Path::new(kvm::DEVICE)).ok()?;
        same.then(|| known.broken.clone().map_or(Ok(()), Err))
    }

    /// Remembers whether KVM works.
    pub fn learn_kvm(&mut self, outcome: &Result<(), kvm::KvmError>) {
        let broken = outcome.clone().err();
        let lasting = broken.as_ref().is_none_or(kvm::KvmError::is_lasting);
        if let (true, Some(boot), Ok(device)) = (lasting, boot_id(), Identity::of(Path::new(kvm::DEVICE))) {
            self.findings.kvm = Some(KvmFinding { boot, device, probe: kvm::REVISION, broken });
            self.store();
        }
    }

    /// What the program said its version is, if it is still the same file.
    pub fn version(&self, program: &Path) -> Option<String> {
        let known = self.findings.versions.get(program)?;
        (known.file == Identity::of(program).ok()?).then(|| known.version.clone())
    }

    /// Remembers a version.
    pub fn learn_version(&mut self, program: &Path, version: &str) {
        let Ok(file) = Identity::of(program) else { return };
        let versions = &mut self.findings.versions;
        if versions.len() >= MAX_PROGRAMS {
            versions.clear();
        }
        versions.insert(program.to_owned(), VersionFinding { file, version: version.to_owned() });
        self.store();
    }

    /// The rungs for which the program has options, if it is still the same file.
    pub fn rungs(&self, program: &Path) -> Option<BTreeSet<Rung>> {
        let known = self.findings.rungs.get(program)?;
        (known.file == Identity::of(program).ok()?).then(|| known.rungs.clone())
    }

    /// Remembers for which rungs a program has options.
    pub fn learn_rungs(&mut self, program: &Path, rungs: &BTreeSet<Rung>) {
        let Ok(file) = Identity::of(program) else { return };
        let findings = &mut self.findings.rungs;
        if findings.len() >= MAX_PROGRAMS {
            findings.clear();
        }
        findings.insert(program.to_owned(), RungsFinding { file, rungs: rungs.clone() });
        self.store();
    }

    /// The digest of a file's content, if it is still the same file.
    pub fn digest(&self, path: &Path) -> Option<String> {
        let known = self.findings.digests.get(path)?;
        (known.file == Identity::of(path).ok()?).then(|| known.digest.clone())
    }

    /// Remembers the digest of what `file` was before and after it was taken.
    pub fn learn_digest(&mut self, path: &Path, file: Identity, digest: &str) {
        let digests = &mut self.findings.digests;
        if digests.len() >= MAX_PROGRAMS {
            digests.clear();
        }
        digests.insert(path.to_owned(), DigestFinding { file, digest: digest.to_owned() });
        self.store();
    }

    /// By rename, as several shims may do it at once. One that loses its findings finds them again.
    fn store(&self) {
        let Some(path) = &self.path else { return };
        let store = || -> io::Result<()> {
            let dir = path.parent().unwrap_or(Path::new("/"));
            fs::create_dir_all(dir)?;
            files::replace(path, &serde_json::to_vec(&self.findings)?)
        };
        if let Err(error) = store() {
            log::debug!("cannot remember findings in {path:?}: {error}");
        }
    }
}

fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (path, program) = (dir.path().join("findings.json"), dir.path().join("program"));
        fs::write(&program, "one").unwrap();
        let mut memory = Memory::load(path.clone());
        assert_eq!(memory.version(&program), None);
        memory.learn_version(&program, "1.0");
        let rungs = BTreeSet::from([Rung::NoPmu]);
        memory.learn_rungs(&program, &rungs);
        assert_eq!(Memory::load(path.clone()).rungs(&program), Some(rungs));
        assert_eq!(Memory::load(path.clone()).version(&program).as_deref(), Some("1.0"));
        fs::write(&program, "three").unwrap();
        assert_eq!(Memory::load(path.clone()).rungs(&program), None);
        assert_eq!(Memory::load(path).version(&program), None);
    }

    #[test]
    fn garbage_and_other_people_s_files_are_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("findings.json");
        fs::write(&path, "{\"kvm\": 3}").unwrap();
        assert_eq!(Memory::load(path.clone()).findings, Findings::default());
        let good = serde_json::to_string(&Findings::default()).unwrap();
        fs::write(&path, good + &" ".repeat(MAX_BYTES as usize)).unwrap();
        assert_eq!(Memory::load(path).findings, Findings::default());
    }

    #[test]
    fn only_lasting_findings_about_kvm_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::load(dir.path().join("findings.json"));
        memory.learn_kvm(&Err(kvm::KvmError::Denied("no".into())));
        assert_eq!(memory.kvm(), None);
        if Path::new(kvm::DEVICE).exists() {
            let broken = Err(kvm::KvmError::Broken("so".into()));
            memory.learn_kvm(&broken);
            assert_eq!(Memory::load(dir.path().join("findings.json")).kvm(), Some(broken));
        }
    }
}
