//! Tells the program from what it was built: a snapshot is of a machine that was put together by these sources, and
//! others may put together another one, under the same version.

use std::{
    error::Error,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut paths = Vec::new();
    walk(Path::new("src"), &mut paths)?;
    // A directory is read in any order.
    paths.sort();
    let mut hasher = DefaultHasher::new();
    for path in paths {
        (&path, fs::read(&path)?).hash(&mut hasher);
    }
    println!("cargo::rustc-env=CHSNAP_SOURCES={:016x}", hasher.finish());
    println!("cargo::rerun-if-changed=src");
    Ok(())
}

fn walk(dir: &Path, paths: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => walk(&entry.path(), paths)?,
            false => paths.push(entry.path()),
        }
    }
    Ok(())
}
