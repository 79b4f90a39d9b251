//! A pod's life: its share, its machine, its agent, from the first container's creation to the last one's end.

use std::{path::Path, sync::Arc, time::Duration};

use chsnap_protocol::agent::{CreateProcessResponse, InfoResponse, Stdio};
use tokio::{
    sync::{Mutex, watch},
    task::AbortHandle,
    time::timeout,
};

mod blueprint;
pub(crate) mod caching;
mod dir;
mod error;
mod expose;
mod features;
mod homes;
pub(crate) mod machine;
mod phases;
mod plan;
mod services;
mod silence;
pub(crate) mod sources;
mod start;
mod ways;

pub use blueprint::Blueprint;
pub use dir::{DirError, PodDir, dir_of};
pub use error::{ContainerError, RootError, StartError};
pub use expose::{ExposeError, Exposed};
use homes::Homes;
pub(crate) use homes::add_root;
pub(crate) use machine::settled;
use machine::watch_over;
pub use phases::Phases;
pub use plan::{Division, Plan, PlanError};
pub(crate) use plan::{network as network_of, pod_of};
pub(crate) use start::TEMPLATE;
pub use ways::Wanting;

pub use crate::guest::KernelError;

use crate::{
    agent::{Agent, AgentError},
    cgroup::Cgroup,
    config::{AnnotationError, Config, GuestConfig, Overrides, Shape},
    guest,
    origin::Place,
    share::{RootMount, Share, Virtiofsd},
    snapshot::InUse,
    state::Way,
    vmm::{self, Vm},
};

/// How long after a broken channel the machine's end may take to show.
const GRACE: Duration = Duration::from_secs(2);

/// What a pod's machine is made from.
#[derive(Debug)]
pub struct Request<'a> {
    /// The address of containerd.
    pub containerd: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The sandbox's id.
    pub id: &'a str,
    /// Settings of the host.
    pub config: &'a Config,
    /// Settings of the pod.
    pub overrides: &'a Overrides,
    /// vCPUs and memory.
    pub shape: Shape,
    /// `linux.cgroupsPath`; empty for none.
    pub cgroups_path: &'a str,
    /// The pod's network namespace, where it is given one.
    pub network: Option<&'a Path>,
}

impl Request<'_> {
    /// What containerd knows the container as.
    #[must_use]
    pub fn place(&self, container: &str) -> Place {
        Place { address: self.containerd.into(), namespace: self.namespace.into(), container: container.into() }
    }
}

/// What a container's process gets.
#[derive(Debug)]
pub struct NewContainer<'a> {
    /// Its id.
    pub id: &'a str,
    /// Mounts from containerd.
    pub rootfs: &'a [RootMount],
    /// Its divided specification.
    pub plan: &'a Plan,
    /// Its streams.
    pub stdio: Stdio,
}

/// How a machine was started.
#[derive(Debug, Clone)]
pub struct Started {
    /// In which way.
    pub way: Way,
    /// Why not in a better one.
    pub why_not: Option<String>,
    /// There was no snapshot, and this one should be built.
    pub wanting: Option<Wanting>,
}

/// A pod with its machine running.
pub struct Sandbox {
    dir: PodDir,
    agent: Agent,
    info: InfoResponse,
    vm: Arc<dyn Vm>,
    driver: (vmm::VmmKind, vmm::Accelerator),
    started: Started,
    shape: Shape,
    overrides: Overrides,
    share: Mutex<Option<Share>>,
    homes: Homes,
    /// The guest believes that nobody else writes to the share.
    alone: bool,
    /// The snapshot that holds a part of the first one's root.
    _snapshot: Option<InUse>,
    cgroup: Mutex<Cgroup>,
    exposed: Arc<Mutex<Option<Exposed>>>,
    /// Watches virtiofsd; owns it, so that aborting it kills virtiofsd.
    guard: AbortHandle,
    gone: watch::Receiver<Option<String>>,
    stop_deadline: Duration,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("dir", &self.dir.path())
            .field("vmm_pid", &self.vm.pid())
            .finish_non_exhaustive()
    }
}

/// What the machine is put on, to be taken down in order when a step fails.
struct Ground {
    dir: PodDir,
    share: Option<Share>,
    cgroup: Cgroup,
}

impl Ground {
    fn take_down(&mut self) {
        self.share = None;
        self.cgroup.remove();
        self.dir.remove();
    }
}

/// A machine that runs.
struct Built {
    vm: Box<dyn Vm>,
    virtiofsd: Virtiofsd,
    driver: (vmm::VmmKind, vmm::Accelerator),
    started: Started,
    met: Met,
    snapshot: Option<InUse>,
}

/// A guest with its first container.
struct Met {
    agent: Agent,
    info: InfoResponse,
    streams: CreateProcessResponse,
    exposed: Exposed,
}

impl Sandbox {
    /// Starts the pod's machine with `first` as its first container; when it fails, nothing is left.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        request: &Request<'_>,
        first: &NewContainer<'_>,
        phases: &mut Phases,
    ) -> Result<(Self, CreateProcessResponse), StartError> {
        let dir = PodDir::claim(&dir_of(&request.config.state.dir, request.namespace, request.id)?)?;
        let cgroup = match request.cgroups_path {
            "" => Ok(Cgroup::default()),
            path => Cgroup::create(path, dir.path()),
        };
        let cgroup = cgroup.inspect_err(|_| dir.remove())?;
        let mut ground = Ground { dir, share: None, cgroup };
        let Built { vm, virtiofsd, driver, started, met, snapshot } =
            match start::build(request, first, &mut ground, phases).await {
                Ok(built) => built,
                Err(e) => {
                    ground.take_down();
                    return Err(e);
                }
            };
        let vm: Arc<dyn Vm> = Arc::from(vm);
        let (guard, gone) = watch_over(virtiofsd, Arc::clone(&vm));
        let exposed = Arc::new(Mutex::new(Some(met.exposed)));
        tokio::spawn(close_when_gone(gone.clone(), Arc::clone(&exposed)));
        let sandbox = Self {
            dir: ground.dir,
            agent: met.agent,
            info: met.info,
            vm,
            driver,
            started,
            shape: request.shape,
            overrides: request.overrides.clone(),
            share: Mutex::new(ground.share),
            homes: Homes::of(first.id),
            alone: caching::is_alone(request, first),
            _snapshot: snapshot,
            cgroup: Mutex::new(ground.cgroup),
            exposed,
            guard,
            gone,
            stop_deadline: request.config.deadlines.stop.duration(),
        };
        Ok((sandbox, met.streams))
    }

    /// Adds a further container to the pod.
    ///
    /// # Errors
    /// See [`ContainerError`]; nothing of the container is left then.
    pub async fn add(&self, new: &NewContainer<'_>) -> Result<CreateProcessResponse, ContainerError> {
        let share = self.share.lock().await;
        let share = share.as_ref().ok_or(ContainerError::Stopped)?;
        if self.alone && new.plan.has_host_files() {
            return Err(ContainerError::NotShared);
        }
        let home = self.homes.add(new.id);
        let added = self.add_at(share, &home, new).await;
        if added.is_err() {
            self.homes.remove(new.id);
        }
        added
    }

    async fn add_at(
        &self,
        share: &Share,
        home: &str,
        new: &NewContainer<'_>,
    ) -> Result<CreateProcessResponse, ContainerError> {
        let (spec_json, _) = add_root(share, home, new.rootfs, new)?;
        let error = match self.agent.create_container(new.id, spec_json, new.stdio.clone()).await {
            Ok(streams) => return Ok(streams),
            Err(e) => e,
        };
        if self.may_yet_do(&error) {
            self.forget(new.id).await;
        }
        share.remove_container(home);
        Err(match self.why_lost(&error).await {
            Some(why) => ContainerError::Gone(why),
            None => ContainerError::Agent(error),
        })
    }

    /// Whether the agent may do what it failed to answer with this error. What it is asked next, it reads after that, be it
    /// after our patience: so it can be asked to forget.
    #[must_use]
    pub fn may_yet_do(&self, error: &AgentError) -> bool {
        error.is_unknown() && self.gone.borrow().is_none()
    }

    /// Why the agent was lost, where its machine's end explains it.
    pub async fn why_lost(&self, error: &AgentError) -> Option<String> {
        if !error.is_unknown() {
            return None;
        }
        timeout(GRACE, settled(&mut self.gone())).await.ok().flatten()
    }

    async fn forget(&self, container: &str) {
        if let Err(e) = self.agent.delete_container(container).await
            && !e.is_not_found()
        {
            log::warn!("container {container}: {e}");
        }
    }

    /// Takes a container out of the pod.
    pub async fn remove(&self, container: &str) {
        if self.gone.borrow().is_none() {
            self.forget(container).await;
        }
        let home = self.homes.remove(container);
        if let (Some(share), Some(home)) = (self.share.lock().await.as_ref(), home) {
            share.remove_container(&home);
        }
    }

    /// Ends the machine and removes everything that belongs to the pod.
    pub async fn stop(&self) {
        *self.exposed.lock().await = None;
        if self.gone.borrow().is_none() {
            // The guest writes back what it holds; its exit is the answer.
            let _ = timeout(self.stop_deadline, async {
                if self.agent.shutdown().await.is_ok() {
                    settled(&mut self.vm.exited()).await;
                }
            })
            .await;
        }
        self.vm.kill().await;
        self.guard.abort();
        *self.share.lock().await = None;
        self.cgroup.lock().await.remove();
        self.dir.remove();
    }

    /// The agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// What the agent said of itself.
    #[must_use]
    pub fn info(&self) -> &InfoResponse {
        &self.info
    }

    /// The VMM's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vm.pid()
    }

    /// The VMM and what it runs on.
    #[must_use]
    pub fn driver(&self) -> (vmm::VmmKind, vmm::Accelerator) {
        self.driver
    }

    /// How it was started.
    #[must_use]
    pub fn started(&self) -> &Started {
        &self.started
    }

    /// Refuses what a further container wants otherwise than the pod has it.
    ///
    /// # Errors
    /// Which annotation that is.
    pub fn accepts(&self, overrides: &Overrides) -> Result<(), AnnotationError> {
        overrides.fit(&self.overrides, self.shape, self.driver.0)
    }

    /// The machine's size.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The pod's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Becomes `Some`, with the reason, when the machine is gone or of no more use.
    #[must_use]
    pub fn gone(&self) -> watch::Receiver<Option<String>> {
        self.gone.clone()
    }

    /// Ends the machine at once, e.g. where the agent no longer answers; [`Sandbox::gone`] follows.
    pub async fn kill(&self) {
        self.vm.kill().await;
    }
}

/// A dead machine's ports are free for another.
async fn close_when_gone(mut gone: watch::Receiver<Option<String>>, exposed: Arc<Mutex<Option<Exposed>>>) {
    settled(&mut gone).await;
    *exposed.lock().await = None;
}

/// Refuses in the same words on every VMM what none could boot.
pub(crate) fn guest_files(files: &GuestConfig) -> Result<(), StartError> {
    let unreadable = |what, path: &Path, source| StartError::GuestFile { what, path: path.into(), source };
    guest::kernel(&files.kernel).map_err(|e| match e {
        KernelError::Unreadable(source) => unreadable("kernel", &files.kernel, source),
        source => StartError::Kernel { path: files.kernel.clone(), source },
    })?;
    guest::open(&files.initramfs).map_err(|source| unreadable("initramfs", &files.initramfs, source))?;
    Ok(())
}
