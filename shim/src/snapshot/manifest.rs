//! What a snapshot consists of, and what it was made from.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    BuildError, FindError, Inputs, Key, digest,
    tree::{self, Tree},
};
use crate::{
    files::{self, Identity},
    vmm::Rung,
};

/// In a snapshot's directory.
pub const MANIFEST: &str = "manifest.json";
/// Beside it: which files were found to have their digests, and how to know them again.
const VERIFIED: &str = "verified.json";
/// Beside it, in an image snapshot: the root difference.
pub const ROOT: &str = "root";
/// A longer one is not ours.
const MAX_BYTES: u64 = 1 << 20;

/// What a snapshot consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name: the inputs' key.
    pub key: Key,
    /// What it was made from.
    pub inputs: Inputs,
    /// RFC 3339, in UTC.
    pub created_at: String,
    /// What building it took, in milliseconds.
    pub build_ms: u64,
    /// The rungs that were tried before the one that it was made on.
    pub refusals: Vec<Refusal>,
    /// Its files by name.
    pub files: BTreeMap<String, Content>,
    /// The root difference, of an image snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Tree>,
}

/// A rung on which no snapshot worked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Which.
    pub rung: Rung,
    /// The whole chain of the error.
    pub why: String,
    /// That was that nothing was answered in time.
    #[serde(default)]
    pub silent: bool,
    /// That was a base snapshot, on whose rungs this one was built.
    #[serde(default)]
    pub of_base: bool,
}

impl Refusal {
    /// With a reason that would be the same a moment later.
    #[must_use]
    pub fn new(rung: Rung, why: impl Into<String>) -> Self {
        Self { rung, why: why.into(), silent: false, of_base: false }
    }

    /// Whether this very snapshot was refused there, and would be again.
    #[must_use]
    pub fn is_lasting(&self) -> bool {
        !self.silent && !self.of_base
    }
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Bytes from its beginning to its end, holes included.
    pub size: u64,
    /// Of [`digest::of_file`].
    pub digest: String,
}

/// What was verified, as it was then.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    files: BTreeMap<String, Identity>,
    root: Option<String>,
}

impl Verified {
    fn read(dir: &Path) -> Self {
        fs::read(dir.join(VERIFIED)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        // The directory's own time says when the snapshot was used, and a file replaced in it is no use of it.
        let opened = File::open(dir)?;
        let used_at = opened.metadata()?.modified()?;
        files::replace(&dir.join(VERIFIED), &serde_json::to_vec(self)?)?;
        opened.set_modified(used_at)
    }
}

/// What a snapshot that is being built consists of.
pub struct Stock {
    /// Its files by name.
    pub files: BTreeMap<String, Content>,
    /// The root difference.
    pub root: Option<Tree>,
    /// As all of it was before its digests were taken.
    pub verified: Verified,
}

/// Looks, and has it written down to the disk.
pub fn take_stock(dir: &Path) -> Result<Stock, BuildError> {
    let failed = |path: &Path, source| BuildError::Io { path: path.into(), source };
    let (mut files, mut root, mut verified) = (BTreeMap::new(), None, Verified::default());
    for entry in fs::read_dir(dir).map_err(|error| failed(dir, error))? {
        let path = entry.map_err(|error| failed(dir, error))?.path();
        let meta = fs::symlink_metadata(&path).map_err(|error| failed(&path, error))?;
        let name = path.file_name().and_then(|name| name.to_str());
        match name {
            Some(ROOT) if meta.is_dir() => {
                // One call for all of its files.
                let synced = File::open(&path).and_then(|top| Ok(nix::unistd::syncfs(&top)?));
                let before = synced.and_then(|()| tree::identity(&path));
                let stock = before.and_then(|before| Ok((before, tree::take_stock(&path)?)));
                let (before, tree) = stock.map_err(|error| failed(&path, error))?;
                (verified.root, root) = (Some(before), Some(tree));
            }
            Some(name) if meta.is_file() => {
                let before = File::open(&path).and_then(|file| file.sync_all()).and_then(|()| Identity::of(&path));
                let stock = before.and_then(|before| Ok((before, digest::of_file(&path)?)));
                let (before, digest) = stock.map_err(|error| failed(&path, error))?;
                verified.files.insert(name.to_owned(), before);
                files.insert(name.to_owned(), Content { size: meta.len(), digest });
            }
            _ => return Err(BuildError::Strange { path }),
        }
    }
    Ok(Stock { files, root, verified })
}

impl Manifest {
    /// Writes it, for good.
    pub fn write(&self, dir: &Path, verified: &Verified) -> Result<(), BuildError> {
        let failed = |path: PathBuf| |source| BuildError::Io { path, source };
        verified.write(dir).map_err(failed(dir.join(VERIFIED)))?;
        let path = dir.join(MANIFEST);
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::from);
        text.and_then(|text| files::replace(&path, &text)).map_err(failed(path))
    }

    /// Reads it, and looks whether the snapshot is what it says.
    pub fn read(dir: &Path, key: &Key) -> Result<Self, FindError> {
        let path = dir.join(MANIFEST);
        let spoilt = |what: String| FindError::Spoilt { key: key.clone(), what };
        let failed = |source| FindError::Io { path: path.clone(), source };
        let meta = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(spoilt(format!("{MANIFEST} is missing")));
            }
            meta => meta.map_err(failed)?,
        };
        if meta.len() > MAX_BYTES {
            return Err(spoilt(format!("{MANIFEST} has {} bytes", meta.len())));
        }
        let text = fs::read(&path).map_err(failed)?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| spoilt(format!("{MANIFEST} is none: {error}")))?;
        if manifest.key != *key || manifest.inputs.key() != *key {
            return Err(spoilt(format!("{MANIFEST} is that of another")));
        }
        Ok(manifest)
    }

    /// Looks whether the files are the manifest's. Their digests are taken only of those that changed since they were
    /// taken last; of all, with `thoroughly`.
    pub fn check(&self, dir: &Path, thoroughly: bool) -> Result<(), FindError> {
        self.check_with(dir, thoroughly, &digest::of_file, &tree::take_stock)
    }

    /// What is remembered is how things were before their digests were taken: what is written meanwhile is seen next time.
    fn check_with(
        &self,
        dir: &Path,
        thoroughly: bool,
        digest: &dyn Fn(&Path) -> io::Result<String>,
        take_stock: &dyn Fn(&Path) -> io::Result<Tree>,
    ) -> Result<(), FindError> {
        let spoilt = |what: String| FindError::Spoilt { key: self.key.clone(), what };
        let (known, mut verified) = (Verified::read(dir), Verified::default());
        let mut looked = false;
        for (name, content) in &self.files {
            let path = dir.join(name);
            let found = match Identity::of(&path) {
                Ok(found) => found,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(spoilt(format!("{name} is missing")));
                }
                Err(source) => return Err(FindError::Io { path, source }),
            };
            if found.size() != content.size {
                return Err(spoilt(format!("{name} has {} bytes and not {}", found.size(), content.size)));
            }
            if thoroughly || known.files.get(name) != Some(&found) {
                let digest = digest(&path).map_err(|source| FindError::Io { path, source })?;
                if digest != content.digest {
                    return Err(spoilt(format!(
                        "{name} has changed: its digest is {digest} and not {}",
                        content.digest
                    )));
                }
                looked = true;
            }
            verified.files.insert(name.clone(), found);
        }
        if let Some(content) = &self.root {
            let path = dir.join(ROOT);
            let failed = |source| FindError::Io { path: path.clone(), source };
            if !path.is_dir() {
                return Err(spoilt(format!("{ROOT} is missing")));
            }
            let before = Some(tree::identity(&path).map_err(failed)?);
            if thoroughly || known.root != before {
                let found = take_stock(&path).map_err(failed)?;
                if found.digest != content.digest {
                    return Err(spoilt(format!(
                        "{ROOT} has changed: its digest is {} and not {}",
                        found.digest, content.digest
                    )));
                }
                looked = true;
            }
            verified.root = before;
        }
        if looked && let Err(error) = verified.write(dir) {
            log::debug!("cannot remember what was verified in {dir:?}: {error}");
        }
        Ok(())
    }

    /// Bytes on the disk.
    pub fn bytes(&self, dir: &Path) -> u64 {
        let names = self.files.keys().map(String::as_str).chain([MANIFEST, VERIFIED]);
        let files = names.filter_map(|name| fs::symlink_metadata(dir.join(name)).ok()).map(|meta| meta.blocks() * 512);
        files.chain(self.root.as_ref().map(|root| root.bytes)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Store, key::tests::inputs};

    /// A snapshot with a root difference, as it was published.
    fn published(dir: &Path) -> (PathBuf, Manifest) {
        let store = Store::open(&dir.join("snapshots"), 1 << 30).unwrap();
        let building = store.build(inputs()).unwrap();
        fs::create_dir_all(building.dir().join("root/etc")).unwrap();
        for name in ["memory", "root/etc/conf"] {
            fs::write(building.dir().join(name), "one").unwrap();
        }
        let key = building.publish(vec![], u64::MAX).unwrap();
        let dir = dir.join("snapshots").join(key.as_str());
        let manifest = Manifest::read(&dir, &key).unwrap();
        (dir, manifest)
    }

    #[test]
    fn what_was_digested_to_be_published_is_not_digested_again_to_be_found() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, manifest) = published(dir.path());
        manifest.check_with(&dir, false, &|path| panic!("{path:?}"), &|path| panic!("{path:?}")).unwrap();
    }

    #[test]
    fn what_is_written_while_a_digest_is_taken_is_not_remembered_as_verified() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, manifest) = published(dir.path());
        // Times are the kernel's, which counts in ticks.
        let tick = || std::thread::sleep(std::time::Duration::from_millis(20));
        let digest = |path: &Path| {
            let digest = digest::of_file(path);
            tick();
            fs::write(path, "two").unwrap();
            digest
        };
        manifest.check_with(&dir, true, &digest, &tree::take_stock).unwrap();
        let error = manifest.check(&dir, false).unwrap_err().to_string();
        assert!(error.contains("memory has changed"), "{error}");
        fs::write(dir.join("memory"), "one").unwrap();
        let stock = |path: &Path| {
            let stock = tree::take_stock(path);
            tick();
            fs::write(path.join("etc/conf"), "two").unwrap();
            stock
        };
        manifest.check_with(&dir, true, &digest::of_file, &stock).unwrap();
        let error = manifest.check(&dir, false).unwrap_err().to_string();
        assert!(error.contains("root has changed"), "{error}");
    }
}
