//! `chsnap doctor`: what a container needs on this host, what of it is there, and how to mend the rest.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Serialize;
use thiserror::Error;

use crate::{
    config::{Config, ConfigError, DEFAULT_PATH},
    program::{Freshness, Scout},
    snapshot::{Ladder, Outcome},
    task::chain,
    vmm::{self, Taken},
};

mod guest;
mod host;
mod machine;
mod programs;
mod snapshots;

/// What was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Stable, for programs.
    pub name: &'static str,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do, where something is wrong.
    pub mend: Option<String>,
}

/// How it is with one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Containers run all the same; something is slower or left out.
    Warn,
    /// No container can run.
    Missing,
}

/// Everything that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Whether a container could run.
    pub ok: bool,
    /// What would run it.
    pub driver: Option<Taken>,
    /// On which rung snapshots work, and why on no fuller one; none where that was not tried yet.
    pub ladder: Option<Outcome>,
    /// One by one.
    pub checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), mend: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), mend: Some(mend.into()) }
    }

    fn missing(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Missing, found: found.into(), mend: Some(mend.into()) }
    }
}

/// Looks at everything, under the configuration that a container would get.
pub async fn examine(explicit: Option<&Path>) -> Report {
    let (config, configuration) = configuration(explicit);
    let usable = configuration.status == Status::Ok;
    let mut scout = if usable { Scout::new(&config, Freshness::Now) } else { Scout::fleeting() };
    let mut checks = vec![configuration, host::root(), host::kernel(), host::size(&config), host::cgroups()];
    let survey = vmm::survey(&config.vmm, &mut scout).await;
    checks.extend(machine::checks(&survey));
    checks.push(programs::virtiofsd(&config.share, &mut scout).await);
    checks.push(guest::kernel(&config.guest.kernel));
    checks.push(guest::initramfs(&config.guest.initramfs));
    checks.push(programs::shim());
    checks.push(programs::containerd().await);
    checks.extend([host::overlay(), host::tun(), host::state(&config.state.dir)]);
    let (snapshots, ladder) = snapshots::check(&config, &mut scout).await;
    checks.push(snapshots);
    Report { ok: checks.iter().all(|check| check.status != Status::Missing), driver: survey.taken.ok(), ladder, checks }
}

/// Forgets on which rung snapshots work, so that the next template is tried on each.
///
/// # Errors
/// Where the configuration cannot be used, or what is known not be removed.
pub fn retry(explicit: Option<&Path>) -> Result<(), RetryError> {
    let config = Config::load(explicit)?;
    let dir = config.snapshot.dir;
    Ladder::forget(&dir).map_err(|source| RetryError::Forget { dir, source })
}

/// Nothing was forgotten.
#[derive(Debug, Error)]
pub enum RetryError {
    /// Where it is kept.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// The file.
    #[error("cannot remove the ladder's outcome from {dir:?}")]
    Forget {
        /// Where.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The rest is looked at under the defaults where the file cannot be used.
fn configuration(explicit: Option<&Path>) -> (Config, Check) {
    let name = "configuration";
    match Config::load(explicit) {
        Ok(config) => {
            let found = match explicit {
                Some(path) => path.display().to_string(),
                None if Path::new(DEFAULT_PATH).exists() => DEFAULT_PATH.into(),
                None => format!("{DEFAULT_PATH} does not exist; every setting has its default"),
            };
            (config, Check::ok(name, found))
        }
        Err(error) => {
            let mend = "correct the file; the checks below use the defaults";
            (Config::default(), Check::missing(name, chain(&error), mend))
        }
    }
}
