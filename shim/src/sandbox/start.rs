//! From what a pod is made of to a guest with its first container: the ways of doing that are tried one after the
//! other, each with a virtiofsd and a VMM of its own, of which nothing is left when it fails.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use chsnap_protocol::{
    FIRST_HOME,
    agent::{AdoptRequest, CreateProcessResponse, InfoResponse},
};

use ttrpc::Code;

use super::{
    Built, Division, Exposed, Ground, Met, NewContainer, Phases, Request, RootError, StartError, Started, add_root,
    blueprint::own_environment,
    caching, guest_files,
    machine::{self, Origin, Patience},
    silence,
    ways::{self, Candidate, Ways},
};
use crate::{
    agent::{Agent, AgentError},
    program::{Freshness, Scout},
    share::{self, RootMount, Share, Virtiofsd, VirtiofsdProgram},
    snapshot::Held,
    state::Way,
    task::chain,
    vmm::{self, BootError, Vm, VmSpec},
};

/// The container in a template's guest.
pub(crate) const TEMPLATE: &str = "template";

/// Starts virtiofsd and the machine; where it fails, neither runs.
pub(super) async fn build(
    request: &Request<'_>,
    first: &NewContainer<'_>,
    ground: &mut Ground,
    phases: &mut Phases,
) -> Result<Built, StartError> {
    let config = request.config;
    let mut scout = Scout::new(config, Freshness::Remembered);
    let driver = vmm::select(&request.overrides.vmm(&config.vmm), &mut scout).await?;
    let virtiofsd = share::find_virtiofsd(&config.share, &mut scout).await?;
    guest_files(&config.guest)?;
    phases.mark("select");
    let Ways { candidates, mut why_not, mut otherwise, wanting } =
        ways::find(request, first, driver, &virtiofsd, &mut scout).await;
    if candidates.is_empty() {
        return Err(StartError::Required { why: why_not.join("; ") });
    }
    phases.mark("lookup");

    let share = Share::create(ground.dir.path()).map_err(RootError::from)?;
    ground.share = Some(share);
    let stage = Stage { request, first, virtiofsd, ground };
    for candidate in candidates {
        let way = candidate.way();
        match stage.take(&candidate, phases).await {
            Ok((vm, virtiofsd, met)) => {
                let why_not = Some(why_not.join("; ")).filter(|why| !why.is_empty());
                let driver = (candidate.driver().kind(), candidate.driver().accelerator());
                let started = Started { way, why_not, wanting };
                return Ok(Built { vm, virtiofsd, driver, met, started, snapshot: candidate.into_part_of_root() });
            }
            Err(error) if way == Way::Direct || !may_be_the_snapshots(&error) => return Err(error),
            Err(error) => {
                let why = format!("the {way} snapshot was not restored: {}", chain(&error));
                log::warn!("{}: {why}", request.id);
                why_not.push(why);
                why_not.append(&mut otherwise);
                phases.mark("failed");
            }
        }
    }
    Err(StartError::Required { why: why_not.join("; ") })
}

/// False for what a guest that booted would refuse as well: a request that makes no sense, a program that is not there. Not
/// so what failed in the guest itself, which may well be the restored share's or kernel's fault.
fn may_be_the_snapshots(error: &StartError) -> bool {
    const LIKEWISE: [Code; 5] = [
        Code::INVALID_ARGUMENT,
        Code::NOT_FOUND,
        Code::PERMISSION_DENIED,
        Code::FAILED_PRECONDITION,
        Code::UNIMPLEMENTED,
    ];
    match error {
        StartError::Container(AgentError::Refused { code, .. }) => !LIKEWISE.contains(code),
        StartError::Expose(_) | StartError::Upper { .. } | StartError::Boot(BootError::Network { .. }) => false,
        _ => true,
    }
}

/// What each way starts from.
struct Stage<'a> {
    request: &'a Request<'a>,
    first: &'a NewContainer<'a>,
    virtiofsd: VirtiofsdProgram,
    ground: &'a Ground,
}

/// The first container's root, where the guest finds it.
struct Root {
    /// As the agent takes it.
    spec_json: Vec<u8>,
    division: Division,
}

impl Stage<'_> {
    /// Tries one; where it fails, nothing of it runs, and the container's root is as it was.
    async fn take(
        &self,
        candidate: &Candidate,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Virtiofsd, Met), StartError> {
        let share = self.ground.share.as_ref().ok_or(StartError::NoShare)?;
        let Some((seed, difference)) = candidate.seed() else {
            return self.with_root(candidate, share, self.first.rootfs, None, phases).await;
        };
        let places = Places::read(difference)?;
        // Else what goes into a copied root would have to be taken out of it again, which takes as long as copying it anew.
        places.leave_free(|| self.first.plan.bound())?;
        let difference = &places.difference;
        let taken = match seed.root.begin(self.first.rootfs, difference).await {
            Ok(rootfs) => self.with_root(candidate, share, &rootfs, Some(&places), phases).await,
            Err(error) => Err(error.into()),
        };
        if taken.is_err() {
            let failed = |source| StartError::Upper { path: seed.root.dir().into(), source };
            seed.root.take_back(&seed.image).await.map_err(failed)?;
        }
        taken
    }

    async fn with_root(
        &self,
        candidate: &Candidate,
        share: &Share,
        rootfs: &[RootMount],
        places: Option<&Places>,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Virtiofsd, Met), StartError> {
        let (spec_json, division) = add_root(share, FIRST_HOME, rootfs, self.first)?;
        // Once more where links in the root have led.
        let served = match places.map_or(Ok(()), |places| places.leave_free(|| division.bound())) {
            Ok(()) => self.serve(candidate, share, &Root { spec_json, division }, phases).await,
            Err(error) => Err(error),
        };
        if served.is_err() {
            share.remove_container(FIRST_HOME);
        }
        served
    }

    async fn serve(
        &self,
        candidate: &Candidate,
        share: &Share,
        root: &Root,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Virtiofsd, Met), StartError> {
        let (dir, cgroups) = (self.ground.dir.path(), self.ground.cgroup.dirs());
        let config = self.request.config;
        let network = self.request.network.map(Path::to_owned);
        let spec = VmSpec { network, ..machine::spec(config, self.request.shape, dir, cgroups) };
        let (cache, socket) = (caching::mode(self.request, self.first), &spec.share_socket);
        let mut virtiofsd = Virtiofsd::spawn(&self.virtiofsd, cache, share.dir(), socket, cgroups)?;
        phases.mark("share");
        match self.machine(candidate, spec, root, &mut virtiofsd, phases).await {
            Ok((vm, met)) => Ok((vm, virtiofsd, met)),
            Err(error) => {
                virtiofsd.kill().await;
                Err(error)
            }
        }
    }

    async fn machine(
        &self,
        candidate: &Candidate,
        mut spec: VmSpec,
        root: &Root,
        virtiofsd: &mut Virtiofsd,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Met), StartError> {
        let deadlines = &self.request.config.deadlines;
        let (origin, patience) = match candidate {
            Candidate::Restore(kind, restore) => {
                spec = machine::templates_spec(spec, *kind, restore.rung);
                spec.deadline = deadlines.restore.duration();
                (Origin::Snapshot(*kind, restore.snapshot.dir()), Patience::restore(deadlines))
            }
            Candidate::Direct(_) => (Origin::Boot, Patience::boot(deadlines)),
        };
        let vm = machine::start(candidate.driver(), &spec, origin, virtiofsd).await?;
        phases.mark(if candidate.way() == Way::Direct { "vmm" } else { "restore" });
        let met = async {
            let call = deadlines.agent_call.duration();
            let (agent, info) = machine::meet_agent(&*vm, virtiofsd, patience, call, origin).await?;
            match origin {
                // The guest's own clock says what vm_init.sh and the agent took; the rest is firmware and kernel.
                Origin::Boot => phases.mark_two("kernel", "agent", init_to_ready(&info)),
                Origin::Snapshot(..) => phases.mark("resume"),
            }
            let container = async {
                let streams = self.container(candidate.way(), &agent, root).await?;
                let exposed = Exposed::open(self.ground.dir.path(), &self.request.overrides.expose, &agent).await?;
                Ok((streams, exposed))
            };
            let (streams, exposed) = machine::while_alive(&*vm, virtiofsd, container).await?;
            phases.mark("container");
            Ok::<_, StartError>(Met { agent, info, streams, exposed })
        };
        match met.await {
            Ok(met) => Ok((vm, met)),
            Err(error) => {
                if error.is_of_silence() {
                    silence::report(self.request.id, &*vm, virtiofsd).await;
                }
                vm.kill().await;
                Err(error)
            }
        }
    }

    /// Has the agent create the first container, or take over the one that is there.
    async fn container(&self, way: Way, agent: &Agent, root: &Root) -> Result<CreateProcessResponse, StartError> {
        let (first, config) = (self.first, self.request.config);
        if way != Way::Image {
            let created = agent.create_container(first.id, root.spec_json.clone(), first.stdio.clone()).await;
            return created.map_err(StartError::Container);
        }
        let spec = first.plan.spec();
        let adoption = AdoptRequest {
            from: TEMPLATE.into(),
            container_id: first.id.into(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            domainname: spec.domainname().clone().unwrap_or_default(),
            env: own_environment(first.plan, &config.snapshot.pod_env),
            mounts_json: root.division.staged_json().map_err(RootError::from)?,
            stdio: Some(first.stdio.clone()).into(),
            resources_json: first.plan.resources_json().map_err(RootError::from)?,
            oom_score_adj: spec.process().as_ref().and_then(|process| process.oom_score_adj()),
            ..Default::default()
        };
        agent.adopt(adoption, config.deadlines.hooks.duration()).await.map_err(StartError::Adopt)
    }
}

/// Where a saved process holds files, and has written some.
struct Places {
    held: Held,
    difference: PathBuf,
}

impl Places {
    /// Those of the snapshot with that root difference.
    fn read(difference: PathBuf) -> Result<Self, StartError> {
        let dir = difference.parent().unwrap_or(&difference);
        let held = Held::read(dir).map_err(|source| StartError::Held { path: dir.into(), source })?;
        Ok(Self { held, difference })
    }

    /// Refuses to restore the process where this container has something bound at one of those.
    fn leave_free<'a, P: Iterator<Item = &'a Path>>(&self, bound: impl Fn() -> P) -> Result<(), StartError> {
        if let Some(path) = self.held.at(bound()) {
            return Err(StartError::Covered { path: path.into() });
        }
        match bound().find(|place| is_written(&self.difference, place)) {
            Some(path) => Err(StartError::Hidden { path: path.into() }),
            None => Ok(()),
        }
    }
}

/// Whether there is more in the difference than an empty directory or file, which a mount needs to be there, or what marks that
/// something was removed, which a mount does as well.
fn is_written(difference: &Path, place: &Path) -> bool {
    let is_whiteout = |meta: &fs::Metadata| meta.file_type().is_char_device() && meta.rdev() == 0;
    let path = difference.join(place.strip_prefix("/").unwrap_or(place));
    let Ok(meta) = fs::symlink_metadata(&path) else { return false };
    if meta.is_dir() {
        let mut entries = fs::read_dir(&path).into_iter().flatten().flatten();
        return entries.any(|entry| !entry.metadata().is_ok_and(|meta| is_whiteout(&meta)));
    }
    !is_whiteout(&meta) && (!meta.is_file() || meta.len() > 0)
}

fn init_to_ready(info: &InfoResponse) -> Duration {
    Duration::from_nanos(info.agent_ready_ns.saturating_sub(info.init_start_ns))
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::{Mode, SFlag, mknod};

    use super::*;

    #[test]
    fn only_what_every_guest_would_refuse_ends_the_request() {
        let refused = |code| StartError::Container(AgentError::Refused { code, message: String::new() });
        assert!(!may_be_the_snapshots(&refused(Code::NOT_FOUND)), "a program that is not there");
        assert!(may_be_the_snapshots(&refused(Code::INTERNAL)), "an I/O error on the restored share");
        let lost = AgentError::Lost { call: "CreateContainer", reason: String::new() };
        assert!(may_be_the_snapshots(&StartError::Container(lost)));
    }

    #[test]
    fn what_a_mount_would_hide_is_found_in_the_difference() {
        let difference = tempfile::tempdir().unwrap();
        let at = |path: &str| difference.path().join(path);
        fs::create_dir_all(at("cache/empty")).unwrap();
        fs::create_dir(at("data")).unwrap();
        fs::write(at("hosts"), "").unwrap();
        fs::write(at("words"), "1").unwrap();
        std::os::unix::fs::symlink("data", at("link")).unwrap();
        for name in ["gone", "data/gone"] {
            let made = mknod(&at(name), SFlag::S_IFCHR, Mode::empty(), 0);
            if made.is_err() {
                chsnap_test_skip::skip_without_setup("not root: overlayfs marks what is removed with a device");
                return;
            }
        }
        let written = |place: &str| is_written(difference.path(), Path::new(place));
        assert!(["/cache", "/words", "/link"].into_iter().all(written));
        assert!(!["/data", "/gone", "/cache/empty", "/hosts", "/none"].into_iter().any(written));
    }
}
