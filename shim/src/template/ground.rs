//! Where a builder works: one of a few places of the host, within bounds, which is cleared away after it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::sleep;

use super::{Order, TemplateError};
use crate::{
    cgroup::Cgroup,
    config::Config,
    files,
    sandbox::{DirError, PodDir, RootError},
    share::Share,
    snapshot::Store,
    task::chain,
};

/// Below the state directory, one for each builder. No namespace of containerd's begins with a point.
const DIR: &str = ".builders";
/// The cgroup of all of them.
const CGROUP: &str = "/chsnap-builders";
/// What VMM and virtiofsd take beside the guest's memory, in MiB.
const OVERHEAD_MIB: u64 = 768;
/// And beside the guest's CPUs.
const VMM_CPUS: u32 = 1;

/// Who clears away after a builder has its place for a moment.
const ATTEMPTS: u32 = 10;
const BETWEEN: Duration = Duration::from_millis(250);

/// Removes what builders have left on this host that were killed.
pub fn clear_away(config: &Config) {
    let entries = fs::read_dir(config.state.dir.join(DIR)).into_iter().flatten().flatten();
    let left: Vec<_> = entries.filter_map(|entry| PodDir::claim(&entry.path()).ok()).collect();
    // While a builder to come waits for these places: else it would find its own in the store taken.
    sweep(config);
    files::remove_left(&config.state.dir);
    for dir in left {
        if let Ok(mut cgroup) = Cgroup::find(CGROUP, dir.path()) {
            cgroup.remove();
        }
        dir.remove_of_dying();
    }
}

fn sweep(config: &Config) {
    // To look is no reason to make it.
    if !config.snapshot.dir.is_dir() {
        return;
    }
    let swept = Store::open(&config.snapshot.dir, config.snapshot.budget.as_bytes()).map(|store| store.sweep());
    match swept {
        Ok(Ok(stayed)) => stayed.iter().for_each(|error| log::warn!("{}", chain(error))),
        Ok(Err(error)) => log::warn!("what a builder has left stays: {}", chain(&error)),
        // Nothing is left where nothing can be.
        Err(_) => {}
    }
}

/// What a builder works on.
pub(super) struct Ground {
    dir: PodDir,
    cgroup: Cgroup,
    share: Option<Share>,
}

impl Ground {
    /// Takes one of the places, and clears away what a builder that was killed has left there.
    pub async fn claim(order: &Order, tell: &mut dyn FnMut(&str)) -> Result<Self, TemplateError> {
        let Config { state, snapshot, .. } = &order.config;
        // One by hand is always allowed.
        let places = if order.beside { snapshot.builders } else { snapshot.builders.max(1) };
        let claim = || {
            let mut dirs = (0..places).map(|number| PodDir::claim(&state.dir.join(DIR).join(number.to_string())));
            dirs.find(|dir| !matches!(dir, Err(DirError::Taken { .. })))
        };
        let mut dir = claim();
        for _ in 0..ATTEMPTS {
            if dir.is_some() || places == 0 {
                break;
            }
            sleep(BETWEEN).await;
            dir = claim();
        }
        let dir = dir.ok_or(TemplateError::Busy(places))??;
        let cgroup = bounds(order, bounded(order, dir.path()), tell).inspect_err(|_| dir.remove())?;
        let share = Share::create(dir.path());
        let mut ground = Self { dir, cgroup, share: None };
        match share {
            Ok(share) => ground.share = Some(share),
            Err(error) => return Err(TemplateError::Start(RootError::from(error).into())),
        }
        Ok(ground)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its cgroup.
    pub fn cgroups(&self) -> &[PathBuf] {
        self.cgroup.dirs()
    }

    /// What its guests see.
    pub fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.share = None;
        self.cgroup.remove();
        self.dir.remove();
    }
}

/// A cgroup that leaves the rest of the host to pods.
fn bounded(order: &Order, dir: &Path) -> io::Result<Cgroup> {
    let mut cgroup = Cgroup::create(CGROUP, dir).map_err(io::Error::other)?;
    let memory = (order.memory_mib + OVERHEAD_MIB) << 20;
    cgroup.bound(memory, order.vcpus + VMM_CPUS).inspect_err(|_| cgroup.remove())?;
    Ok(cgroup)
}

/// Who waits for a template may have it without bounds, and is told. Beside pods none is built that could take what is theirs.
fn bounds(order: &Order, bounded: io::Result<Cgroup>, tell: &mut dyn FnMut(&str)) -> Result<Cgroup, TemplateError> {
    bounded.or_else(|error| match order.beside {
        true => Err(TemplateError::Unbounded(error)),
        false => {
            tell(&format!("without bounds on memory and CPU: {}", chain(&error)));
            Ok(Cgroup::default())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Overrides, Shape};

    #[test]
    fn nothing_without_bounds_is_built_beside_pods() {
        let shape = Shape { vcpus: 1, memory_mib: 256 };
        let beside = Order::of(&Config::default(), &Overrides::default(), shape);
        let refused = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let mut told = Vec::new();
        let error = bounds(&beside, refused(), &mut |line| told.push(line.to_owned())).unwrap_err();
        assert!(chain(&error).contains("permission denied"), "{}", chain(&error));
        assert!(told.is_empty());
        let by_hand = Order { beside: false, ..beside };
        bounds(&by_hand, refused(), &mut |line| told.push(line.to_owned())).unwrap();
        assert_eq!(told, ["without bounds on memory and CPU: permission denied"]);
    }
}
