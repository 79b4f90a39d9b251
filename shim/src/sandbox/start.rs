//! From what a pod is made of to a guest with its first container: the ways of doing that are tried one after the
//! other, each with a virtiofsd and a VMM of its own, of which nothing is left when it fails.

use std::{path::PathBuf, time::Duration};

use chsnap_protocol::agent::InfoResponse;

use super::{
    Built, Exposed, Ground, Met, NewContainer, Phases, Request, RootError, StartError, Started, add_root, guest_files,
    machine::{self, Origin, Patience},
    ways::{self, Candidate, Ways},
};
use crate::{
    agent::{Agent, AgentError},
    program::{Freshness, Scout},
    share::{self, Share, Virtiofsd, VirtiofsdProgram},
    state::Way,
    task::chain,
    vmm::{self, Vm, VmSpec},
};

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
    let Ways { candidates, mut why_not, wanting } = ways::find(request, driver, &virtiofsd, &mut scout).await;
    if candidates.is_empty() {
        return Err(StartError::Required { why: why_not.join("; ") });
    }
    phases.mark("lookup");

    let share = Share::create(ground.dir.path()).map_err(RootError::from)?;
    let share = ground.share.insert(share);
    let (share_dir, spec_json) = (share.dir().to_owned(), add_root(share, first)?);
    let stage = Stage { request, first, spec_json, virtiofsd, share_dir, ground };
    for candidate in candidates {
        let way = candidate.way();
        match stage.take(&candidate, phases).await {
            Ok((vm, virtiofsd, met)) => {
                if way == Way::Base {
                    why_not.push("this version has no image snapshots".into());
                }
                let why_not = Some(why_not.join("; ")).filter(|why| !why.is_empty());
                let driver = (candidate.driver().kind(), candidate.driver().accelerator());
                return Ok(Built { vm, virtiofsd, driver, met, started: Started { way, why_not, wanting } });
            }
            Err(error) if way == Way::Direct || !may_be_the_snapshots(&error) => return Err(error),
            Err(error) => {
                let why = format!("the {way} snapshot was not restored: {}", chain(&error));
                log::warn!("{}: {why}", request.id);
                why_not.push(why);
                phases.mark("failed");
            }
        }
    }
    Err(StartError::Required { why: why_not.join("; ") })
}

/// False for what a guest that booted would refuse as well.
fn may_be_the_snapshots(error: &StartError) -> bool {
    !matches!(error, StartError::Container(AgentError::Refused { .. }) | StartError::Expose(_))
}

/// What each way starts from.
struct Stage<'a> {
    request: &'a Request<'a>,
    first: &'a NewContainer<'a>,
    /// Of the first container, as the agent takes it.
    spec_json: Vec<u8>,
    virtiofsd: VirtiofsdProgram,
    share_dir: PathBuf,
    ground: &'a Ground,
}

impl Stage<'_> {
    /// Tries one; where it fails, nothing of it runs.
    async fn take(
        &self,
        candidate: &Candidate,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Virtiofsd, Met), StartError> {
        let (dir, cgroups) = (self.ground.dir.path(), self.ground.cgroup.dirs());
        let config = self.request.config;
        let spec = machine::spec(config, self.request.shape, dir, cgroups);
        let (cache, socket) = (config.share.cache, &spec.share_socket);
        let mut virtiofsd = Virtiofsd::spawn(&self.virtiofsd, cache, &self.share_dir, socket, cgroups)?;
        phases.mark("share");
        match self.machine(candidate, spec, &mut virtiofsd, phases).await {
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
        virtiofsd: &mut Virtiofsd,
        phases: &mut Phases,
    ) -> Result<(Box<dyn Vm>, Met), StartError> {
        let deadlines = &self.request.config.deadlines;
        let (origin, patience) = match candidate {
            Candidate::Base(base) => {
                spec = machine::templates_spec(spec, base.rung);
                spec.deadline = deadlines.restore.duration();
                (Origin::Snapshot(base.snapshot.dir()), Patience::restore(deadlines))
            }
            Candidate::Direct(_) => (Origin::Boot, Patience::boot(deadlines)),
        };
        let vm = machine::start(candidate.driver(), &spec, origin, virtiofsd).await?;
        let patience = match origin {
            // A boot's begins when its VMM runs.
            Origin::Boot => Patience::boot(deadlines),
            Origin::Snapshot(_) => patience,
        };
        phases.mark(if candidate.way() == Way::Direct { "vmm" } else { "restore" });
        let met = async {
            let call = deadlines.agent_call.duration();
            let (agent, info) = machine::meet_agent(&*vm, virtiofsd, patience, call, origin).await?;
            match origin {
                // The guest's own clock says what vm_init.sh and the agent took; the rest is firmware and kernel.
                Origin::Boot => phases.mark_two("kernel", "agent", init_to_ready(&info)),
                Origin::Snapshot(_) => phases.mark("resume"),
            }
            self.container(agent, info, phases).await
        };
        match met.await {
            Ok(met) => Ok((vm, met)),
            Err(error) => {
                vm.kill().await;
                Err(error)
            }
        }
    }

    /// Has the agent create the first container.
    async fn container(&self, agent: Agent, info: InfoResponse, phases: &mut Phases) -> Result<Met, StartError> {
        let Self { request, first, spec_json, .. } = self;
        let created = agent.create_container(first.id, spec_json.clone(), first.stdio.clone()).await;
        let streams = created.map_err(StartError::Container)?;
        let exposed = Exposed::open(self.ground.dir.path(), &request.overrides.expose, &agent).await?;
        phases.mark("container");
        Ok(Met { agent, info, streams, exposed })
    }
}

fn init_to_ready(info: &InfoResponse) -> Duration {
    Duration::from_nanos(info.agent_ready_ns.saturating_sub(info.init_start_ns))
}
