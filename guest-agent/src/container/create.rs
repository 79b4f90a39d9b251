//! Creating a container.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use nix::{fcntl::OFlag, unistd::pipe2};

use super::{
    Cgroup, Container, ContainerError, Containers, check_id, passwd,
    plan::{self, PlanError, Setting},
    set_oom_score,
    spec::Spec,
};
use crate::{
    process::{self, Birth, LaunchError, Launching, Pending, Process, StreamIds, Wanted},
    sys::Namespaces,
};

/// The id is taken while the container comes into being.
struct Claim<'a> {
    containers: &'a Containers,
    id: &'a str,
}

impl<'a> Claim<'a> {
    fn new(containers: &'a Containers, id: &'a str) -> Result<Self, ContainerError> {
        let mut all = containers.all();
        if all.contains_key(id) {
            return Err(ContainerError::Exists(id.to_owned()));
        }
        all.insert(id.to_owned(), None);
        Ok(Self { containers, id })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut all = self.containers.all();
        if let Some(None) = all.get(self.id) {
            all.remove(self.id);
        }
    }
}

/// Whether its namespace of this kind is its own. One that it is given is the pod's, which in here is the machine's.
fn has_own(spec: &Spec, kind: &str) -> bool {
    !spec.linux.namespaces.iter().any(|one| one.kind == kind && !one.path.is_empty())
}

impl Containers {
    /// Makes everything ready for the container's process.
    ///
    /// # Errors
    /// For what cannot be done, by name. Nothing is left of it then.
    pub async fn create(&self, id: &str, spec: &[u8], wanted: Wanted) -> Result<StreamIds, ContainerError> {
        check_id(id)?;
        let _claim = Claim::new(self, id)?;
        let mut spec: Spec = serde_json::from_slice(spec).map_err(PlanError::Json)?;
        let names = !has_own(&spec, "uts");
        if names && self.named.load(Ordering::Relaxed) {
            // The pod has a name, perhaps another by now than its first container gave it.
            spec.hostname.clear();
            spec.domainname.clear();
        }
        let cgroup = Arc::new(Cgroup::create(&self.cgroup_root, id, &spec.linux.resources)?);
        let init = Arc::new(Process::new(cgroup.clone()));
        match self.launch_init(&spec, wanted, &cgroup, &init).await {
            Ok(streams) => {
                self.named.fetch_or(names, Ordering::Relaxed);
                let container = Container {
                    id: id.to_owned(),
                    cgroup,
                    init,
                    execs: Default::default(),
                    deleting: Default::default(),
                };
                self.all().insert(id.to_owned(), Some(Arc::new(container)));
                Ok(streams)
            }
            Err(error) => {
                init.close_streams(&self.streams);
                if let Err(e) = cgroup.remove().await {
                    eprintln!("chsnap-agent: container {id}: {}", crate::error::chain(&e));
                }
                Err(error)
            }
        }
    }

    async fn launch_init(
        &self,
        spec: &Spec,
        wanted: Wanted,
        cgroup: &Cgroup,
        init: &Arc<Process>,
    ) -> Result<StreamIds, ContainerError> {
        let user = &spec.process.user;
        let ends = match wanted.terminal {
            true => None,
            false => {
                let (ids, ends) = process::pipes(wanted, user.uid, &self.streams)?;
                init.attach(ids, None);
                Some(ends)
            }
        };
        let setting = Setting {
            stdio: ends.as_ref().map(process::Ends::fds),
            terminal: wanted.terminal,
            home: passwd::home(Path::new(&spec.root.path), user.uid),
            open_files: self.open_files,
        };
        let (parked, start): (OwnedFd, OwnedFd) = pipe2(OFlag::O_CLOEXEC).map_err(|e| LaunchError::Watch(e.into()))?;
        let plan = plan::init(spec, &setting, parked.as_fd())?;
        let namespaces = Namespaces::New { ipc: has_own(spec, "ipc"), uts: has_own(spec, "uts") };
        let birth = Birth { namespaces, cgroup: cgroup.as_fd(), beside: None };
        let launching = Launching::spawn(&plan, birth, Some(start), init, &self.reaper)?;
        // The child alone holds its ends from here on.
        drop((ends, parked));
        if let Some(pid) = init.pid() {
            set_oom_score(pid, spec.process.oom_score_adj)?;
        }
        let terminal = launching.parked().await?;
        if let (Some(number), Some(child)) = (terminal, init.child()) {
            let master = child.pidfd.descriptor(number).map_err(LaunchError::Terminal)?;
            let (ids, channel) = process::terminal(wanted, master, &self.streams)?;
            init.attach(ids, Some(channel));
            if let Some(size) = spec.process.console_size.filter(|size| size.width != 0 && size.height != 0) {
                init.resize(size.width, size.height)?;
            }
        }
        init.prepare(Pending::Parked(launching));
        Ok(init.streams())
    }
}
