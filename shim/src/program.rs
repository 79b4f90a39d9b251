//! Programs of the host: where they are, and what they say about their version.

use std::{
    collections::BTreeSet,
    env, fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::timeout,
};

use crate::{
    child,
    config::Config,
    files::Identity,
    snapshot,
    vmm::{self, Memory, Rung},
};

/// Whether to believe what was found before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Look.
    Now,
    /// Believe.
    Remembered,
}

/// Where findings are kept, in the state directory.
const MEMORY: &str = "host.json";

/// Of what a program says about its version, bytes.
const MOST: u64 = 8 << 10;

/// Looks at what a host has.
#[derive(Debug)]
pub struct Scout {
    pub(crate) memory: Memory,
    pub(crate) freshness: Freshness,
    /// For a program to tell its version. QEMU loads a hundred libraries first, which took 26 s on an emulated machine.
    patience: Duration,
}

impl Scout {
    /// One that waits for a program as long as for a boot.
    #[must_use]
    pub fn new(config: &Config, freshness: Freshness) -> Self {
        let memory = Memory::load(config.state.dir.join(MEMORY));
        Self { memory, freshness, patience: config.deadlines.boot.duration() }
    }

    /// One that leaves nothing where a configuration that is none may not have meant it to.
    #[must_use]
    pub fn fleeting() -> Self {
        let patience = Config::default().deadlines.boot.duration();
        Self { memory: Memory::fleeting(), freshness: Freshness::Now, patience }
    }

    /// The version that `read` finds in the first line of what `program` says; else what was wrong.
    pub(crate) async fn version(&mut self, program: &Path, read: fn(&str) -> Option<String>) -> Result<String, String> {
        let remembered = (self.freshness == Freshness::Remembered).then(|| self.memory.version(program)).flatten();
        match remembered {
            Some(version) => Ok(version),
            None => {
                let asked = timeout(self.patience, ask_version(program, read)).await;
                let late = |_| Err(format!("no answer within {} s, [deadlines] boot", self.patience.as_secs_f32()));
                asked.unwrap_or_else(late).inspect(|version| self.memory.learn_version(program, version))
            }
        }
    }

    /// The digest of the content of a file that may be large: taken once, and again when it is another file.
    pub(crate) fn digest(&mut self, path: &Path) -> io::Result<String> {
        let remembered = (self.freshness == Freshness::Remembered).then(|| self.memory.digest(path)).flatten();
        if let Some(digest) = remembered {
            return Ok(digest);
        }
        let before = Identity::of(path)?;
        let digest = snapshot::digest_of(path)?;
        // What is written to meanwhile has no digest that is worth remembering.
        if Identity::of(path)? == before {
            self.memory.learn_digest(path, before, &digest);
        }
        Ok(digest)
    }

    /// The rungs whose masks are options of this Cloud Hypervisor.
    pub(crate) async fn own_rungs(&mut self, program: &Path) -> io::Result<BTreeSet<Rung>> {
        let remembered = (self.freshness == Freshness::Remembered).then(|| self.memory.rungs(program)).flatten();
        match remembered {
            Some(rungs) => Ok(rungs),
            None => {
                let found = vmm::own_rungs(program, self.patience).await;
                found.inspect(|rungs| self.memory.learn_rungs(program, rungs))
            }
        }
    }
}

async fn ask_version(program: &Path, read: fn(&str) -> Option<String>) -> Result<String, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut child = child::command(program, &[], vec![]).map_err(text)?.arg("--version").spawn().map_err(text)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = tokio::try_join!(first_line(stdout), first_line(stderr)).map_err(text)?;
    let status = child.wait().await.map_err(text)?;
    read(&stdout).ok_or_else(|| format!("{status}; {stdout:?} {stderr:?}"))
}

/// Reads to the end, but of a program that never stops talking no more than a version takes.
async fn first_line(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let mut said = Vec::new();
    if let Some(stream) = stream {
        stream.take(MOST).read_to_end(&mut said).await?;
    }
    Ok(String::from_utf8_lossy(&said).lines().next().unwrap_or_default().to_owned())
}

/// The first word that looks like a version, without a `v` before it.
pub(crate) fn version_in(line: &str) -> Option<String> {
    let words = line.split_whitespace().map(|word| word.strip_prefix('v').unwrap_or(word));
    words.filter(|word| numbers(word).is_some()).map(str::to_owned).next()
}

/// Major and minor of `10.0.2` or `53.0-dirty`.
pub(crate) fn numbers(version: &str) -> Option<(u64, u64)> {
    let (major, rest) = version.split_once('.')?;
    let minor = rest.split(|char: char| !char.is_ascii_digit()).next()?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Whether it is a file that can be executed.
pub(crate) fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The program of that name in PATH.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|path| is_executable(path))
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A scout that keeps its findings in `dir`.
    pub fn scout(dir: &Path, freshness: Freshness, patience: Duration) -> Scout {
        Scout { memory: Memory::load(dir.join(MEMORY)), freshness, patience }
    }

    /// A program that answers `--version` with what the script `says`.
    pub fn program(dir: &Path, name: &str, says: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{says}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::{
        testing::{program, scout},
        *,
    };

    #[test]
    fn versions_as_programs_tell_them() {
        assert_eq!(version_in("cloud-hypervisor v53.0-dirty").as_deref(), Some("53.0-dirty"));
        assert_eq!(version_in("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)").as_deref(), Some("10.0.2"));
        assert_eq!(version_in("no version here"), None);
        assert_eq!((numbers("53.0-dirty"), numbers("10.0.2")), (Some((53, 0)), Some((10, 0))));
        assert_eq!((numbers("1.13.3-dirty"), numbers("one.two")), (Some((1, 13)), None));
        assert!(numbers("9.2.0") < Some((10, 0)) && numbers("1.9.0") < numbers("1.14.0"));
    }

    #[tokio::test]
    async fn a_version_is_asked_once() {
        let dir = tempfile::tempdir().unwrap();
        let patience = Duration::from_secs(60);
        let says = format!("echo asked >>{}/asked; echo v53.0", dir.path().display());
        let path = program(dir.path(), "ch", &says);
        let mut believes = scout(dir.path(), Freshness::Remembered, patience);
        for _ in 0..3 {
            assert_eq!(believes.version(&path, version_in).await.as_deref(), Ok("53.0"));
        }
        assert_eq!(fs::read_to_string(dir.path().join("asked")).unwrap(), "asked\n");
        scout(dir.path(), Freshness::Now, patience).version(&path, version_in).await.unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("asked")).unwrap(), "asked\nasked\n");
    }

    #[tokio::test]
    async fn a_digest_is_taken_again_when_the_file_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let mut scout = scout(dir.path(), Freshness::Remembered, Duration::from_secs(1));
        fs::write(&path, "one").unwrap();
        let one = scout.digest(&path).unwrap();
        assert_eq!(scout.memory.digest(&path).as_ref(), Some(&one));
        // Known without being read.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(scout.memory.digest(&path), None, "its times have changed");
        assert_eq!(scout.digest(&path).unwrap(), one);
        fs::write(&path, "two").unwrap();
        assert_ne!(scout.digest(&path).unwrap(), one);
        assert!(scout.digest(&dir.path().join("none")).is_err());
    }

    #[tokio::test]
    async fn a_program_that_never_stops_talking_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let path = program(dir.path(), "yes", "exec yes v53.0");
        let mut scout = scout(dir.path(), Freshness::Now, Duration::from_secs(20));
        assert_eq!(scout.version(&path, version_in).await.as_deref(), Ok("53.0"));
    }

    #[tokio::test]
    async fn findings_are_kept_in_the_configured_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.state.dir = dir.path().join("state");
        let path = program(dir.path(), "ch", "echo v53.0");
        Scout::new(&config, Freshness::Remembered).version(&path, version_in).await.unwrap();
        let memory = Memory::load(config.state.dir.join("host.json"));
        assert_eq!(memory.version(&path).as_deref(), Some("53.0"));
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_given_up_with_the_deadline_of_a_boot() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::parse("[deadlines]\nboot = \"1s\"\n", Path::new("config.toml")).unwrap();
        let path = program(dir.path(), "sleepy", "exec sleep 1000");
        let began = Instant::now();
        let error = Scout::new(&config, Freshness::Now).version(&path, version_in).await.unwrap_err();
        assert!(error.contains("within 1 s, [deadlines] boot"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
}
