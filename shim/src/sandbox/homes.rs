//! Where in the share each of the pod's containers has its root, and how it comes there.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use chsnap_protocol::FIRST_HOME;

use super::{Division, NewContainer, RootError};
use crate::share::{Content, RootMount, Share};

/// The directories of the share by container. None is used twice: the guest may remember what was there.
#[derive(Debug)]
pub(super) struct Homes(Mutex<Taken>);

#[derive(Debug)]
struct Taken {
    homes: HashMap<String, String>,
    later: u64,
}

impl Homes {
    /// Those of a pod with `first` alone.
    pub fn of(first: &str) -> Self {
        Self(Mutex::new(Taken { homes: HashMap::from([(first.into(), FIRST_HOME.into())]), later: 0 }))
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A further container's.
    pub fn add(&self, container: &str) -> String {
        let mut taken = self.taken();
        taken.later += 1;
        let home = format!("{container}.{}", taken.later);
        taken.homes.insert(container.into(), home.clone());
        home
    }

    /// The directory of one that goes.
    pub fn remove(&self, container: &str) -> Option<String> {
        self.taken().homes.remove(container)
    }
}

/// Puts the container's root, `rootfs`, into the share's directory `home`; answers its specification for the agent, and
/// what was divided for it.
pub(crate) fn add_root(
    share: &Share,
    home: &str,
    rootfs: &[RootMount],
    new: &NewContainer<'_>,
) -> Result<(Vec<u8>, Division), RootError> {
    let assembly = share.assemble(new.id, home, rootfs)?;
    let division = new.plan.divide(home, |place, hidden| assembly.resolve(place, hidden))?;
    let spec_json = new.plan.spec_json(&division)?;
    assembly.publish(&Content {
        binds: &division.binds,
        staged: &division.staged,
        mountpoints: &division.mountpoints,
        readonly: new.plan.readonly,
    })?;
    Ok((spec_json, division))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_directory_is_used_twice() {
        let homes = Homes::of("web");
        let (one, two) = (homes.add("log"), homes.add("proxy"));
        assert_eq!((homes.remove("log"), homes.remove("web")), (Some(one.clone()), Some(FIRST_HOME.into())));
        let successors = (homes.add("log"), homes.add("web"));
        assert!(![&one, &two, &FIRST_HOME.to_owned()].contains(&&successors.0) && successors.0 != successors.1);
        assert_eq!(homes.remove("log"), Some(successors.0));
        assert_eq!(homes.remove("log"), None);
    }
}
