//! What a saved process has open. virtiofsd opens a file that a machine had open when it was saved by its path, in the root
//! of the container that the machine is restored for: where that has a file of its own there, which the template had not, the
//! process would go on in the middle of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// In a snapshot's directory.
const FILE: &str = "open.json";
/// More is what no process has, and the guest says what it likes.
const MAX_FILES: usize = 1 << 16;
const MAX_BYTES: usize = 1 << 20;

/// The paths, as the process knows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held(Vec<PathBuf>);

impl Held {
    /// What the guest's agent has told.
    ///
    /// # Errors
    /// If that is more than a process may have.
    pub fn told(paths: Vec<String>) -> Result<Self, usize> {
        let bytes: usize = paths.iter().map(String::len).sum();
        if bytes > MAX_BYTES || paths.len() > MAX_FILES {
            return Err(paths.len());
        }
        Ok(Self(paths.into_iter().map(PathBuf::from).collect()))
    }

    /// Reads what is kept with the snapshot in `dir`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(dir.join(FILE))?)?)
    }

    /// Keeps it with the snapshot in `dir`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join(FILE), serde_json::to_vec(self)?)
    }

    /// One that lies at one of `places`, or below.
    pub fn at<'a>(&self, mut places: impl Iterator<Item = &'a Path>) -> Option<&Path> {
        places.find_map(|place| self.0.iter().find(|path| path.starts_with(place))).map(PathBuf::as_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_at_a_place_of_the_pod_s_is_found() {
        let held = Held::told(vec!["/data/app.db".into(), "/usr/bin/python3".into()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        held.write(dir.path()).unwrap();
        let held = Held::read(dir.path()).unwrap();
        let at = |place: &str| held.at([Path::new("/etc/hosts"), Path::new(place)].into_iter());
        assert_eq!(at("/data"), Some(Path::new("/data/app.db")));
        assert_eq!(at("/usr/bin/python3"), Some(Path::new("/usr/bin/python3")));
        assert_eq!(at("/data/app"), None);
        assert_eq!(at("/dat"), None);
        assert_eq!(Held::told(vec!["/x".repeat(MAX_BYTES)]), Err(1));
        assert_eq!(Held::told(vec![String::new(); MAX_FILES + 1]), Err(MAX_FILES + 1));
    }
}
