//! Containers that stand still: made in a template, and let go in a machine that was restored from it.

use std::{os::fd::AsFd, sync::Arc, time::Duration};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tokio::time::timeout;

use super::{
    CgroupError, Container, ContainerError, Containers, check_id,
    exec::running,
    plan::{self, PlanError},
    set_oom_score,
    spec::{Linux, Mount, Resources},
};
use crate::{
    process::{Birth, Exit, Launching, Pending, Process},
    sys::Namespaces,
};

/// What makes a frozen container that of a pod.
#[derive(Debug, Clone, Copy)]
pub struct Adoption<'a> {
    pub hostname: &'a str,
    pub domainname: &'a str,
    /// OCI mounts as JSON; may be empty.
    pub mounts_json: &'a [u8],
    /// OCI resources as JSON; may be empty.
    pub resources_json: &'a [u8],
    /// As in the OCI specification of a process.
    pub oom_score: Option<i32>,
}

impl Containers {
    /// Stops everything in the container.
    ///
    /// # Errors
    /// If something goes on.
    pub async fn freeze(&self, id: &str) -> Result<(), ContainerError> {
        Ok(self.get(id)?.cgroup.freeze().await?)
    }

    /// How the process of the container ended, if it is none of those that stand still.
    ///
    /// # Errors
    /// If that cannot be told.
    pub async fn ended(&self, id: &str) -> Result<Option<Exit>, ContainerError> {
        // Between its last moment there and its end nothing but the kernel is left of it.
        const LATEST: Duration = Duration::from_secs(1);
        let container = self.get(id)?;
        let pid = container.init.pid().and_then(|pid| u32::try_from(pid).ok());
        if container.cgroup.processes()?.into_iter().any(|process| Some(process) == pid) {
            return Ok(None);
        }
        match timeout(LATEST, container.init.wait()).await {
            Ok(exit) => Ok(Some(exit?)),
            // It has gone to another cgroup.
            Err(_elapsed) => Ok(None),
        }
    }

    /// Lets everything in the container go on.
    ///
    /// # Errors
    /// If that cannot be said.
    pub fn thaw(&self, id: &str) -> Result<(), ContainerError> {
        Ok(self.get(id)?.cgroup.thaw()?)
    }

    /// Gives the frozen container `from` another id, and what `adoption` says.
    ///
    /// # Errors
    /// For what cannot be done, by name. The machine is of no use then.
    pub async fn adopt(&self, from: &str, id: &str, adoption: Adoption<'_>) -> Result<Arc<Container>, ContainerError> {
        check_id(id)?;
        let old = self.get(from)?;
        let mounts: Vec<Mount> = match adoption.mounts_json {
            [] => Vec::new(),
            json => serde_json::from_slice(json).map_err(PlanError::Json)?,
        };
        if !adoption.resources_json.is_empty() {
            let resources: Resources = serde_json::from_slice(adoption.resources_json).map_err(PlanError::Json)?;
            old.cgroup.limit(&resources)?;
        }
        for pid in old.cgroup.processes()? {
            set_oom_score(pid.cast_signed(), adoption.oom_score)?;
        }
        let child = running(&old)?;
        let Adoption { hostname, domainname, .. } = adoption;
        let plan = plan::adoption(hostname, domainname, &mounts, &Linux::default(), &child.pidfd)?;
        // Not in the container's own cgroup, which stands still.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let cgroup = open(&self.cgroup_root, flags, Mode::empty())
            .map_err(|e| CgroupError::Read(self.cgroup_root.clone(), e.into()))?;
        let birth = Birth { namespaces: Namespaces::Same, cgroup: cgroup.as_fd(), beside: None };
        let helper = Arc::new(Process::new(old.cgroup.clone()));
        Launching::spawn(&plan, birth, None, &helper, &self.reaper)?.done(&helper).await?;

        let (cgroup, init) = (old.cgroup.clone(), old.init.clone());
        let container =
            Container { id: id.to_owned(), cgroup, init, execs: Default::default(), deleting: Default::default() };
        let container = Arc::new(container);
        let mut all = self.all();
        all.remove(from);
        all.insert(id.to_owned(), Some(container.clone()));
        Ok(container)
    }
}

impl Container {
    /// Its process is let go by the start, as one that has just been created.
    pub fn park(&self) {
        self.init.prepare(Pending::Frozen);
    }

    /// Its own process.
    pub fn init(&self) -> &Process {
        &self.init
    }
}
