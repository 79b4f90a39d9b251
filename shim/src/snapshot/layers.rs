//! Which image's layers are in which directories. A pod is created from directories, and containerd knows their image,
//! but to ask it takes longer than a restore; so what it once answered is kept.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::files;

/// In the store's directory.
const FILE: &str = "layers.json";
/// More are not kept: a host that has had that many images has removed most of them.
const MAX_STACKS: usize = 4096;

/// In the place of a chain ID, for a stack whose image is not known.
#[must_use]
pub fn nameless(directories: &[PathBuf]) -> String {
    let shown = directories.iter().map(|path| path.display().to_string());
    format!("directories:{}", shown.collect::<Vec<_>>().join(":"))
}

/// What is known of stacks of directories.
#[derive(Debug)]
pub struct Layers {
    path: PathBuf,
    stacks: Vec<Stack>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stack {
    /// The topmost first, and how to know each again.
    directories: Vec<(PathBuf, Mark)>,
    chain_id: String,
}

/// Of a directory that nobody writes to: another of the same name has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    inode: u64,
    changed: (i64, i64),
}

impl Mark {
    fn of(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = fs::metadata(path)?;
        Ok(Self { inode: meta.ino(), changed: (meta.ctime(), meta.ctime_nsec()) })
    }
}

impl Layers {
    /// What is kept in the store `root`; nothing, where nothing can be read.
    #[must_use]
    pub fn load(root: &Path) -> Self {
        let path = root.join(FILE);
        let stacks = read(&path);
        Self { path, stacks }
    }

    /// The chain ID of these directories, the topmost first, as containerd calls their image.
    #[must_use]
    pub fn chain_id(&self, directories: &[PathBuf]) -> Option<&str> {
        let known = self.stacks.iter().rfind(|stack| stack.directories.iter().map(|(path, _)| path).eq(directories))?;
        let same = known.directories.iter().all(|(path, mark)| Mark::of(path).is_ok_and(|now| now == *mark));
        same.then_some(&known.chain_id)
    }

    /// The directories of an image with this chain ID, the topmost first; one alone, if `alone`.
    #[must_use]
    pub fn directories(&self, chain_id: &str, alone: bool) -> Option<Vec<PathBuf>> {
        let mut known = self.stacks.iter().rev().filter(|stack| stack.chain_id == chain_id);
        let fits = |stack: &&Stack| !alone || stack.directories.len() == 1;
        let same =
            |stack: &&Stack| stack.directories.iter().all(|(path, mark)| Mark::of(path).is_ok_and(|now| now == *mark));
        let stack = known.find(|stack| fits(stack) && same(stack))?;
        Some(stack.directories.iter().map(|(path, _)| path.clone()).collect())
    }

    /// Keeps it.
    ///
    /// # Errors
    /// Where a directory is gone, or nothing can be written.
    pub fn learn(&mut self, directories: &[PathBuf], chain_id: &str) -> io::Result<()> {
        let marked = directories.iter().map(|path| Ok((path.clone(), Mark::of(path)?)));
        let directories: Vec<_> = marked.collect::<io::Result<_>>()?;
        // Other builders learn, too.
        let _lock = self.path.parent().map(files::lock_dir).transpose()?;
        self.stacks = read(&self.path);
        self.stacks
            .retain(|stack| !stack.directories.iter().map(|(path, _)| path).eq(directories.iter().map(|(p, _)| p)));
        self.stacks.push(Stack { directories, chain_id: chain_id.to_owned() });
        let surplus = self.stacks.len().saturating_sub(MAX_STACKS);
        self.stacks.drain(..surplus);
        let text = serde_json::to_vec(&BTreeMap::from([("stacks", &self.stacks)]))?;
        files::replace(&self.path, &text)
    }
}

fn read(path: &Path) -> Vec<Stack> {
    let text = fs::read(path).unwrap_or_default();
    let stacks: BTreeMap<String, Vec<Stack>> = serde_json::from_slice(&text).unwrap_or_default();
    stacks.into_values().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_is_known_until_one_of_its_directories_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let place = |name: &str| dir.path().join(name);
        let stack = [place("2"), place("1")];
        stack.iter().for_each(|path| fs::create_dir(path).unwrap());
        assert_eq!(Layers::load(dir.path()).chain_id(&stack), None);
        // Neither of two that were loaded at the same time loses what the other learns.
        let (mut one, mut other) = (Layers::load(dir.path()), Layers::load(dir.path()));
        one.learn(&stack, "sha256:a").unwrap();
        other.learn(&stack[1..], "sha256:b").unwrap();
        let layers = Layers::load(dir.path());
        assert_eq!(layers.chain_id(&stack), Some("sha256:a"));
        assert_eq!(layers.chain_id(&stack[1..]), Some("sha256:b"));
        assert_eq!(layers.chain_id(&stack[..1]), None);
        assert_eq!(layers.directories("sha256:a", false).as_deref(), Some(&stack[..]));
        assert_eq!(layers.directories("sha256:b", true).as_deref(), Some(&stack[1..]));
        assert_eq!((layers.directories("sha256:a", true), layers.directories("sha256:c", false)), (None, None));
        // The name is used again: for another image.
        fs::remove_dir(&stack[1]).unwrap();
        fs::create_dir(&stack[1]).unwrap();
        fs::write(stack[1].join("file"), "").unwrap();
        let mut layers = Layers::load(dir.path());
        assert_eq!((layers.chain_id(&stack), layers.chain_id(&stack[1..])), (None, None));
        assert_eq!(layers.directories("sha256:b", true), None);
        layers.learn(&stack[1..], "sha256:c").unwrap();
        assert_eq!(Layers::load(dir.path()).chain_id(&stack[1..]), Some("sha256:c"));
        assert!(layers.learn(&[place("none")], "sha256:d").is_err());
        fs::write(place(FILE), "{").unwrap();
        assert_eq!(Layers::load(dir.path()).chain_id(&stack[1..]), None);
    }
}
