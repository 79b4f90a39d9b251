//! Create: from containerd's request to a container whose machine runs.

use std::{os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use chsnap_protocol::agent::CreateProcessResponse;
use containerd_shim_protos::{
    api::{CreateTaskRequest, Mount},
    events::task::{TaskCreate, TaskIO},
};
use oci_spec::runtime::{LinuxResources, Spec};
use tokio::sync::Mutex;

use super::{
    Container, Service, TaskError, chain,
    clean_up::note_pid,
    options,
    pause::{self, Pod},
    process::Process,
    stdio::{Local, Paths},
};
use crate::{
    config::{Annotations, Shape},
    oom,
    sandbox::{
        NewContainer, Phases, Plan, Request, Sandbox, StartError, Started, Wanting, dir_of, network_of, sources,
    },
    share::RootMount,
    state::{self, Exposed, State},
    template::{self, Order},
};

/// Where the bundle keeps the name of the pod's directory.
pub(super) const DIR_FILE: &str = "chsnap.dir";

impl Service {
    pub(super) async fn create_container(&self, request: CreateTaskRequest) -> Result<Arc<Container>, TaskError> {
        let _creating = Arc::clone(&self.creating);
        let mut phases = Phases::start();
        let mut created = created(&request);
        usable_id(&request.id)?;
        if let Some(from) = [&request.checkpoint, &request.parent_checkpoint].into_iter().find(|c| !c.is_empty()) {
            return Err(TaskError::Checkpoint(from.clone()));
        }
        let path = Path::new(&request.bundle).join("config.json");
        let mut spec = Spec::load(&path).map_err(|source| TaskError::Spec { path, source })?;
        let config = options::config(request.options.as_ref())?;
        if !self.debug {
            log::set_max_level(config.log.level.into());
        }
        let annotations = spec.annotations().clone().unwrap_or_default();
        let mut overrides = Annotations::parse(&annotations)?;
        let mut limits = spec.linux().as_ref().and_then(|l| l.resources().clone());
        let mut cgroups_path = spec
            .linux()
            .as_ref()
            .and_then(|l| l.cgroups_path().as_ref())
            .map(|p| p.display().to_string())
            .unwrap_or_default();
        let own_limits = limits.clone();
        let mut network = network_of(&spec).map(Path::to_owned);
        let pod = self.pod.lock().await.clone();
        let shape_of = if pod.is_some() { Shape::of_pod } else { Shape::of };
        if let Some(pod) = pod {
            overrides = overrides.or(&pod.overrides);
            limits = pod.limits.or(limits);
            cgroups_path = pod.cgroups_path;
            network = pod.network;
            if spec.hostname().as_ref().is_none_or(String::is_empty) {
                spec.set_hostname(pod.hostname);
            }
        }
        let root = spec.root().as_ref().map(|r| r.path().clone()).unwrap_or_default();
        sources::answer(&spec, config.deadlines.boot.duration()).await?;
        let plan = Plan::of(&request.id, spec)?.with_ready(overrides.ready.as_ref());
        if !plan.ignored.is_empty() {
            log::info!("not applied inside the VM: {}", plan.ignored.join(", "));
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        // For the `delete` action, should this process be killed: it is not told the configuration.
        let dir = dir_of(&config.state.dir, &self.namespace, &self.id).map_err(StartError::from)?;
        let note = Path::new(&request.bundle).join(DIR_FILE);
        std::fs::write(&note, dir.as_os_str().as_bytes()).map_err(|source| TaskError::Bundle { path: note, source })?;
        if pause::is_pause(&annotations) {
            let limits = pause::limits(&annotations);
            // Before the pod is said to be there: no VM could ever be that large.
            Shape::of_pod(&config, &overrides, limits.as_ref())?;
            let hostname = plan.spec().hostname().clone();
            let pod = Pod { overrides, cgroups_path, hostname, network, limits };
            return self.create_pause(created, paths, pod).await;
        }
        let shape = shape_of(&config, &overrides, limits.as_ref())?;
        let local = Local::open(&paths).await?;
        let mut rootfs: Vec<RootMount> = request.rootfs.iter().map(root_mount).collect();
        if rootfs.is_empty() {
            rootfs.push(bound_root(&request.bundle, &root));
        }
        let new = NewContainer { id: &request.id, rootfs: &rootfs, plan: &plan, stdio: paths.wanted() };
        phases.mark("prepare");

        let request = Request {
            containerd: &self.address,
            namespace: &self.namespace,
            id: &self.id,
            config: &config,
            overrides: &overrides,
            shape,
            cgroups_path: &cgroups_path,
            network: network.as_deref(),
        };
        let make = |streams, sandbox: &Sandbox| {
            let init = Arc::new(Process::new(new.id, "", paths, streams, local, sandbox.pid()));
            Container { id: new.id.into(), bundle: created.bundle.clone(), init, execs: Mutex::default() }
        };
        let (container, sandbox, starts) = self.place(&new, own_limits.as_ref(), &request, &mut phases, make).await?;
        let init = &container.init;
        // From the next line on, an end may be told.
        created.pid = init.pid();
        note_pid(&created.bundle, created.pid);
        if starts {
            created.checkpoint = restored_from(sandbox.started());
        }
        self.events.publish(created).await;
        self.watch_created(init, &sandbox);
        Ok(container)
    }

    /// Takes down a container that nobody waits for any more, see `callers.rs`, and with the last one the shim.
    pub(super) async fn abandon(&self, id: String, created: Result<Arc<Container>, TaskError>) -> TaskError {
        let gone = match created {
            Ok(container) => self.delete_container(&container).await,
            Err(e) => Err(e),
        };
        if let Err(e) = gone {
            log::warn!("container {id}: {}", chain(&e));
        }
        if self.containers.lock().await.is_empty() {
            self.exit.signal();
        }
        TaskError::Abandoned(id)
    }

    /// Puts the container into the pod's machine, which the first one starts: the last answer says whether it has. It is one of
    /// the pod's before the machine is let go of, which ends with the last of them.
    async fn place(
        &self,
        new: &NewContainer<'_>,
        limits: Option<&LinuxResources>,
        request: &Request<'_>,
        phases: &mut Phases,
        make: impl FnOnce(CreateProcessResponse, &Sandbox) -> Container,
    ) -> Result<(Arc<Container>, Arc<Sandbox>, bool), TaskError> {
        let mut slot = self.sandbox.lock().await;
        if self.containers.lock().await.contains_key(new.id) {
            return Err(TaskError::Exists { what: "container", id: new.id.into() });
        }
        self.give_up_dead(&mut slot).await;
        let (streams, sandbox, starts) = match slot.as_ref() {
            Some(sandbox) => {
                sandbox.accepts(request.overrides)?;
                sandbox.shape().holds(request.config, request.overrides, limits)?;
                (sandbox.add(new).await?, Arc::clone(sandbox), false)
            }
            None => {
                let (streams, sandbox) = self.start_machine(new, request, phases).await?;
                *slot = Some(Arc::clone(&sandbox));
                (streams, sandbox, true)
            }
        };
        let container = Arc::new(make(streams, &sandbox));
        self.containers.lock().await.insert(new.id.into(), Arc::clone(&container));
        Ok((container, sandbox, starts))
    }

    /// A pod whose sandbox goes on gets another machine when its own has died, and all that ran there has ended with it.
    async fn give_up_dead(&self, slot: &mut Option<Arc<Sandbox>>) {
        let is_dead = |sandbox: &mut Arc<Sandbox>| sandbox.gone().borrow().is_some();
        if self.pod.lock().await.is_none() || !slot.as_mut().is_some_and(is_dead) {
            return;
        }
        let containers: Vec<_> = self.containers.lock().await.values().cloned().collect();
        for container in containers.iter().filter(|container| !container.init.pauses()) {
            container.init.wait().await;
        }
        if let Some(dead) = slot.take() {
            dead.stop().await;
        }
    }

    async fn start_machine(
        &self,
        new: &NewContainer<'_>,
        request: &Request<'_>,
        phases: &mut Phases,
    ) -> Result<(CreateProcessResponse, Arc<Sandbox>), TaskError> {
        let (sandbox, streams) = Sandbox::start(request, new, phases).await?;
        let sandbox = Arc::new(sandbox);
        // In the guest the agent sees to it; here it is about the whole guest.
        if let Some(score) = new.plan.spec().process().as_ref().and_then(|process| process.oom_score_adj())
            && let Err(error) = oom::adjust_children(score)
        {
            log::warn!("oomScoreAdj = {score} does not hold for the pod's VM: {error}");
        }
        let state = state_of(request, &sandbox, phases);
        if let Err(e) = state.write(sandbox.dir()) {
            sandbox.stop().await;
            return Err(TaskError::Record(e));
        }
        let (vmm, accelerator) = sandbox.driver();
        let ms = phases.total().as_millis();
        let (started, why_not) = (sandbox.started(), state.why_not.as_deref().unwrap_or("it is the best"));
        let way = started.way;
        log::info!(
            "VM of {} started in {ms} ms, way {way} ({why_not}): {vmm} on {accelerator}, {:?} us",
            request.id,
            state.phases_us
        );
        if let Some(wanting) = &started.wanting {
            let order = Order::of(request.config, request.overrides, request.shape);
            template::launch(match wanting {
                Wanting::Base => order,
                Wanting::Image(blueprint) => order.of_image(blueprint, new.rootfs, request.place(new.id)),
            })
            .await;
        }
        // A builder that was killed together with its janitor has nobody else to clear away after it. The pod does not wait for
        // that: what is in the way may take its time.
        let config = request.config.clone();
        drop(tokio::task::spawn_blocking(move || template::clear_away(&config)));
        Ok((streams, sandbox))
    }
}

/// The way, and why it was not a better one, in the field in which containerd names what a task was restored from.
fn restored_from(started: &Started) -> String {
    match &started.why_not {
        Some(why) => format!("{}: {why}", started.way),
        None => started.way.to_string(),
    }
}

fn state_of(request: &Request<'_>, sandbox: &Sandbox, phases: &Phases) -> State {
    let (vmm, accelerator) = sandbox.driver();
    let exposed = request.overrides.expose.iter().map(|e| Exposed {
        guest_port: e.guest_port,
        socket: sandbox.dir().join(format!("{}.sock", e.guest_port)),
        listen: e.listen,
    });
    State {
        id: request.id.into(),
        namespace: request.namespace.into(),
        pid: std::process::id(),
        vmm_pid: Some(sandbox.pid()),
        vmm: Some(vmm),
        accelerator: Some(accelerator),
        guest_kernel: Some(sandbox.info().kernel_release.chars().filter(|c| !c.is_control()).take(64).collect()),
        way: Some(sandbox.started().way),
        why_not: sandbox.started().why_not.clone(),
        started_at: state::timestamp(),
        vcpus: request.shape.vcpus,
        memory_mib: request.shape.memory_mib,
        exposed: exposed.collect(),
        phases_us: phases.microseconds(),
    }
}

/// What is told of it, but for the number.
fn created(request: &CreateTaskRequest) -> TaskCreate {
    let mut io = TaskIO::new();
    io.stdin = request.stdin.clone();
    io.stdout = request.stdout.clone();
    io.stderr = request.stderr.clone();
    io.terminal = request.terminal;
    let mut event = TaskCreate::new();
    event.container_id = request.id.clone();
    event.bundle = request.bundle.clone();
    event.rootfs = request.rootfs.clone();
    event.io = Some(io).into();
    event
}

fn root_mount(m: &Mount) -> RootMount {
    RootMount { fstype: m.type_.clone(), source: m.source.clone(), options: m.options.clone() }
}

/// Without mounts from a snapshotter (`ctr run --rootfs`), the root is where the specification says, which is relative
/// to the bundle.
fn bound_root(bundle: &str, root: &Path) -> RootMount {
    let source = Path::new(bundle).join(root).display().to_string();
    RootMount { fstype: "bind".into(), source, options: vec!["rbind".into()] }
}

/// containerd checks ids too; here they become directories and sockets.
fn usable_id(id: &str) -> Result<(), TaskError> {
    let plain = id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if plain && !id.is_empty() && !id.starts_with('.') && id.len() <= 128 {
        return Ok(());
    }
    Err(TaskError::Id(id.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_without_mounts_is_bound() {
        assert_eq!(bound_root("/b", Path::new("rootfs")).source, "/b/rootfs");
        assert_eq!(bound_root("/b", Path::new("/srv/root")).source, "/srv/root");
    }

    #[test]
    fn ids_that_lead_elsewhere_are_refused() {
        for good in ["a", "web-1", "0f.x_Y"] {
            usable_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "../x", "a b", &"x".repeat(129)] {
            assert!(usable_id(bad).is_err(), "{bad}");
        }
    }
}
